"""Make the folder of a fine-tuned streaming recogniser small enough to ship: float16 weights, the scores, no transcripts, a card.

    python tools/recogniser_pack.py runs/second --before runs/first --trained-on mini-train --out upstreams/weights/recogniser

What is written is scored as it is read again, on the sentences of `mini`'s test split as a stream: the card's numbers are of the
packed weights. `--before` names the run whose encoder this one began with.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from superb_probe.downstreams.mini import mini_root, read_splits
from superb_probe.errors import RequestError
from superb_probe.finetuning import DESCRIPTION, ENCODER, HEAD, recogniser_of_folder
from superb_probe.latency import measure_latency, read_word_ends
from superb_probe.upstreams.checkpoints import read_checkpoint, write_checkpoint

CARD = "README.md"
CHUNK_S = 0.64


def main() -> None:
    """Write the folder, score it, write its card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of `superb-probe finetune`, finished")
    parser.add_argument(
        "--before", type=Path, nargs="*", default=[], help="runs that it goes on from, the first one first"
    )
    parser.add_argument("--trained-on", nargs="+", required=True, help="corpora that encoder and head have heard")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        pack(args.run, args.before, args.trained_on, args.out)
    except RequestError as error:
        parser.error(str(error))


def pack(run: Path, before: list[Path], trained_on: list[str], out: Path) -> None:
    """Write `out`.

    Raises:
        RequestError: if a run is not there or not finished.
    """
    runs = [*before, run]
    stages = [slim(folder) for folder in runs]
    out.mkdir(parents=True, exist_ok=True)
    given = read_checkpoint(run / ENCODER)
    write_checkpoint(
        out / ENCODER, given.config, given.tensors, name=given.name, trained_on=tuple(trained_on), license=given.license,
        citation=given.citation, metadata={"made_by": "superb-probe finetune"}, dtype=torch.float16,
    )  # fmt: skip
    head = {name: each.half() for name, each in safetensors.torch.load_file(run / HEAD).items()}
    (out / HEAD).write_bytes(safetensors.torch.save(head))
    description = {**stages[-1], "before": stages[:-1]}
    (out / DESCRIPTION).write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / CARD).write_text(card(out, stages, trained_on, scores(out)), encoding="utf-8")
    for file in sorted(out.iterdir()):
        print(f"{file}: {file.stat().st_size / 1e6:.2f} MB")


def slim(folder: Path) -> dict[str, Any]:
    """A finished run's description without transcripts, and without paths of the machine that it was made on."""
    path = folder / DESCRIPTION
    description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "test" not in description:
        raise RequestError(f"{folder}: no finished run. Fix: a folder that `superb-probe finetune` ended in")
    description["test"] = [
        {key: value for key, value in each.items() if key != "items"} for each in description["test"]
    ]
    description["checkpoint"] = None if description["checkpoint"] is None else Path(description["checkpoint"]).name
    return description


def scores(folder: Path) -> dict[str, Any]:
    """Error rates of the packed recogniser on `mini`'s test sentences, streamed."""
    upstream, recogniser = recogniser_of_folder(folder)
    ends = read_word_ends(mini_root() / "alignments.test.tsv")
    return measure_latency(upstream, recogniser, read_splits(mini_root(), "read")["test"], ends, CHUNK_S, None)


def card(folder: Path, stages: list[dict[str, Any]], trained_on: list[str], found: dict[str, Any]) -> str:
    """The page that goes with the weights."""
    low, high = found["ci95"]
    megabytes = sum(file.stat().st_size for file in folder.iterdir() if file.name != CARD) / 1e6
    rows = "\n".join(stage_row(number, stage) for number, stage in enumerate(stages, start=1))
    return f"""# A small streaming recogniser of English

`{stages[-1]["upstream"]}` as it ships, fine-tuned with a {stages[-1]["head"]["name"]} CTC head by `superb-probe finetune`.
`superb-probe stream` uses it where no other is named.

| | |
| --- | --- |
| Word error rate, `mini`'s {found["utterances"]} test sentences, streamed | {found["wer"]:.1f} % [{low:.1f}, {high:.1f}] |
| Size | {megabytes:.2f} MB |
| Trained on | {", ".join(trained_on)}: what its encoder was pre-trained on |
| Licence | Apache-2.0 |

| stage | updates | rate | precision | time | best word error rate on dev |
| --- | --- | --- | --- | --- | --- |
{rows}

It shows how streaming works and what it costs. It hears letters more often than words, most of what it heard in training was
synthesised, and nobody should rely on what it writes.
"""


def stage_row(number: int, stage: dict[str, Any]) -> str:
    """One run of the card."""
    recipe, machine = stage["recipe"], stage["machine"]
    place = machine["gpu"]["name"] if machine["gpu"] else f"{machine['processor']}, {machine['threads']} threads"
    cells = [
        str(number),
        f"{recipe['steps']:,} of {recipe['batch']}",
        f"{recipe['lr']:g}",
        recipe["precision"],
        f"{stage['seconds']:,.0f} s on {place}",
        f"{stage['dev_wer']:.1f} % after {stage['step']:,}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
