"""Real speech: every task that a small real corpus fits, for several encoders, beside the same probes on shuffled labels.

Run from anywhere, one thread:

    OMP_NUM_THREADS=1 python tools/real_speech.py DATA --manifests FOLDER --out RECORDS

DATA holds folders with a manifest.csv, as `superb-probe prepare csv` reads them (librispeech_mini, picovoice_intent, emodb4,
speech_commands_3w, fsdd, ami_diarization; one that is absent is said and left out). It is never touched: manifests, states (safe to
delete) and records are written to the other folders. A cell whose records are there is not run again, so that the command can be
stopped and resumed. The table, in Markdown, is printed at the end; `--table` prints what the records have by now and runs nothing.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import superb_probe
from superb_probe.downstreams.base import Task
from superb_probe.downstreams.load import load_task
from superb_probe.downstreams.manifest import Manifest
from superb_probe.downstreams.prepare import prepare_csv
from superb_probe.errors import RequestError
from superb_probe.results.compare import Comparison, compare_items, load_items
from superb_probe.results.leaderboard import leaderboard
from superb_probe.results.record import RunRecord, read_records

UPSTREAMS = ("fbank", "transformer_hubert", "mamba_hubert_causal")
MISALIGNED = ("6081-41997-0000", "7078-271888-0000", "3235-11599-0000")  # transcript and audio do not belong together
SLOTS = ("coffeeDrink", "size", "roast", "numberOfShots")
PIECE_S = 4.0
POOLED = (
    "er",
    "ic",
    "ks",
    "sid",
)  # of `fbank` they see means that are zero by construction: `fbank_no_cmvn` stands for it
Files = dict[str, Path]


@dataclass(frozen=True)
class Cell:
    """One task on one corpus.

    Attributes:
        task: its name.
        corpus: a folder of the data.
        lr: the learning rates tried.
        seed: the seeds.
        steps: updates; None for the small budget's.
        arrange: changes the manifests that `prepare csv` made, where the task needs other splits; None keeps them.
        exclude: utterances that are left out.
        slot: columns that become slots.
        splits: what of the manifests the task is given.
    """

    task: str
    corpus: str
    lr: tuple[float, ...] = (1e-2, 1e-3)
    seed: tuple[int, ...] = (1, 2)
    steps: int | None = None
    arrange: Callable[[Files, Path], Files] | None = None
    exclude: tuple[str, ...] = ()
    slot: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("train", "dev", "test")


def whole(files: Files, root: Path) -> list[Any]:
    """The utterances of all splits."""
    return [utterance for path in files.values() for utterance in Manifest.read(path, root)]


def by_sentence(files: Files, root: Path) -> Files:
    """emodb4 for speakers: seven of its ten sentences to train on, one to choose by, two to test on; all speakers in each.

    The sentence is the middle of an utterance's id: speaker, sentence, emotion, version (03 a01 F a).
    """
    splits = {"b10": "dev", "a07": "test", "b03": "test"}
    utterances = whole(files, root)
    for split, path in files.items():
        part = [each for each in utterances if splits.get(each.id[2:5], "train") == split]
        Manifest(part, root, split).write(path)
    return files


def by_speaker_pair(files: Files, root: Path) -> Files:
    """emodb4 for emotions: one manifest; its sessions, the five pairs of speakers of the column `fold`, are each tested once."""
    with (root / "manifest.csv").open(encoding="utf-8", newline="") as table:
        pair = {row["utt_id"]: row["fold"] for row in csv.DictReader(table)}
    labelled = [replace(each, labels={**each.labels, "session": pair[each.id]}) for each in whole(files, root)]
    Manifest(labelled, root, "train").write(files["train"])
    return {"train": files["train"]}


def known_phones(files: Files, root: Path) -> Files:
    """emodb4 for phones: without the few utterances of dev and test with a label of its narrow transcription that train lacks."""
    known = {phone for label in Manifest.read(files["train"], root).labels("phones") for phone in label.split()}
    for split in ("dev", "test"):
        manifest = Manifest.read(files[split], root)
        kept = [each.id for each in manifest if known.issuperset(each.labels["phones"].split())]
        manifest.keep(kept).write(files[split])
    return files


def in_pieces(files: Files, root: Path) -> Files:
    """librispeech_mini for verification: its training utterances in equal pieces of 4 s or a little more.

    It has one utterance a speaker, and labels shuffled among classes of one are the same task with other names: no control.
    """
    pieces = []
    for each in Manifest.read(files["train"], root):
        count = max(1, int(each.duration_s // PIECE_S))
        length = math.floor(1000 * each.duration_s / count) / 1000
        for number in range(count):
            start = each.start_s + number * length
            pieces.append(replace(each, id=f"{each.id}.{number}", start_s=start, duration_s=length))
    Manifest(pieces, root, "train").write(files["train"])
    return files


CELLS = (
    Cell("ks", "speech_commands_3w"),
    Cell("sid", "fsdd"),
    Cell("sid", "emodb4", arrange=by_sentence),
    Cell("er", "emodb4", arrange=by_speaker_pair),
    Cell("ic", "picovoice_intent", slot=SLOTS),
    Cell(
        "asv",
        "librispeech_mini",
        (1e-3,),
        (1,),
        arrange=in_pieces,
        exclude=MISALIGNED,
        splits=("train", "test", "trials"),
    ),
    Cell("sd", "ami_diarization", (1e-2,), (1,)),
    Cell("pr", "librispeech_mini", (1e-2,), (1,), 200, exclude=MISALIGNED),
    Cell("pr", "emodb4", (1e-2,), (1,), 200, arrange=known_phones, exclude=("08a01Wa",)),
    Cell("asr", "librispeech_mini", (1e-3,), (1,), 60, exclude=MISALIGNED),
)


def manifests_of(cell: Cell, data: Path, folder: Path) -> Files:
    """The manifests of a cell, made by `prepare csv` and arranged as the task needs them."""
    root = data / cell.corpus
    made = prepare_csv(root, folder / f"{cell.corpus}.{cell.task}", slot=cell.slot, exclude=cell.exclude)
    trials = made.pop("trials", None)
    if cell.arrange is not None:
        made = cell.arrange(made, root)
    if trials is not None:
        made["trials"] = trials
    return {name: path for name, path in made.items() if name in cell.splits}


def upstream_of(cell: Cell, upstream: str) -> str:
    """The encoder that a cell is run with."""
    return "fbank_no_cmvn" if upstream == "fbank" and cell.task in POOLED else upstream


def run_cell(
    cell: Cell, upstreams: Sequence[str], data: Path, folder: Path, out: Path, steps: int | None = None
) -> None:
    """Run a cell for every encoder, on its labels and on shuffled ones, and say the commands."""
    files = manifests_of(cell, data, folder)
    for name in upstreams:
        for control in (None, "shuffle"):
            request: dict[str, Any] = {
                "lr": cell.lr,
                "seed": cell.seed,
                "steps": steps or cell.steps,
                "budget": "small",
            }
            upstream = upstream_of(cell, name)
            say(command(upstream, cell, files, data, {**request, "control": control}))
            superb_probe.run(
                upstream,
                cell.task,
                manifest=files,
                root=data / cell.corpus,
                out=out,
                store=folder / "states",
                control=control,
                device="cpu",
                **request,
            )


def command(upstream: str, cell: Cell, files: Files, data: Path, request: Mapping[str, Any]) -> str:
    """The same on a command line."""
    words = [
        "superb-probe run --upstream",
        upstream,
        "--task",
        cell.task,
        "--root",
        str(data / cell.corpus),
        "--manifest",
    ]
    words += [f"{name}={path}" for name, path in files.items()]
    for name, value in request.items():
        if value is not None:
            words += [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return " ".join(words)


@dataclass(frozen=True)
class Line:
    """A row of the table: a result, its control, and how the two compare on the same test items."""

    row: Mapping[str, Any]
    control: Mapping[str, Any]
    compared: Comparison

    @property
    def verdict(self) -> str:
        """Whether the 95 % interval of the paired difference excludes zero on the better side."""
        if self.compared.ci95 is None:
            return "cannot tell"
        low, high = self.compared.ci95
        better = low > 0 if self.compared.higher_is_better else high < 0
        return "yes" if better else "no"


def lines_of(records: Sequence[RunRecord], out: Path) -> list[Line]:
    """A line for every result that has a control trained alike."""
    by_id = {record.run_id: record for record in records}
    rows = [dict(row) for row in leaderboard(records).to_dict("records")]
    alike = ("task", "dataset", "upstream", "revision", "steps", "budget", "head", "data")
    controls = {tuple(row[name] for name in alike): row for row in rows if row["control"]}
    found = []
    for row in rows:
        control = controls.get(tuple(row[name] for name in alike))
        if row["control"] or control is None:
            continue
        task: Task = load_task(row["task"])
        sides = [
            load_items([by_id[each] for each in side["run_ids"].split()], [out / row["task"]])
            for side in (control, row)
        ]
        better = row["better"] == "higher"
        compared = compare_items(row["task"], row["metric"], better, sides[0], sides[1], task.value)
        found.append(Line(row, control, compared))
    return sorted(found, key=lambda line: (line.row["task"], line.row["dataset"], line.row["upstream"]))


def table_of(lines: Iterable[Line]) -> str:
    """The Markdown table."""
    heads = [
        "task",
        "corpus",
        "encoder",
        "score [95 %]",
        "shuffled labels [95 %]",
        "difference [95 %]",
        "excludes the control",
    ]
    heads += ["updates x batch", "dev slope", "lr", "seeds"]
    text = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for line in lines:
        row = line.row
        arrow = "higher" if row["better"] == "higher" else "lower"
        corpus = row["dataset"].removeprefix("manifest:").partition(".")[0]
        random = " (random)" if row["weights"] == "random" else ""
        difference = f"{line.compared.difference:+.1f}"
        if line.compared.ci95 is not None:
            difference += f" [{line.compared.ci95[0]:+.1f}, {line.compared.ci95[1]:+.1f}]"
        cells = (
            f"{row['task']} ({row['metric']} %, {arrow} is better)",
            corpus,
            row["upstream"] + random,
            score(row),
            score(line.control),
            difference,
            line.verdict,
            f"{row['steps']} x {row['batch']}",
            "-" if row["dev_slope"] is None else f"{row['dev_slope']:+.2f}",
            f"{row['lr']:g}",
            str(row["seeds"]),
        )
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def score(row: Mapping[str, Any]) -> str:
    """A score with its interval, where it has one."""
    low, high = row["ci95_low"], row["ci95_high"]
    if low is None or math.isnan(low):
        return f"{row['score']:.1f}"
    return f"{row['score']:.1f} [{low:.1f}, {high:.1f}]"


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def main(words: Sequence[str] | None = None) -> int:
    """Run what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder of the corpora")
    parser.add_argument("--manifests", type=Path, required=True, help="a folder for the manifests")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the records")
    parser.add_argument("--upstream", nargs="+", default=UPSTREAMS, help="encoders")
    parser.add_argument("--task", nargs="+", help="only these tasks")
    parser.add_argument("--steps", type=int, help="updates instead of each cell's own")
    parser.add_argument("--table", action="store_true", help="run nothing")
    asked = parser.parse_args(words)
    cells = [cell for cell in CELLS if asked.task is None or cell.task in asked.task]
    try:
        for cell in () if asked.table else cells:
            if not (asked.data / cell.corpus).is_dir():
                say(f"{cell.task}: no {cell.corpus} in {asked.data}; left out")
                continue
            run_cell(cell, asked.upstream, asked.data, asked.manifests, asked.out, asked.steps)
        records = read_records(asked.out) if asked.out.is_dir() else []
        print(
            table_of(
                lines_of([each for each in records if asked.task is None or each.task.name in asked.task], asked.out)
            )
        )
    except RequestError as error:
        say(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
