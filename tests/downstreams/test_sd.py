"""SD: labels on the encoder's grid, chunks, settings chosen where the protocol says, and RTTM files that cannot be used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from superb_probe.downstreams.base import Fold, FrameGrid, Task
from superb_probe.downstreams.load import load_folds, load_task
from superb_probe.downstreams.manifest import Manifest, Utterance
from superb_probe.downstreams.sd import PLAIN, SETTINGS, labelled_turns, recording_turns, rttm_of_items
from superb_probe.errors import RequestError
from superb_probe.probes.diarization import Turn, diarization_errors, frame_labels, read_rttm, rttm_lines
from superb_probe.probes.statistics import bootstrap

HOP_S = 0.02


def fold_of(folder: Path, protocol: str = "strict", duration_s: float = 6.0, **recordings: list[Turn]) -> Fold:
    """An arranged fold; `test_a` is recording a of the test split."""
    manifests = {}
    for split in ("train", "dev", "test"):
        made = []
        for name, turns in recordings.items():
            if name.startswith(split):
                (folder / f"{name}.rttm").write_text(rttm_lines(name, turns))
                made.append(Utterance(name, f"{name}.wav", 0.0, duration_s, {"rttm": f"{name}.rttm"}))
        if made:
            manifests[split] = Manifest(made, folder, split)
    return load_task("sd").arrange(Fold(None, manifests), protocol)


def bound(fold: Fold, less: int = 1, hop: int = 320) -> Task:
    """The task on an encoder whose states are `less` frames shorter than the audio has hops."""
    frames = {u.id: round(u.duration_s * 16000) // hop - less for manifest in fold.manifests.values() for u in manifest}
    return load_task("sd").bind(fold, FrameGrid(hop, 16000, frames))


def answers(task: Task, fold: Fold, split: str, confidence: float = 10.0) -> dict[str, np.ndarray]:
    labels = task.labels(fold.manifests[split])
    return {u.id: confidence * (2 * task.target(u, labels)["speakers"].numpy() - 1) for u in fold.manifests[split]}


TWO = [Turn(0.5, 3.0, "ann"), Turn(2.0, 5.0, "bob")]


def test_labels_follow_the_encoder_in_strict_and_the_audio_in_superb(tmp_path: Path) -> None:
    for protocol, hop, less, frames in (
        ("strict", 320, 1, 299),
        ("strict", 160, 2, 598),
        ("superb", 320, 1, 300),
        ("superb", 160, 2, 600),
    ):
        fold = fold_of(tmp_path, protocol, train_a=TWO)
        task = bound(fold, less, hop)
        labels = task.target(fold.manifests["train"][0], task.labels(fold.manifests["train"]))["speakers"]
        assert labels.shape == (frames, 2)
        hop_s = hop / 16000
        assert torch.equal(labels, torch.from_numpy(frame_labels(TWO, ["ann", "bob"], frames, hop_s)))
        first = int(labels[:, 0].nonzero()[0, 0])
        assert first * hop_s == pytest.approx(0.5)


def test_superb_trains_where_labels_are_longer_than_states(tmp_path: Path) -> None:
    from superb_probe.probes.batches import collate

    for protocol in ("strict", "superb"):
        fold = fold_of(tmp_path, protocol, train_a=TWO, train_b=TWO[:1])
        task = bound(fold, less=2)
        manifest = fold.manifests["train"]
        labels = task.labels(manifest)
        options = dict(task.info.protocols[protocol].head)
        head = task.head(4, labels, {"width": 3, **options})
        num_frames = torch.tensor([298, 298])
        batch = collate(manifest.ids, num_frames, [task.target(u, labels) for u in manifest])
        outputs = head(torch.randn(2, 298, 4), num_frames)
        assert torch.isfinite(head.loss(outputs, batch))
        predicted = dict(zip(manifest.ids, head.predict(outputs), strict=True))
        assert np.isfinite(task.score(predicted, fold, "train").value)
        covered = int(torch.minimum(batch.targets["speakers_lengths"], outputs.num_frames).sum())
        assert covered == int(batch.targets["speakers_lengths"].sum()), "every label is learnt"


def test_long_recordings_are_cut_and_scored_whole(tmp_path: Path) -> None:
    turns = [Turn(1, 39, "ann"), Turn(38, 43, "bob"), Turn(79, 91, "ann"), Turn(95, 100, "bob")]
    fold = fold_of(tmp_path, duration_s=100.0, test_a=turns, test_b=turns[:1])
    manifest = fold.manifests["test"]
    assert manifest.ids == ("test_a#0", "test_a#1", "test_a#2", "test_b#0", "test_b#1", "test_b#2")
    assert [(u.start_s, u.duration_s) for u in manifest][:3] == [(0.0, 40.0), (40.0, 40.0), (80.0, 20.0)]
    assert labelled_turns(manifest[1], Path()) == [Turn(0.0, 3.0, "bob"), Turn(39.0, 40.0, "ann")]
    assert any("2 recordings in 6 chunks" in note for note in fold.notes)
    task = bound(fold)
    right = answers(task, fold, "test")
    # a chunk's columns are the sorted speakers of the chunk: put bob where he was before
    right["test_a#1"] = task.target(manifest[1], task.labels(manifest))["speakers"].numpy() * 20 - 10
    score = task.score(right, fold, "test")
    assert score.items["id"] == ["test_a", "test_b"] and score.value == pytest.approx(0.0, abs=1e-9)
    swapped = {**right, "test_a#1": right["test_a#1"][:, ::-1]}
    value = task.score(swapped, fold, "test").value
    assert value == pytest.approx(100 * 4 / (38 + 5 + 12 + 5 + 38)), (
        "speakers keep their columns over a recording's chunks"
    )


def test_a_short_rest_stays_with_its_chunk(tmp_path: Path) -> None:
    for duration, pieces in ((40.0, [40.0]), (40.4, [40.4]), (40.6, [40.0, 0.6]), (80.0, [40.0, 40.0])):
        fold = fold_of(tmp_path, duration_s=duration, test_a=[Turn(0, 1, "ann")])
        assert [u.duration_s for u in fold.manifests["test"]] == pytest.approx(pieces)
        assert fold.manifests["test"][0].id == ("test_a" if len(pieces) == 1 else "test_a#0")


def noisy(task: Task, fold: Fold, split: str, seed: int) -> dict[str, np.ndarray]:
    """Answers whose best threshold is not 0.5: every logit is shifted, with noise that a median filter removes."""
    generator = np.random.default_rng(seed)
    found = answers(task, fold, split, confidence=0.5)
    return {name: logits + 0.55 + 0.45 * generator.normal(size=logits.shape) for name, logits in found.items()}


def der(task: Task, fold: Fold, predictions: dict[str, np.ndarray], split: str, setting: tuple[float, int]) -> float:
    threshold, median = setting
    from scipy.ndimage import median_filter

    wrong = speech = 0.0
    for u in fold.manifests[split]:
        logits = np.pad(predictions[u.id], ((0, 1), (0, 0)), mode="edge")
        active = 1 / (1 + np.exp(-logits)) > threshold
        active = median_filter(active, (median, 1), mode="constant") if median > 1 else active
        said = [
            Turn(k * HOP_S, (k + 1) * HOP_S, str(speaker))
            for speaker in (0, 1)
            for k in active[:, speaker].nonzero()[0]
        ]
        errors = diarization_errors(labelled_turns(u, Path()), said)
        wrong, speech = wrong + sum(errors[:3]), speech + errors.speech_s
    return 100 * wrong / speech


def test_strict_takes_the_setting_that_dev_chose_and_superb_the_best_on_test(tmp_path: Path) -> None:
    recordings = {"dev_a": TWO, "test_a": TWO, "test_b": TWO[::-1]}
    values = {}
    for protocol in ("strict", "superb"):
        fold = fold_of(tmp_path, protocol, **recordings)
        strict_grid = replace(fold, protocol="strict")
        task = bound(fold)
        on_dev = noisy(bound(strict_grid), strict_grid, "dev", 1)
        on_test = {name: logits - 0.9 for name, logits in noisy(bound(strict_grid), strict_grid, "test", 2).items()}
        table = {setting: der(task, fold, on_test, "test", setting) for setting in SETTINGS}
        dev_table = {setting: der(task, fold, on_dev, "dev", setting) for setting in SETTINGS}
        dev = task.score(on_dev, fold, "dev")
        score = task.tuned_by(dev).score(on_test, fold, "test")
        values[protocol] = score
        used = (score.extra["threshold"], int(score.extra["median"]))
        assert score.value == pytest.approx(table[used], abs=1e-6)
        if protocol == "strict":
            assert used == min(dev_table, key=lambda setting: dev_table[setting]) != PLAIN
            assert dev.value == pytest.approx(min(dev_table.values()), abs=1e-6)
            assert dev.selects is None
        else:
            assert score.value == pytest.approx(min(table.values()), abs=1e-6)
            assert dev.value == pytest.approx(dev_table[PLAIN], abs=1e-6)
            assert dev.selects == dev.extra["frame_error"] != dev.value
    assert values["superb"].value < values["strict"].value


def test_superb_selects_by_frame_accuracy_of_chunks(tmp_path: Path) -> None:
    fold = fold_of(tmp_path, "superb", dev_a=TWO, dev_b=[Turn(0.0, 6.0, "ann")])
    task = bound(fold)
    quiet = {u.id: np.full((299, 2), -5.0) for u in fold.manifests["dev"]}
    score = task.score(quiet, fold, "dev")
    shares = [(2.5 + 3.0) / 12.0, 6.0 / 12.0]
    assert score.selects == pytest.approx(100 * np.mean(shares))
    assert score.value == pytest.approx(100.0), "all speech is missed"
    settings = load_task("sd").info.protocols
    assert settings["superb"].select_metric == "frame_error" and settings["strict"].select_metric is None


def test_items_are_recordings_with_their_turns(tmp_path: Path) -> None:
    fold = fold_of(tmp_path, test_a=TWO, test_b=[Turn(1, 2, "ann")])
    task = bound(fold)
    found = answers(task, fold, "test")
    found["test_b"] = -found["test_b"]  # says both speak when nobody does
    score = task.score(found, fold, "test")
    rows = {name: score.items[name] for name in ("miss_s", "false_alarm_s", "confusion_s", "speech_s")}
    assert [float(rows[name][0]) for name in rows] == pytest.approx([0, 0, 0, 5.5])
    # the quiet second speaker's column is active all through, the first's outside of the turn
    assert [float(rows[name][1]) for name in rows] == pytest.approx([0, 10.0, 0, 1.0])
    assert score.items["turns"][0] == "0.50 2.50 1; 2.00 3.00 2"
    (tmp_path / "found.rttm").write_text(rttm_of_items(score.items))
    found_turns = read_rttm(tmp_path / "found.rttm")
    assert found_turns["test_a"] == [Turn(0.5, 3.0, "1"), Turn(2.0, 5.0, "2")]
    assert sum(diarization_errors(TWO, found_turns["test_a"])[:3]) == 0
    columns = {name: column for name, column in score.items.items() if name not in ("id", "cluster")}
    low, high, _ = bootstrap(task.value, columns, clusters=score.items["cluster"], draws=20)
    assert low <= score.value <= high
    assert score.extra["false_alarm"] == pytest.approx(100 * 10.0 / 6.5)


def test_an_encoder_with_another_hop_is_refused(tmp_path: Path) -> None:
    fold = fold_of(tmp_path, test_a=TWO)
    with pytest.raises(RequestError, match="hop_samples must be"):
        bound(fold).score({"test_a": np.zeros((150, 2))}, fold, "test")
    with pytest.raises(ValueError, match="bind"):
        load_task("sd").target(fold.manifests["test"][0], bound(fold).labels(fold.manifests["test"]))


def test_the_recording_is_found_by_id_by_audio_or_alone(tmp_path: Path) -> None:
    text = rttm_lines("one", [Turn(0, 1, "a")]) + rttm_lines("two", [Turn(2, 3, "b")])
    (tmp_path / "all.rttm").write_text(text)
    (tmp_path / "single.rttm").write_text(rttm_lines("other", [Turn(4, 5, "c")]))
    (tmp_path / "empty.rttm").write_text("")

    def turns(name: str, audio: str, rttm: str, start: float = 0.0, duration: float = 9.0) -> list[Turn]:
        return recording_turns(Utterance(name, audio, start, duration, {"rttm": rttm}), tmp_path)

    assert turns("two", "x.wav", "all.rttm") == [Turn(2, 3, "b")]
    assert turns("x", "a/one.wav", "all.rttm") == [Turn(0, 1, "a")]
    assert turns("x", "x.wav", "single.rttm") == [Turn(4, 5, "c")]
    assert turns("x", "x.wav", "empty.rttm") == []
    assert turns("x", "x.wav", "single.rttm", 4.5, 0.25) == [Turn(0, 0.25, "c")], "times are counted from the stretch"
    with pytest.raises(RequestError, match="recordings one, two"):
        turns("x", "x.wav", "all.rttm")
    for path in ("/etc/x.rttm", "../x.rttm"):
        with pytest.raises(RequestError, match="absolute or leaves"):
            turns("x", "x.wav", path)


def test_everything_wrong_is_named_at_once(mini_like: Path, tmp_path: Path) -> None:
    task = load_task("sd")
    (tmp_path / "bad.rttm").write_text("SPEAKER\n")
    (tmp_path / "many.rttm").write_text("".join(rttm_lines("m", [Turn(k, k + 1, f"s{k}")]) for k in range(6)))
    made = [Utterance(name, f"{name}.wav", 0.0, 9.0, {"rttm": f"{name}.rttm"}) for name in ("bad", "many", "none")]
    told = [str(p) for p in task.label_problems(Fold(None, {"test": Manifest(made, tmp_path, "test")}))]
    assert len(told) == 3 and "1 fields" in told[0] and "6 speakers" in told[1] and "No such file" in told[2]
    (fold,) = load_folds(task, root=mini_like)
    assert fold.protocol == "strict" and all("segments" in u.labels for u in fold.manifests["train"])


def test_a_recording_with_more_speakers_than_train_is_refused(tmp_path: Path) -> None:
    three = [*TWO, Turn(5, 6, "cem")]
    fold = fold_of(tmp_path, train_a=TWO, test_a=three)
    (problem,) = load_task("sd").label_problems(fold)
    assert "1 recordings have more than 2 speakers, the most of train: test_a" in problem.what
    wider = fold_of(tmp_path, train_a=three, test_a=TWO)
    task = bound(wider)
    assert not task.label_problems(wider) and task.labels(wider.manifests["train"]).sizes() == {"speaker": 3}
    assert task.target(wider.manifests["test"][0], task.labels(wider.manifests["train"]))["speakers"].shape == (299, 3)


def test_a_changed_rttm_changes_the_digest(tmp_path: Path) -> None:
    before = fold_of(tmp_path, test_a=TWO).manifests["test"].digest
    assert before == fold_of(tmp_path, test_a=TWO).manifests["test"].digest
    assert before != fold_of(tmp_path, test_a=TWO[:1]).manifests["test"].digest, "the same path, other turns"


def test_the_full_budget_is_superbs() -> None:
    info = load_task("sd").info
    full = info.budgets["full"]
    assert (full.steps, full.batch, full.accumulate, full.evaluate_every) == (30_000, 8, 4, 500)
    assert (info.optimizer, info.clip, dict(full.head)) == ("adam", 1.0, {})
    assert (info.protocols["superb"].default_lr, info.protocols["mamba_hubert"].default_lr) == (1e-4, 1e-3)
    assert sorted(SETTINGS) == [(t / 10, m) for t in (3, 4, 5, 6, 7) for m in (1, 11)]
    head = load_task("sd").head(4, load_task("sd").labels(Manifest([], Path(), "train")))
    assert head.rnn.hidden_size == 512 and not head.rnn.bidirectional and head.linear.out_features == 2  # type: ignore[attr-defined]
