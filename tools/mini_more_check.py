"""Checks of what joined `mini` later: words, slots, styles, speakers to know, queries, mixtures. `mini_check.py` runs them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import numpy as np
from mini_check import SLOTS, SPLITS, Corpus, Row, log_mel, read_table, wilson
from mini_more_text import STYLES, holds

KEYWORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go", "_unknown_", "_silence_")
OVERLAP = (0.2, 0.6)
Report = Callable[[str, bool], None]


def check_labels(corpus: Corpus, report: Report) -> None:
    """Labels of words, slots and styles: their counts, their form, and that the text tells no style."""
    for split in SPLITS:
        counts = Counter(row["keyword"] for row in corpus.every("words", split))
        text = f"words {split}: {sum(counts.values())}, {min(counts.values())} to {max(counts.values())} a keyword"
        report(text, set(counts) == set(KEYWORDS))
    unknown = [
        {row["text"] for row in corpus.every("words", split) if row["keyword"] == "_unknown_"} for split in SPLITS
    ]
    shared = (unknown[0] & unknown[1]) | (unknown[0] & unknown[2]) | (unknown[1] & unknown[2])
    report(f"unknown words {[len(words) for words in unknown]}, {len(shared)} in two splits", not shared)
    wrong, names = [], {split: Counter() for split in SPLITS}
    for split in SPLITS:
        for row in corpus.every("slots", split):
            labels = row["iob"].split()
            broken = [
                label
                for before, label in pairwise(["O", *labels])
                if label.startswith("I-") and before[2:] != label[2:]
            ]
            if len(labels) != len(row["text"].split()) or broken:
                wrong.append(row["id"])
            names[split].update(label[2:] for label in labels if label.startswith("B-"))
    known = set(names["train"])
    text = (
        f"slots: {len(known)} kinds, {[sum(names[split].values()) for split in SPLITS]} slots, {len(wrong)} rows broken"
    )
    report(text, not wrong and set(names["dev"]) <= known and set(names["test"]) <= known)
    said = Counter((row["text"], row["speaker"], row["emotion"]) for row in corpus.every("styles"))
    pairs = {key[:2] for key in said}
    even = all(said[(*pair, style)] == 1 for pair in pairs for style in STYLES)
    report(
        f"styles: {len(said)} utterances, {len(pairs)} sentences of a speaker, each once in {len(STYLES)} styles", even
    )
    sessions = {split: rows for (style, split), rows in corpus.rows.items() if style == "styles"}
    voices = {row["speaker"]: row["voice"] for row in read_table(corpus.root / "speakers.tsv")}
    speakers = [speaker for rows in sessions.values() for speaker in {row["speaker"] for row in rows}]
    texts = [text for rows in sessions.values() for text in {row["text"] for row in rows}]
    distinct = len(set(speakers)) == len({voices[name] for name in speakers}) == len(speakers) == 10
    report(
        f"styles: {len(sessions)} sessions, {len(set(speakers))} speakers of as many voices, {len(set(texts))} texts, none in two "
        "sessions",
        distinct and len(texts) == len(set(texts)) and len(sessions) == 5,
    )


def check_made(corpus: Corpus, report: Report) -> None:
    """Speakers to know, occurrences and mixtures."""
    dealt = {split: corpus.every("speakers_id", split) for split in SPLITS}
    speakers = {split: sorted({row["speaker"] for row in rows}) for split, rows in dealt.items()}
    ids = [row["id"] for rows in dealt.values() for row in rows]
    report(
        f"speakers_id: {[len(rows) for rows in dealt.values()]} utterances of {len(speakers['train'])} speakers, none twice",
        speakers["train"] == speakers["dev"] == speakers["test"] and len(ids) == len(set(ids)),
    )
    for split in ("dev", "test"):
        queries, documents = corpus.every("queries", split), corpus.every("documents", split)
        listed = {(row["query"], row["document"]) for row in read_table(corpus.root / f"occurrences.{split}.tsv")}
        by_text = {(q["id"], d["id"]) for q in queries for d in documents if q["text"] in d["text"].split()}
        spoken = {row["id"]: corpus.alignments[row["id"]]["phones"].split() for row in queries + documents}
        heard = {name: [phone for phone in phones if phone != "SIL"] for name, phones in spoken.items()}
        by_sound = {(q["id"], d["id"]) for q in queries for d in documents if holds(heard[d["id"]], heard[q["id"]])}
        reader = {row["id"]: row["speaker"] for row in queries + documents}
        own = sum(reader[query] == reader[document] for query, document in listed)
        fewest = min(Counter(query for query, _ in listed).values())
        report(
            f"queries {split}: {len(queries)} in {len(documents)} documents, {len(listed)} occurrences, at least {fewest} a query, "
            f"{len(listed ^ by_text)} wrong by text, {len(listed ^ by_sound)} by phones, {own} by the query's own speaker",
            listed == by_text == by_sound and own == 0 and {q for q, _ in listed} == {q["id"] for q in queries},
        )
    for split in SPLITS:
        own_speakers = {row["speaker"] for row in corpus.every("read", split)}
        shares, outside, foreign = [], 0, 0
        for row in corpus.every("mixtures", split):
            length_s = float(row["duration_s"])
            active: dict[str, np.ndarray] = {}
            for line in (corpus.root / row["rttm"]).read_text(encoding="utf-8").splitlines():
                fields = line.split()
                begin_s, long_s = float(fields[3]), float(fields[4])
                outside += begin_s < 0 or begin_s + long_s > length_s + 1e-3 or long_s <= 0
                track = active.setdefault(fields[7], np.zeros(round(100 * length_s), bool))
                track[round(100 * begin_s) : round(100 * (begin_s + long_s))] = True
            foreign += len(active) != 2 or not set(active) <= own_speakers
            first, second = list(active.values())[:2]
            shares.append((first & second).sum() / (first | second).sum())
        report(
            f"mixtures {split}: {len(shares)}, both talk {100 * min(shares):.0f} to {100 * max(shares):.0f} % of the time that any "
            f"does, {outside} segments outside the file, {foreign} not of two speakers of the split",
            not outside and not foreign and min(shares) > OVERLAP[0] - 0.02 and max(shares) < OVERLAP[1] + 0.02,
        )


def linear_classifier() -> object:
    """A shrunk linear discriminant on standardised features."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1))


def means_of(corpus: Corpus, rows: list[Row]) -> np.ndarray:
    """(U, 80) time means of log-mel frames: all that a linear head with mean pooling sees of them."""
    return np.array([log_mel(corpus.audio(row)).mean(0) for row in rows])


def report_accuracy(name: str, right: np.ndarray, truth: list[str], report: Report) -> None:
    """Accuracy beside the share of the largest class; it must lie between 1.3 times that and 90 %."""
    chance = max(Counter(truth).values()) / len(truth)
    low, high = wilson(int(right.sum()), len(right))
    text = f"{100 * right.mean():.1f} % [{100 * low:.1f}, {100 * high:.1f}], chance {100 * chance:.1f} %"
    report(f"{name} test, log-mel means: {text}", 1.3 * chance < right.mean() < 0.9)


def check_pooled(corpus: Corpus, report: Report) -> None:
    """IC, KS, SID and ER by a linear discriminant on time means of log-mel frames."""
    labels: dict[str, tuple[str, Callable[[Row], str]]] = {
        "IC": ("commands", lambda row: "/".join(row[slot] for slot in SLOTS)),
        "KS": ("words", lambda row: row["keyword"]),
        "SID": ("speakers_id", lambda row: row["speaker"]),
    }
    for name, (style, label) in labels.items():
        train, test = corpus.every(style, "train"), corpus.every(style, "test")
        model = linear_classifier().fit(means_of(corpus, train), [label(row) for row in train])
        truth = [label(row) for row in test]
        report_accuracy(name, model.predict(means_of(corpus, test)) == np.array(truth), truth, report)
    rows = corpus.every("styles")
    features, truth = means_of(corpus, rows), np.array([row["emotion"] for row in rows])
    session = np.array([split for (style, split), each in corpus.rows.items() if style == "styles" for _ in each])
    right = np.zeros(len(rows), bool)
    for tested in sorted(set(session)):
        model = linear_classifier().fit(features[session != tested], truth[session != tested])
        right[session == tested] = model.predict(features[session == tested]) == truth[session == tested]
    report_accuracy("ER (styles, a stand-in), five sessions,", right, list(truth), report)


def least_cost(query: np.ndarray, document: np.ndarray) -> float:
    """Subsequence dynamic time warping: least mean cosine distance of the query's frames along a path in the document."""
    distances = 1 - query @ document.T
    cost = distances[0]
    for row in distances[1:]:
        stay = np.minimum(cost, np.r_[np.inf, cost[:-1]]) + row
        # A document frame may be repeated for the query's frame: a running minimum along the row.
        total = np.cumsum(row)
        cost = np.minimum.accumulate(stay - total) + total
    return float(cost.min() / len(query))


def check_sequences(corpus: Corpus, report: Report) -> None:
    """QbE by dynamic time warping on log-mel frames, and what silence or constant overlap would score in SD."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    def frames(row: Row) -> np.ndarray:
        mel = log_mel(corpus.audio(row))[::2]
        mel = (mel - mel.mean(0)) / mel.std(0)
        return mel / np.linalg.norm(mel, axis=1, keepdims=True)

    for split in ("dev", "test"):
        documents = [(row, frames(row)) for row in corpus.every("documents", split)]
        scores, truth = [], []
        for query in corpus.every("queries", split):
            sought = frames(query)
            found = -np.array([least_cost(sought, document) for _, document in documents])
            scores.append((found - found.mean()) / found.std())
            truth.append([query["text"] in row["text"].split() for row, _ in documents])
        areas = [roc_auc_score(t, s) for t, s in zip(truth, scores, strict=True)]
        precision = np.mean([average_precision_score(t, s) for t, s in zip(truth, scores, strict=True)])
        report(
            f"QbE {split}, warping of log-mel frames: area under ROC {np.mean(areas):.3f}, mean average precision {precision:.3f}, "
            f"chance 0.5 and {np.mean(truth):.3f}",
            split == "dev" or (np.mean(areas) > 0.55 and precision < 0.9),
        )
    errors = {"nobody talks": [0.0, 0.0], "both always talk": [0.0, 0.0]}
    for row in corpus.every("mixtures", "test"):
        lines = (corpus.root / row["rttm"]).read_text(encoding="utf-8").splitlines()
        spoken = sum(float(line.split()[4]) for line in lines)
        errors["nobody talks"][0] += spoken
        errors["both always talk"][0] += 2 * float(row["duration_s"]) - spoken
        for sums in errors.values():
            sums[1] += spoken
    text = ", ".join(f"{name} {100 * wrong / total:.1f} %" for name, (wrong, total) in errors.items())
    report(f"SD test, DER without looking: {text}", True)
