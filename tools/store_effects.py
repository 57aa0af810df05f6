"""What the types and the crops that stores keep do to scores, on the embedded corpus: the tables of docs/stores.md.

Usage: python tools/store_effects.py dtypes --task ic --upstream transformer_hubert --size tiny --random 1
       python tools/store_effects.py crops --upstream mamba_hubert_causal --reference-crops 128 --draws 120 --seed {1..360} ...

Each row is a paired difference: the score of a seed of the probe less the score of the same seed with float32 states
("dtypes") or with crops encoded anew at every access ("crops"), with the 95 % interval of Student's t over the seeds. Encoding
anew takes hours on a CPU: --reference-crops K puts K kept crops of each utterance, a lot of them, in its place, and says so.
--draws N keeps other crops for each of N groups of the seeds: a difference is then the mean of a group, and the interval is over the
draws, whose effect all seeds of one draw share.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from superb_probe import run
from superb_probe.downstreams.audio import read_waveform
from superb_probe.downstreams.base import Fold, Task
from superb_probe.downstreams.load import load_task
from superb_probe.downstreams.manifest import Manifest
from superb_probe.downstreams.mini import mini_root, read_splits
from superb_probe.downstreams.sid import INFO, SpeakerIdentification
from superb_probe.downstreams.support import own_corpus
from superb_probe.errors import RequestError
from superb_probe.probes.statistics import t_interval
from superb_probe.upstreams.base import LayerStates, Upstream
from superb_probe.upstreams.load import load_upstream

# Crops of sentences of 2 to 7 s, by their names on the command line. Of VoxCeleb's utterances (8.2 s on average) 8 s are as much as
# 3.5 s are of these; with 1 s every utterance is cut, to 29 % on average.
CROPS_S = {"1": 1.0, "3.5": 3.5}


class Computed(Upstream):
    """The float32 states of an encoder over the embedded corpus, computed once and given by utterance id."""

    def __init__(self, encoder: Upstream, task: Task) -> None:
        """Encodes every utterance of a task by itself."""
        super().__init__()
        self.info, self.encoder, self._states = encoder.info, encoder, dict[str, Tensor]()
        for fold in task.splits(mini_root()):
            for manifest in fold.manifests.values():
                for utterance in manifest:
                    wave = read_waveform(utterance, manifest.root, encoder.info.sample_rate_hz, task.info.waveform)
                    self._states[utterance.id] = encoder.extract([torch.from_numpy(wave)]).states[:, 0].cpu().clone()

    def num_frames(self, num_samples: int) -> int:
        """Those of the encoder."""
        return self.encoder.num_frames(num_samples)

    def states_for(self, utterance_id: str) -> Tensor:
        """The states (L, T, D) of an utterance."""
        return self._states[utterance_id]

    def forward(self, wavs: Tensor, num_samples: Tensor) -> LayerStates:
        """Not there: the states are."""
        raise NotImplementedError


class ShortCrops(SpeakerIdentification):
    """SID on the sentences of the embedded corpus, cut to so many seconds in training."""

    def __init__(self, crop_s: float) -> None:
        """`crop_s` in seconds."""
        self.info = replace(
            INFO, budgets={name: replace(budget, max_crop_s=crop_s) for name, budget in INFO.budgets.items()}
        )

    def splits(self, root: Path) -> list[Fold]:
        """The training speakers: every fifth sentence of each is dev, the one after it test, and so are commands and phrases."""
        sentences = read_splits(mini_root(), "read")["train"]
        count: dict[str, int] = {}
        parts: dict[str, list[Any]] = {"train": [], "dev": [], "test": []}
        speakers = set(sentences.labels("speaker"))
        for table in ("commands", "phrases"):  # more to be scored on: a point of 70 sentences is less than one of them
            parts["test"] += [
                row for row in read_splits(mini_root(), table)["train"] if row.labels["speaker"] in speakers
            ]
        for utterance in sentences:
            number = count[utterance.labels["speaker"]] = count.get(utterance.labels["speaker"], -1) + 1
            parts[{3: "dev", 4: "test"}.get(number % 5, "train")].append(utterance)
        plain = {
            split: [replace(row, labels={"speaker": row.labels["speaker"]}) for row in part]
            for split, part in parts.items()
        }
        made = {split: Manifest(part, sentences.root, f"crops.{split}") for split, part in plain.items()}
        return [Fold(None, {split: own_corpus(manifest, "mini") for split, manifest in made.items()})]


for _name, _seconds in CROPS_S.items():
    globals()[f"crops_of_{_name}"] = partial(ShortCrops, _seconds)  # as `FILE:NAME` names a task


def scores(upstream: Any, task: str, args: argparse.Namespace, **options: Any) -> np.ndarray[Any, Any]:
    """The test score of every seed."""
    shared = {"lr": [args.lr], "seed": args.seed, "steps": args.steps, "device": args.device, **options}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(sys.stderr):
        records = run(upstream, task, **shared, out=Path(folder), store=args.store)
    values = {record.probe.seed: record.score.value for record in records if record.score is not None}
    return np.array([values[seed] for seed in shared["seed"]])


def drawn_anew(upstream: Any, task: str, args: argparse.Namespace, crops: int) -> np.ndarray[Any, Any]:
    """The test score of every seed, each group of them with a draw of crops of its own."""
    groups = np.array(args.seed).reshape(args.draws, -1).tolist()
    found = [
        scores(upstream, task, args, crops=crops, seed=group, crop_seed=number)
        for number, group in enumerate(groups, start=args.draws > 1)
    ]
    return np.concatenate(found)


def row(name: str, found: np.ndarray[Any, Any], base: np.ndarray[Any, Any], draws: int = 1) -> str:
    """One line of a table; the interval is over the draws where there are several, else over the seeds."""
    paired = (found - base).reshape(draws if draws > 1 else len(found), -1).mean(1)
    low, high = t_interval(paired)
    return (
        f"| {name} | {found.mean():.2f} | {found.std(ddof=1):.2f} | {paired.mean():+.2f} | {low:+.2f} to {high:+.2f} |"
    )


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("dtypes", "crops"))
    parser.add_argument("--task", default="ic")
    parser.add_argument("--upstream", default="transformer_hubert")
    parser.add_argument("--size")
    parser.add_argument("--random", type=int)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--crops", nargs="+", type=int, default=[2, 8])
    parser.add_argument("--crop-seconds", choices=tuple(CROPS_S), default="1")
    parser.add_argument("--draws", type=int, default=1, help="of the kept crops, each for its share of the seeds")
    parser.add_argument("--reference-crops", type=int, default=0, metavar="K", help="default: encoded anew")
    parser.add_argument("--store", type=Path, help="folder of states that runs share (default: each makes its own)")
    args = parser.parse_args()
    if args.draws < 1 or len(args.seed) % args.draws or (args.draws == 1 and len(args.seed) < 2):
        parser.error(
            f"--draws {args.draws} of {len(args.seed)} seeds: each draw has as many, and there are several of either"
        )
    try:
        encoder = load_upstream(args.upstream, size=args.size, random=args.random, device=args.device)
    except RequestError as error:
        parser.error(str(error))
    print("| states | mean score | deviation over seeds | mean difference | its 95 % interval |\n|---|---|---|---|---|")
    if args.what == "dtypes":
        upstream = Computed(encoder, load_task(args.task))
        base = scores(upstream, args.task, args, feature_dtype="float32")
        print(row("float32", base, base), flush=True)
        for dtype in ("float16", "bfloat16", "int8"):
            print(row(dtype, scores(upstream, args.task, args, feature_dtype=dtype), base), flush=True)
        return
    task = f"{Path(__file__)}:crops_of_{args.crop_seconds}"
    base = scores(encoder, task, args, crops=args.reference_crops)
    print(
        row(f"{args.reference_crops} crops kept" if args.reference_crops else "crops encoded anew", base, base),
        flush=True,
    )
    for crops in args.crops:
        print(row(f"{crops} crops kept", drawn_anew(encoder, task, args, crops), base, args.draws), flush=True)


if __name__ == "__main__":
    main()
