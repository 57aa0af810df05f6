"""Made-up records by the thousand, for tests of tables and figures. None of them was measured; none is ever written as a result.

`python tests/results/made_up.py FOLDER` writes them all, to time the tables with.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from superb_probe.results.record import RunRecord, read_records

RATES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
SEEDS = (1, 2, 3, 4, 5)
# task: (metric, higher is better, head, view, corpus, worst, best): where made-up scores lie
TASKS: dict[str, tuple[str, bool, str, str, str, float, float]] = {
    "pr": ("per", False, "frame_ctc", "frames", "librispeech", 80, 4),
    "asr": ("wer", False, "lstm_ctc", "frames", "librispeech", 30, 4),
    "ks": ("accuracy", True, "utterance_linear", "mean", "speech_commands", 40, 97),
    "qbe": ("mtwv", True, "dtw", "frames", "quesst14", 0.5, 9),
    "sid": ("accuracy", True, "utterance_linear", "mean", "voxceleb1", 20, 95),
    "asv": ("eer", False, "xvector", "frames", "voxceleb1", 12, 4),
    "sd": ("der", False, "lstm_pit", "frames", "libri2mix", 10, 3),
    "ic": ("accuracy", True, "utterance_linear", "mean", "fluent_speech_commands", 10, 99),
    "sf": ("slot_type_f1", True, "lstm_ctc", "frames", "audio_snips", 60, 92),
    "er": ("accuracy", True, "utterance_linear", "mean", "iemocap", 40, 70),
}
UPSTREAMS = tuple(f"made_up_{letter}" for letter in "abcdefghij")


def made_up_records(
    base: RunRecord,
    upstreams: tuple[str, ...] = UPSTREAMS,
    tasks: tuple[str, ...] = tuple(TASKS),
    rates: tuple[float, ...] = RATES,
    seeds: tuple[int, ...] = SEEDS,
) -> list[RunRecord]:
    """One record for every upstream, task, rate and seed (QbE: for every layer instead), changed from `base`.

    Scores follow from a formula and a seeded generator: upstreams differ in quality, the middle rate is the best, seeds scatter.
    """
    records = []
    for number, upstream in enumerate(upstreams):
        for task in tasks:
            points = (
                [(0.0, 0, layer) for layer in range(13)]
                if task == "qbe"
                else [(lr, s, None) for lr in rates for s in seeds]
            )
            for lr, seed, layer in points:
                records.append(_made_up(base, upstream, number, len(upstreams), task, lr, seed, layer))
    return records


def _made_up(
    base: RunRecord, upstream: str, number: int, count: int, task: str, lr: float, seed: int, layer: int | None
) -> RunRecord:
    metric, higher, head, view, corpus, worst, best = TASKS[task]
    cause = json.dumps([upstream, task, lr, seed, layer])
    draw = random.Random(cause)
    quality = 0.35 + 0.6 * number / max(count - 1, 1)
    off = abs(layer - 8) / 16 if layer is not None else abs(RATES.index(lr) - 2) / 5 if lr in RATES else 0.0
    value = worst + (best - worst) * max(0.0, quality - 0.4 * off + draw.gauss(0, 0.01))
    dev = worst + (best - worst) * max(0.0, quality - 0.4 * off + draw.gauss(0, 0.01))
    peak = 4.0 + 6 * (list(TASKS).index(task) / len(TASKS)) + draw.gauss(0, 0.1)
    weights = [1 / (1 + (i - peak) ** 2) for i in range(13)]
    extra = {"slot_value_cer": 60 - 40 * quality} if task == "sf" else {}
    assert base.score is not None
    return replace(
        base,
        run_id=hashlib.sha256(cause.encode()).hexdigest()[:12],
        upstream=replace(
            base.upstream, name=upstream, revision=f"sha256:{number}", params=20_000_000 * (number + 1), macs=10**11 * (number + 1)
        ),
        task=replace(
            base.task, name=task, metric=metric, higher_is_better=higher, dataset=corpus, unit="x 100" if task == "qbe" else "percent"
        ),
        probe=replace(
            base.probe, head=head, view=view, lr=lr, seed=seed, layer=layer, steps=0 if task == "qbe" else 1000  # type: ignore[arg-type]
        ),
        selection=replace(base.selection, metric=metric, value=dev, curve=((500, dev * 1.1), (1000, dev))),  # type: ignore[type-var]
        score=replace(base.score, value=value, ci95=(value * 0.97, value * 1.03), extra=extra),
        layer_weights=None if layer is not None else tuple(weight / sum(weights) for weight in weights),
        cost=replace(base.cost, extract_s=100.0, audio_s=36000.0 / (number + 1)),
        items=None,
        probe_weights=None,
    )  # fmt: skip


def write_quickly(records: list[RunRecord], folder: Path) -> None:
    """Write records where `write_record` would, without waiting for the disk."""
    for record in records:
        path = folder / record.task.name / record.upstream.name / f"{record.run_id}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(record.to_json())


def changed(record: RunRecord, **parts: Any) -> RunRecord:
    """A record with other parts and another run id."""
    return replace(record, run_id=hashlib.sha256(repr((record.run_id, parts)).encode()).hexdigest()[:12], **parts)


if __name__ == "__main__":
    example = read_records(Path(__file__).parent / "records_v1")[0]
    example = replace(example, upstream=replace(example.upstream, num_layers=13), layer_weights=(1 / 13,) * 13)
    write_quickly(made_up_records(example), Path(sys.argv[1]))
