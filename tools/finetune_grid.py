"""The comparisons of the Mamba-HuBERT paper that are about fine-tuning, on what a short budget allows: same data, updates, size.

`causal` (its table 2): Mamba and Transformer, each with the published front end (63 frames of look-ahead, GroupNorm over the
utterance) and the strictly causal one. `length` (its table 1): ExtBiMamba and Transformer, each trained on utterances and on whole
documents (as much audio an update), both scored by both. Every cell has several seeds. Runs that are there are kept, stopped ones go
on; then come a table, learning curves and a CSV.

    python tools/finetune_grid.py causal --device cuda --precision bfloat16 --steps 3000 --seed 1 2 3 --out runs/causal
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from superb_probe.downstreams.manifest import Manifest, Utterance
from superb_probe.downstreams.mini import mini_root, read_splits
from superb_probe.finetuning import DESCRIPTION, LOG, FinetuneRequest, HeadChoice, finetune
from superb_probe.probes.finetune import CHECKPOINT, FinetuneRecipe
from superb_probe.probes.finetune_data import passages
from superb_probe.probes.finetune_model import Regularisation
from superb_probe.probes.statistics import t_interval
from superb_probe.results.lines import Panel, draw_panels
from superb_probe.upstreams.load import find_device

CELLS: dict[str, dict[str, dict[str, Any]]] = {
    "causal": {
        f"{family}, {front}": {
            "upstream": f"{family}_hubert_causal",
            "upstream_options": {"causal_front_end": front == "strict"},
            "head": "lstm",
        }
        for family in ("mamba", "transformer")
        for front in ("published", "strict")
    },
    "length": {
        f"{family}, {context}": {"upstream": f"{family}_hubert", "context": context, "head": "conv"}
        for family in ("mamba", "transformer")
        for context in ("utterance", "document")
    },
}
TABLES = ("read", "slots", "commands", "phrases")  # of mini: train splits with a text


def main() -> None:
    """Run what is missing, then report."""
    args = arguments()
    manifests = mini_manifests() if args.manifest is None else own_manifests(args)
    checkpoints = dict(text.split("=", 1) for text in args.checkpoint)
    for seed in args.seed:
        for name in args.cell or CELLS[args.plan]:
            folder = args.out / f"{name.replace(', ', '-')}-{seed}"
            if finished(folder):
                continue
            finetune(request(args, CELLS[args.plan][name], manifests, checkpoints.get(name), seed, folder))
    report(args)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", choices=tuple(CELLS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cell", nargs="+", metavar="CELL", help="only these, to run several processes side by side")
    parser.add_argument(
        "--checkpoint", nargs="+", default=[], metavar="CELL=FILE", help="instead of the shipped weights"
    )
    parser.add_argument("--random", action="store_true", help="start from random weights, of the run's seed")
    parser.add_argument("--size", help="of random weights (default: tiny)")
    parser.add_argument("--manifest", nargs=3, type=Path, metavar=("TRAIN", "DEV", "TEST"), help="default: mini")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--document-column", help="default: mini's speakers, else document or LibriSpeech's chapters")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--part-seconds", type=float, default=200.0, help="most audio at once (default: 200)")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--frozen-share", type=float, help="default: 0.1, and 0 with --random")
    parser.add_argument("--head", help="instead of the plan's (lstm; conv): linear learns in the fewest updates")
    parser.add_argument("--head-width", type=int, default=256)
    parser.add_argument("--no-specaugment", dest="augment", action="store_false", help="for runs too short to overfit")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--seed", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    unknown = sorted(set(args.cell or ()) - set(CELLS[args.plan]))
    if unknown:
        parser.error(f"--cell {'; '.join(unknown)}: not in {args.plan}, which has {'; '.join(CELLS[args.plan])}")
    if args.random and args.checkpoint:
        parser.error("--random and --checkpoint: one of them")
    if args.size and not args.random:
        parser.error("--size is of --random: checkpoints and the shipped weights have their own")
    return args


def mini_manifests() -> dict[str, Manifest]:
    """All train tables of mini that have a text; dev and test sentences."""
    root = mini_root()
    rows = [row for table in TABLES for row in read_splits(root, table)["train"]]
    plain = [Utterance(row.id, row.audio, row.start_s, row.duration_s, _labels(row)) for row in rows]
    read = read_splits(root, "read")
    return {"train": Manifest(plain, root, "mini.train"), "dev": read["dev"], "test": read["test"]}


def _labels(row: Utterance) -> dict[str, str]:
    return {"text": row.labels["text"], "speaker": row.labels["speaker"]}


def own_manifests(args: argparse.Namespace) -> dict[str, Manifest]:
    """The manifests named on the command line."""
    return {
        split: Manifest.read(path, args.root)
        for split, path in zip(("train", "dev", "test"), args.manifest, strict=True)
    }


def finished(folder: Path) -> bool:
    """Whether a run has its scores."""
    path = folder / DESCRIPTION
    return path.is_file() and "test" in json.loads(path.read_text(encoding="utf-8"))


def request(
    args: argparse.Namespace,
    cell: dict[str, Any],
    manifests: dict[str, Manifest],
    checkpoint: str | None,
    seed: int,
    folder: Path,
) -> FinetuneRequest:
    """The run of a cell and a seed."""
    frozen = args.frozen_share if args.frozen_share is not None else 0.0 if args.random else 0.1
    context = cell.get("context", "utterance")
    column = args.document_column or ("speaker" if args.manifest is None else None)
    batch = args.batch
    if args.plan == "length":  # an update holds whole documents, and as many utterances as are in so many
        a_document = len(manifests["train"]) / len(passages(manifests["train"], "document", column))
        documents = max(1, round(batch / a_document))
        batch = documents if context == "document" else round(documents * a_document)
    recipe = FinetuneRecipe(
        steps=args.steps, lr=args.lr, batch=batch, part_s=args.part_seconds, frozen_share=frozen, precision=args.precision, seed=seed,
        evaluate_every=max(1, args.steps // 10),
    )  # fmt: skip
    return FinetuneRequest(
        upstream=cell["upstream"],
        manifests=manifests,
        out=folder,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        size=args.size if args.random else None,
        random=seed if args.random else None,
        upstream_options={} if checkpoint else cell.get("upstream_options", {}),
        head=HeadChoice(args.head or cell["head"], args.head_width),
        augment=args.augment,
        recipe=recipe,
        how=Regularisation(),
        context=context,
        test_contexts=("utterance", "document") if args.plan == "length" else (),
        document_column=column,
        device=find_device(args.device),
        resume=(folder / CHECKPOINT).exists(),
    )


def report(args: argparse.Namespace) -> None:
    """Print a row a cell and the differences of the families, and write OUT.csv and learning curves beside the runs."""
    rows: list[dict[str, Any]] = []
    scores: dict[tuple[str, str], list[float]] = {}
    lengths: dict[tuple[str, float, float], list[float]] = {}
    curves: dict[str, dict[str, tuple[list[float], list[float]]]] = {"dev_wer": {}, "loss": {}}
    for name in CELLS[args.plan]:
        folders = [args.out / f"{name.replace(', ', '-')}-{seed}" for seed in args.seed]
        found = [
            json.loads((folder / DESCRIPTION).read_text(encoding="utf-8")) for folder in folders if finished(folder)
        ]
        for place in range(len(found[0]["test"]) if found else 0):
            each = [run["test"][place]["wer"] for run in found]
            scores[name, found[0]["test"][place]["context"]] = each
            shared = {"cell": name, "test by": found[0]["test"][place]["context"]}
            minutes = sum(run["seconds"] for run in found) / 60 / len(found)
            rows.append(shared | summary(each) | {"minutes": minutes})
        lengths.update(against_length(name, found))
        logs = [
            list(csv.DictReader((folder / LOG).open(encoding="utf-8")))
            for folder in folders
            if (folder / LOG).is_file()
        ]
        for column, lines in curves.items() if logs else ():
            steps = [float(row["step"]) for row in min(logs, key=len)]
            lines[name] = steps, [sum(float(log[k][column]) for log in logs) / len(logs) for k in range(len(steps))]
    if args.plan == "length":
        rows += [
            {"cell": name, "test by": f"{low:g} to {high:g} s"} | summary(each)
            for (name, low, high), each in lengths.items()
        ]
    table = pd.DataFrame(rows + differences(scores))
    print(table.to_string(index=False, float_format="%.2f", na_rep=""))
    start = f"random weights of size {args.size or 'tiny'}" if args.random else "pre-trained weights"
    panels = [
        Panel("Word error rate on dev", "update", "% (lower is better)", curves["dev_wer"]),
        Panel("Loss in training", "update", "CTC, a character", curves["loss"]),
    ]
    if args.plan == "length":
        lines: dict[str, tuple[list[float], list[float]]] = {}
        for (name, low, high), each in lengths.items():
            x, y = lines.setdefault(name, ([], []))
            x.append(round(math.sqrt(low * high), 1))
            y.append(sum(each) / len(each))
        panels.append(Panel("On test, by length", "seconds of an input", "% (lower is better)", lines, log_x=True))
    for path in draw_panels(panels, table, args.out / "grid", f"{args.plan}: {start}, mean of {len(args.seed)} seeds"):
        print(path)


def against_length(name: str, runs: Sequence[dict[str, Any]]) -> dict[tuple[str, float, float], list[float]]:
    """Word error rates of every seed by the length of the input, from and to so many seconds; all contexts of the test."""
    found: dict[tuple[str, float, float], list[float]] = {}
    for run in runs:
        for score in run["test"]:
            for each in score["by_length"]:
                found.setdefault((name, each["from_s"], each["to_s"]), []).append(each["wer"])
    return dict(sorted(found.items(), key=lambda item: item[0][1]))


def summary(values: list[float]) -> dict[str, Any]:
    """The mean over seeds, Student's interval where there are several, and each."""
    low, high = t_interval(values) if len(values) > 1 else (None, None)
    each = " ".join(f"{value:.2f}" for value in values)
    return {"seeds": len(values), "wer": sum(values) / len(values), "low": low, "high": high, "each": each}


def differences(scores: dict[tuple[str, str], list[float]]) -> list[dict[str, Any]]:
    """Mamba less Transformer and trained on documents less on utterances, seed by seed, wherever both have the same seeds."""
    rows = []
    for one, other in (("mamba", "transformer"), ("document", "utterance")):
        for (name, context), values in scores.items():
            against = scores.get((name.replace(one, other), context), [])
            if one in name and len(values) == len(against):
                paired = [ours - theirs for ours, theirs in zip(values, against, strict=True)]
                shared = {"cell": name.replace(one, f"{one} less {other}"), "test by": context}
                rows.append(shared | summary(paired) | {"minutes": None})
    return rows


if __name__ == "__main__":
    main()
