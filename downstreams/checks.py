"""What is checked of a corpus before anything is computed: every problem at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import soundfile

from superb_probe.downstreams.audio import SAMPLE_RATE_HZ, AudioHeader, effective_samples
from superb_probe.downstreams.base import Fold, Task, TaskInfo
from superb_probe.downstreams.manifest import Manifest, Problem, Utterance
from superb_probe.errors import RequestError

MAX_NAMED = 5  # examples named in one problem


def fold_problems(fold: Fold, info: TaskInfo) -> tuple[list[Problem], list[str]]:
    """What is wrong between the splits of a fold: errors, and warnings to keep in the record.

    An utterance in two splits is an error, a speaker in two splits is one where the task says speakers are disjoint (or only
    those of test). Speakers that are not known, and sentences that two splits share, are warnings.
    """
    errors: list[Problem] = []
    warnings: list[str] = []
    for first, second in combinations(fold.manifests, 2):
        a, b = fold.manifests[first], fold.manifests[second]
        where = f"{first} ({a.name}) and {second} ({b.name})"
        if not info.trained:
            pass  # nothing is learnt from a split: the same documents may be searched in both
        elif shared := sorted(set(a.ids) & set(b.ids)):
            errors.append(Problem(where, f"share {some(shared, 'utterance id')}", "keep each utterance in one split"))
        elif overlapping := _overlapping(a, b):
            errors.append(Problem(where, f"share audio: {some(overlapping, 'pair')}", "keep each stretch in one split"))
        if info.speakers == "disjoint" or (info.speakers == "test_disjoint" and "test" in (first, second)):
            speakers = (set(a.labels("speaker")) & set(b.labels("speaker"))) - {""}
            if speakers:
                what = f"share {some(sorted(speakers), 'speaker')}, but {info.name} needs speakers apart"
                errors.append(Problem(where, what, "keep each speaker in one split"))
        if "text" in info.label_columns:
            texts = (set(a.labels("text")) & set(b.labels("text"))) - {""}
            if texts:
                warnings.append(f"{where} share {some(sorted(texts), 'sentence')}")
    if info.speakers != "shared":
        for split, manifest in fold.manifests.items():
            unknown = manifest.labels("speaker").count("")
            if unknown:
                warnings.append(
                    f"{split} ({manifest.name}): the speakers of {unknown} of {len(manifest)} utterances are not known; "
                    "whether splits share speakers could not be checked"
                )
    return errors, warnings


def length_problems(
    manifest: Manifest,
    num_frames: Callable[[int], int],
    min_frames: int = 1,
    *,
    waveform: str = "none",
    sample_rate_hz: int = SAMPLE_RATE_HZ,
    resample: bool = False,
) -> list[Problem]:
    """The utterances too short for the encoder or for the head, all of them.

    Args:
        manifest: the utterances.
        num_frames: frames the encoder gives for a number of samples (`Upstream.num_frames`).
        min_frames: fewest frames the head can take (`Head.min_frames`).
        waveform: effects applied first; "gain_trim" shortens, so those files are decoded.
        sample_rate_hz: rate of the waveforms.
        resample: whether another rate is converted.
    """
    found = []
    for utterance in manifest:
        num_samples = effective_samples(utterance, manifest, waveform, sample_rate_hz, resample=resample)
        frames = num_frames(num_samples)
        if frames < max(1, min_frames):
            need = "one frame" if frames < 1 else f"{min_frames} frames, which the head needs"
            after = " after silence trimming" if waveform == "gain_trim" else ""
            what = f"{num_samples / sample_rate_hz:.3f} s{after} give {frames} frames, less than {need}"
            where = f"{manifest.name}, utterance {utterance.id}"
            found.append(Problem(where, what, "leave it out of the manifest"))
    return found


def file_problem(path: Path, header: AudioHeader, rates_hz: Sequence[int] = (SAMPLE_RATE_HZ,)) -> str | None:
    """What is wrong with an audio file as a whole: its rate, its channels, an end that was cut off; None if nothing.

    The end is looked at without decoding the rest: a cut WAV holds less than its header promises, a cut FLAC has no last sample.

    Args:
        path: the file.
        header: what `read_header` said of it.
        rates_hz: the rates it may have.
    """
    found = []
    if header.sample_rate_hz not in rates_hz:
        wanted = " or ".join(str(rate) for rate in rates_hz)
        found.append(f"{header.sample_rate_hz} Hz, expected {wanted} Hz")
    if header.num_channels != 1:
        found.append(f"{header.num_channels} channels, expected one")
    if header.num_samples < 1:
        found.append("no samples")
    elif _promised_bytes(path) > path.stat().st_size or not _has_last_sample(path, header.num_samples):
        found.append("truncated: it ends before its header says")
    return "; ".join(found) or None


def _promised_bytes(path: Path) -> int:
    """The size a RIFF header says the file has up to the end of its samples; 0 where it says none."""
    with path.open("rb") as file:
        if file.read(4) != b"RIFF":
            return 0
        file.seek(12)
        while len(chunk := file.read(8)) == 8:
            length = int.from_bytes(chunk[4:], "little")
            if chunk[:4] == b"data":
                return 0 if length in (0, 0xFFFFFFFF) else file.tell() + length  # written as a stream: no size known
            file.seek(length + length % 2, 1)
    return 0


def _has_last_sample(path: Path, num_samples: int) -> bool:
    try:
        with soundfile.SoundFile(str(path)) as file:
            file.seek(num_samples - 1)
            return len(file.read(1)) == 1
    except soundfile.LibsndfileError:
        return False


def check_fold(task: Task, fold: Fold, *, read_audio: bool = False, resample: bool = False) -> list[str]:
    """The warnings about a fold, to keep in the record.

    Raises:
        RequestError: with every problem of its manifests, labels and trials, and between its splits.
    """
    problems: list[Problem] = []
    for split, manifest in fold.manifests.items():
        columns = task.label_columns(fold, split)
        problems += manifest.problems(read_audio=read_audio, label_columns=columns, resample=resample)
    errors, warnings = fold_problems(fold, task.info)
    problems += errors
    if not problems:  # labels are looked at only where they are all there
        problems += task.label_problems(fold)
        for split, trials in fold.trials.items():
            problems += trials.problems(fold.manifests[split])
    if problems:
        raise report(f"{task.info.name}{f' ({fold.name})' if fold.name else ''}", problems)
    return warnings


def report(what: str, problems: list[Problem], limit: int = 20) -> RequestError:
    """One error for many problems, each with its place, the fixes said once.

    >>> print(report("asr", [Problem("train, a", "no text", "write it"), Problem("train, b", "no text", "write it")]))
    asr: 2 problems
      train, a: no text
      train, b: no text
    Fix: write it
    """
    shown = [f"\n  {problem.where}: {problem.what}" for problem in problems[:limit]]
    more = f"\n  (and {len(problems) - limit} more)" if len(problems) > limit else ""
    fixes = dict.fromkeys(problem.fix.rstrip(".") for problem in problems)
    plural = "problem" if len(problems) == 1 else "problems"
    return RequestError(f"{what}: {len(problems)} {plural}{''.join(shown)}{more}\nFix: {'; '.join(fixes)}")


def unseen_problems(fold: Fold, column: str) -> list[Problem]:
    """The labels of dev and test that train does not have: a closed set cannot answer them."""
    known = set(fold.manifests["train"].labels(column))
    found = []
    for split, manifest in fold.manifests.items():
        unseen = sorted(set(manifest.labels(column)) - known)
        if unseen:
            where = f"{split} ({manifest.name}), {column}"
            what = f"{some(unseen, 'label')} not in train (train has {len(known)})"
            found.append(Problem(where, what, "move an utterance of each into train, or leave these out"))
    return found


def some(names: Sequence[str], noun: str) -> str:
    """How many there are and the first of them.

    >>> some(["a", "b"], "speaker")
    '2 speakers (a, b)'
    """
    listed = ", ".join(names[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'} ({listed})"


def _overlapping(a: Manifest, b: Manifest) -> list[str]:
    """Pairs of utterances of two splits that hear the same stretch of a file."""
    stretches = _by_file(a)
    return [
        f"{x.id} and {y.id}"
        for y in b
        for x in stretches.get(str((b.root / y.audio).absolute()), ())
        if x.start_s < y.start_s + y.duration_s and y.start_s < x.start_s + x.duration_s
    ]


def _by_file(manifest: Manifest) -> dict[str, list[Utterance]]:
    files: dict[str, list[Utterance]] = {}
    for utterance in manifest:
        files.setdefault(str((manifest.root / utterance.audio).absolute()), []).append(utterance)
    return files
