"""s3prl 0.4.18 as the peer of a bench: found, given the same corpus and encoder, run, and its result read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from superb_probe.bench_corpus import (
    BenchCorpus,
    arrange_fluent_commands,
    arrange_librispeech,
    arrange_phones,
    arrange_voxceleb,
    write_wavs,
)
from superb_probe.bench_machine import run_side
from superb_probe.errors import CheckError, RequestError

VERSION = "0.4.18"
TASKS = ("ic", "pr", "asr", "asv")
CUDA_ONLY = ("asv",)  # its expert calls .cuda() whatever the device
DRIVER = Path(__file__).resolve().parents[2] / "tools" / "s3prl_peer.py"
WARM_UP_UPDATES = 5
LEAST_UPDATES = 100


@dataclass(frozen=True, slots=True)
class PeerRun:
    """What one run of the peer measured.

    Attributes:
        updates: optimiser updates made.
        update_s: mean seconds of one, after warm-up.
        spread_s: standard deviation of the mean of ten blocks of updates; None with too few.
        update_processor_s: processor seconds of one, all threads together; None where data loaders are processes of their own.
        evaluation_s: seconds of one evaluation, by this project's split name.
        evaluation_processor_s: processor seconds of one.
        update_passes: utterances through the encoder in one update.
        evaluation_passes: in one evaluation, by split.
        peak_rss_bytes: most memory the process, or one of its workers, held.
        peak_gpu_bytes: most memory torch held on the GPU in training.
        scalars: what s3prl logged: name, value, update.
        raw: the driver's result.
    """

    updates: int
    update_s: float
    spread_s: float | None
    update_processor_s: float | None
    evaluation_s: Mapping[str, float]
    evaluation_processor_s: Mapping[str, float]
    update_passes: float
    evaluation_passes: Mapping[str, int]
    peak_rss_bytes: int
    peak_gpu_bytes: int | None
    scalars: tuple[tuple[str, float, int], ...]
    raw: Mapping[str, Any]

    @property
    def processes_only_itself(self) -> bool:
        """Whether its processor seconds are all there are: no GPU, and so no data loader beside it (see `peer_job`)."""
        return self.peak_gpu_bytes is None

    def score(self, split: str) -> float | None:
        """The task's metric on a split after the last update, in percent; None where s3prl did not log it."""
        for name, value, _ in reversed(self.scalars):
            where, _, metric = name.rpartition("/")[2].rpartition("-")
            if where in _SPLIT_NAMES[split] and metric in ("acc", "per", "wer", "EER"):
                return value if metric == "wer" and "asr/" in name else 100.0 * value
        return None


_SPLIT_NAMES = {"dev": ("dev", "dev-clean"), "test": ("test", "test-clean")}


def why_not(task: str, device: torch.device, python: str | None, driver: Path) -> str | None:
    """Why the peer cannot run a task here; None when it can.

    >>> why_not("asv", torch.device("cpu"), "python3", Path("driver.py"))
    's3prl trains speaker verification on CUDA only (its expert calls .cuda() whatever the device)'
    """
    if task not in TASKS:
        return f"the bench arranges no corpus for s3prl's {task}; it does for {', '.join(TASKS)}"
    if task in CUDA_ONLY and device.type != "cuda":
        return "s3prl trains speaker verification on CUDA only (its expert calls .cuda() whatever the device)"
    if python is None:
        return "no --peer-python: s3prl needs an environment of its own (docs/benchmarks.md)"
    if not driver.is_file():
        return f"{driver} is missing: it is part of a checkout, not of the wheel. Fix: --peer-driver"
    return None


def check_python(python: str) -> str:
    """The version of s3prl in an environment.

    Raises:
        RequestError: if the program is not there or has another s3prl.
    """
    if shutil.which(python) is None:
        raise RequestError(
            f"--peer-python {python}: no such program. Fix: docs/benchmarks.md says how to make the environment"
        )
    code = (
        "import importlib.util as u, pathlib; f = u.find_spec('s3prl'); "
        "print((pathlib.Path(f.origin).parent / 'version.txt').read_text().strip() if f else 'none')"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    found = done.stdout.strip()
    if done.returncode != 0 or found != VERSION:
        raise RequestError(
            f"--peer-python {python}: expected s3prl {VERSION}, found {found or done.stderr.strip()[-200:]}. "
            "Fix: docs/benchmarks.md says how to make the environment"
        )
    return found


def run_peer(
    corpus: BenchCorpus,
    *,
    python: str,
    driver: Path,
    checkpoint: Path,
    device: torch.device,
    updates: int,
    lr: float,
    folder: Path,
    threads: int | None = None,
    timeout_s: float = 3600.0,
    gone: bool = False,
) -> PeerRun:
    """Train one learning rate with s3prl's own runner, and evaluate after the last update.

    Args:
        corpus: the same utterances this project reads.
        python: interpreter of the environment that has s3prl.
        driver: tools/s3prl_peer.py.
        checkpoint: s3prl's converted form of the encoder.
        device: where.
        updates: optimiser updates.
        lr: learning rate.
        folder: for the arranged corpus, the job, its log.
        threads: of torch; None leaves its default.
        timeout_s: then it is stopped.
        gone: unused files of an earlier run in the folder are removed first.

    Raises:
        CheckError: if it fails or is stopped; the end of its log is in the message.
    """
    if gone:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    job = peer_job(corpus, checkpoint=checkpoint, device=device, updates=updates, lr=lr, folder=folder)
    job["threads"] = threads
    train = corpus.fold.manifests["train"]
    write_wavs(train[:1], folder, lambda utterance: "states.wav")
    job["states"] = {"audio": str(folder / "states.wav"), "out": str(folder / "states.npy")}
    (folder / "job.json").write_text(json.dumps(job, indent=1), encoding="utf-8")
    result, log = folder / "result.json", folder / "log.txt"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    words = [python, str(driver), str(folder / "job.json"), str(result)]
    what = f"s3prl on {corpus.task.info.name}"
    return read_result(run_side(words, result, log, what, timeout_s, environment))


def read_result(raw: Mapping[str, Any]) -> PeerRun:
    """The rates in a driver's result.

    >>> raw = {"begun": 0.0, "stamps": [1.0, 1.5, 2.0, 2.5], "updates": 4, "passes": {"training": 128}, "peak_rss_bytes": 1,
    ...     "evaluations": [{"split": "dev", "seconds": 2.0, "passes": 9}], "peak_gpu_bytes": None, "scalars": []}
    >>> found = read_result(raw)
    >>> found.update_s, found.update_passes, found.evaluation_s
    (0.5, 32.0, {'dev': 2.0})

    Raises:
        CheckError: if there was no update.
    """
    stamps = [float(stamp) for stamp in raw["stamps"]]
    if not stamps:
        raise CheckError("s3prl made no update: nothing to measure")
    skip = min(WARM_UP_UPDATES, len(stamps) // 5)
    kept = stamps[skip:]
    update_s = (kept[-1] - kept[0]) / (len(kept) - 1) if len(kept) > 1 else stamps[-1] - float(raw["begun"])
    worked = [float(stamp) for stamp in raw.get("processor_stamps", ())][skip:]
    names = {theirs: ours for ours, all_theirs in _SPLIT_NAMES.items() for theirs in all_theirs}
    evaluations = {names[each["split"]]: each for each in raw["evaluations"]}
    return PeerRun(
        updates=int(raw["updates"]),
        update_s=update_s,
        spread_s=_spread(kept),
        update_processor_s=(worked[-1] - worked[0]) / (len(worked) - 1) if len(worked) > 1 else None,
        evaluation_s={split: float(each["seconds"]) for split, each in evaluations.items()},
        evaluation_processor_s={split: float(each.get("processor_s", 0.0)) for split, each in evaluations.items()},
        update_passes=int(raw["passes"]["training"]) / len(stamps),
        evaluation_passes={split: int(each["passes"]) for split, each in evaluations.items()},
        peak_rss_bytes=int(raw["peak_rss_bytes"]),
        peak_gpu_bytes=raw["peak_gpu_bytes"],
        scalars=tuple((str(name), float(value), int(step)) for name, value, step in raw["scalars"]),
        raw=raw,
    )


def _spread(stamps: list[float]) -> float | None:
    """How well a mean update is known: the standard error over ten blocks."""
    size = (len(stamps) - 1) // 10
    if size < 1:
        return None
    means = [(stamps[(n + 1) * size] - stamps[n * size]) / size for n in range(10)]
    mean = fmean(means)
    return float((sum((value - mean) ** 2 for value in means) / 9 / 10) ** 0.5)


def peer_job(
    corpus: BenchCorpus, *, checkpoint: Path, device: torch.device, updates: int, lr: float, folder: Path
) -> dict[str, Any]:
    """Arrange the corpus and say what the driver is to run."""
    name, fold = corpus.task.info.name, corpus.fold
    workers = 0 if device.type == "cpu" else 4
    data = folder / "corpus"
    budget = corpus.task.info.budgets["full"]
    tokens = corpus.task.labels(fold.manifests["train"]).classes.get("tokens", ())
    job: dict[str, Any] = {
        "upstream": "hubert_local",
        "checkpoint": str(checkpoint),
        "device": str(device),
        "seed": 1337,
        "expdir": str(folder / "experiment"),
    }
    if name == "ic":
        arrange_fluent_commands(fold, data, budget.batch)
        job |= {"downstream": "fluent_commands", "config": {"downstream_expert": _intents(data, budget.batch, workers)}}
    elif name == "pr":
        arrange_phones(fold, data, tokens)
        job |= {"downstream": "ctc", "config": {"downstream_expert": _phones(data, budget.batch, workers)}}
    elif name == "asr":
        arrange_librispeech(fold, data, tokens)
        job |= {"downstream": "asr", "config": {"downstream_expert": _speech(data, workers), "specaug": _SPECAUG}}
    elif name == "asv":
        job["lengths"] = arrange_voxceleb(fold, data, budget.batch * budget.accumulate)
        job |= {"downstream": "sv_voxceleb1", "config": {"downstream_expert": _speakers(data, budget.batch, workers)}}
    else:
        raise RequestError(f"the bench arranges no corpus for s3prl's {name}. Fix: one of {', '.join(TASKS)}")
    splits = {"asr": ["dev-clean", "test-clean"], "asv": ["test"]}.get(name, ["dev", "test"])
    job["config"] |= {
        "runner": {
            "total_steps": updates,
            "gradient_clipping": corpus.task.info.clip,
            "gradient_accumulate_steps": budget.accumulate,
            "log_step": 100,
            "eval_step": updates,
            "save_step": updates + 1,
            "max_keep": 1,
            "eval_dataloaders": splits,
        },
        "optimizer": {
            "name": "TorchOptim",
            "torch_optim_name": {"adam": "Adam", "adamw": "AdamW"}[corpus.task.info.optimizer],
            "lr": lr,
        },
    }
    return job


# The configurations that SUPERB was run with (s3prl, downstream/*/config.yaml), as far as these experts read them.
_SPECAUG = {
    "apply_time_warp": True,
    "time_warp_window": 5,
    "time_warp_mode": "bicubic",
    "apply_freq_mask": True,
    "freq_mask_width_range": [0, 50],
    "num_freq_mask": 4,
    "apply_time_mask": True,
    "time_mask_width_range": [0, 40],
    "num_time_mask": 2,
    "adaptive": False,
}


def _intents(data: Path, batch: int, workers: int) -> dict[str, Any]:
    return {
        "datarc": {"file_path": str(data), "train_batch_size": batch, "eval_batch_size": batch, "num_workers": workers},
        "modelrc": {"projector_dim": 256, "select": "UtteranceLevel", "UtteranceLevel": {"pooling": "MeanPooling"}},
    }


def _phones(data: Path, batch: int, workers: int) -> dict[str, Any]:
    return {
        "corpus": {
            "name": "libriphone",
            "path": str(data),
            "train": ["train"],
            "dev": ["dev"],
            "test": ["test"],
            "bucketing": True,
            "batch_size": batch,
            "num_workers": workers,
        },
        "text": {"mode": "word", "vocab_file": str(data / "vocabulary.txt")},
        "model": {"project_dim": 256, "select": "FrameLevel", "zero_infinity": True},
        "metric": ["per"],
        "metric_higher_better": False,
    }


def _speech(data: Path, workers: int) -> dict[str, Any]:
    return {
        "datarc": {
            "train": ["train"],
            "dev-clean": ["dev"],
            "test-clean": ["test"],
            "libri_root": str(data),
            "bucket_file": str(data / "lengths"),
            "dict_path": str(data / "dict.txt"),
            "batch_size": 32,  # halved by the data set itself to the 16 that this project takes
            "eval_batch_size": 1,
            "num_workers": workers,
            "zero_infinity": True,
            "decoder_args": {"decoder_type": "None"},
        },
        "modelrc": {
            "project_dim": 1024,
            "select": "RNNs",
            "RNNs": {
                "total_rate": -1,
                "module": "LSTM",
                "bidirection": True,
                "dim": [1024, 1024],
                "dropout": [0.2, 0.2],
                "layer_norm": [False, False],
                "proj": [False, False],
                "sample_rate": [1, 1],
                "sample_style": "concat",
            },
        },
    }


def _speakers(data: Path, batch: int, workers: int) -> dict[str, Any]:
    return {
        "datarc": {
            "file_path": str(data),
            "train_meta_data": "",
            "dev_meta_data": str(data / "trials.txt"),
            "test_meta_data": str(data / "trials.txt"),
            "vad_config": {"min_sec": 32000},
            "max_timestep": 128000,
            "train_batch_size": batch,
            "eval_batch_size": 1,
            "num_workers": workers,
        },
        "modelrc": {
            "input_dim": 512,
            "agg_module": "SP",
            "module": "XVector",
            "module_config": {"XVector": {"agg_dim": 1500, "dropout_p": 0.0, "batch_norm": False}},
            "utter_module": "UtteranceExtractor",
            "ObjectiveLoss": "AMSoftmaxLoss",
            "LossConfig": {"AMSoftmaxLoss": {"s": 30.0, "m": 0.4}},
        },
    }
