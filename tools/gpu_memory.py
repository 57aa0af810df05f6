"""GPU memory that each task takes with a Base encoder, under a limit: the table of docs/stores.md.

    python tools/gpu_memory.py --device cuda --gigabytes 16 --out FOLDER

Every task trains its own number of utterances at once (SUPERB's budget, five learning rates) for a few updates and is scored, on the
embedded corpus with every utterance repeated to the length of long ones of the published corpora (`SECONDS`), audio and labels alike:
memory is that of long speech, scores mean nothing. The process may hold no more than the limit, and the planner knows it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from superb_probe import run
from superb_probe.downstreams.audio import SAMPLE_RATE_HZ, read_waveform
from superb_probe.downstreams.base import Fold, Task
from superb_probe.downstreams.load import load_task
from superb_probe.downstreams.manifest import Manifest, Utterance
from superb_probe.downstreams.support import own_corpus
from superb_probe.engine_record import peak_memory_bytes
from superb_probe.errors import RequestError
from superb_probe.upstreams.load import find_device

# LibriSpeech's longest is 35 s, ER's 34 s, SD is cut at 40 s; training crops of SID and ASV are 8 s, their test utterances longer.
SECONDS = {
    "pr": 35, "asr": 35, "ks": 1, "ic": 10, "sid": 20, "er": 34, "asv": 20, "sd": 40, "sf": 12, "qbe": 12,
}  # fmt: skip
REPEATED = ("text", "phones", "iob")


def long_task(name: str, folder: Path) -> Task:
    """A task whose utterances are repeated to the length of long ones."""
    task = load_task(name)
    splits = task.splits

    def longer(root: Path) -> list[Fold]:
        return [
            replace(fold, manifests={split: stretched(each, SECONDS[name], folder) for split, each in fold.manifests.items()})
            for fold in splits(root)
        ]  # fmt: skip

    task.splits = longer  # type: ignore[method-assign]
    return task


def stretched(manifest: Manifest, seconds: float, folder: Path) -> Manifest:
    """Every utterance repeated to about so many seconds, at least once."""
    rows = [_stretched(row, manifest.root, max(1, round(seconds / row.duration_s)), folder) for row in manifest]
    return own_corpus(Manifest(rows, folder, manifest.name), "mini")


def _stretched(row: Utterance, root: Path, times: int, folder: Path) -> Utterance:
    path = folder / f"{row.id}.x{times}.flac"
    if not path.exists():
        wave = np.tile(read_waveform(row, root, SAMPLE_RATE_HZ), times)
        soundfile.write(path, wave, SAMPLE_RATE_HZ, subtype="PCM_16")
    labels = {name: " ".join([text] * times) if name in REPEATED else text for name, text in row.labels.items()}
    if "rttm" in labels:
        labels["rttm"] = f"{row.id}.x{times}.rttm"
        lines = [line.split() for line in (root / row.labels["rttm"]).read_text(encoding="utf-8").splitlines()]
        again = [[*w[:3], f"{float(w[3]) + n * row.duration_s:.3f}", *w[4:]] for n in range(times) for w in lines]
        (folder / labels["rttm"]).write_text("".join(" ".join(words) + "\n" for words in again), encoding="utf-8")
    return Utterance(row.id, path.name, 0.0, soundfile.info(path).frames / SAMPLE_RATE_HZ, labels)


_FOLDER = Path(tempfile.gettempdir()) / "superb-probe-gpu-memory"
for _name in SECONDS:
    globals()[_name] = partial(long_task, _name, _FOLDER)  # as `FILE:NAME` names a task


def main() -> int:
    """Run every task and print a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=tuple(SECONDS), default=list(SECONDS))
    parser.add_argument("--upstream", default="transformer_hubert")
    parser.add_argument("--size", default="base")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--gigabytes", type=float, default=16.0, help="that the process may hold (default: 16)")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--limit", type=int, default=64, help="utterances of a split, but for qbe (default: 64)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the records")
    args = parser.parse_args()
    try:
        gpu = find_device(args.device).type == "cuda"
    except RequestError as error:
        parser.error(str(error))
    if gpu:
        torch.cuda.set_per_process_memory_fraction(args.gigabytes * 1e9 / torch.cuda.mem_get_info()[1])
    _FOLDER.mkdir(exist_ok=True)
    print("| task | utterances of s | batch | peak GB | states kept, GB |\n|---|---|---|---|---|")
    for name in args.task:
        if gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        options: dict[str, Any] = {} if name == "qbe" else {"steps": args.steps}
        records = run(
            args.upstream, f"{Path(__file__)}:{name}", size=args.size, random=1, device=args.device, budget="full",
            limit=None if name == "qbe" else args.limit, out=args.out / name, overwrite="always", **options,
        )  # fmt: skip
        kept = max(each.cost.store_bytes or 0 for each in records)
        peak = max((each.cost.peak_device_memory_bytes or 0) for each in records) if gpu else peak_memory_bytes() or 0
        batch = load_task(name).info.budgets["full"].batch
        print(f"| {name} | {SECONDS[name]} | {batch} | {peak / 1e9:.2f} | {kept / 1e9:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
