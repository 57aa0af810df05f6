"""What the shipped encoders learned: curves and purities of their pre-training, scores beside random weights and filter banks.

    python tools/pretrain_report.py --pretraining docs/pretraining --runs RECORDS --out docs/pretraining

Each shipped encoder has two files in --pretraining, of the folder that `superb-probe pretrain` left: NAME.csv (log.csv) and NAME.json
(evidence.json). --runs holds records of `run_superb.py` for the shipped names, the same with --random, filter banks, and
--control shuffle; docs/pretrain.md has the commands. Writes curves.png and prints Markdown: masked prediction, scores, paired tests
(Holm over all). ASR has its character errors beside its word errors: a probe that only ever says the commonest word has few of these.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from superb_probe.downstreams.load import load_task
from superb_probe.results.compare import Comparison, compare_items, holm, load_items
from superb_probe.results.leaderboard import leaderboard
from superb_probe.results.record import RunRecord, read_records
from superb_probe.upstreams.load import load_upstream

PUBLISHED = "-published-front-end"
NAMES = (
    "transformer_hubert",
    "mamba_hubert",
    "transformer_hubert_causal",
    "mamba_hubert_causal",
    f"transformer_hubert_causal{PUBLISHED}",
    f"mamba_hubert_causal{PUBLISHED}",
)
CHARACTERS = "asr, characters"
TASKS = ("asr", CHARACTERS, "pr", "asv", "ic")
BASELINES = {"ic": "fbank_no_cmvn"}  # means of `fbank` are zero by construction
# Pairs of systems that are tested, A and B: a name of NAMES, the same after RANDOM, or BASELINE; after SHUFFLED, its control.
RANDOM, BASELINE, SHUFFLED = "random ", "filter banks", "shuffled labels, "
CONTROLLED = ("transformer_hubert", "mamba_hubert", BASELINE)
PAIRS = (
    *((SHUFFLED + name, name) for name in CONTROLLED),
    *((RANDOM + name, name) for name in NAMES[:4]),
    *((BASELINE, name) for name in NAMES),
    ("transformer_hubert", "mamba_hubert"),
    ("transformer_hubert_causal", "mamba_hubert_causal"),
    (f"transformer_hubert_causal{PUBLISHED}", f"mamba_hubert_causal{PUBLISHED}"),
)
Row = Mapping[str, Any]


def systems(rows: Sequence[Row]) -> dict[tuple[str, str], Row]:
    """(task, system) to the leaderboard row of it; a shipped encoder is known by the digest of its weights."""
    shipped = {}
    for name in NAMES:
        options = {"causal_front_end": False} if name.endswith(PUBLISHED) else {}
        shipped[load_upstream(name.removesuffix(PUBLISHED), **options).info.revision] = name
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        system = shipped.get(row["revision"])
        if row["weights"] == "random":
            system = RANDOM + row["upstream"]
        elif row["upstream"] == BASELINES.get(row["task"], "fbank"):
            system = BASELINE
        if system is None:
            continue
        system = SHUFFLED + system if row["control"] else system
        if (row["task"], system) in found:
            raise SystemExit(
                f"{row['task']} of {system}: two results. Fix: a folder with the records of one set of commands."
            )
        found[row["task"], system] = row
    return found


def with_characters(found: Mapping[tuple[str, str], Row], by_id: Mapping[str, RunRecord]) -> dict[tuple[str, str], Row]:
    """Each system's character error rate of ASR, a task of its own; without an interval, which records have for words."""
    added: dict[tuple[str, str], Row] = {}
    for (task, system), row in found.items():
        if task != "asr":
            continue
        scores = [by_id[each].score for each in row["run_ids"].split()]
        mean = sum(each.extra["cer"] for each in scores if each is not None) / len(scores)
        added[CHARACTERS, system] = {**row, "metric": "cer", "score": mean, "ci95_low": None, "ci95_high": None}
    return {**found, **added}


def items_of(task: str, row: Row, by_id: Mapping[str, RunRecord], runs: Path) -> list[dict[str, list[Any]]]:
    """What a row's records say of each test item; characters in the place of words where they are asked for."""
    items = load_items([by_id[each] for each in row["run_ids"].split()], [runs])
    if task != CHARACTERS:
        return items
    return [{**each, "edits": each["character_edits"], "words": each["characters"]} for each in items]


@dataclass(frozen=True)
class Tested:
    """A pair of systems on a task, compared on the same test items."""

    task: str
    a: str
    b: str
    outcome: Comparison


def tests_of(found: Mapping[tuple[str, str], Row], by_id: Mapping[str, RunRecord], runs: Path) -> list[Tested]:
    """Every pair of PAIRS that has results, p values corrected for all of them."""
    tested = []
    for task in TASKS:
        for a, b in PAIRS:
            if (task, a) not in found or (task, b) not in found:
                continue
            rows = found[task, a], found[task, b]
            sides = [items_of(task, row, by_id, runs) for row in rows]
            scored = load_task("asr" if task == CHARACTERS else task)
            metric, better = scored.info.metric, rows[0]["better"] == "higher"
            outcome = compare_items(task, metric, better, sides[0], sides[1], scored.value)
            tested.append(Tested(task, a, b, outcome))
    corrected = holm([each.outcome.p if each.outcome.p is not None else 1.0 for each in tested])
    return [replace(each, outcome=replace(each.outcome, p_holm=p)) for each, p in zip(tested, corrected, strict=True)]


def scores_table(found: Mapping[tuple[str, str], Row]) -> str:
    """A row a system, a column a task."""
    tasks = [task for task in TASKS if any(key[0] == task for key in found)]
    heads = []
    for task in tasks:
        row = next(row for (each, _), row in found.items() if each == task)
        heads.append(f"{task} ({row['metric']} %, {row['better']} is better)")
    text = [f"| encoder | {' | '.join(heads)} |", "| --- |" + " --- |" * len(tasks)]
    controls = (SHUFFLED + name for name in CONTROLLED)
    for system in (*NAMES, *(RANDOM + name for name in NAMES[:4]), BASELINE, *controls):
        cells = [score(found.get((task, system))) for task in tasks]
        if any(cells):
            text.append(f"| {label(system)} | {' | '.join(cells)} |")
    return "\n".join(text)


def score(row: Row | None) -> str:
    """A score with its interval."""
    if row is None:
        return ""
    low, high = row["ci95_low"], row["ci95_high"]
    return f"{row['score']:.1f}" + ("" if low is None or math.isnan(low) else f" [{low:.1f}, {high:.1f}]")


def tests_table(tested: Sequence[Tested]) -> str:
    """A row a pair, a column a task: B minus A, its interval, the corrected p, bold where B is better or worse at 5 %."""
    tasks = [task for task in TASKS if any(each.task == task for each in tested)]
    text = [f"| B against A | {' | '.join(tasks)} |", "| --- |" + " --- |" * len(tasks)]
    for a, b in PAIRS:
        cells = []
        for task in tasks:
            one = next((each.outcome for each in tested if (each.task, each.a, each.b) == (task, a, b)), None)
            cells.append("" if one is None else difference(one))
        if any(cells):
            text.append(f"| {label(b)} against {label(a)} | {' | '.join(cells)} |")
    return "\n".join(text)


def difference(one: Comparison) -> str:
    """B minus A in words."""
    text = f"{one.difference:+.1f}"
    if one.ci95 is not None:
        text += f" [{one.ci95[0]:+.1f}, {one.ci95[1]:+.1f}]"
    if one.p is None or one.p_holm is None:
        return f"{text}, cannot tell"
    said = f"{text}, p {one.p_holm:.3f}"
    if one.p_holm >= 0.05:
        return said
    return f"**{said}**" if (one.difference > 0) == one.higher_is_better else f"**{said} (A is better)**"


def label(system: str) -> str:
    """A system in words."""
    return system.replace(PUBLISHED, ", published front end")


def learning_table(pretraining: Path) -> str:
    """Masked prediction on held-out speech and phone purity, a row an encoder."""
    heads = ("encoder", "iteration 1: right at masked frames", "commonest unit", "iteration 2: right", "commonest unit",
             "loss", "purity of the predicted units", "purest layer", "cepstra", "updates", "training time")  # fmt: skip
    text = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for name in NAMES:
        first, second = evidence(pretraining, name)
        pure = [layer["phone"] for layer in second["layers"]["layers"]]
        best = max(range(len(pure)), key=pure.__getitem__)
        cells = [label(name)]
        for each in (first, second):
            cells += [f"{100 * each['held_out']['accuracy']:.1f} %", f"{100 * each['held_out']['chance']:.1f} %"]
        cells += [
            f"{second['held_out']['entropy']:.2f}",
            f"{second['unit_purity']:.3f}",
            f"{pure[best]:.3f} (layer {best})",
        ]
        cells += [f"{second['layers']['mfcc']['phone']:.3f}", f"{first['steps']:,} + {second['steps']:,}"]
        cells.append(f"{first['seconds'] + second['seconds']:.0f} s")
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def evidence(pretraining: Path, name: str) -> list[dict[str, Any]]:
    """What both iterations of an encoder left."""
    found: list[dict[str, Any]] = json.loads((pretraining / f"{name}.json").read_text(encoding="utf-8"))
    return found


def draw(pretraining: Path, out: Path) -> None:
    """Three panels: cross entropy in training, accuracy held out, purity by layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    loss, right, pure = figure.subplots(1, 3)
    for name in NAMES:
        style = {
            "color": "#0072B2" if name.startswith("transformer") else "#D55E00",
            "linestyle": ":" if name.endswith(PUBLISHED) else "--" if "causal" in name else "-",
        }
        with (pretraining / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["iteration"] == "2"]
        loss.plot([int(row["step"]) for row in rows], [float(row["loss"]) for row in rows], label=label(name), **style)
        held = [row for row in rows if row["held_out_accuracy"]]
        right.plot(
            [int(row["step"]) for row in held],
            [100 * float(row["held_out_accuracy"]) for row in held],
            marker="o",
            **style,
        )
        layers = evidence(pretraining, name)[1]["layers"]
        pure.plot([layer["phone"] for layer in layers["layers"]], marker="o", **style)
    pure.axhline(layers["mfcc"]["phone"], color="black", linewidth=1)
    pure.annotate("cepstra", (0, layers["mfcc"]["phone"]), xytext=(0, 3), textcoords="offset points")
    chance = max(evidence(pretraining, name)[1]["held_out"]["chance"] for name in NAMES)
    right.axhline(100 * chance, color="black", linewidth=1)
    right.annotate("the commonest unit", (1000, 100 * chance), xytext=(0, 3), textcoords="offset points")
    right.set_ylim(bottom=0)
    for axes, title, below in (
        (loss, "Cross entropy at masked frames, training (nats)", "update of iteration 2"),
        (right, "Right at masked frames, held out (%)", "update of iteration 2"),
        (pure, "Phone purity of 100 clusters, held out", "layer"),
    ):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(below)
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(out / "curves.png", dpi=110)


def main(words: Sequence[str] | None = None) -> int:
    """Draw and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pretraining", type=Path, required=True, help="folder of NAME.csv and NAME.json")
    parser.add_argument("--runs", type=Path, help="records; without them no scores are printed")
    parser.add_argument("--out", type=Path, required=True, help="folder of curves.png")
    asked = parser.parse_args(words)
    asked.out.mkdir(parents=True, exist_ok=True)
    draw(asked.pretraining, asked.out)
    print(learning_table(asked.pretraining))
    if asked.runs is not None:
        records = read_records(asked.runs)
        by_id = {record.run_id: record for record in records}
        found = with_characters(systems([dict(row) for row in leaderboard(records).to_dict("records")]), by_id)
        print(f"\n{scores_table(found)}\n\n{tests_table(tests_of(found, by_id, asked.runs))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
