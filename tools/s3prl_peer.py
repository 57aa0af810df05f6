"""s3prl's side of `superb-probe bench probing`: one downstream task trained by s3prl's own runner, timed and counted.

Runs inside the peer's environment, where s3prl 0.4.18 is installed and this project need not be:

    python tools/s3prl_peer.py JOB.json RESULT.json

The job is written by `superb_probe.bench_peer`: s3prl's name of the task, its configuration, checkpoint, device and seed. The result
holds seconds of every update, seconds of every evaluation, utterances put through the encoder (counted by a hook), memory, and the
scalars s3prl logged.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import random
import resource
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import s3prl_peer_stand_ins as stand_ins


def main(job_path: str, result_path: str) -> int:
    """Run one job and write its result."""
    job: dict[str, Any] = json.loads(Path(job_path).read_text(encoding="utf-8"))
    started = time.perf_counter()
    replaced = stand_ins.install()
    import numpy as np
    import torch

    torch.multiprocessing.set_sharing_strategy("file_system")
    if job.get("threads"):
        torch.set_num_threads(int(job["threads"]))
    cuda = job["device"].startswith("cuda")
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(int(job["seed"]))
    # as run_downstream.py sets them
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    stand_ins.GAIN_DB["value"] = float(job.get("gain_db", 0.0))
    os.makedirs(job["expdir"], exist_ok=True)
    cache = _length_cache(job)
    try:
        result = _run(job, cuda)
    finally:
        if cache is not None:
            cache.unlink(missing_ok=True)
    result |= {
        "seconds_in_all": time.perf_counter() - started,
        "stand_ins": replaced,
        "peak_rss_bytes": max(_rss(resource.RUSAGE_SELF), _rss(resource.RUSAGE_CHILDREN)),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "s3prl": _version("s3prl"),
            "transformers": _version("transformers"),
        },
        "threads": torch.get_num_threads(),
    }
    Path(result_path).write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 0


def _run(job: dict[str, Any], cuda: bool) -> dict[str, Any]:
    """s3prl's runner: built, trained, evaluated where its configuration says."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    started = time.perf_counter()
    from s3prl.downstream.runner import Runner

    if job["downstream"] == "ctc":
        stand_ins.keep_num_workers()
    runner = Runner(_arguments(job), job["config"])
    if job.get("states"):
        _write_states(job["states"], runner.upstream.model, job["device"])
    setup_s = time.perf_counter() - started
    meter = Meter(runner, cuda)
    handle = register_optimizer_step_post_hook(meter.stamp)
    if cuda:
        import torch

        torch.cuda.reset_peak_memory_stats()
    _synchronize(cuda)
    begun = time.perf_counter()
    runner.train()
    _synchronize(cuda)
    train_s = time.perf_counter() - begun
    handle.remove()
    return {
        "setup_s": setup_s,
        "train_s": train_s,
        "begun": begun,
        "stamps": meter.stamps,
        "processor_stamps": meter.processor,
        "updates": len(meter.stamps),
        "evaluations": meter.evaluations,
        "passes": meter.passes,
        "scalars": stand_ins.SCALARS,
    }


class Meter:
    """What is read off a runner of s3prl while it trains: nothing of it is changed.

    Attributes:
        stamps: when each update was made.
        processor: processor seconds of all threads by then: what other work on the machine does not stretch.
        passes: utterances through the encoder, in training and in evaluation.
        evaluations: seconds and passes of each.
    """

    def __init__(self, runner: Any, cuda: bool) -> None:
        """Watch the runner's encoder and its `evaluate`."""
        self.stamps: list[float] = []
        self.processor: list[float] = []
        self.passes = {"training": 0, "evaluation": 0}
        self.evaluations: list[dict[str, Any]] = []
        self._evaluating, self._cuda, self._evaluate = False, cuda, runner.evaluate
        runner.evaluate = self.evaluate
        runner.upstream.model.register_forward_hook(self.count)

    def count(self, module: Any, inputs: Any, output: Any) -> None:
        """A forward hook of the encoder."""
        self.passes["evaluation" if self._evaluating else "training"] += len(inputs[0])

    def stamp(self, optimizer: Any, arguments: Any, keywords: Any) -> None:
        """A hook after every step of an optimiser."""
        self.stamps.append(time.perf_counter())
        self.processor.append(time.process_time())

    def evaluate(self, split: Any = None, logger: Any = None, global_step: int = 0) -> Any:
        """The runner's own evaluation, timed."""
        _synchronize(self._cuda)
        before, begun, worked = time.perf_counter(), self.passes["evaluation"], time.process_time()
        self._evaluating = True
        names = self._evaluate(split, logger, global_step)
        self._evaluating = False
        _synchronize(self._cuda)
        self.evaluations.append(
            {
                "split": split,
                "step": global_step,
                "seconds": time.perf_counter() - before,
                "processor_s": time.process_time() - worked,
                "passes": self.passes["evaluation"] - begun,
            }
        )
        return names


def _arguments(job: dict[str, Any]) -> Namespace:
    """What run_downstream.py would have parsed."""
    return Namespace(
        mode="train",
        init_ckpt=None,
        past_exp=None,
        upstream=job["upstream"],
        upstream_ckpt=job["checkpoint"],
        upstream_model_config=None,
        upstream_refresh=False,
        upstream_trainable=False,
        upstream_feature_selection="hidden_states",
        upstream_layer_selection=None,
        upstream_feature_normalize=False,
        downstream=job["downstream"],
        downstream_variant=None,
        expdir=job["expdir"],
        device=job["device"],
        seed=int(job["seed"]),
        local_rank=None,
        push_to_hf_hub=False,
        verbose=False,
    )


def _length_cache(job: dict[str, Any]) -> Path | None:
    """The file in which speaker verification keeps trimmed lengths, inside s3prl's own folder: written from the job's list."""
    if "lengths" not in job:
        return None
    import s3prl
    import torch

    cache = Path(s3prl.__file__).parent / "downstream" / "sv_voxceleb1" / ".wav_lengths" / "Voxceleb1_length.pt"
    cache.parent.mkdir(exist_ok=True)
    tags, lengths = zip(*((tuple(tag), length) for tag, length in job["lengths"]), strict=True)
    torch.save([list(tags), list(lengths)], str(cache))
    return cache


def _write_states(paths: dict[str, str], upstream: Any, device: str) -> None:
    """The layer states (L, T, D) of one file, to be compared with this project's."""
    import numpy as np
    import torch
    import torchaudio

    wav, _ = torchaudio.load(paths["audio"])
    upstream.eval()
    with torch.no_grad():
        layers = upstream([wav[0].to(device)])["hidden_states"]
    np.save(paths["out"], torch.stack([layer[0] for layer in layers]).float().cpu().numpy())


def _synchronize(cuda: bool) -> None:
    if cuda:
        import torch

        torch.cuda.synchronize()


def _rss(who: int) -> int:
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        import s3prl

        path = Path(s3prl.__file__).with_name("version.txt")
        return path.read_text().strip() if name == "s3prl" and path.is_file() else "unknown"


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python s3prl_peer.py JOB.json RESULT.json")
    sys.exit(main(sys.argv[1], sys.argv[2]))
