"""The command `align`: phone and word times of transcribed speech, by the trained head of a PR or ASR record."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from superb_probe.commands_flags import add_json
from superb_probe.commands_output import print_json, stdout_to_stderr
from superb_probe.errors import RequestError


def add_commands(subparsers: Any) -> None:
    """Add `align`."""
    align = subparsers.add_parser(
        "align",
        help="phone and word times of transcribed speech",
        description="Times of phones (by a record of pr, from the column `phones`) or of words (by one of asr, from `text`), by "
        "Viterbi search over the CTC head that the record's probe trained. Written as CSV, CTM or a folder of TextGrids; `analyze` "
        "reads all three.",
        epilog="examples:\n  superb-probe align results/runs/pr/fbank/0314512804f0.json --manifest mine.tsv --out times.csv\n"
        "  superb-probe align results/runs/asr/mamba_hubert/9b1e51280f00.json --manifest mine.tsv --out textgrids",
    )
    align.add_argument(
        "record", type=Path, metavar="RECORD", help="the .json file of a pr or asr run, its probe beside it"
    )
    align.add_argument(
        "--manifest", type=Path, required=True, metavar="TSV", help="what to align, with a column phones or text"
    )
    align.add_argument("--root", type=Path, metavar="DIR", help="folder that audio paths start from")
    align.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="a .csv or .ctm file, or a folder for TextGrids"
    )
    align.add_argument("--checkpoint", type=Path, metavar="FILE", help="the encoder's weights")
    align.add_argument(
        "--record-manifest",
        nargs="+",
        default=[],
        metavar="SPLIT=TSV",
        help="the record's own data, where it is not the embedded corpus",
    )
    align.add_argument("--record-root", type=Path, metavar="DIR", help="their folder")
    align.add_argument(
        "--backend", choices=("auto", "own", "torchaudio"), default="auto", help="default: auto; the paths are the same"
    )
    align.add_argument(
        "--reach-ms", type=float, default=60.0, metavar="MS", help="how far a token reaches into blanks (default: 60)"
    )
    align.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    add_json(align)
    align.set_defaults(handler=write_alignments)


def write_alignments(args: argparse.Namespace) -> int:
    """Align and write; 1 when an utterance cannot be aligned (the others still are)."""
    from superb_probe.alignment import AlignRequest, align
    from superb_probe.probes import alignments
    from superb_probe.settings import pairs

    if args.reach_ms < 0:
        raise RequestError(f"--reach-ms {args.reach_ms:g}: zero or more.")
    own = {split: Path(file) for split, file in pairs(args.record_manifest, "--record-manifest").items()} or None
    with stdout_to_stderr(args.json):
        found = align(
            AlignRequest(
                args.record,
                args.manifest,
                args.root,
                args.checkpoint,
                own,
                args.record_root,
                args.backend,
                args.reach_ms / 1000,
                args.device,
            )
        )
        files = alignments.write_alignments(args.out, found.phones, found.words, found.durations_s)
    utterances = len(found.durations_s)
    summary = {
        "files": [str(file) for file in files],
        "utterances": utterances,
        "aligned": utterances - len(found.problems),
        "problems": list(found.problems),
        "mean_log_probability": found.mean_log_probability,
        "backend": found.backend,
    }
    if args.json:
        print_json(summary)
    else:
        done = f"{summary['aligned']} of {utterances} utterances aligned, {found.backend}"
        lines = [
            *map(str, files),
            f"{done}, mean log probability of a frame {found.mean_log_probability:.3f}",
            *found.problems,
        ]
        print("\n".join(lines))
    return 1 if found.problems else 0
