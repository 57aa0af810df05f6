"""The commands that read records: leaderboard, plot, compare, verify."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from superb_probe.commands_flags import add_json
from superb_probe.commands_output import print_json, stdout_to_stderr, table
from superb_probe.errors import RequestError, unknown_name

if TYPE_CHECKING:
    from superb_probe.results.record import RunRecord

MINI_CITATION = "mini, the embedded corpus of superb-probe: synthesised speech (downstreams/mini/README.md)"
FORMATS = {"csv": ".csv", "md": ".md", "html": ".html", "latex": ".tex"}


def add_commands(subparsers: Any) -> None:
    """Add `leaderboard`, `plot`, `compare` and `verify`."""
    _add_leaderboard(subparsers)
    _add_plot(subparsers)
    _add_compare(subparsers)
    _add_verify(subparsers)


def _add_leaderboard(subparsers: Any) -> None:
    board = subparsers.add_parser(
        "leaderboard",
        help="tables from all records: CSV, Markdown, one HTML page, LaTeX",
        description="Tables from all records (the rules are in results/README.md). The CSV has a row for each comparable result; the "
        "others have an upstream a row and a task a column, with SUPERB's scores and the published rows apart.",
        epilog="examples:\n"
        "  superb-probe leaderboard\n"
        "  superb-probe leaderboard --runs results/runs /other/runs --out board.csv\n"
        "  superb-probe leaderboard --format latex --task asv pr --cite",
    )
    _add_runs(board)
    board.add_argument("--task", nargs="+", metavar="TASK", help="only these tasks; the scores are over them")
    board.add_argument(
        "--out",
        type=Path,
        default=Path("results/leaderboard"),
        metavar="FILE",
        help="its ending says the format where --format does not (default: %(default)s.csv, .md and .html)",
    )
    board.add_argument(
        "--format", nargs="+", choices=tuple(FORMATS), help="several take the name of --out with their own endings"
    )
    board.add_argument("--no-published", action="store_true", help="leave out the published rows")
    board.add_argument(
        "--cite", action="store_true", help="write the BibTeX of every upstream, task and corpus beside it, as .bib"
    )
    board.set_defaults(handler=write_leaderboard)


def _add_plot(subparsers: Any) -> None:
    plot = subparsers.add_parser(
        "plot",
        help="pictures of all records",
        description="Pictures of all records, PNG and SVG, with the numbers as CSV beside them:\n"
        "  scores   scores with their 95 % intervals, a panel a task\n"
        "  radar    tasks around a circle\n"
        "  heatmap  upstreams by tasks\n"
        "  layers   what each task reads from which layer\n"
        "  rates    dev score against learning rate, with the chosen point\n"
        "  cost     score against parameters, MACs or speed (Pareto)",
        epilog="examples:\n  superb-probe plot --out results/scores.png\n  superb-probe plot --kind radar layers --task asv pr ic",
    )
    _add_runs(plot)
    kinds = ("scores", "radar", "heatmap", "layers", "rates", "cost")
    plot.add_argument("--kind", nargs="+", choices=kinds, default=["scores"], help="default: scores")
    plot.add_argument(
        "--cost", choices=("params", "macs", "time"), default="params", help="for --kind cost (default: %(default)s)"
    )
    plot.add_argument("--task", nargs="+", metavar="TASK", help="only these tasks")
    plot.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: results/KIND.png; several kinds take its name and _KIND",
    )
    plot.set_defaults(handler=write_plot)


def _add_compare(subparsers: Any) -> None:
    compare = subparsers.add_parser(
        "compare",
        help="is B really better than A? paired tests on the same test items",
        description="Paired tests on stored per-item outcomes, corrected for the number of tests (Holm); says when it cannot tell.",
        epilog="examples:\n"
        "  superb-probe compare asv fbank mamba_hubert\n"
        "  superb-probe compare all fbank hubert_base@sha256:9b1e --json\n"
        "  superb-probe compare all fbank:shuffle fbank",
    )
    compare.add_argument("task", metavar="TASK", help="a task, several joined by commas, or all")
    compare.add_argument("a", metavar="A", help="an upstream, or NAME@REVISION; NAME:shuffle is its control")
    compare.add_argument("b", metavar="B", help="the other")
    _add_runs(compare)
    add_json(compare)
    compare.set_defaults(handler=write_comparison)


def _add_verify(subparsers: Any) -> None:
    verify = subparsers.add_parser(
        "verify",
        help="is a record true? scores it again from its items, its probe and its encoder",
        description="Scores a record again: from its stored items, from its stored probe on states encoded anew, and with "
        "--retrain by training the probe again. Says equal, within the interval, or different; 1 when something is different.",
        epilog="examples:\n  superb-probe verify results/runs/asv/fbank/0314512804f0.json --retrain",
    )
    verify.add_argument("record", type=Path, metavar="RECORD", help="the .json file")
    verify.add_argument("--retrain", action="store_true", help="train the probe again as well")
    verify.add_argument("--checkpoint", type=Path, metavar="FILE", help="the encoder's weights")
    verify.add_argument("--data", nargs="+", default=[], metavar="NAME=DIR", help="the corpus, as for run")
    verify.add_argument("--root", type=Path, metavar="DIR", help="what the manifests' audio is relative to, as for run")
    verify.add_argument("--manifest", nargs="+", default=[], metavar="SPLIT=TSV", help="your own data, as for run")
    add_json(verify)
    verify.set_defaults(handler=write_verification)


def _add_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs",
        nargs="+",
        type=Path,
        default=[Path("results/runs")],
        metavar="DIR",
        help="folders of records (default: results/runs)",
    )


def _records(args: argparse.Namespace, tasks: list[str] | None) -> tuple[list[RunRecord], list[str]]:
    """The records asked for, and a line for each file that is not one.

    Raises:
        RequestError: for a task that no record is of.
    """
    from superb_probe.results.record import scan_records

    records, problems = scan_records(args.runs)
    known = {record.task.name for record in records}
    for name in tasks or ():
        if name not in known:
            raise unknown_name("task", name, known)
    return [record for record in records if not tasks or record.task.name in tasks], problems


def _say(*lines: str) -> None:
    for line in lines:
        print(f"superb-probe: {line}", file=sys.stderr)


def write_leaderboard(args: argparse.Namespace) -> int:
    """Write the tables and print their main columns; 1 if a file could not be read as a record (the others still count)."""
    from superb_probe.results.leaderboard import aggregate, write_csv
    from superb_probe.results.overlap import MARKS, overlap_notes

    files = _formats(args)
    records, problems = _records(args, args.task)
    board, unfinished, conflicts = aggregate(records)
    try:
        for name, path in files.items():
            if name == "csv":
                write_csv(board, path)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(_text(name, board, len(records), args), encoding="utf-8", newline="\n")
        if args.cite:
            files["cite"] = args.out.with_suffix(".bib")
            files["cite"].parent.mkdir(parents=True, exist_ok=True)
            files["cite"].write_text(_citations(records), encoding="utf-8", newline="\n")
    except OSError as error:
        raise RequestError(f"cannot write {args.out}: {error.strerror or error}. Fix: another --out.") from error
    columns = (
        "task",
        "upstream",
        "weights",
        "dataset",
        "protocol",
        "budget",
        "control",
        "score",
        "seeds",
        "lr",
        "edge",
    )
    if len(board):
        marks = board["overlap"].map(lambda kind: MARKS.get(kind, ""))
        shown = board.assign(score=board["score"].map("{:.2f}".format) + marks, lr=board["lr"].map("{:g}".format))
        notes = overlap_notes(board.to_dict("records"))
        print("\n".join([table(columns, shown[list(columns)].values.tolist()), *notes]))
    print(f"{len(board)} rows from {len(records)} records: {' '.join(map(str, files.values()))}")
    _say(*unfinished, *conflicts, *problems)
    return 1 if problems or conflicts else 0


def _formats(args: argparse.Namespace) -> dict[str, Path]:
    """The file of each format to write."""
    by_ending = {ending: name for name, ending in FORMATS.items()}
    ending = args.out.suffix
    if args.format:
        base = args.out.with_suffix("") if ending in by_ending else args.out
        return {name: base.with_name(base.name + FORMATS[name]) for name in dict.fromkeys(args.format)}
    if ending in by_ending:
        return {by_ending[ending]: args.out}
    if ending:
        raise RequestError(f"--out {args.out}: unknown ending. Fix: {', '.join(by_ending)}, or --format.")
    return {name: args.out.with_name(args.out.name + FORMATS[name]) for name in ("csv", "md", "html")}


def _text(name: str, board: Any, num_records: int, args: argparse.Namespace) -> str:
    from superb_probe.results.boards import boards, published_boards
    from superb_probe.results.page import page
    from superb_probe.results.text_tables import latex, markdown

    own = boards(board, args.task)
    published = [] if args.no_published else published_boards()
    if name == "html":
        return page(own, published, board, num_records)
    if name == "md":
        return markdown([*own, *published], len(board), num_records)
    return latex([*own, *published])


def _citations(records: list[RunRecord]) -> str:
    """BibTeX of what the records name: the declared citation of each task, upstream and corpus."""
    from superb_probe.downstreams.corpora import CORPORA
    from superb_probe.downstreams.load import load_task
    from superb_probe.results.text_tables import bibtex

    found: dict[str, str] = {}
    for record in records:
        name, task = record.upstream.name, record.task.name
        if task not in found:
            try:
                found[task] = load_task(task).info.citation
            except RequestError:  # a task of somebody's own that is not here
                found[task] = ""
        if name not in found:
            found[name] = _upstream_citation(name)
        dataset = record.task.dataset
        found[f"corpus {dataset}"] = MINI_CITATION if dataset == "mini" else ""
        if dataset in CORPORA:
            found[f"corpus {dataset}"] = CORPORA[dataset].info.citation
    return bibtex(found)


def _upstream_citation(name: str) -> str:
    """What an upstream declares; "" for one that only a network, a checkpoint or somebody's file gives (`hf:`, `./mine.py:`)."""
    from superb_probe.upstreams.load import load_upstream

    if ":" in name:
        return ""
    for options in ({"size": "test", "random": 0}, {}):
        try:
            return str(load_upstream(name, **options).info.citation)  # type: ignore[arg-type]
        except RequestError:
            continue
    return ""


def write_plot(args: argparse.Namespace) -> int:
    """Draw the pictures; 1 if a file could not be read as a record (the others still count)."""
    from superb_probe.results.figures import draw

    records, problems = _records(args, args.task)
    for kind in dict.fromkeys(args.kind):
        out = args.out or Path("results") / f"{kind}.png"
        if args.out and len(args.kind) > 1:
            out = args.out.with_name(f"{args.out.stem}_{kind}{args.out.suffix}")
        print("\n".join(map(str, draw(records, kind, out, cost=args.cost))))
    _say(*problems)
    return 1 if problems else 0


def write_comparison(args: argparse.Namespace) -> int:
    """Compare two upstreams; 1 if a file could not be read as a record."""
    import dataclasses

    from superb_probe.downstreams.load import load_task
    from superb_probe.results.compare import compare_items, holm, load_items, pairs, split_control
    from superb_probe.results.overlap import overlap_notes

    wanted = None if args.task == "all" else args.task.split(",")
    records, problems = _records(args, wanted)
    by_id = {record.run_id: record for record in records}
    names = sorted({record.upstream.name for record in records})
    both = [
        {
            record.task.name
            for record in records
            if record.status == "finished"
            and (record.upstream.name, record.probe.control) == (name.partition("@")[0], control)
        }
        for name, control in map(split_control, (args.a, args.b))
    ]
    tasks = wanted or sorted(both[0] & both[1])
    if not tasks:
        raise RequestError(f"no task has results of both {args.a} and {args.b}. Known: {', '.join(names) or 'none'}.")
    found = []
    for name in tasks:
        value = load_task(name).value
        for first, second in pairs(records, name, args.a, args.b):
            sides = [load_items((by_id[run] for run in row["run_ids"].split()), args.runs) for row in (first, second)]
            metric, higher = first["metric"], first["better"] == "higher"
            found.append((first, second, compare_items(name, metric, higher, sides[0], sides[1], value)))
    known = [i for i, (*_, each) in enumerate(found) if each.p is not None]
    for i, p in zip(known, holm([found[i][2].p or 0.0 for i in known]), strict=True):
        found[i] = (*found[i][:2], dataclasses.replace(found[i][2], p_holm=p))
    lines = [
        {**dataclasses.asdict(each), "effect": dict(each.effect), "protocol": row["protocol"], "budget": row["budget"],
         "dataset": row["dataset"], "verdict": each.verdict(args.a, args.b),
         "overlap": {"a": row["overlap"], "b": other["overlap"]}}
        for row, other, each in found
    ]  # fmt: skip
    if args.json:
        print_json({"a": args.a, "b": args.b, "comparisons": lines})
    else:
        notes = overlap_notes([row for rows in found for row in rows[:2]])
        print("\n".join([_comparison_table(args.a, args.b, lines), *notes]))
    _say(*problems)
    return 1 if problems else 0


def _comparison_table(a: str, b: str, lines: list[dict[str, Any]]) -> str:
    from superb_probe.results.overlap import MARKS

    def number(value: float | None, digits: str = ".2f") -> str:
        return "-" if value is None else format(value, digits)

    def score(line: dict[str, Any], side: str) -> str:
        return number(line[side]) + MARKS.get(line["overlap"][side], "")

    rows = [
        (line["task"], line["metric"], line["dataset"], line["protocol"], line["budget"], score(line, "a"), score(line, "b"),
         number(line["difference"], "+.2f"), "-" if line["ci95"] is None else f"[{line['ci95'][0]:+.2f}, {line['ci95'][1]:+.2f}]",
         number(line["p"], ".4f"), number(line["p_holm"], ".4f"),
         ", ".join(f"{name.replace('_', ' ')} {value:+.2f}" for name, value in line["effect"].items()), line["verdict"])
        for line in lines
    ]  # fmt: skip
    head = (
        "task",
        "metric",
        "data",
        "protocol",
        "budget",
        "A",
        "B",
        "B - A",
        "95 %",
        "p",
        "p (Holm)",
        "effect",
        "verdict",
    )
    methods = sorted({f"{line['task']}: {line['method']}, {line['items']} items" for line in lines})
    return "\n".join(
        [f"A = {a}, B = {b}", table(head, rows), *methods, "Seeds are averaged item by item; the test is over items."]
    )


def write_verification(args: argparse.Namespace) -> int:
    """Verify a record; 1 when something is different."""
    import dataclasses

    from superb_probe.verification import verify

    with stdout_to_stderr(args.json):
        findings = verify(args.record, checkpoint=args.checkpoint, data=_verification_data(args), retrain=args.retrain)
    if args.json:
        print_json({"record": str(args.record), "findings": [dataclasses.asdict(each) for each in findings]})
    else:
        print(table(("what", "verdict", "detail"), [(each.what, each.verdict, each.detail) for each in findings]))
    return 1 if any(each.verdict == "different" for each in findings) else 0


def _verification_data(args: argparse.Namespace) -> Any:
    """Where the record's data are, from --data, or --root and --manifest."""
    from superb_probe.downstreams.corpora import choose_data
    from superb_probe.results.record import read_record
    from superb_probe.verification import Data

    wrong = [entry for entry in (*args.manifest, *args.data) if "=" not in entry]
    if wrong:
        raise RequestError(f"{' '.join(wrong)}: expected SPLIT=FILE, e.g. test=test.tsv, or NAME=DIR")
    pairs = {name: Path(path) for name, _, path in (entry.partition("=") for entry in args.data)}
    if pairs:
        _, folder, extras = choose_data(read_record(args.record).task.name, pairs)
        return Data(folder, None, extras)
    manifest = {split: Path(file) for split, _, file in (entry.partition("=") for entry in args.manifest)}
    return Data(args.root, manifest or None)
