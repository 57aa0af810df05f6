"""The commands that give to and take from other tools: import, export, submit."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from superb_probe.commands_flags import add_json, add_weights
from superb_probe.commands_output import print_json, stdout_to_stderr, table
from superb_probe.errors import RequestError


def add_commands(subparsers: Any) -> None:
    """Add `import`, `export` and `submit`."""
    _add_import(subparsers)
    export = subparsers.add_parser(
        "export",
        help="an encoder in the files of s3prl or transformers",
        description="Write an encoder so that others can check it with their own tools; `convert` starts from a checkpoint file.",
        epilog="examples:\n  superb-probe export transformers transformer_hubert exported\n"
        "  superb-probe export s3prl mamba_hubert exported --checkpoint mine.safetensors",
    )
    export.add_argument("tool", choices=("s3prl", "transformers"))
    export.add_argument("name", metavar="NAME", help="a registered upstream")
    export.add_argument("folder", type=Path, metavar="DIR")
    add_weights(export)
    export.set_defaults(handler=export_encoder)

    submit = subparsers.add_parser(
        "submit",
        help="the prediction files that SUPERB's site takes, from records",
        description="Write predict/<task>_public/... and predict.zip from the items of records on the published corpora.",
        epilog="examples:\n  superb-probe submit results/runs/*/hubert_base/best-*.json --out submission",
    )
    submit.add_argument("record", nargs="+", type=Path, metavar="RECORD", help="one .json file a task (er: a fold)")
    submit.add_argument("--out", type=Path, required=True, metavar="DIR")
    submit.set_defaults(handler=write_submission)


def _add_import(subparsers: Any) -> None:
    taking = subparsers.add_parser(
        "import",
        help="an experiment of s3prl as a record",
        description="Read an experiment folder of s3prl 0.4.18 (any of SUPERB's ten tasks) into a record marked as imported, and "
        "score its head again here where its encoder and data are at hand; 1 when that gives another number. SD and QbE "
        "need the data: their folders do not hold what is right.",
        epilog="examples:\n  superb-probe import s3prl result/downstream/ic --data fluent_speech_commands=/corpora/fsc\n"
        "  superb-probe import s3prl result/downstream/pr/states-100000.ckpt --manifest train=a.tsv dev=b.tsv test=c.tsv\n"
        "  superb-probe import s3prl result/downstream/qbe --data quesst14=/corpora/quesst14   # a folder each layer and split",
    )
    taking.add_argument("tool", choices=("s3prl",))
    taking.add_argument(
        "experiment",
        type=Path,
        metavar="EXPDIR",
        help="the folder, or one of its checkpoints; of QbE, the folder of its evaluations",
    )
    taking.add_argument("--out", type=Path, default=Path("results/runs"), metavar="DIR", help="default: %(default)s")
    taking.add_argument("--data", nargs="+", default=[], metavar="NAME=DIR", help="the corpus, as for run; or mini")
    taking.add_argument("--manifest", nargs="+", default=[], metavar="SPLIT=TSV", help="your own data, as for run")
    taking.add_argument("--root", type=Path, metavar="DIR", help="what the manifests' audio is relative to")
    taking.add_argument(
        "--upstream", metavar="NAME", help="our name of the encoder, where it does not follow from s3prl's"
    )
    taking.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="the encoder's weights (default: where s3prl had them)"
    )
    taking.add_argument("--overwrite", choices=("never", "failed", "always"), default="never", help="default: never")
    add_json(taking)
    taking.set_defaults(handler=import_experiment)


def import_experiment(args: argparse.Namespace) -> int:
    """Import an experiment; 1 when its head gives another number here."""
    import dataclasses

    from superb_probe.s3prl_import import import_s3prl

    wrong = [entry for entry in (*args.data, *args.manifest) if "=" not in entry and entry != "mini"]
    if wrong:
        raise RequestError(f"{' '.join(wrong)}: expected NAME=PATH")
    data = {name: Path(path) if path else None for name, _, path in (entry.partition("=") for entry in args.data)}
    manifest = {split: Path(path) for split, _, path in (entry.partition("=") for entry in args.manifest)}
    with stdout_to_stderr(args.json):
        found = import_s3prl(
            args.experiment,
            args.out,
            data=data,
            manifest=manifest,
            root=args.root,
            upstream=args.upstream,
            checkpoint=args.checkpoint,
            overwrite=args.overwrite,
        )
    if args.json:
        findings = [dataclasses.asdict(each) for each in found.findings]
        print_json({"record": str(found.path), "agrees": found.agrees, "findings": findings})
    else:
        score = found.record.score
        assert score is not None
        print(f"{found.path}: {found.record.task.name} {found.record.task.metric} {score.value:.2f}")
        print(table(("what", "verdict", "detail"), [(each.what, each.verdict, each.detail) for each in found.findings]))
        if not found.agrees:
            name = found.record.imported_from
            print(
                f"Not the number of {name}? s3prl's prediction files are of its last evaluation: -m evaluate -e CKPT writes them anew."
            )
    return 0 if found.agrees else 1


def export_encoder(args: argparse.Namespace) -> int:
    """Write an encoder for another tool, and say what reads it."""
    from superb_probe.export import export_upstream
    from superb_probe.upstreams.load import load_upstream

    upstream = load_upstream(args.name, checkpoint=args.checkpoint, size=args.size, random=args.random)
    written = export_upstream(upstream, args.tool, args.folder)
    print(f"{written.path}\nread by {written.reader}")
    return 0


def write_submission(args: argparse.Namespace) -> int:
    """Write the prediction files, and say what is not among them."""
    from superb_probe.results.submission import write_submission as write

    written = write(args.record, args.out)
    print(table(("part", "items"), list(written.parts.items())))
    print(written.path)
    if written.absent:
        print(f"no record of: {', '.join(written.absent)}")
    return 0
