"""Pre-training: batches, updates, resuming, several processes, exported weights, graphs."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from superb_probe.errors import CheckError, RequestError
from superb_probe.upstreams import pretrain_targets, pretrain_train
from superb_probe.upstreams.checkpoints import read_checkpoint
from superb_probe.upstreams.config import HubertConfig
from superb_probe.upstreams.load import load_upstream
from superb_probe.upstreams.pretrain import CHECKPOINT, Job, begin, pretrain
from superb_probe.upstreams.pretrain_data import Clips, Phones, Sampler, Units, fetch
from superb_probe.upstreams.pretrain_model import HubertPretraining, new_encoder
from superb_probe.upstreams.pretrain_recipe import Iteration, Recipe
from superb_probe.upstreams.pretrain_train import Trainer, World, measure
from superb_probe.upstreams.sizes import size_config

CPU = World(0, 1, torch.device("cpu"))
CONFIG = HubertConfig(
    conv_layers=((8, 10, 5), *((8, 3, 2),) * 4, *((8, 2, 2),) * 2), dim=16, num_layers=2, num_heads=2, ffn_dim=16, conv_pos=6,
    conv_pos_groups=4, state_dim=4, expand=2, head_dim=8, final_dim=8, num_classes=12, frame_multiple=1,
)  # fmt: skip
RECIPE = Recipe(
    iterations=(Iteration("mfcc", 8, 0, 1.0, 6), Iteration("layer", 8, 0, 1.0, 6)),
    clip_lengths_s=(0.5, 0.8), batch_s=3.0, accumulate=1, dropout=0.1, input_dropout=0.1, layer_drop=0.05,
    precision="float32", log_every=2, validate_every=3, learning_rate=1e-3,
)  # fmt: skip


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Clips:
    """Fourteen clips of noise whose colour changes every 100 ms, the last two held out and aligned to the colour."""
    generator = np.random.default_rng(3)
    made, values, offsets = [], [], [0]
    for index in range(14):
        pieces, colours = [], generator.integers(0, 3, 11)
        for colour in colours:
            noise = generator.standard_normal(1600)
            pieces.append(np.convolve(noise, np.ones(1 + 6 * colour), "same") * 1500 / (1 + colour))
        samples = np.concatenate(pieces)[: 12800 + 400 * index].clip(-32768, 32767).astype(np.int16)
        made.append((f"c{index}", index >= 12, samples))
        if index >= 12:
            middles = np.arange((len(samples) - 400) // 320 + 1) * 320 + 200
            values.append(colours[middles // 1600].astype(np.int16))
            offsets.append(offsets[-1] + len(middles))
    phones = Phones(np.array([12, 13]), np.concatenate(values), np.array(offsets), ("a", "b", "c"))
    return Clips.write(tmp_path_factory.mktemp("clips"), made, {"corpora": {"made": 1.0}}, phones)


def model_of(config: HubertConfig = CONFIG, recipe: Recipe = RECIPE) -> HubertPretraining:
    return HubertPretraining(new_encoder(config, recipe), recipe)


def trainer_of(clips: Clips, recipe: Recipe = RECIPE, config: HubertConfig = CONFIG, steps: int = 6) -> Trainer:
    units = pretrain_targets.mfcc_units(clips, 8, 1.0, 0, CPU.device)
    model = model_of(config, recipe)
    return Trainer(model, Sampler(clips, units, recipe, model.encoder.num_frames, 320), recipe, steps, CPU)


def job_of(clips: Clips, out: Path, recipe: Recipe = RECIPE, limit_s: float = math.inf, world: World = CPU) -> Job:
    description = {"trained_on": ["made"], "license": "MIT", "metadata": {"who": "a test"}}
    config = replace(size_config("mamba_hubert_causal", "test"), dim=32, num_layers=2)
    return Job("mamba_hubert_causal", config, recipe, clips, out, out, world, limit_s, True, description, True, True)


def log_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# Batches


def test_a_frame_has_the_unit_nearest_to_it(clips: Clips) -> None:
    values = np.concatenate([np.arange(n) for n in ((clips.lengths - 400) // 160 + 1)]).astype(np.int16)
    offsets = np.concatenate([[0], np.cumsum((clips.lengths - 400) // 160 + 1)]).astype(np.int64)
    units = Units(values, offsets, 160, 100, 0.0, "the number of the unit")
    sampler = Sampler(clips, units, RECIPE, lambda samples: (samples - 400) // 320 + 1, 320)
    distances = []
    for number in range(40):
        batch = sampler.batch(number)
        wavs, mask, targets = fetch(batch, clips.on(CPU.device), torch.from_numpy(values), 2, CPU.device)
        assert wavs.shape == (len(batch.starts), batch.length) and mask.shape == targets.shape
        clip = np.searchsorted(clips.offsets, batch.starts, side="right") - 1
        within = batch.starts - clips.offsets[clip]
        assert (within + batch.length <= clips.lengths[clip]).all()
        frames = within[:, None] + 320 * np.arange(mask.shape[1])
        distances.append(targets.numpy() * 160 - frames)
        assert np.array_equal(
            (wavs[0] * 32768).to(torch.int16).numpy(), clips.samples[batch.starts[0] :][: batch.length]
        )
    spread = np.concatenate([each.ravel() for each in distances])
    assert np.abs(spread).max() <= 80 and abs(spread.mean()) < 20


def test_an_epoch_has_every_training_clip_and_no_held_out_one(clips: Clips) -> None:
    trainer = trainer_of(clips)
    sampler = trainer.sampler
    seen: set[int] = set()
    for number in range(sampler.batches):
        batch = sampler.batch(number)
        seen |= set((np.searchsorted(clips.offsets, batch.starts, side="right") - 1).tolist())
        assert len(batch.starts) * batch.length <= 3.0 * 16000
    assert seen == set(range(12))
    first = [sampler.batch(number).starts.tolist() for number in range(sampler.batches)]
    second = [sampler.batch(number + sampler.batches).starts.tolist() for number in range(sampler.batches)]
    assert first != second
    assert first == [sampler.batch(number).starts.tolist() for number in range(sampler.batches)]


def test_short_clips_are_counted(clips: Clips) -> None:
    recipe = replace(RECIPE, clip_lengths_s=(0.9, 1.0))
    units = Units(np.zeros(2000, np.int16), np.arange(15) * 100, 160, 2, 0.0, "")
    sampler = Sampler(clips, units, recipe, lambda samples: 10, 320)
    assert sampler.left_out == int((clips.lengths[:12] < 14400).sum()) > 0
    with pytest.raises(RequestError, match="none has 2 s"):
        Sampler(clips, units, replace(RECIPE, clip_lengths_s=(2.0,), batch_s=5), lambda samples: 10, 320)


# Training


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_learns_and_beats_chance(clips: Clips, precision: str) -> None:
    recipe = replace(
        RECIPE,
        precision=precision,
        learning_rate=3e-3,
        dropout=0.0,
        input_dropout=0.0,
        attention_dropout=0.0,
        layer_drop=0.0,
    )
    trainer = trainer_of(clips, recipe, replace(CONFIG, extractor_mode="causal"), steps=120)
    losses = [trainer.update(step).entropy for step in range(120)]
    assert np.mean(losses[-15:]) < 0.85 * np.mean(losses[:15])
    found = measure(trainer.model, trainer.sampler, clips, CPU.device)
    assert sum(found["targets"]) == found["masked"] > 0 and 0 < found["chance"] < 1


def test_an_update_is_adam_with_decoupled_decay_on_the_mean_over_masked_frames(clips: Clips) -> None:
    recipe = replace(RECIPE, dropout=0.0, input_dropout=0.0, attention_dropout=0.0, layer_drop=0.0, clip_norm=0.5)
    trainer = trainer_of(clips, recipe)
    other = model_of(recipe=recipe)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1.0, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)
    for step in range(3):
        batch = trainer.sampler.batch(step)
        wavs, mask, targets = fetch(batch, trainer._samples, trainer._units, 2, CPU.device)
        optimizer.zero_grad()
        score = other(wavs, mask, targets)
        (score.loss / score.sums[2]).backward()
        norm = nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = trainer.learning_rate(step)
        optimizer.step()
        update = trainer.update(step)
        assert update.gradient_norm == pytest.approx(float(norm), rel=1e-4)
    for (name, ours), theirs in zip(trainer.masters.items(), other.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5), name


def test_accumulated_batches_are_one_batch_of_all_their_frames(clips: Clips) -> None:
    still = {"dropout": 0.0, "input_dropout": 0.0, "attention_dropout": 0.0, "layer_drop": 0.0}
    trainer = trainer_of(clips, replace(RECIPE, accumulate=2, **still))
    other = model_of(recipe=trainer.recipe)
    scores = []
    for number in range(2):
        wavs, mask, targets = fetch(trainer.sampler.batch(number), trainer._samples, trainer._units, 2, CPU.device)
        scores.append(other(wavs, mask, targets))
    masked = scores[0].sums[2] + scores[1].sums[2]
    ((scores[0].loss + scores[1].loss) / masked).backward()
    norm = torch.linalg.vector_norm(torch.stack([each.grad.norm() for each in other.parameters()]))
    assert trainer.update(0).gradient_norm == pytest.approx(float(norm), rel=1e-4)


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(clips: Clips, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(clips, replace(RECIPE, most_skipped=1))
    good = trainer.pass_over

    def poisoned(*arguments: torch.Tensor) -> torch.Tensor:
        sums = good(*arguments)
        trainer._parameters[0].grad.fill_(math.nan)
        return sums

    before = {name: each.clone() for name, each in trainer.masters.items()}
    monkeypatch.setattr(trainer, "pass_over", poisoned)
    assert trainer.update(0).skipped and trainer.skipped == 1
    assert all(torch.equal(each, before[name]) for name, each in trainer.masters.items())
    with pytest.raises(CheckError, match="2 updates were not finite"):
        trainer.update(1)
    monkeypatch.setattr(trainer, "pass_over", good)
    assert not trainer.update(2).skipped
    assert not all(torch.equal(each, before[name]) for name, each in trainer.masters.items())


# Runs


@pytest.fixture(scope="module")
def whole(clips: Clips, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    begin(out, RECIPE, clips, resume=False)
    assert pretrain(job_of(clips, out))
    return out


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("at", [3, 9])
def test_a_killed_run_goes_on_to_the_same_curve(
    clips: Clips, whole: Path, tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed half-way through an iteration, some updates after its last checkpoint."""
    recipe = replace(RECIPE, save_every_s=1e-9)  # a checkpoint after every update
    update, count = Trainer.update, 0

    def dying(self: Trainer, step: int) -> pretrain_train.Update:
        nonlocal count
        count += 1
        if count > at:
            raise _KilledError
        return update(self, step)

    monkeypatch.setattr(Trainer, "update", dying)
    begin(tmp_path, recipe, clips, resume=False)
    with pytest.raises(_KilledError):
        pretrain(job_of(clips, tmp_path, recipe))
    monkeypatch.setattr(Trainer, "update", update)
    begin(tmp_path, recipe, clips, resume=True)
    assert pretrain(job_of(clips, tmp_path, recipe))
    timeless = [
        {key: value for key, value in row.items() if key not in ("seconds", "audio_s_per_s", "frames_per_s")}
        for folder in (whole, tmp_path)
        for row in log_of(folder)
    ]
    half = len(timeless) // 2
    assert len(timeless) == 2 * half > 6
    assert timeless[:half] == timeless[half:]
    weights = [read_checkpoint(folder / "mamba_hubert_causal.safetensors").tensors for folder in (whole, tmp_path)]
    assert all(torch.equal(each, weights[1][name]) for name, each in weights[0].items())


def test_a_run_that_forgot_its_optimiser_would_be_seen(
    clips: Clips, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant of the test above: a resume that starts Adam anew gives another curve."""
    begin(tmp_path, RECIPE, clips, resume=False)
    assert not pretrain(job_of(clips, tmp_path, RECIPE, limit_s=-1.0))  # stops after its first update
    assert torch.load(tmp_path / CHECKPOINT, weights_only=True)["step"] == 1
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda self, state: None)
    assert pretrain(job_of(clips, tmp_path))
    weights = [read_checkpoint(folder / "mamba_hubert_causal.safetensors").tensors for folder in (whole, tmp_path)]
    assert not all(torch.equal(each, weights[1][name]) for name, each in weights[0].items())


def test_a_finished_run_has_weights_that_load_and_evidence(whole: Path) -> None:
    path = whole / "mamba_hubert_causal.safetensors"
    upstream = load_upstream("mamba_hubert_causal", checkpoint=path)
    assert upstream.info.trained_on == ("made",) and upstream.info.license == "MIT"
    assert path.stat().st_size < 2.2 * sum(each.numel() for each in upstream.parameters()) + 20_000  # half precision
    states = upstream.extract([torch.randn(8000) * 0.1]).states
    assert torch.isfinite(states).all()
    evidence = json.loads((whole / "evidence.json").read_text())
    assert [each["iteration"] for each in evidence] == [1, 2]
    assert evidence[1]["units"].startswith("k-means 8 of layer 1 of 2")
    assert len(evidence[1]["layers"]["layers"]) == 3 and evidence[1]["layers"]["chance"] < 1
    rows = log_of(whole)
    assert [row["step"] for row in rows] == ["2", "3", "4", "6"] * 2
    assert all(row["held_out_loss"] and row["unit_purity"] for row in rows if row["step"] in ("3", "6"))


def test_a_folder_with_a_run_is_not_begun_again(clips: Clips, whole: Path) -> None:
    with pytest.raises(RequestError, match="--resume"):
        begin(whole, RECIPE, clips, resume=False)
    with pytest.raises(RequestError, match="learning_rate was 0.001, now 0.002"):
        begin(whole, replace(RECIPE, learning_rate=0.002), clips, resume=True)
    begin(whole, RECIPE, clips, resume=True)


_TWO = """
import sys, torch
sys.path.insert(0, {tests!r})
from pathlib import Path
from dataclasses import replace
from superb_probe.upstreams.pretrain import begin, pretrain
from superb_probe.upstreams.pretrain_data import Clips
from superb_probe.upstreams.pretrain_train import find_world
import importlib.util
spec = importlib.util.spec_from_file_location("made", {here!r})
made = importlib.util.module_from_spec(spec)
sys.modules["made"] = made
spec.loader.exec_module(made)
torch.set_num_threads(1)
world = find_world(torch.device("cpu"))
clips = Clips.read(Path({clips!r}))
recipe = replace(made.STILL, accumulate=1)
assert pretrain(made.job_of(clips, Path({out!r}), recipe, world=world))
"""
STILL = replace(RECIPE, dropout=0.0, input_dropout=0.0, attention_dropout=0.0, layer_drop=0.0, validate_every=0)


@pytest.mark.slow
def test_two_processes_are_two_accumulated_batches(clips: Clips, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert pretrain(job_of(clips, one, replace(STILL, accumulate=2)))
    folder = Path(clips.samples.filename).parent  # type: ignore[attr-defined]
    here = Path(__file__)
    code = _TWO.format(tests=str(here.parent), here=str(here), clips=str(folder), out=str(two))
    (tmp_path / "two.py").write_text(code)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(tmp_path / "two.py"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for a, b in zip(log_of(one), log_of(two), strict=True):
        for name in ("loss", "accuracy", "gradient_norm", "audio_hours"):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=2e-3), name


# On a GPU


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["transformer", "mamba", "ext_bi_mamba"])
def test_graphs_and_plain_passes_give_one_curve(clips: Clips, kind: str) -> None:
    recipe = replace(STILL, precision="bfloat16")
    world = World(0, 1, torch.device("cuda", 0))
    curves = []
    for graphs in (True, False):
        units = pretrain_targets.mfcc_units(clips, 8, 1.0, 0, CPU.device)
        model = model_of(replace(CONFIG, layer_type=kind, state_dim=8), recipe)
        sampler = Sampler(clips, units, recipe, model.encoder.num_frames, 320)
        trainer = Trainer(model, sampler, recipe, 12, world, graphs)
        curves.append([trainer.update(step).entropy for step in range(12)])
        assert bool(trainer._graphs) == graphs
    assert np.allclose(*curves, rtol=2e-2)
