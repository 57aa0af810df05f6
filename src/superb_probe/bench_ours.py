"""This project's side of a bench, in a process of its own: so that its peak memory is its own, as the peer's is.

python -m superb_probe.bench_ours JOB.json RESULT.json
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from superb_probe.bench_machine import run_side
from superb_probe.errors import CheckError


@dataclass(frozen=True, slots=True)
class OursJob:
    """One call of `superb_probe.run`, to be timed.

    Attributes:
        checkpoint: of the encoder, in any format.
        task: by name.
        manifests: TSVs by split.
        root: what their audio is relative to.
        lr: learning rates.
        seed: seeds.
        steps: optimiser updates.
        out: folder for records.
        store: folder for states; None keeps them in memory.
        device: where.
        threads: of torch; None leaves its default.
        layer: "all" for one probe a layer beside the weighted sum's; None for the weighted sum alone.
        states: audio and output file, to compare the encoder's layers with the peer's; None: no comparison.
    """

    checkpoint: str
    task: str
    manifests: dict[str, str]
    root: str
    lr: list[float]
    seed: list[int]
    steps: int
    out: str
    store: str | None
    device: str
    threads: int | None
    layer: str | None = None
    states: dict[str, str] | None = None


def run_ours(job: OursJob, folder: Path, timeout_s: float = 3600.0) -> dict[str, Any]:
    """Run a job in another process and read its result.

    Raises:
        CheckError: if it fails or is stopped; the end of its log is in the message.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job_file, result, log = folder / "job.json", folder / "result.json", folder / "log.txt"
    job_file.write_text(json.dumps(asdict(job), indent=1), encoding="utf-8")
    words = [sys.executable, "-m", "superb_probe.bench_ours", str(job_file), str(result)]
    return run_side(words, result, log, f"superb-probe on {job.task}", timeout_s)


def main(argv: Sequence[str]) -> int:
    """Do one job and write its result."""
    job = OursJob(**json.loads(Path(argv[0]).read_text(encoding="utf-8")))
    Path(argv[1]).write_text(json.dumps(measure(job), indent=1), encoding="utf-8")
    return 0


def measure(job: OursJob) -> dict[str, Any]:
    """Time one call of `superb_probe.run`: seconds from the call to the last record, passes by a hook, memory, scores."""
    import torch

    import superb_probe
    from superb_probe.bench_machine import counted_passes, synchronize
    from superb_probe.engine_record import peak_memory_bytes

    if job.threads:
        torch.set_num_threads(job.threads)
    device = torch.device(job.device)
    upstream = superb_probe.load_upstream("transformer_hubert", checkpoint=job.checkpoint)
    upstream.to(device)
    if job.states is not None:
        _write_states(job.states, upstream, device)
    else:
        upstream.extract([torch.zeros(upstream.info.sample_rate_hz, device=device)])  # the peer's encoder is warm too
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    options: dict[str, Any] = {} if job.layer is None else {"layer": job.layer}
    synchronize(device)
    started, worked = time.perf_counter(), time.process_time()
    with counted_passes(upstream) as passes:
        records = superb_probe.run(
            upstream,
            job.task,
            manifest={split: Path(path) for split, path in job.manifests.items()},
            root=Path(job.root),
            protocol="superb",
            budget="full",
            steps=job.steps,
            lr=job.lr,
            seed=job.seed,
            device=job.device,
            out=Path(job.out),
            store=None if job.store is None else Path(job.store),
            overwrite="always",
            **options,
        )
    synchronize(device)
    wall_s, processor_s = time.perf_counter() - started, time.process_time() - worked
    failed = [f"lr {r.probe.lr:g}, seed {r.probe.seed}: {r.error}" for r in records if r.status == "failed"]
    if len(failed) == len(records):
        raise CheckError(f"every trial of {job.task} failed: {failed[0]}")
    return {
        "wall_s": wall_s,
        "processor_s": processor_s,
        "encoder_passes": passes.utterances,
        "encoder_batches": passes.batches,
        "peak_rss_bytes": peak_memory_bytes(),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "failed": failed,
        **_summary(records),
    }


def _summary(records: Sequence[Any]) -> dict[str, Any]:
    """Costs and scores of some records."""
    return {
        "extract_s": max(record.cost.extract_s or 0.0 for record in records),
        "fit_s": sum(record.cost.fit_s or 0.0 for record in records),
        "store_bytes": max(record.cost.store_bytes or 0 for record in records),
        "trials": len(records),
        "scores": [
            {
                "lr": record.probe.lr,
                "seed": record.probe.seed,
                "layer": record.probe.layer,
                "selected": None if record.selection is None else record.selection.value,
                "selected_at": None if record.selection is None else record.selection.step,
                "after_last_update": None if record.selection is None else record.selection.curve[-1][1],
                "test": None if record.score is None else record.score.value,
            }
            for record in records
        ],
    }


def _write_states(paths: dict[str, str], upstream: Any, device: Any) -> None:
    """The layer states (L, T, D) of one file."""
    import numpy as np
    import soundfile
    import torch

    wav, _ = soundfile.read(paths["audio"], dtype="float32")
    with torch.inference_mode():
        layers = upstream.extract([torch.from_numpy(wav).to(device)])
    np.save(paths["out"], layers.states[:, 0].float().cpu().numpy())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
