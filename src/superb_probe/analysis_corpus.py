"""The speech that analyses look at: manifests with phone times, an encoder's states, and the frames of a layer with labels."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from superb_probe.downstreams.manifest import Manifest, Trials
from superb_probe.downstreams.mini import SPLITS, mini_root, read_splits, read_trials
from superb_probe.engine_progress import Stage, say
from superb_probe.errors import RequestError, all_at_once
from superb_probe.probes.alignments import Segment, Segments, fold_labels, frame_labels, is_silence, read_alignments
from superb_probe.probes.store import FeatureStore
from superb_probe.results.compare import FEWEST_CLUSTERS
from superb_probe.upstreams.base import Upstream


@dataclass(frozen=True, slots=True)
class AnalysisCorpus:
    """Speech in three splits, with the times of its phones.

    Attributes:
        dataset: "mini" or "manifest:<folder of the test manifest>".
        splits: manifests by "train", "dev", "test".
        phones: by utterance, without stress, silences as SIL.
        trials: pairs to verify, by split; empty where none are given.
        digests: of what was read.
        warnings: what a reader of its numbers must know.
    """

    dataset: str
    splits: Mapping[str, Manifest]
    phones: Mapping[str, Segments]
    trials: Mapping[str, Trials]
    digests: Mapping[str, str]
    warnings: tuple[str, ...] = ()

    @property
    def phone_names(self) -> tuple[str, ...]:
        """All phones, sorted: what phone numbers stand for."""
        return tuple(sorted({each.label for segments in self.phones.values() for each in segments}))


def load_corpus(
    manifest: Mapping[str, Path] | None = None,
    *,
    root: Path | None = None,
    alignment: Sequence[Path] = (),
    limit: int | None = None,
    skip_unaligned: bool = False,
) -> AnalysisCorpus:
    """The embedded corpus' read sentences, or anyone's own manifests with alignments.

    Args:
        manifest: TSVs by "train", "dev", "test" and, if any, "trials" (of test); None for the embedded corpus.
        root: what their audio is relative to; None for each TSV's own folder.
        alignment: files or folders with the phones' times, any form that `probes.alignments` reads.
        limit: most utterances of a split, evenly taken from the file; None for all.
        skip_unaligned: leave utterances without alignment out, with a warning.

    Raises:
        RequestError: for a missing split, or utterances without alignment.
    """
    if manifest is None:
        dataset = "mini"
        splits = dict(read_splits(mini_root(), "read"))
        trials = dict(read_trials(mini_root()))
        alignment = [mini_root() / f"alignments.{split}.tsv" for split in SPLITS]
    else:
        splits, trials = _own_splits(manifest, root)
        dataset = f"manifest:{manifest['test'].resolve().parent.name}"  # as in run records
    if not alignment:
        raise RequestError(
            "phone times are needed. Fix: --alignment FILE or DIR (TextGrid, CTM, CSV), or `superb-probe align`."
        )
    phones: dict[str, Segments] = {key: value for path in alignment for key, value in read_alignments(path).items()}
    digests = {f"alignment.{path.name}": _digest(path) for path in alignment}
    if limit is not None:
        splits = {name: _limited(split, limit) for name, split in splits.items()}
    lacking = [each.id for split in splits.values() for each in split if each.id not in phones]
    warnings = []
    if lacking:
        some = ", ".join(lacking[:5])
        if not skip_unaligned:
            raise RequestError(
                f"{len(lacking)} utterances have no alignment: {some}. Fix: align them, or --skip-unaligned."
            )
        warnings.append(f"{len(lacking)} utterances without alignment were left out: {some}")
        splits = {name: split.keep([each.id for each in split if each.id in phones]) for name, split in splits.items()}
    known = {each.id: each.duration_s for split in splits.values() for each in split}
    clipped = {name: _clipped(fold_labels(phones[name]), duration) for name, duration in known.items()}
    digests |= {split: each.digest for split, each in splits.items()}
    if limit is None and not lacking:
        wrong_trials = [str(each) for split, pairs in trials.items() for each in pairs.problems(splits[split])]
        if wrong_trials:
            raise all_at_once("trials", wrong_trials, "use the ids of the manifest")
    among = {split: _among(pairs, splits[split]) for split, pairs in trials.items()}
    speakers = {each.labels.get("speaker") or each.id for each in splits["test"]}
    if len(speakers) < FEWEST_CLUSTERS:
        warnings.append(f"test has {len(speakers)} speaker(s): intervals over so few are not to be relied on")
    return AnalysisCorpus(dataset, splits, clipped, among, digests, tuple(warnings))


def _own_splits(manifest: Mapping[str, Path], root: Path | None) -> tuple[dict[str, Manifest], dict[str, Trials]]:
    """What `load_corpus` was given instead of the embedded corpus: utterances by split, and the trials of test, if any."""
    wrong = sorted(set(manifest) - {*SPLITS, "trials"})
    missing = [split for split in SPLITS if split not in manifest]
    if wrong or missing:
        raise RequestError(
            f"--manifest: train, dev and test are needed, and trials may be given; missing {', '.join(missing) or 'none'}, "
            f"unknown {', '.join(wrong) or 'none'}."
        )
    splits = {split: Manifest.read(manifest[split], root) for split in SPLITS}
    return splits, {"test": Trials.read(manifest["trials"])} if "trials" in manifest else {}


def _among(trials: Trials, manifest: Manifest) -> Trials:
    """The trials whose two utterances are in a manifest."""
    known = set(manifest.ids)
    rows = [
        at
        for at, pair in enumerate(zip(trials.ids_a, trials.ids_b, strict=True))
        if pair[0] in known and pair[1] in known
    ]
    labels = [int(trials.labels[at]) for at in rows]
    return Trials.of(labels, [trials.ids_a[at] for at in rows], [trials.ids_b[at] for at in rows])


def _digest(path: Path) -> str:
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    total = hashlib.sha256()
    for file in files:
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return "sha256:" + total.hexdigest()


def _limited(manifest: Manifest, limit: int) -> Manifest:
    """At most `limit` utterances, evenly spaced, so that every speaker stays in as far as it goes."""
    if len(manifest) <= limit:
        return manifest
    ids = manifest.ids
    return manifest.keep([ids[int(at * len(ids) / limit)] for at in range(limit)])


def _clipped(segments: Segments, duration_s: float) -> Segments:
    """Segments that end with the utterance: a table of beginnings does not say when the last one ends."""
    return tuple(
        replace(each, end_s=duration_s) if math.isinf(each.end_s) else each
        for each in segments
        if each.start_s < duration_s
    )


def extract(
    upstream: Upstream,
    name: str,
    manifests: Mapping[str, Manifest],
    store: Path | None,
    device: torch.device,
    batch_s: float = 120.0,
) -> dict[str, FeatureStore]:
    """Frame states of some manifests in float16, on disk below `store`, or in memory without one."""
    upstream.to(device)
    made: dict[str, FeatureStore] = {}
    with Stage(f"extract {name}", sum(each.total_s for each in manifests.values()), "s of audio") as stage:
        for key, manifest in manifests.items():
            made[key] = FeatureStore(store, view="frames", dtype="float16")
            made[key].build(upstream, manifest, max_batch_s=batch_s, progress=stage.advance, say=say)
    upstream.to("cpu")
    return made


class Frames:
    """The frames of some utterances, with their phones and speakers.

    Attributes:
        manifest: the utterances.
        hop_s: seconds between frames.
        num_frames: (U,) of each utterance.
        phones: (N,) number of the phone of every frame; -1 where there is none.
        silent: (P,) which phones are silence.
        utterance: (N,) number of the utterance of every frame.
        speakers: (U,) number of the speaker of each utterance in `speaker_names`; where unknown, the utterance by itself.
    """

    def __init__(
        self,
        store: FeatureStore,
        manifest: Manifest,
        upstream: Upstream,
        segments: Mapping[str, Segments],
        names: Sequence[str],
    ) -> None:
        """Label the frames of a store by the segments of its utterances; `names` are the phones in number order."""
        self._store, self.manifest = store, manifest
        self.hop_s = upstream.info.hop_samples / upstream.info.sample_rate_hz
        self.segments = segments
        number = {name: at for at, name in enumerate(names)}
        self.names = tuple(names)
        self.silent = np.array([is_silence(name) for name in names])
        self.num_frames = np.array([store.num_frames(each) for each in manifest.ids])
        labels = []
        for name, count in zip(manifest.ids, self.num_frames.tolist(), strict=True):
            of_segment = np.array([number[each.label] for each in segments[name]] + [-1], dtype=np.int64)
            labels.append(of_segment[frame_labels(segments[name], count, self.hop_s)])
        self.phones = np.concatenate(labels)
        self.utterance = np.repeat(np.arange(len(manifest)), self.num_frames)
        found = [each.labels.get("speaker", "") or each.id for each in manifest]
        self.speaker_names = tuple(sorted(set(found)))
        place = {name: at for at, name in enumerate(self.speaker_names)}
        self.speakers = np.array([place[name] for name in found], dtype=np.int64)

    @property
    def speech(self) -> NDArray[np.bool_]:
        """(N,) which frames have a phone that is not silence."""
        found: NDArray[np.bool_] = (self.phones >= 0) & ~self.silent[self.phones]
        return found

    def layer(self, layer: int, rows: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """(N, D) the states of a layer, of all frames or of some, whose numbers are sorted."""
        parts = []
        ends = np.cumsum(self.num_frames)
        for name, start, end in zip(self.manifest.ids, ends - self.num_frames, ends, strict=True):
            states = self._store.stored(name)[layer]
            if rows is not None:
                low, high = np.searchsorted(rows, [start, end])
                if low == high:
                    continue
                states = states[torch.from_numpy(rows[low:high] - start)]
            parts.append(states.float().cpu().numpy())
        return np.concatenate(parts)

    def sample(self, count: int | None, seed: int, speech_only: bool = False) -> NDArray[np.int64]:
        """Numbers of at most `count` frames drawn at random, sorted."""
        rows = np.flatnonzero(self.speech) if speech_only else np.arange(len(self.phones))
        if count is None or len(rows) <= count:
            return rows
        return np.sort(np.random.default_rng([seed, 3]).permutation(rows)[:count])

    def split(self, values: NDArray[Any]) -> list[NDArray[Any]]:
        """Values of all frames (N, ...), utterance by utterance."""
        return np.split(values, np.cumsum(self.num_frames)[:-1])


def read_embeddings(path: Path) -> dict[str, NDArray[np.float64]]:
    """Vectors by utterance id: an `.npz` with an array a name, or a `.csv`/`.tsv` whose first column is the id and the rest numbers.

    Raises:
        RequestError: for another form, vectors of different lengths, or values that are no numbers.
    """
    found: dict[str, NDArray[np.float64]] = {}
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                found = {name: np.asarray(arrays[name], dtype=np.float64).ravel() for name in arrays.files}
        elif path.suffix in (".csv", ".tsv"):
            separator = "," if path.suffix == ".csv" else "\t"
            lines = path.read_text(encoding="utf-8-sig").splitlines()[1:]
            cells = [line.split(separator) for line in lines if line]
            found = {row[0]: np.array([float(cell) for cell in row[1:]]) for row in cells}
        else:
            raise RequestError(f"{path}: unknown form of embeddings. Fix: .npz, .csv or .tsv.")
    except (OSError, ValueError) as error:
        raise RequestError(f"{path}: cannot be read as embeddings: {error}") from error
    if (
        not found
        or len({vector.shape for vector in found.values()}) != 1
        or not all(np.isfinite(each).all() for each in found.values())
    ):
        raise RequestError(f"{path}: {len(found)} embeddings; they must be finite and of one length.")
    return found


def json_of(value: Any) -> str:
    """Canonical JSON, for digests of causes."""
    return json.dumps(value, sort_keys=True, default=str)


def utterance_segments(segments: Segments, speech_only: bool = True) -> list[Segment]:
    """The segments of an utterance, without silences."""
    return [each for each in segments if not (speech_only and is_silence(each.label))]
