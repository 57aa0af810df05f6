"""The command that times: `bench probing`, `sweep`, `extraction`, the project's parts, encoders and kernels; and `bench table`."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from superb_probe.commands_flags import add_json, add_threads
from superb_probe.errors import RequestError

PROBING_TASKS = ("ic", "pr", "asr", "asv")


def add_commands(subparsers: Any) -> None:
    """Add `bench`."""
    bench = subparsers.add_parser(
        "bench",
        help="time this project on this machine, against s3prl and against its own parts",
        description="Ratios from one run on this machine; docs/benchmarks.md says what each one measures.",
        epilog="examples:\n"
        "  superb-probe bench sweep --device cuda\n"
        "  superb-probe bench probing --task ic pr --limit 60 --peer-python .venv-s3prl/bin/python",
    )
    kinds = bench.add_subparsers(dest="kind", metavar="WHAT", required=True)
    _add_probing(kinds)
    _add_parts(kinds)
    _add_recurrence(kinds)
    _add_dtw(kinds)
    _add_encoders(kinds)


def _add_probing(kinds: Any) -> None:
    probing = kinds.add_parser(
        "probing",
        help="against s3prl 0.4.18: same corpus, encoder, updates, learning rates",
        description="Train a task's learning rates here and in s3prl, and compare time, encoder passes, memory and scores.",
    )
    _common(probing)
    probing.add_argument("--task", nargs="+", default=list(PROBING_TASKS), help="default: ic pr asr asv")
    probing.add_argument("--updates", type=int, default=2000, help="of both sides (default: 2000)")
    probing.add_argument(
        "--peer-updates",
        type=int,
        default=100,
        metavar="N",
        help="of s3prl that are run; the rest is scaled (default: 100)",
    )
    probing.add_argument("--peer-python", metavar="PATH", help="interpreter of the environment that has s3prl")
    probing.add_argument("--peer-driver", type=Path, metavar="FILE", help="tools/s3prl_peer.py of a checkout")
    probing.add_argument("--lr", nargs="+", type=float, help="learning rates (default: SUPERB's five)")
    probing.add_argument("--seed", nargs="+", type=int, default=[1], help="of this project's side (default: 1)")
    probing.add_argument("--timeout", type=float, default=3600.0, metavar="S", help="of one side of one task")
    probing.set_defaults(handler=run_probing)


def _add_parts(kinds: Any) -> None:
    weighted = kinds.add_parser(
        "weighted-sum",
        help="forward and backward against the time its bytes need",
        description="The weighted sum over (L, B, T, D), forward and backward, against a copy of as many bytes.",
    )
    _common(weighted, encoder=False)
    weighted.add_argument(
        "--shape",
        nargs=4,
        type=int,
        metavar=("L", "B", "T", "D"),
        help="default: 13 32 750 768 on a GPU, 13 4 200 768 on a CPU",
    )
    weighted.set_defaults(handler=run_weighted_sum)

    extraction = kinds.add_parser(
        "extraction",
        help="FLAC on disk to a weighted-sum training batch, against the encoder alone",
        description="Seconds of audio a second: decoding, encoding, storing and reading, and all of it together.",
    )
    _common(extraction)
    extraction.add_argument("--dtype", default="float32", help="the encoder's number format (default: float32)")
    extraction.add_argument(
        "--copies", type=int, default=1, metavar="N", help="of every file, for a bench that lasts longer (default: 1)"
    )
    extraction.set_defaults(handler=run_extraction)

    sweep = kinds.add_parser(
        "sweep",
        help="a sweep of IC, 5 rates x 5 seeds, against one encoder pass; --layer all against the weighted sum",
        description="A whole sweep, decoding and writing included, against one pass of the encoder over the corpus.",
    )
    _common(sweep)
    sweep.add_argument("--task", default="ic", help="default: ic")
    sweep.add_argument("--updates", type=int, help="default: SUPERB's own number")
    sweep.add_argument(
        "--copies",
        type=int,
        default=1,
        metavar="N",
        help="of every file, for a corpus of a real one's size (default: 1)",
    )
    sweep.add_argument(
        "--classes",
        type=int,
        metavar="N",
        help="of a task with one label, given by turns: heads as large as SUPERB's (SID: 1251)",
    )
    sweep.add_argument("--seed", nargs="+", type=int, default=[1, 2, 3, 4, 5], help="default: 1 2 3 4 5")
    sweep.add_argument("--no-layers", action="store_true", help="leave --layer all out")
    sweep.add_argument("--timeout", type=float, default=3600.0, metavar="S", help="of one run")
    sweep.set_defaults(handler=run_sweep)


def _add_recurrence(kinds: Any) -> None:
    recurrence = kinds.add_parser(
        "recurrence",
        help="ASR's recurrent layers, all trials as one stack, beside torch's one after another",
        description="Bidirectional LSTM layers of several trials, forward and backward.",
    )
    _common(recurrence, encoder=False)
    recurrence.add_argument(
        "--shape",
        nargs=5,
        type=int,
        default=[5, 16, 250, 1024, 1024],
        metavar=("N", "B", "T", "I", "H"),
        help="trials, rows, frames, input, width (default: 5 16 250 1024 1024)",
    )
    _add_turns(recurrence, 5)
    recurrence.set_defaults(handler=run_recurrence)


def _add_dtw(kinds: Any) -> None:
    dtw = kinds.add_parser(
        "dtw",
        help="query by example's search, all layers at once, beside dtw-python",
        description="One query in some documents: the whole search and its recurrence alone, in processor time on a CPU.",
    )
    _common(dtw, encoder=False)
    dtw.add_argument(
        "--shape",
        nargs=5,
        type=int,
        default=[13, 768, 50, 40, 330],
        metavar=("L", "D", "Q", "N", "T"),
        help="layers, width, query frames, documents, their longest (default: 13 768 50 40 330)",
    )
    _add_turns(dtw, 5)
    dtw.set_defaults(handler=run_dtw)


def _add_encoders(kinds: Any) -> None:
    encoders = kinds.add_parser(
        "encoders",
        help="all layers of every encoder, in seconds of audio a second, beside transformers' HubertModel",
        description="Encoders with random weights on a batch in memory: no decoding, no storing.",
    )
    _common(encoders, encoder=False)
    names = ["transformer_hubert", "mamba_hubert", "mamba_hubert_causal"]
    encoders.add_argument("--upstream", nargs="+", default=names, help=f"default: {' '.join(names)}")
    encoders.add_argument("--size", default="base", help="default: base")
    encoders.add_argument("--dtype", default="float32", help="default: float32")
    encoders.add_argument(
        "--part", nargs="+", choices=("batch", "growth"), default=["batch"], help="default: batch; growth: one long row"
    )
    encoders.add_argument("--batch", type=int, default=4, help="utterances (default: 4)")
    encoders.add_argument("--seconds", type=float, default=15.0, help="of each (default: 15)")
    encoders.add_argument(
        "--growth-seconds",
        nargs="+",
        type=float,
        metavar="S",
        help="lengths of growth (default: 5 to 80, on a GPU to 1200)",
    )
    encoders.add_argument("--no-peer", dest="peer", action="store_false", help="leave transformers out")
    _add_turns(encoders, 5)
    encoders.set_defaults(handler=run_encoders)

    parts = ("scan", "scan-gradients", "block", "block-gradients")
    kernels = kinds.add_parser(
        "kernels",
        help="the selective scan's back ends and whole Mamba blocks, beside mamba_ssm, mambapy and transformers where installed",
        description="Scans and blocks at the width of the paper's Base model: times, ratios, memory, floors by counting.",
    )
    _common(kernels, encoder=False)
    kernels.add_argument("--dtype", default="float32", help="default: float32")
    kernels.add_argument("--part", nargs="+", choices=parts, default=list(parts), help=f"default: {' '.join(parts)}")
    kernels.add_argument("--shape", nargs="+", metavar="ROWSxFRAMES", help="default: of the device, such as 16x1500")
    _add_turns(kernels, 10)
    kernels.set_defaults(handler=run_kernels)

    table = kinds.add_parser(
        "table",
        help="Markdown tables of what `bench encoders` and `bench kernels` wrote",
        description="The tables of docs/encoder-speed.md are made by this.",
    )
    table.add_argument("file", nargs="+", type=Path, help="JSON documents, as --out writes them")
    table.set_defaults(handler=run_table)


def _add_turns(parser: Any, repeats: int) -> None:
    parser.add_argument(
        "--repeats",
        type=int,
        default=repeats,
        help=f"turns; GPU: the median counts, CPU: the least (default: {repeats})",
    )
    parser.add_argument(
        "--limit", type=float, default=20.0, metavar="S", help="no new turn of a row after it (default: 20)"
    )


def _common(parser: Any, encoder: bool = True) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    add_threads(parser)
    add_json(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON document here too")
    if encoder:
        parser.add_argument("--size", default="base", help="of the encoder with random weights (default: base)")
        parser.add_argument(
            "--checkpoint", type=Path, metavar="FILE", help="a Transformer HuBERT instead of random weights"
        )
        parser.add_argument(
            "--limit", type=int, metavar="N", help="training utterances, spread over the embedded corpus"
        )
        parser.add_argument("--work", type=Path, metavar="DIR", help="keep manifests, WAVs, logs and stores here")


def run_probing(args: argparse.Namespace) -> int:
    """Bench a task's sweep against s3prl."""
    from superb_probe import bench_probing
    from superb_probe.bench_peer import DRIVER
    from superb_probe.engine_ask import choose_device

    bench_probing.check_request(args.task, args.updates, args.peer_updates, args.limit)

    def measure(folder: Path) -> dict[str, Any]:
        request = bench_probing.Request(
            tasks=tuple(dict.fromkeys(args.task)),
            updates=args.updates,
            peer_updates=args.peer_updates,
            limit=args.limit,
            device=choose_device(args.device),
            size=args.size,
            checkpoint=args.checkpoint,
            lr=args.lr,
            seeds=args.seed,
            peer_python=args.peer_python,
            folder=folder,
            driver=args.peer_driver or DRIVER,
            threads=args.threads,
            timeout_s=args.timeout,
        )
        return bench_probing.bench_probing(request)

    return _report(args, measure, bench_probing.describe, args.work)


def run_weighted_sum(args: argparse.Namespace) -> int:
    """Bench the weighted sum."""
    from superb_probe import bench_parts

    return _report(args, lambda folder: bench_parts.bench_weighted_sum(args), bench_parts.describe_weighted_sum, None)


def run_recurrence(args: argparse.Namespace) -> int:
    """Bench the recurrent layers of several trials."""
    from superb_probe import bench_recurrence as bench

    return _report(args, lambda folder: bench.bench_recurrence(args), bench.describe_recurrence, None)


def run_dtw(args: argparse.Namespace) -> int:
    """Bench the search of query by example."""
    from superb_probe import bench_dtw

    return _report(args, lambda folder: bench_dtw.bench_dtw(args), bench_dtw.describe_dtw, None)


def run_extraction(args: argparse.Namespace) -> int:
    """Bench the way from FLAC to a training batch."""
    from superb_probe import bench_extraction as bench

    return _report(args, lambda folder: bench.bench_extraction(args, folder), bench.describe_extraction, args.work)


def run_sweep(args: argparse.Namespace) -> int:
    """Bench a sweep against one encoder pass."""
    from superb_probe import bench_parts

    return _report(args, lambda folder: bench_parts.bench_sweep(args, folder), bench_parts.describe_sweep, args.work)


def run_encoders(args: argparse.Namespace) -> int:
    """Bench the encoders."""
    from superb_probe import bench_encoders

    return _report(args, lambda folder: bench_encoders.bench_encoders(args), bench_encoders.describe_encoders, None)


def run_kernels(args: argparse.Namespace) -> int:
    """Bench the scan and the Mamba block."""
    from superb_probe import bench_kernels

    return _report(args, lambda folder: bench_kernels.bench_kernels(args), bench_kernels.describe_kernels, None)


def run_table(args: argparse.Namespace) -> int:
    """Print results as Markdown."""
    from superb_probe.bench_tables import read_results, tables

    for result in read_results(args.file):
        print("\n".join(tables(result)))
    return 0


def _report(
    args: argparse.Namespace,
    measure: Callable[[Path], dict[str, Any]],
    describe: Callable[[Any], list[str]],
    work: Path | None,
) -> int:
    """Measure in a folder that goes away (or in --work), print lines or JSON, and write the document if asked."""
    import json

    from superb_probe.commands_output import print_json, stdout_to_stderr

    if args.out is not None and not args.out.parent.is_dir():
        raise RequestError(f"--out {args.out}: no folder {args.out.parent}. Fix: make it first")
    if args.threads is not None:
        import torch

        torch.set_num_threads(args.threads)
    with stdout_to_stderr(args.json), tempfile.TemporaryDirectory(prefix="superb-probe-bench-") as temporary:
        result = measure(Path(work) if work is not None else Path(temporary))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.json:
        print_json(result)
    else:
        print("\n".join(describe(result)))
    return 0
