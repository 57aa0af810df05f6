"""Keywords, speakers and emotions: SUPERB's classes, sampling, crops, folds and numbers, each beside a broken version that fails."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import superb_probe
from superb_probe.downstreams import er as er_module
from superb_probe.downstreams.audio import effective_samples, read_waveform
from superb_probe.downstreams.base import Budget, Fold
from superb_probe.downstreams.er import session_folds
from superb_probe.downstreams.ks import KEYWORDS
from superb_probe.downstreams.load import load_folds, load_task
from superb_probe.downstreams.manifest import Manifest, Utterance
from superb_probe.errors import RequestError
from superb_probe.probes import batches as batches_module
from superb_probe.probes.batches import class_weights, training_batches
from superb_probe.probes.draws import Draws


def manifest(name: str, column: str, *labels: str, corpus: str = "", **more: list[str]) -> Manifest:
    utterances = [
        Utterance(
            f"{name}{k}", f"{name}{k}.flac", 0.0, 1.0, {column: label} | {key: each[k] for key, each in more.items()}
        )
        for k, label in enumerate(labels)
    ]
    return Manifest(utterances, Path("."), name, corpus=corpus)


@pytest.mark.parametrize(
    ("name", "steps", "batch", "accumulate", "evaluate_every", "crop_s", "balance", "waveform"),
    [
        ("ks", 200_000, 32, 1, 5000, None, "keyword", "gain"),
        ("sid", 200_000, 8, 4, 5000, 8.0, "", "none"),
        ("er", 30_000, 4, 8, 1000, None, "", "none"),
        ("ic", 200_000, 32, 1, 5000, None, "", "none"),
    ],
)
def test_the_full_budget_is_superbs(name, steps, batch, accumulate, evaluate_every, crop_s, balance, waveform):
    info = load_task(name).info
    full = info.budgets["full"]
    assert (full.steps, full.batch, full.accumulate, full.evaluate_every) == (steps, batch, accumulate, evaluate_every)
    assert (full.max_crop_s, full.balance, info.waveform) == (crop_s, balance, waveform)
    assert (info.optimizer, info.clip, info.metric, info.view) == ("adam", 1.0, "accuracy", "mean")
    assert not full.head, "the head's own width, 256, is the protocol's"
    small = info.budgets["small"]
    assert (small.max_crop_s, small.balance) == (crop_s, balance)
    assert small.batch * small.accumulate == (128 if name == "er" else 256)
    for protocol, layer_norm in (("strict", False), ("superb", False), ("mamba_hubert", True)):
        settings = info.protocols[protocol]
        assert settings.lr_grid == (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
        assert (settings.layer_norm, settings.select_on, settings.batch) == (layer_norm, "dev", None)
        tuned = protocol == "mamba_hubert" and name == "sid"  # the paper's code ships SID at 1e-1
        assert settings.default_lr == (1e-1 if tuned else 1e-4)
    assert any("fbank_no_cmvn" in note for note in info.notes), "why fbank is at chance is said by `show task`"


def test_the_twelve_keywords_are_those_of_a_known_corpus():
    task = load_task("ks")
    train = manifest("train", "keyword", "no", "yes", corpus="mini")
    names = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go", "_unknown_", "_silence_")
    assert task.labels(train).classes["keyword"] == names == KEYWORDS
    assert task.target(train[0], task.labels(train))["keyword"].item() == 1
    own = manifest("train", "keyword", "happy", "bed", "cat")
    assert task.labels(own).classes["keyword"] == ("bed", "cat", "happy")


def test_a_keyword_that_is_no_class_is_refused_with_all_the_others():
    task = load_task("ks")
    train, dev = (manifest(name, "keyword", "no", "yes", corpus="mini") for name in ("train", "dev"))
    assert task.label_problems(Fold(None, {"train": train, "dev": dev})) == []
    test = manifest("test", "keyword", "bed", "cat", "yes", "silence", corpus="mini")
    (problem,) = task.label_problems(Fold(None, {"train": train, "dev": dev, "test": test}))
    assert "bed, cat, silence" in problem.what and "_unknown_" in problem.fix
    own = {name: manifest(name, "keyword", "bed", "cat") for name in ("train", "dev")}
    found = task.label_problems(
        Fold(
            None,
            {**own, "dev": manifest("dev", "keyword", "up", "bed"), "test": manifest("test", "keyword", "dog", "owl")},
        )
    )
    assert [problem.where.split()[0] for problem in found] == ["dev", "test"]
    assert "1 label (up) not in train" in found[0].what and "2 labels (dog, owl) not in train" in found[1].what


def drawn(labels: list[int], weights: torch.Tensor | None, batches: int = 400) -> Counter:
    stream = training_batches([1] * len(labels), 8, torch.Generator().manual_seed(0), similar=False, weights=weights)
    return Counter(labels[row] for _ in range(batches) for row in next(stream))


def test_classes_are_drawn_equally_often_and_only_with_weights():
    labels = [0] * 90 + [1] * 9 + [2]
    count = drawn(labels, class_weights(labels))
    assert sum(count.values()) == 3200 and max(count.values()) < 1.15 * min(count.values())
    plain = drawn(labels, None)
    assert plain[0] > 50 * plain[2], "the same measure tells an epoch that visits every utterance once"
    again = drawn(labels, class_weights(labels))
    assert again == count, "the generator decides"


def test_utterances_drawn_ahead_are_those_of_one_batch_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = class_weights([0] * 90 + [1] * 9 + [2])

    def batches() -> list[list[int]]:
        stream = training_batches([1] * 100, 8, torch.Generator().manual_seed(0), similar=False, weights=weights)
        return [next(stream) for _ in range(120)]

    ahead = batches()
    monkeypatch.setattr(batches_module, "AHEAD", 1)
    assert batches() == ahead


@pytest.mark.parametrize(("balance", "least", "most"), [("keyword", 0.35, 0.65), ("", 0.0, 0.1)])
def test_training_hears_rare_keywords_as_often_as_its_budget_says(balance, least, most):
    task = load_task("ks")
    train = manifest("train", "keyword", *["yes"] * 57, *["no"] * 3, corpus="mini")
    labels = task.labels(train)
    budget = replace(task.info.budgets["small"], balance=balance)
    draws = Draws(OneFrame(train.ids), [task.target(each, labels) for each in train], 1, budget, None, None)
    drawn = torch.cat([draws.batch()[1].targets["keyword"] for _ in range(40)])
    assert least <= (drawn == KEYWORDS.index("no")).float().mean() <= most


class OneFrame:
    """States of utterances in view "mean", all zero."""

    def __init__(self, ids: tuple[str, ...]) -> None:
        self.ids, self.num_frames = ids, [1] * len(ids)

    def batch(self, rows, max_frames=None, generator=None):
        return torch.zeros(1, len(rows), 1, 4), torch.ones(len(rows), dtype=torch.long)

    def prefetch(self, rows):
        """Nothing to announce."""


def test_what_selects_keywords_is_the_mean_of_the_classes():
    """Always saying the frequent class is right in 8 of 10, but in one of two classes."""
    task = load_task("ks")
    dev = manifest("dev", "keyword", *["_unknown_"] * 8, "yes", "no", corpus="mini")
    score = task.score({name: {"keyword": "_unknown_"} for name in dev.ids}, Fold(None, {"dev": dev}), "dev")
    assert score.value == 80.0
    assert score.selects == pytest.approx(100 / 3) == score.extra["balanced_accuracy"]
    assert task.value(score.items) == 80.0 and load_task("sid").info.protocols["superb"].select_metric is None
    assert {each.select_metric for each in task.info.protocols.values()} == {"balanced_accuracy"}
    rng = np.random.default_rng(0)  # s3prl draws dev with replacement, each class as often: the mean of many such draws
    weights = np.asarray([1 / 8] * 8 + [1.0, 1.0]) / 3
    draws = [score.items["correct"][rng.choice(10, 10, p=weights)].mean() for _ in range(4000)]
    assert 100 * np.mean(draws) == pytest.approx(score.selects, abs=1.0)
    assert abs(100 * np.mean(draws) - score.value) > 40, "plain accuracy is another number"


def test_keywords_are_heard_three_decibels_softer(write_audio, tmp_path):
    utterance = Utterance("a", write_audio("a.flac"), 0.0, 1.0, {})
    plain = read_waveform(utterance, tmp_path)
    softer = read_waveform(utterance, tmp_path, waveform=load_task("ks").info.waveform)
    assert softer.shape == plain.shape and np.abs(softer - plain * 10 ** (-3 / 20)).max() < 1e-7
    assert np.abs(softer - plain).max() > 0.05
    somewhere = Manifest([replace(utterance, audio="not_there.flac")], tmp_path, "m")
    assert effective_samples(somewhere[0], somewhere, "gain", 16000) == 16000, (
        "a gain changes no length: nothing is decoded"
    )
    with pytest.raises(RequestError, match="no such audio file"):
        effective_samples(somewhere[0], somewhere, "gain_trim", 16000)


def test_speakers_of_identification_are_in_every_split_and_must_be_in_train(mini_like, tmp_path):
    task = load_task("sid")
    (fold,) = load_folds(task, root=mini_like)
    assert [set(each.labels("speaker")) for each in fold.manifests.values()] == [{"ann", "bob", "cem"}] * 3
    paths = {split: mini_like / f"speakers_id.{split}.tsv" for split in ("train", "dev")}
    stranger = Manifest.read(mini_like / "read.test.tsv")
    stranger.write(tmp_path / "test.tsv")
    with pytest.raises(RequestError, match=r"2 labels \(fay, gus\) not in train"):
        load_folds(task, manifests={**paths, "test": tmp_path / "test.tsv"}, root=mini_like)


@pytest.mark.parametrize(("name", "silent"), [("fbank", True), ("fbank_no_cmvn", False)])
def test_the_mean_of_normalised_filter_banks_is_zero_whatever_is_said(name, silent):
    """Why fbank is at chance in the tasks that read a mean, as their notes say."""
    upstream = superb_probe.load_upstream(name)
    noise = torch.randn(3, 16000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.01], [0.1], [0.3]])
    layers = upstream.extract(list(noise))
    means = layers.states[:, :, : int(layers.num_frames[0])].mean(2)
    assert (float(means.abs().max()) < 1e-4) is silent


def test_identification_crops_in_training_only():
    """The crop belongs to the budget, which only training reads; dev and test are heard whole."""
    full = load_task("sid").info.budgets["full"]
    assert (full.max_crop_s, full.crops) == (8.0, 2)
    assert Budget(1, 1, 1, 1).crops == 1 and Budget(1, 1, 1, 1).max_crop_s is None


def sessions(count: int = 5, each: int = 20) -> Manifest:
    labels = [("sad", "glad")[k % 2] for k in range(count * each)]
    where = [str(1 + k // each) for k in range(count * each)]
    return manifest("u", "emotion", *labels, session=where, speaker=[f"s{name}" for name in where])


def test_every_session_is_tested_once_and_a_fifth_of_the_others_is_dev():
    whole = sessions()
    folds = session_folds(whole)
    assert [fold.name for fold in folds] == [f"session{k}" for k in range(1, 6)]
    tested = [name for fold in folds for name in fold.manifests["test"].ids]
    assert sorted(tested) == sorted(whole.ids)
    for number, fold in enumerate(folds, start=1):
        parts = {split: set(each.ids) for split, each in fold.manifests.items()}
        assert {split: len(ids) for split, ids in parts.items()} == {"train": 64, "dev": 16, "test": 20}
        assert set.union(*parts.values()) == set(whole.ids)
        assert set(fold.manifests["test"].labels("session")) == {str(number)}
        assert len(set(fold.manifests["dev"].labels("session"))) == 4, "drawn from all of them, not cut off the end"
    torch.manual_seed(123)  # whatever the run's seed: the folds are the same for every lr and seed
    again = session_folds(whole)
    assert [fold.manifests["dev"].digest for fold in again] == [fold.manifests["dev"].digest for fold in folds]


def test_dev_is_the_fifth_that_s3prl_draws(monkeypatch):
    """torch.manual_seed(0), then random_split([int(0.8 N), rest]): the rest is dev. Another seed draws another fifth."""
    whole = sessions()
    others = [each.id for each in whole if each.labels["session"] != "1"]
    torch.manual_seed(0)
    _, rest = torch.utils.data.random_split(others, [64, 16])
    assert set(session_folds(whole)[0].manifests["dev"].ids) == set(rest)
    monkeypatch.setattr(er_module, "SPLIT_SEED", 1)
    assert set(session_folds(whole)[0].manifests["dev"].ids) != set(rest)


def test_iemocap_has_the_published_train_sizes():
    sizes = {"1": 1085, "2": 1023, "3": 1151, "4": 1031, "5": 1241}
    where = [session for session, count in sizes.items() for _ in range(count)]
    folds = session_folds(manifest("u", "emotion", *["sad"] * 5531, session=where))
    assert [len(fold.manifests["train"]) for fold in folds] == [3556, 3606, 3504, 3600, 3432]
    assert [len(fold.manifests["test"]) for fold in folds] == list(sizes.values())


def test_emotion_speakers_are_shared_with_dev_but_not_with_test(mini_like, tmp_path):
    task = load_task("er")
    folds = load_folds(task, root=mini_like)
    assert len(folds) == 5 and all(fold.manifests["train"].corpus == "mini" for fold in folds)
    assert any(set(f.manifests["train"].labels("speaker")) & set(f.manifests["dev"].labels("speaker")) for f in folds)
    whole = Manifest.read(mini_like / "styles.1.tsv")
    other = Manifest.read(mini_like / "styles.2.tsv")
    mixed = Manifest(
        [replace(each, labels={**each.labels, "speaker": whole[0].labels["speaker"]}) for each in other], mini_like, "t"
    )
    for split, message in (("test", "needs speakers apart"), ("dev", "")):
        paths = {
            "train": mini_like / "styles.1.tsv",
            "dev": mini_like / "styles.3.tsv",
            "test": mini_like / "styles.4.tsv",
        }
        mixed.write(tmp_path / f"mixed.{split}.tsv")
        paths[split] = tmp_path / f"mixed.{split}.tsv"
        if message:
            with pytest.raises(RequestError, match=message):
                load_folds(task, manifests=paths, root=mini_like)
        else:
            assert len(load_folds(task, manifests=paths, root=mini_like)) == 1


def test_one_manifest_with_sessions_is_cross_validated(mini_like, tmp_path):
    task = load_task("er")
    rows = [
        replace(each, labels={**each.labels, "session": str(number)})
        for number in (1, 2, 3)
        for each in Manifest.read(mini_like / f"styles.{number}.tsv")
    ]
    Manifest(rows, mini_like, "all").write(tmp_path / "all.tsv")
    folds = load_folds(task, manifests={"train": tmp_path / "all.tsv"}, root=mini_like)
    assert [fold.name for fold in folds] == ["session1", "session2", "session3"]
    with pytest.raises(RequestError, match="divided by its column 'session'"):
        load_folds(task, manifests={"train": mini_like / "styles.1.tsv"}, root=mini_like)
    with pytest.raises(RequestError, match="lacks test, dev"):
        load_folds(load_task("sid"), manifests={"train": tmp_path / "all.tsv"}, root=mini_like)


def waveforms_encoded(task: str, out: Path, **options) -> tuple[int, int]:
    """Records of a sweep of five rates and five seeds, and how many waveforms a hook on the encoder saw."""
    encoder, seen = superb_probe.load_upstream("mamba_hubert", size="test", random=0), []
    encoder.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    rates = [10.0**-power for power in range(1, 6)]
    shared = {"steps": 5, "limit": 20, "budget": "small", "device": "cpu", "out": out}
    records = superb_probe.run(encoder, task, lr=rates, seed=[1, 2, 3, 4, 5], **shared, **options)
    assert all(record.status == "finished" for record in records)
    return len(records), sum(seen)


@pytest.mark.parametrize(("task", "trials"), [("ks", 25), ("sid", 25), ("er", 125)])
def test_five_rates_and_five_seeds_are_one_pass_of_the_encoder(task, trials, tmp_path):
    distinct = (
        60
        if task != "er"
        else len(
            {
                each.audio
                for fold in load_folds(load_task("er"))
                for part in fold.manifests.values()
                for each in part[:20]
            }
        )
    )
    assert waveforms_encoded(task, tmp_path) == (trials, distinct)


def test_encoding_anew_at_every_update_is_more_than_a_pass(tmp_path):
    """The mutant: the same sweep on states that are kept nowhere."""
    assert waveforms_encoded("ks", tmp_path, states="stream")[1] > 1.5 * 60
