"""The command `finetune`: an encoder and a recogniser's head trained together, on utterances or whole documents."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from superb_probe.commands_flags import add_device, add_json, add_random, add_threads
from superb_probe.commands_output import print_json, stdout_to_stderr, table
from superb_probe.errors import RequestError
from superb_probe.settings import pairs, parse_duration

if TYPE_CHECKING:
    from superb_probe.downstreams.manifest import Manifest
    from superb_probe.finetuning import FinetuneRequest

_SPLITS = ("train", "dev", "test")


def add_commands(subparsers: Any) -> None:
    """Add `finetune`."""
    parser = subparsers.add_parser(
        "finetune",
        help="train an encoder and a recogniser's head together",
        description="Speech recognition by CTC with the whole encoder trained, as in the Mamba-HuBERT paper: the head alone for the\n"
        "first tenth of the updates, then all but the convolutional front end. docs/finetune.md.",
        epilog="examples:\n"
        "  superb-probe finetune --upstream mamba_hubert_causal --checkpoint mamba.safetensors --manifest train=a.tsv dev=b.tsv \\\n"
        "    test=c.tsv --out runs/streaming --device cuda --precision bfloat16\n"
        "  superb-probe finetune --upstream mamba_hubert --checkpoint mamba.safetensors --stm /corpora/TEDLIUM_release-3/legacy \\\n"
        "    --context document --head conv --recompute --out runs/talks --device cuda --precision bfloat16",
    )
    _add_model(parser)
    _add_data(parser)
    _add_training(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--time-limit", metavar="TIME", help="stop with a checkpoint after this long, as 25m")
    add_device(parser)
    add_json(parser, ": the description")
    parser.set_defaults(handler=run_finetuning)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--upstream", required=True, metavar="NAME", help="a HuBERT of this project")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="its weights")
    parser.add_argument("--size", help="without a checkpoint: test, tiny, small or base")
    add_random(parser)
    parser.add_argument("--upstream-option", nargs="+", default=[], metavar="NAME=VALUE", help="the encoder's own")
    parser.add_argument(
        "--head", choices=("lstm", "blstm", "conv", "linear"), default="lstm",
        help="lstm (unidirectional) and linear can stream; conv has 12 layers (default: lstm)",
    )  # fmt: skip
    parser.add_argument("--head-width", type=int, metavar="N", help="default: lstm and blstm 1024, conv and linear 256")
    parser.add_argument("--head-layers", type=int, metavar="N", help="default: lstm and blstm 2, conv 12")


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--manifest", nargs="+", default=[], metavar="SPLIT=TSV", help="train, dev and test, with `text`"
    )
    parser.add_argument("--root", type=Path, metavar="DIR", help="what the manifests' audio starts from")
    parser.add_argument("--stm", type=Path, metavar="DIR", help="TED-LIUM 3: the folder of train, dev and test")
    parser.add_argument("--mini", action="store_true", help="the embedded corpus (for trying things out)")
    parser.add_argument(
        "--context", choices=("utterance", "document"), default="utterance",
        help="document: whole talks, chapters or other documents as one input (default: utterance)",
    )  # fmt: skip
    parser.add_argument(
        "--test-context", nargs="+", choices=("utterance", "document"), default=[], help="default: that of training"
    )
    parser.add_argument("--document-column", metavar="NAME", help="label that names the document (default: document)")
    parser.add_argument(
        "--max-seconds", type=float, default=1200.0, metavar="S", help="longer ones are left out (default: 1200)"
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=2000, help="updates (default: 2000; the paper's 200000)")
    parser.add_argument("--lr", type=float, default=1e-4, help="highest rate (default: 1e-4)")
    parser.add_argument("--batch", type=int, default=16, help="passages of an update (default: 16)")
    parser.add_argument(
        "--part-seconds", type=float, default=200.0, metavar="S",
        help="most audio at once, padding included: bounds memory, not the batch (default: 200)",
    )  # fmt: skip
    parser.add_argument(
        "--frozen-share", type=float, default=0.1, metavar="X", help="of the updates, for the head alone"
    )
    parser.add_argument("--dropout", type=float, default=0.1, help="default: 0.1")
    parser.add_argument("--layer-drop", type=float, default=0.05, help="default: 0.05")
    parser.add_argument("--no-specaugment", action="store_true", help="leave SpecAugment out")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    parser.add_argument(
        "--recompute", action="store_true", help="gradient checkpointing: less memory, a third more time"
    )
    parser.add_argument("--evaluate-every", type=int, default=200, metavar="N", help="updates (default: 200)")
    parser.add_argument("--seed", type=int, default=1, help="of order, masks, dropout and the head (default: 1)")
    add_threads(parser)


def run_finetuning(args: argparse.Namespace) -> int:
    """Fine-tune and print the scores; 0 also when the time limit stopped it (its last line says so)."""
    import torch

    from superb_probe.finetuning import finetune

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with stdout_to_stderr(args.json):
        description = finetune(request_of(args))
    if description is None:
        return 0
    if args.json:
        print_json(description)
        return 0
    rows = [
        (score["context"], f"{score['wer']:.2f}", _interval(score["ci95"]), score["passages"])
        for score in description["test"]
    ]
    print(table(("test by", "wer %", "95 % interval", "passages"), rows))
    print(f"update {description['step']}, dev wer {description['dev_wer']:.2f} %; {args.out}")
    return 0


def _interval(ends: list[float | None]) -> str:
    return "-" if ends[0] is None else f"[{ends[0]:.2f}, {ends[1]:.2f}]"


def request_of(args: argparse.Namespace) -> FinetuneRequest:
    """The request of a command line.

    Raises:
        RequestError: for no data or several, and values that contradict each other.
    """
    from superb_probe.commands_run import option_values
    from superb_probe.finetuning import FinetuneRequest, HeadChoice
    from superb_probe.probes.finetune import FinetuneRecipe
    from superb_probe.probes.finetune_model import Regularisation
    from superb_probe.upstreams.load import find_device

    recipe = FinetuneRecipe(
        steps=args.steps,
        lr=args.lr,
        batch=args.batch,
        part_s=args.part_seconds,
        frozen_share=args.frozen_share,
        precision=args.precision,
        seed=args.seed,
        evaluate_every=args.evaluate_every,
    )
    return FinetuneRequest(
        upstream=args.upstream,
        manifests=_manifests(args),
        out=args.out,
        checkpoint=args.checkpoint,
        size=args.size,
        random=args.random,
        upstream_options=option_values(args.upstream_option),
        head=HeadChoice(args.head, args.head_width, args.head_layers),
        recipe=recipe,
        how=Regularisation(args.dropout, args.layer_drop, args.recompute),
        augment=not args.no_specaugment,
        context=args.context,
        test_contexts=tuple(dict.fromkeys(args.test_context)),
        test_manifests=_talks(args),
        document_column=args.document_column,
        longest_s=args.max_seconds,
        device=find_device(args.device),
        resume=args.resume,
        time_limit_s=float("inf") if args.time_limit is None else parse_duration(args.time_limit),
    )


def _talks(args: argparse.Namespace) -> dict[str, Manifest]:
    """With --stm, the test split in each context: a talk has pauses that its segments have not."""
    from superb_probe.probes.finetune_data import stm_manifest

    return (
        {} if args.stm is None else {each: stm_manifest(args.stm / "test", each, "test") for each in args.test_context}
    )


def _manifests(args: argparse.Namespace) -> dict[str, Manifest]:
    from superb_probe.downstreams.manifest import Manifest
    from superb_probe.downstreams.mini import mini_root, read_splits

    if sum((bool(args.manifest), args.stm is not None, args.mini)) != 1:
        raise RequestError("superb-probe finetune: give one of --manifest, --stm and --mini")
    if args.mini:
        return read_splits(mini_root(), "read")
    if args.stm is not None:
        from superb_probe.probes.finetune_data import stm_manifest

        return {split: stm_manifest(args.stm / split, args.context, split) for split in _SPLITS}
    files = pairs(args.manifest, "--manifest")
    missing = [split for split in _SPLITS if split not in files]
    if missing or len(files) != len(_SPLITS):
        raise RequestError(f"--manifest: expected train=, dev= and test=, found {', '.join(files)}")
    return {split: Manifest.read(Path(file), args.root) for split, file in files.items()}
