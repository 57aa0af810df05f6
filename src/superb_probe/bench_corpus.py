"""The corpus of a bench: a part of the embedded one, as this project reads it and as s3prl's data loaders want it."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import soundfile

from superb_probe.downstreams.audio import SAMPLE_RATE_HZ, read_waveform
from superb_probe.downstreams.base import Fold, Task
from superb_probe.downstreams.load import load_folds
from superb_probe.downstreams.manifest import Manifest, Utterance
from superb_probe.errors import RequestError

REPEAT_UPDATES = 400  # a training list for the peer is repeated until an epoch has as many updates


@dataclass(frozen=True, slots=True)
class BenchCorpus:
    """One task's data on this project's side.

    Attributes:
        task: the task.
        fold: its splits, as chosen.
        manifests: written TSVs, as `superb_probe.run` takes them.
        root: what their audio is relative to.
    """

    task: Task
    fold: Fold
    manifests: Mapping[str, Path]
    root: Path

    @property
    def distinct(self) -> int:
        """Different utterances in all splits."""
        manifests = self.fold.manifests.values()
        return len({(u.audio, u.start_s, u.duration_s) for manifest in manifests for u in manifest})

    @property
    def audio_s(self) -> float:
        """Their seconds of audio."""
        manifests = self.fold.manifests.values()
        return sum({(u.audio, u.start_s): u.duration_s for manifest in manifests for u in manifest}.values())


def spread(manifest: Manifest, count: int | None) -> Manifest:
    """`count` utterances spread evenly over a split, in its order; all of them for None or when there are no more.

    >>> rows = [Utterance(str(n), f"{n}.wav", 0.0, 1.0, {}) for n in range(7)]
    >>> spread(Manifest(rows, Path("."), "train"), 3).ids
    ('0', '3', '6')
    """
    if count is None or len(manifest) <= count:
        return manifest
    step = (len(manifest) - 1) / max(count - 1, 1)
    return manifest.keep([manifest[round(number * step)].id for number in range(count)])


def choose_corpus(task: Task, limit: int | None, folder: Path, *, labelled: bool = True) -> BenchCorpus:
    """The task's part of the embedded corpus, its manifests written to a folder.

    Args:
        task: a task with one fold.
        limit: utterances of train, spread evenly; dev and test get a third each. None takes all; verification keeps all,
            because trials name their utterances.
        folder: where manifests go.
        labelled: whether dev and test are to hold only labels that the chosen part of train has.

    Raises:
        RequestError: for a task that has no splits to train on.
    """
    fold = load_folds(task, dataset="mini", protocol="superb")[0]
    needed = {"train", "test"} if fold.trials else {"train", "dev", "test"}
    if not needed <= set(fold.manifests):
        raise RequestError(f"{task.info.name}: the bench needs {', '.join(sorted(needed))}. Fix: another --task")
    # anyone's own data, not the corpus by name: the classes are those of the chosen part, on both sides
    manifests = {str(split): Manifest(list(rows), rows.root, rows.name) for split, rows in fold.manifests.items()}
    if limit is not None and not fold.trials:
        parts = {"train": limit, "dev": max(limit // 3, 1), "test": max(limit // 3, 1)}
        manifests["train"] = spread(manifests["train"], limit)
        if labelled:
            manifests |= _seen_labels(task, manifests)
        manifests = {split: spread(manifest, parts[split]) for split, manifest in manifests.items()}
    fold = replace(fold, manifests=manifests)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for split, manifest in manifests.items():
        paths[split] = folder / f"{task.info.name}.{split}.tsv"
        manifest.write(paths[split])
    for split, trials in fold.trials.items():
        key = "trials" if split == "test" else "dev_trials"
        paths[key] = folder / f"{task.info.name}.{key}.tsv"
        trials.write(paths[key])
    root = manifests["train"].root
    if labelled and limit is not None and not fold.trials:
        load_folds(task, manifests=paths, root=root, protocol="superb")  # what a run would refuse is refused here
    return BenchCorpus(task, fold, paths, root)


def _seen_labels(task: Task, manifests: Mapping[str, Manifest]) -> dict[str, Manifest]:
    """Dev and test without utterances whose labels the chosen part of train lacks."""
    kept = {}
    for split in ("dev", "test"):
        manifest = manifests[split]
        single = [
            Fold(None, {"train": manifests["train"], split: manifest[row : row + 1]}) for row in range(len(manifest))
        ]
        ids = [u.id for u, fold in zip(manifest, single, strict=True) if not task.label_problems(fold)]
        if not ids:
            raise RequestError(
                f"{task.info.name}: no utterance of {split} has only labels that train has. Fix: a larger --limit"
            )
        kept[split] = manifest.keep(ids)
    return kept


def write_wavs(
    manifest: Manifest, folder: Path, name: Callable[[Utterance], str], waveform: str = "none"
) -> dict[str, int]:
    """Write every utterance as a 16-bit WAV: the form s3prl reads fastest.

    Args:
        manifest: the utterances.
        folder: where they go.
        name: relative path of each.
        waveform: effects applied on the way.

    Returns:
        Samples by utterance id.
    """
    samples = {}
    for utterance in manifest:
        path = folder / name(utterance)
        path.parent.mkdir(parents=True, exist_ok=True)
        wav = read_waveform(utterance, manifest.root, SAMPLE_RATE_HZ, waveform)
        soundfile.write(str(path), wav, SAMPLE_RATE_HZ, subtype="PCM_16")
        samples[utterance.id] = len(wav)
    return samples


def repeats(utterances: int, batch: int) -> int:
    """How often the peer's training list is repeated, so that starting data loader workers is no part of its rate.

    >>> repeats(512, 32), repeats(100_000, 32)
    (25, 1)
    """
    return max(1, -(-REPEAT_UPDATES * batch // max(utterances, 1)))


def arrange_fluent_commands(fold: Fold, folder: Path, batch: int) -> None:
    """Fluent Speech Commands' layout: data/{train,valid,test}_data.csv and WAVs."""
    slots = ("action", "object", "location")
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split, theirs in (("train", "train"), ("dev", "valid"), ("test", "test")):
        manifest = fold.manifests[split]
        write_wavs(manifest, folder, lambda utterance: f"wavs/{utterance.id}.wav")
        times = repeats(len(manifest), batch) if split == "train" else 1
        with (folder / "data" / f"{theirs}_data.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(("path", *slots))
            rows = [(f"wavs/{u.id}.wav", *(u.labels[f"slot_{slot}"] for slot in slots)) for u in manifest]
            writer.writerows(rows * times)


def arrange_phones(fold: Fold, folder: Path, tokens: Sequence[str]) -> None:
    """WAVs, `corpus.tsv` for the stand-in of s3prl's corpus class, and the vocabulary without its three special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for split in ("train", "dev", "test"):
        manifest = fold.manifests[split]
        write_wavs(manifest, folder, lambda utterance, split=split: f"{split}/{utterance.id}.wav")  # type: ignore[misc]
        lines += [f"{split}\t{split}/{u.id}.wav\t{u.labels['phones']}" for u in manifest]
    (folder / "corpus.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "vocabulary.txt").write_text("\n".join(tokens[3:]) + "\n", encoding="utf-8")


def arrange_librispeech(fold: Fold, folder: Path, tokens: Sequence[str]) -> None:
    """LibriSpeech's layout (split/speaker/chapter, one transcript file each), lengths by split, and a fairseq dictionary."""
    (folder / "lengths").mkdir(parents=True, exist_ok=True)
    for split in ("train", "dev", "test"):
        manifest = fold.manifests[split]

        def place(utterance: Utterance, split: str = split) -> str:
            return f"{split}/{utterance.labels['speaker']}/0/{utterance.id}.wav"

        samples = write_wavs(manifest, folder, place)
        with (folder / "lengths" / f"{split}.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(("file_path", "length", "label"))
            writer.writerows((place(u), samples[u.id], "") for u in manifest)
        texts: dict[str, list[str]] = {}
        for utterance in manifest:
            texts.setdefault(utterance.labels["speaker"], []).append(f"{utterance.id} {utterance.labels['text']}")
        for speaker, lines in texts.items():
            path = folder / split / speaker / "0" / f"{speaker}-0.trans.txt"
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "dict.txt").write_text("".join(f"{token} 1\n" for token in tokens[4:]), encoding="utf-8")


def arrange_voxceleb(fold: Fold, folder: Path, batch: int) -> list[tuple[tuple[str, str, str], int]]:
    """VoxCeleb1's layout (speaker/video/utterance), trials by path, SoX's effects applied already.

    Returns:
        The last three parts of every training file's path and its samples: what s3prl keeps in a cache of its own.
    """
    lengths = []
    times = repeats(len(fold.manifests["train"]), batch)
    for split, theirs in (("train", "dev"), ("test", "test")):
        manifest = fold.manifests[split]

        def place(utterance: Utterance) -> str:
            return f"{utterance.labels['speaker']}/0/{utterance.id}.wav"

        wavs = folder / theirs / "wav"
        samples = write_wavs(manifest, wavs, place, "gain_trim")
        if split == "train":
            tags = [(u.labels["speaker"], "0", f"{u.id}.wav") for u in manifest]
            lengths = [(tag, samples[u.id]) for tag, u in zip(tags, manifest, strict=True)] * times
    trials, test = fold.trials["test"], fold.manifests["test"]
    (folder / "trials.txt").write_text(
        "".join(
            f"{label} {test[a].labels['speaker']}/0/{a}.wav {test[b].labels['speaker']}/0/{b}.wav\n"
            for label, a, b in zip(trials.labels.tolist(), trials.ids_a, trials.ids_b, strict=True)
        ),
        encoding="utf-8",
    )
    return lengths


def flac_corpus(corpus: BenchCorpus, folder: Path) -> BenchCorpus:
    """The same data as one FLAC file an utterance, the form that published corpora come in."""
    folder.mkdir(parents=True, exist_ok=True)
    manifests, paths = {}, dict(corpus.manifests)
    for split, manifest in corpus.fold.manifests.items():
        rows = []
        for utterance in manifest:
            wav = read_waveform(utterance, manifest.root, SAMPLE_RATE_HZ)
            audio = f"{split}/{utterance.id}.flac"
            (folder / audio).parent.mkdir(exist_ok=True)
            soundfile.write(str(folder / audio), wav, SAMPLE_RATE_HZ, subtype="PCM_16")
            rows.append(replace(utterance, audio=audio, start_s=0.0, duration_s=len(wav) / SAMPLE_RATE_HZ))
        manifests[split] = Manifest(rows, folder, manifest.name, corpus=manifest.corpus)
        paths[str(split)] = folder / f"{corpus.task.info.name}.{split}.tsv"
        manifests[split].write(paths[str(split)])
    return BenchCorpus(corpus.task, replace(corpus.fold, manifests=manifests), paths, folder)


def corpus_summary(corpus: BenchCorpus) -> dict[str, Any]:
    """How much data, for the result."""
    return {
        "corpus": "mini",
        "utterances": {str(split): len(manifest) for split, manifest in corpus.fold.manifests.items()},
        "audio_s": {str(split): round(manifest.total_s, 1) for split, manifest in corpus.fold.manifests.items()},
        "distinct": corpus.distinct,
        "trials": {str(split): len(trials) for split, trials in corpus.fold.trials.items()},
    }
