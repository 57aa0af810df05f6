"""The doors to tasks and their data: a task by name, its folds from a corpus folder or from anyone's manifests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from superb_probe.downstreams.audio import SAMPLE_RATE_HZ
from superb_probe.downstreams.base import Fold, Task
from superb_probe.downstreams.checks import check_fold
from superb_probe.downstreams.corpora import CORPORA, corpus_folds
from superb_probe.downstreams.manifest import Manifest, Trials, resampled_files
from superb_probe.downstreams.mini import mini_root
from superb_probe.errors import RequestError, all_at_once, nearest
from superb_probe.registry import Registry

MANIFEST_KEYS = ("train", "dev", "test", "trials", "dev_trials")


def load_task(name: str) -> Task:
    """Build a task: a registered name or "./file.py:function".

    >>> load_task("asr").info.metric
    'wer'

    Raises:
        RequestError: for an unknown name, or a builder that does not give a Task.
    """
    task = Registry("task").find(name).load()()
    if not isinstance(task, Task):
        raise RequestError(
            f"task {name!r}: its function gave {type(task).__name__}, not a Task. "
            "Fix: return a subclass of superb_probe.Task (docs/add-a-task.md)."
        )
    return task


def load_folds(
    task: Task,
    *,
    dataset: str | None = None,
    root: Path | None = None,
    extras: Mapping[str, Path] | None = None,
    manifests: Mapping[str, Path] | None = None,
    protocol: str = "strict",
    read_audio: bool = False,
    resample: bool = False,
) -> list[Fold]:
    """The folds a run uses: read, checked, arranged for the protocol, with everything to be said about them in `Fold.notes`.

    Args:
        task: the task.
        dataset: name of a corpus; "mini" is the embedded one and needs no root, None is the task's own (`info.dataset`).
        root: the corpus folder; with manifests, what `audio` is relative to (None: each TSV's own folder).
        extras: files of a published corpus that are not in its folder, e.g. its lexicon, by name.
        manifests: anyone's own data instead of a corpus: paths by train, dev, test, trials, dev_trials.
        protocol: one of `task.info.protocols`.
        read_audio: decode every file in the check, not only its header.
        resample: whether another sample rate is converted, which the task may ask for itself.

    Raises:
        RequestError: with every problem found.
    """
    if protocol not in task.info.protocols:
        raise RequestError(
            f"{task.info.name} has no protocol {protocol!r}. Fix: one of {', '.join(sorted(task.info.protocols))}."
        )
    if manifests:
        folds = folds_from_manifests(task, manifests, root)
    elif dataset is not None and dataset in CORPORA and root is not None:
        folds = corpus_folds(dataset, root, task, extras)
    elif root is not None:
        folds = task.splits(Path(root))
    elif dataset in (None, task.info.dataset, "mini"):
        folds = task.splits(mini_root())
    else:
        raise RequestError(
            f"where is {dataset}? Fix: --data {dataset}=FOLDER, or --manifest train=... dev=... test=..."
        )
    resample = resample or task.info.resample
    arranged = []
    for fold in folds:
        warnings = check_fold(task, fold, read_audio=read_audio, resample=resample)
        if resample:
            warnings += _conversions(fold)
        arranged.append(task.arrange(replace(fold, notes=(*fold.notes, *warnings)), protocol))
    return arranged


def _conversions(fold: Fold) -> list[str]:
    """What is converted from another sample rate, split by split."""
    counts = {split: (len(resampled_files(manifest)), manifest.name) for split, manifest in fold.manifests.items()}
    return [
        f"{split} ({name}): {count} files of another rate are converted to {SAMPLE_RATE_HZ} Hz"
        for split, (count, name) in counts.items()
        if count
    ]


def folds_from_manifests(task: Task, paths: Mapping[str, Path], root: Path | None = None) -> list[Fold]:
    """The fold of anyone's own data, or the folds of one undivided manifest, read but not yet checked.

    Args:
        task: the task, which says what is needed.
        paths: TSVs by "train", "dev", "test", "trials" (of test) and "dev_trials"; trials are for verification only. "train" alone
            is divided where the task cross-validates.
        root: what `audio` is relative to; None: each TSV's own folder.

    Raises:
        RequestError: for an unknown key, a missing split, or a file that cannot be read.
    """
    for key in paths:
        if key not in MANIFEST_KEYS:
            close = nearest(key, MANIFEST_KEYS)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise RequestError(f"--manifest {key}=...: unknown split.{hint} Fix: use {', '.join(MANIFEST_KEYS)}.")
    if set(paths) == {"train"}:
        whole = Manifest.read(Path(paths["train"]), root)
        if folds := task.folds_of(whole):
            return folds
    verification = task.info.metric == "eer"
    needed = [split for split in ("train", "test") if task.info.trained or split != "train"]
    needed += ["trials"] if verification else ["dev"]
    missing = [key for key in needed if key not in paths]
    if missing:
        wanted = " ".join(f"{key}={key}.tsv" for key in needed)
        raise RequestError(f"{task.info.name}: --manifest lacks {', '.join(missing)}. Fix: --manifest {wanted}")
    if not verification and ("trials" in paths or "dev_trials" in paths):
        raise RequestError(f"{task.info.name} has no trials. Fix: leave trials= out.")
    if "dev_trials" in paths and "dev" not in paths:
        raise RequestError("dev_trials= needs dev=, the manifest its ids are in. Fix: add dev=dev.tsv.")
    absent = [f"{key}={path}: no such file" for key, path in paths.items() if not Path(path).is_file()]
    if absent:
        raise all_at_once("--manifest", absent, "give the paths of TSVs (`superb-probe prepare csv` makes them)")
    manifests = {split: Manifest.read(Path(paths[split]), root) for split in ("train", "dev", "test") if split in paths}
    trials = {
        split: Trials.read(Path(paths[key]))
        for split, key in (("dev", "dev_trials"), ("test", "trials"))
        if key in paths
    }
    return [Fold(None, manifests, trials)]
