"""How often the paired tests cry wolf, and how often they see a real difference: simulated systems, items and speakers.

`python tests/results/simulate_compare.py 2000` prints the rates; the tests run a smaller number.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from superb_probe.probes.metrics import eer
from superb_probe.results import compare
from superb_probe.results.compare import compare_items

Simulator = Callable[[np.random.Generator, float], tuple[list[dict[str, Any]], list[dict[str, Any]]]]


def _logistic(values: Any) -> Any:
    return 1 / (1 + np.exp(-values))


def accuracy_items(rng: np.random.Generator, gain: float) -> Any:
    """400 independent items, difficulty shared by both systems; `gain` is added to B's log odds."""
    difficulty = rng.normal(1.0, 1.0, 400)
    sides = []
    for more in (0.0, gain):
        right = rng.random(400) < _logistic(difficulty + more)
        sides.append([{"id": [str(i) for i in range(400)], "correct": right.astype(int)}])
    return sides[0], sides[1]


def accuracy_speakers(rng: np.random.Generator, gain: float) -> Any:
    """20 speakers of 20 items; each system has its own luck with each speaker."""
    names = np.repeat([f"s{i}" for i in range(20)], 20)
    difficulty = rng.normal(1.0, 0.7, 400)
    sides = []
    for more in (0.0, gain):
        luck = np.repeat(rng.normal(0, 0.5, 20), 20)
        right = rng.random(400) < _logistic(difficulty + luck + more)
        sides.append([{"id": [str(i) for i in range(400)], "cluster": list(names), "correct": right.astype(int)}])
    return sides[0], sides[1]


def word_errors(rng: np.random.Generator, gain: float) -> Any:
    """12 speakers of 15 sentences; an error rate near 20 %, with each system's own luck with each speaker."""
    names = np.repeat([f"s{i}" for i in range(12)], 15)
    words = rng.integers(5, 30, 180)
    hard = np.repeat(rng.normal(0, 0.3, 12), 15)
    sides = []
    for more in (0.0, gain):
        luck = np.repeat(rng.normal(0, 0.15, 12), 15)
        edits = rng.binomial(words, _logistic(-1.4 + hard + luck - more))
        sides.append([{"id": [str(i) for i in range(180)], "cluster": list(names), "edits": edits, "words": words}])
    return sides[0], sides[1]


def trials(rng: np.random.Generator, gain: float) -> Any:
    """Verification among 20 speakers of 4 utterances: scores share the speakers' difficulty; `gain` moves B's target scores."""
    speakers, each = 20, 4
    owner = np.repeat(np.arange(speakers), each)
    first, second = np.triu_indices(speakers * each, 1)
    keep = (owner[first] == owner[second]) | (rng.random(len(first)) < 0.08)
    first, second = first[keep], second[keep]
    label = (owner[first] == owner[second]).astype(int)
    sides = []
    for more in (0.0, gain):
        typical = rng.normal(0, 0.5, speakers)
        noise = rng.normal(0, 1, len(first))
        score = label * (2.0 + more) + (typical[owner[first]] + typical[owner[second]]) / 2 + noise
        sides.append([{
            "id": [f"{a} {b}" for a, b in zip(first, second, strict=True)],
            "label": label,
            "score": score,
            "cluster_a": [f"s{owner[a]}" for a in first],
            "cluster_b": [f"s{owner[b]}" for b in second],
        }])  # fmt: skip
    return sides[0], sides[1]


# name: (simulator, metric, higher is better, metric of the columns, gain whose power is stated)
CASES: dict[str, tuple[Simulator, str, bool, Callable[[Any], float], float]] = {
    "McNemar, 400 items": (accuracy_items, "accuracy", True, lambda items: 100 * float(np.mean(items["correct"])), 0.6),
    "accuracy, 20 speakers x 20": (accuracy_speakers, "accuracy", True, lambda items: 100 * float(np.mean(items["correct"])), 0.8),
    "WER, 12 speakers x 15": (
        word_errors, "wer", False, lambda items: 100 * float(np.sum(items["edits"]) / np.sum(items["words"])), 0.3,
    ),
    "EER, 20 speakers": (trials, "eer", False, lambda items: 100 * eer(items["label"], items["score"])[0], 0.8),
}  # fmt: skip


def rejections(name: str, gain: float, times: int, seed: int = 0, level: float = 0.05) -> tuple[float, float]:
    """The share of simulated comparisons with p below the level, and the mean difference B - A."""
    simulator, metric, higher, value, _ = CASES[name]
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(times):
        a, b = simulator(rng, gain)
        found.append(compare_items("simulated", metric, higher, a, b, value))
    return float(np.mean([each.p is not None and each.p < level for each in found])), float(
        np.mean([each.difference for each in found])
    )


if __name__ == "__main__":
    count = int(sys.argv[1])
    compare.DRAWS, compare.BOOTSTRAP_DRAWS = 2000, 300
    for case, (*_, effect) in CASES.items():
        number = count if "EER" not in case else max(count // 4, 50)
        wolf, _ = rejections(case, 0.0, number)
        power, difference = rejections(case, effect, max(number // 4, 50), seed=1)
        print(
            f"{case}: false positives {100 * wolf:.1f} % of {number}; power {100 * power:.0f} % at {difference:+.1f} points",
            flush=True,
        )
