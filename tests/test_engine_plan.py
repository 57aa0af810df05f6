"""What a run plans: names and suites, the quick tier, time limits, layers, crops, and what a dry run says about it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from superb_probe import engine_estimate, engine_request, engine_subset
from superb_probe.downstreams.load import load_task
from superb_probe.downstreams.manifest import Manifest, Utterance
from superb_probe.engine import run
from superb_probe.engine_ask import Problems, Request
from superb_probe.engine_estimate import Estimate, fit_into
from superb_probe.engine_names import QUICK, SUITES, expand_tasks, quick_tasks
from superb_probe.engine_places import Places, need_of
from superb_probe.engine_request import Job, resolve
from superb_probe.errors import RequestError
from superb_probe.probes.store_files import list_stores
from superb_probe.registry import Registry
from superb_probe.settings import RUN_FLAGS, parse_bytes, parse_duration
from superb_probe.upstreams.base import LayerStates, Upstream, UpstreamInfo

TASK = "synthetic_sid"


class Energy(Upstream):
    """Two layers of 4 numbers about each 20 ms."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.randn(2, 161, 4, generator=torch.Generator().manual_seed(0)), requires_grad=False
        )
        self.calls = 0
        self.info = UpstreamInfo("energy", "sha256:0", 2, 4, 16000, 320, "none", 0, "block_output", (), "CC0", "none")

    def num_frames(self, num_samples: int) -> int:
        return num_samples // 320

    def forward(self, wavs: Tensor, num_samples: Tensor) -> LayerStates:
        self.calls += wavs.shape[0]
        frames = wavs[:, : wavs.shape[1] // 320 * 320].unflatten(1, (-1, 320))
        states = torch.einsum("bts,lsd->lbtd", torch.fft.rfft(frames).abs(), self.weight)
        num_frames = num_samples // 320
        return LayerStates(states * (torch.arange(states.shape[2]) < num_frames[:, None])[..., None], num_frames)


def request(**changes: Any) -> Request:
    values: dict[str, Any] = {flag.name: None for flag in RUN_FLAGS}
    values |= {
        "upstream": Energy(),
        "task": TASK,
        "layer_norm": False,
        "feature_dtype": "float16",
        "seed": (1,),
        "protocol": "strict",
        "padding": "exact",
    }
    values |= {"device": "cpu", "store_clean": False, "stop_hopeless": False, "overwrite": "never", "dry_run": True}
    return Request(**{**values, **changes})


def job(**changes: Any) -> Job:
    problems = Problems()
    made = resolve(request(**changes), problems)
    problems.raise_any()
    (only,) = made
    return only


def cropped_task(monkeypatch: pytest.MonkeyPatch, crop_s: float) -> None:
    """The task of synthetic speakers, its training cut to stretches."""
    task = load_task(TASK)
    budgets = {n: dataclasses.replace(b, max_crop_s=crop_s, crops=2, steps=10) for n, b in task.info.budgets.items()}
    protocols = {name: task.info.protocols["strict"] for name in ("strict", "superb")}
    task.info = dataclasses.replace(task.info, budgets=budgets, protocols=protocols)  # type: ignore[misc]
    monkeypatch.setattr(engine_request, "load_task", lambda name: task)


def test_names_suites_and_aliases() -> None:
    assert expand_tasks(["sv", "phoneme", "intent", "asv"]) == ["asv", "pr", "ic"]
    assert expand_tasks(["paper4"]) == list(QUICK) and len(set(SUITES["superb10"])) == 10
    every = expand_tasks(["all"])
    assert set(every) == {name for name in Registry("task").names() if not name.startswith("synthetic")}
    assert quick_tasks([]) == list(QUICK) and quick_tasks(["intent"]) == ["ic"]
    with pytest.raises(RequestError, match="not asv"):
        quick_tasks(["sv", "pr"])


def test_amounts() -> None:
    assert parse_bytes("1.5TB") == 1_500_000_000_000 and parse_bytes(7) == 7 and parse_bytes("3 gb") == 3 * 10**9
    assert parse_duration("8h") == 28_800 and parse_duration(5.0) == 5 and parse_duration("2d") == 172_800
    for text in ("", "GB", "-3GB", "5XB", "1e9", "0"):
        with pytest.raises(RequestError, match="is not a size"):
            parse_bytes(text)
    for text in ("soon", "8 hours", "-1h", "0h"):
        with pytest.raises(RequestError, match="is not a time"):
            parse_duration(text)


def test_a_seeded_subset_is_the_same_wherever_it_is_drawn() -> None:
    made = [Utterance(f"u{k}", "a.wav", float(k), 1.0 + k % 7, {}) for k in range(300)]
    manifest = Manifest(made, Path("."), "train")
    ids = engine_subset.drawn(manifest, 50, 0)
    assert len(set(ids)) == 50 and set(ids) == set(engine_subset.drawn(Manifest(made[::-1], Path("."), "x"), 50, 0))
    assert set(ids) != set(engine_subset.drawn(manifest, 50, 1)) and set(ids) != set(manifest.ids[:50])
    assert set(engine_subset.drawn(manifest, 20, 0)) < set(ids)
    even = [next(u.duration_s for u in made if u.id == name) for name in engine_subset.even_ids(manifest, 30)]
    assert min(even) < 2 and max(even) > 6 and abs(sum(even) / 30 - sum(u.duration_s for u in made) / 300) < 0.3


def test_the_quick_tier_is_a_budget_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("superb_probe.engine_names.QUICK", (TASK,))
    monkeypatch.setattr(engine_subset, "QUICK_SIZES", {"train": 40, "dev": 16, "test": 16})
    monkeypatch.setattr(engine_request, "QUICK_SIZES", {"train": 40, "dev": 16, "test": 16})
    upstream = Energy()
    (record,) = run(upstream, tier="quick", lr=[0.01], out=tmp_path)
    assert upstream.calls == 72 and record.probe.budget == "quick"
    assert any("quick tier" in text and "40 of train" in text for text in record.task.protocol_deviations)
    (own,) = run(upstream, tier="quick", lr=[0.01], steps=5, out=tmp_path)
    assert own.probe.budget == "quick:5"


def test_layers_beside_the_weighted_sum_train_in_one_fit(tmp_path: Path) -> None:
    upstream = Energy()
    records = run(upstream, TASK, layer="all", lr=[0.1, 0.01], limit=30, out=tmp_path)
    assert [(r.probe.layer, r.probe.lr) for r in records] == [
        (layer, lr) for layer in (None, 0, 1) for lr in (0.1, 0.01)
    ]
    assert upstream.calls == 90 and {r.cost.encoder_passes for r in records} == {1.0}  # every utterance once, for all
    (alone,) = run(upstream, TASK, layer=1, lr=[0.01], limit=30, out=tmp_path)
    assert alone == records[-1] and upstream.calls == 90  # the same trial, found again


def test_the_pass_count_is_the_hook_s(tmp_path: Path) -> None:
    upstream = Energy()
    store = tmp_path / "store"
    (first,) = run(upstream, TASK, lr=[0.01], limit=20, out=tmp_path / "a", store=store)
    (second,) = run(upstream, TASK, lr=[0.02], limit=20, out=tmp_path / "a", store=store)
    assert first.cost.encoder_passes == 1.0 and second.cost.encoder_passes == 0.0
    assert first.cost.audio_s == pytest.approx(
        sum(m.total_s for m in job(limit=20).question.folds[0].fold.manifests.values()), abs=1e-3
    )
    (twice,) = run(upstream, TASK, lr=[0.01], limit=20, steps=4, out=tmp_path / "b", states="stream")
    assert (twice.cost.encoder_passes or 0) > 1.0


def test_crops_are_kept_or_taken_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cropped_task(monkeypatch, 0.3)
    kept = job()
    assert (kept.crops, kept.crops_anew) == (2, False) and kept.template.head_options["crops"] == 2
    assert kept.state_bytes > job(crops=1).state_bytes
    assert (job(crops=5).crops, job(crops=0).crops_anew) == (5, True)
    assert job(protocol="superb").crops_anew and not job(protocol="superb", crops=3).crops_anew
    assert need_of(job(crops=0), Places(torch.device("cpu"))).crops_anew
    upstream = Energy()
    options: dict[str, Any] = {"lr": [0.01], "limit": 20, "out": tmp_path}
    (stored,) = run(upstream, TASK, crops=3, **options)
    assert upstream.calls == 20 * 3 + 40 and stored.probe.head_options["crops"] == 3
    (anew,) = run(upstream, TASK, crops=0, **options)
    assert anew.probe.head_options["crops"] == 0 and anew.run_id != stored.run_id
    assert stored.probe.head_options["crop_seed"] == 0 and "crop_seed" not in anew.probe.head_options
    (other,) = run(upstream, TASK, crops=3, crop_seed=1, **options)  # elsewhere in the same utterances: another run
    assert other.probe.head_options["crop_seed"] == 1 and other.run_id != stored.run_id
    assert (
        other.score is not None and stored.score is not None and other.cost.encoder_passes == stored.cost.encoder_passes
    )
    assert other.probe_weights is not None and stored.probe_weights is not None
    assert other.probe_weights.sha256 != stored.probe_weights.sha256
    with pytest.raises(RequestError, match="--states memory: new random crops"):
        run(upstream, TASK, crops=0, states="memory", **options)
    cropped_task(monkeypatch, 100.0)  # longer than every utterance: nothing to cut
    assert (job(protocol="superb").crops, job(protocol="superb").crops_anew) == (0, False)


def test_what_does_not_fit_into_the_time_is_dropped_and_said() -> None:
    whole = job(lr=(0.1, 0.01, 0.001), seed=(1, 2), layer="all")
    trials = len(whole.trials())
    estimate = Estimate(10.0, 6.0 * trials, trials)
    assert fit_into([whole], [estimate], 1e6) == ([whole], [estimate], [])
    (kept,), (cost,), dropped = fit_into([whole], [estimate], estimate.total_s - 1)
    assert kept.seeds == (1,) and dropped == ["seed 2 of synthetic_sid, energy"] and cost.total_s == 10 + 6 * trials / 2
    assert not kept.question.may_grow and kept.question.deviations[-1] == "--time-limit left out seed 2"
    (kept,), _, dropped = fit_into([whole], [estimate], 10 + 3 * 6 + 1)
    assert kept.layers == (None,) and len(kept.trials()) == 3 and len(dropped) == 2
    (kept,), (cost,), dropped = fit_into([whole], [estimate], 10 + 6 + 1)
    assert len(kept.question.rates) == 1 and cost.total_s == pytest.approx(16.0)
    default = whole.question.settings.default_lr
    assert all(abs(torch.log10(torch.tensor(r / default))) >= abs(torch.log10(torch.tensor(kept.question.rates[0] / default))) - 1e-4
               for r in whole.question.rates)  # fmt: skip
    kept_two, _, dropped = fit_into([kept, kept], [cost, cost], 20.0)
    assert len(kept_two) == 1 and "would take" in dropped[-1]
    assert fit_into([kept], [cost], 1.0)[0] == []


def test_a_time_limit_reaches_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(
        "superb_probe.engine.estimate_jobs",
        lambda planned, *rest: [Estimate(1.0, 10.0 * len(each.trials()), len(each.trials())) for each, _ in planned],
    )
    records = run(Energy(), TASK, seed=[1, 2], lr=[0.1, 0.01], limit=20, time_limit="25s", out=tmp_path)
    assert [(r.probe.seed, r.probe.lr) for r in records] == [(1, 0.1), (1, 0.01)]
    assert "--time-limit left out seed 2" in records[0].task.protocol_deviations
    assert "--time-limit drops seed 2" in capsys.readouterr().err
    with pytest.raises(RequestError, match="no trial fits"):
        run(Energy(), TASK, lr=[0.1], limit=20, time_limit="3s", out=tmp_path)


def test_estimates_grow_with_what_is_asked(tmp_path: Path) -> None:
    places = Places(torch.device("cpu"))
    short, long = job(lr=(0.1,), steps=500), job(lr=(0.1,), steps=5000)
    planned = [(each, places.choose(each, measure=True)) for each in (short, long)]
    costs = engine_estimate.estimate_jobs(planned, places.device, None)
    assert costs[1].fit_s > 3 * costs[0].fit_s > 0 and costs[0].extract_s > 0 and costs[0].trials == 1


def test_a_search_without_training_has_a_price_by_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample's time is scaled by the products of lengths; a mutant that scales by utterances is told apart."""
    made = [Utterance(f"q{n}", "a.wav", 0.0, 0.5, {"role": "query", "occurrences": "d0"}) for n in range(12)]
    made += [Utterance(f"d{n}", "a.wav", 0.0, 1.0 + n % 3, {"role": "document", "occurrences": ""}) for n in range(96)]
    whole = Manifest(made, Path("."), "q")
    few = engine_estimate._some_of_each_role(whole)
    roles = [u.labels["role"] for u in few]
    assert roles.count("query") == 6 and roles.count("document") == 48
    share = engine_estimate._products(whole) / engine_estimate._products(few)
    assert share == pytest.approx(4.0, rel=0.05) and abs(share - len(whole) / len(few)) > 1.5
    searches: list[int] = []
    monkeypatch.setattr(engine_estimate, "search_split", lambda states, manifest: searches.append(len(manifest)))
    asked = job(task="qbe")
    places = Places(torch.device("cpu"))
    (found,) = engine_estimate.estimate_jobs([(asked, places.choose(asked))], places.device, None)
    assert found.fit_s > 0.0 and len(searches) == 4 and max(searches) <= 54


def test_tasks_share_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders of one shape share the time of a task's trials, tasks of one encoder share its rates; nothing else is shared."""
    places = Places(torch.device("cpu"))
    asked = job(lr=(0.1,), steps=50)
    twin = dataclasses.replace(
        asked, template=dataclasses.replace(asked.template, upstream="twin", upstream_revision="sha256:1")
    )
    others = [job(lr=(0.1,), steps=60), job(lr=(0.1, 0.01), steps=50), job(lr=(0.1,), steps=50, seed=[1, 2])]
    encoded: list[Any] = []
    monkeypatch.setattr("superb_probe.probes.planner.time_encoding", lambda *args, **rest: encoded.append(args) or 9.0)
    jobs = [asked, twin, *others]
    planned = [(each, places.choose(each, measure=True)) for each in jobs]
    assert len(encoded) == len({id(each.upstream.upstream) for each in jobs})
    timed: list[Any] = []
    monkeypatch.setattr(engine_estimate, "_time_trials", lambda job, *rest: timed.append(job) or float(len(timed)))
    costs = engine_estimate.estimate_jobs(planned, places.device, None)
    assert timed == [asked, *others] and [cost.fit_s for cost in costs] == [1.0, 1.0, 2.0, 3.0, 4.0]


def test_store_limit_picks_another_place(tmp_path: Path, capsys: Any) -> None:
    few: dict[str, Any] = {"lr": [0.01], "limit": 20, "steps": 4}
    store = tmp_path / "store"
    run(Energy(), TASK, store=store, store_limit=100, out=tmp_path / "a", **few)
    assert not list(store.rglob("*.bin")) and "states in memory" in capsys.readouterr().err
    with pytest.raises(RequestError, match="--states disk: .*--store-limit"):
        run(Energy(), TASK, store=store, store_limit=100, states="disk", out=tmp_path / "b", **few)
    run(Energy(), TASK, store=store, out=tmp_path / "c", **few)
    before = list_stores(store)
    assert len(before) == 3
    needed = need_of(job(limit=20, steps=4, feature_dtype="float32"), Places(torch.device("cpu"), store)).missing_bytes
    small = sum(each.num_bytes for each in before) + needed - 1
    run(Energy(), TASK, store=store, store_limit=small, feature_dtype="float32", out=tmp_path / "d", **few)
    assert len(list_stores(store)) == 3  # nothing is deleted unasked, nothing written
    capsys.readouterr()
    clean: dict[str, Any] = {"store_limit": small, "store_clean": True, "feature_dtype": "float32"}
    run(Energy(), TASK, store=store, out=tmp_path / "e", **clean, **few)
    assert f"deleted the store {store}" in capsys.readouterr().err
    assert {each.path for each in before} - {each.path for each in list_stores(store)}


def test_folds_over_the_same_utterances_share_their_states(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    task = load_task(TASK)
    (fold,) = task.splits(Path("."))
    train, dev, test = (fold.manifests[split] for split in ("train", "dev", "test"))
    folds = [
        dataclasses.replace(fold, name="1"),
        dataclasses.replace(fold, name="2", manifests={"train": train, "dev": test, "test": dev}),
    ]
    monkeypatch.setattr(type(task), "splits", lambda self, root: folds)
    for store in (None, tmp_path / "store"):
        upstream = Energy()
        records = run(upstream, TASK, lr=[0.1], steps=4, out=tmp_path / f"runs{store is None}", store=store)
        assert [record.task.fold for record in records] == ["1", "2"]
        assert upstream.calls == len(train) + len(dev) + len(test) and records[1].cost.encoder_passes == 1.0
    assert len(list((tmp_path / "store").iterdir())) == 1
    assert job().state_bytes == 176 * 2 * 4 * 2  # each stretch of audio counts once


def test_folds_without_a_selecting_split_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task(TASK)
    (fold,) = task.splits(Path("."))
    folds = [dataclasses.replace(fold, name="3", manifests={s: m for s, m in fold.manifests.items() if s != "dev"})]
    monkeypatch.setattr(engine_request, "load_folds", lambda *_, **__: folds)
    with pytest.raises(RequestError, match="no dev split in 3.*dev=dev.tsv"):
        job()
