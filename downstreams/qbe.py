"""QbE: spoken queries are looked for in spoken documents, without training, scored by maximum term-weighted value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from superb_probe.downstreams.base import (
    Budget,
    Fold,
    Head,
    LabelSet,
    Prediction,
    ProtocolSettings,
    Score,
    Split,
    Task,
    TaskInfo,
)
from superb_probe.downstreams.manifest import Manifest, Problem, Utterance, read_table
from superb_probe.downstreams.mini import check_folder
from superb_probe.downstreams.support import (
    COMMON_DEVIATIONS,
    SUPERB_CITATION,
    check_options,
    check_predictions,
    clusters,
)
from superb_probe.errors import RequestError, all_at_once
from superb_probe.probes.metrics import detection_counts, mean_average_precision, term_weighted_values
from superb_probe.probes.untrained import DOCUMENT, QUERY, SubsequenceDtw

PROVIDES = ("qbe",)

SPLITS = ("dev", "test")
YES_ABOVE = 2.0  # s3prl's own decision, in standard deviations over the documents of a query
LEAST_DEVIATION = 1e-9
ACCEPT_NOTHING = 1e6  # standard scores are at most the root of the number of documents
PUBLISHED_DECIMALS = 4  # s3prl writes scores so, and the scorer reads them
DEVIATIONS = (
    COMMON_DEVIATIONS[0],
    "scored here by the definition of the term-weighted value, not by the database's own scorer",
)
UNTRAINED = Budget(steps=0, batch=1, accumulate=1, evaluate_every=1)

INFO = TaskInfo(
    name="qbe",
    version=1,
    metric="mtwv",
    unit="percent",
    higher_is_better=True,
    view="frames",
    protocols={
        "strict": ProtocolSettings(lr_grid=(0.0,), default_lr=0.0),
        "superb": ProtocolSettings(lr_grid=(0.0,), default_lr=0.0, deviations=DEVIATIONS),
        "mamba_hubert": ProtocolSettings(lr_grid=(0.0,), default_lr=0.0, layer_norm=True, deviations=DEVIATIONS),
    },
    optimizer="none",
    clip=0.0,
    budgets={"full": UNTRAINED, "small": UNTRAINED},
    label_columns=("role",),
    speakers="shared",
    trained=False,
    waveform="gain",
    resample=True,
    license="QUESST 2014: research use, see its README",
    citation=SUPERB_CITATION,
    published={
        "layer": {"wav2vec2_base": 1, "hubert_base": 12, "wav2vec2_large": 15, "hubert_large": 24},
        "mtwv": {"fbank": 0.58, "hubert_base": 7.36},
    },
)


class QueryByExample(Task):
    """In which documents a spoken query occurs: subsequence DTW on the states of one layer, chosen on dev.

    A split is one manifest of queries and documents: column `role`, and `occurrences`, the ids of the documents a query is in.

    Attributes:
        threshold: the detection threshold that dev chose; None before.
    """

    info = INFO

    def __init__(self, threshold: float | None = None) -> None:
        """`threshold` only makes `extra["atwv"]`; the metric takes the best."""
        self.threshold = threshold

    def splits(self, root: Path) -> list[Fold]:
        """The queries and documents of the embedded corpus, or of a folder laid out like it."""
        names = [f"{table}.{split}.tsv" for table in ("queries", "documents", "occurrences") for split in SPLITS]
        check_folder(Path(root), names)
        return [Fold(None, {split: read_split(Path(root), split) for split in SPLITS})]

    def arrange(self, fold: Fold, protocol: str) -> Fold:
        """The fold under the protocol; queries that occur nowhere are told, because they are not scored."""
        notes = []
        for split, manifest in fold.manifests.items():
            idle = [u.id for u in manifest if u.labels["role"] == QUERY and not occurrences(u)]
            if idle:
                notes.append(
                    f"{split} ({manifest.name}): {len(idle)} queries occur nowhere and are not scored ({idle[0]}, ...)"
                )
        return replace(fold, notes=(*fold.notes, *notes), protocol=protocol)

    def label_problems(self, fold: Fold) -> list[Problem]:
        """Roles that are none, occurrences that are no documents, splits with nothing to find, queries of two splits."""
        found = [problem for manifest in fold.manifests.values() for problem in _split_problems(manifest)]
        queries = {
            split: {(u.audio, u.start_s) for u in manifest if u.labels["role"] == QUERY}
            for split, manifest in fold.manifests.items()
        }
        if shared := sorted(queries.get("dev", set()) & queries.get("test", set())):
            what = f"dev and test share {len(shared)} queries, first {shared[0][0]}: the layer is chosen on dev"
            found.append(Problem("queries", what, "give each query to one split; documents may be shared"))
        return found

    def labels(self, train: Manifest) -> LabelSet:
        """Whether a query occurs in a document."""
        return LabelSet({"match": ("no", "yes")})

    def target(self, utterance: Utterance, labels: LabelSet) -> dict[str, Tensor]:
        """Nothing is trained: the number of documents a query occurs in, ()."""
        return {"occurrences": torch.tensor(len(occurrences(utterance)))}

    def head(self, dim: int, labels: LabelSet, options: Mapping[str, Any] | None = None) -> Head:
        """How frames are compared: "distance" is "cosine_exp" (the default) or "cosine"."""
        return SubsequenceDtw(**check_options("qbe", options, ("distance",)))

    def tuned_by(self, score: Score) -> Task:
        """The task with the threshold that is best on dev, for `extra["atwv"]`."""
        return QueryByExample(score.extra["threshold"])

    def score(self, predictions: Mapping[str, Prediction], fold: Fold, split: Split) -> Score:
        """Maximum term-weighted value in percent, from the scores (documents,) of every query.

        Scores are standardised over the documents of each query, as s3prl does. Items are queries: what each accepts, at every
        threshold that may be the best, and its scores, in the order of the documents that the first row names. `extra` has the
        value at the threshold chosen on dev ("atwv") and at s3prl's two standard deviations ("twv_yes"), and mean average precision
        in percent, which no threshold enters ("map").
        """
        manifest = fold.manifests[split]
        queries = manifest.keep([u.id for u in manifest if u.labels["role"] == QUERY])
        check_predictions("qbe", predictions, queries)
        count = manifest.labels("role").count(DOCUMENT)
        scores = {query.id: standard_scores(predictions[query.id], count, query.id) for query in queries}
        if fold.protocol != "strict":
            scores = {name: each.round(PUBLISHED_DECIMALS) for name, each in scores.items()}
        return self.score_standard(scores, manifest)

    def score_standard(self, standard: Mapping[str, NDArray[np.float64]], manifest: Manifest) -> Score:
        """The score of standard scores by query, in the order of the manifest's documents."""
        queries = manifest.keep([u.id for u in manifest if u.labels["role"] == QUERY])
        documents = [u.id for u in manifest if u.labels["role"] == DOCUMENT]
        truths = [np.isin(documents, occurrences(query)).astype(np.int64) for query in queries]
        scores = [standard[query.id] for query in queries]
        thresholds, hits, false_alarms = detection_counts(truths, scores)
        items: dict[str, Any] = {
            "id": list(queries.ids),
            "cluster": clusters(queries),
            "targets": [int(truth.sum()) for truth in truths],
            "others": [int((1 - truth).sum()) for truth in truths],
            "hits": [_text(row) for row in hits],
            "false_alarms": [_text(row) for row in false_alarms],
            "scores": [" ".join(f"{score:.{PUBLISHED_DECIMALS}f}" for score in each) for each in scores],
            "documents": [" ".join(documents), *[""] * (len(queries) - 1)],  # the same for every query
        }
        values = term_weighted_values(hits, false_alarms, items["targets"], items["others"])
        best = int(values.argmax())
        extra = {
            "threshold": float(thresholds[best]) if values[best] > 0 else ACCEPT_NOTHING,
            "twv_yes": self._value_above(truths, scores, YES_ABOVE, False),
            "map": 100.0 * mean_average_precision(truths, scores),
        }
        if self.threshold is not None:
            extra["atwv"] = self._value_above(truths, scores, self.threshold, True)
        return Score(self.value(items), items, extra)

    def value(self, items: Mapping[str, Any]) -> float:
        """Maximum term-weighted value in percent; accepting nothing is worth 0."""
        hits, false_alarms = (np.stack([_numbers(text) for text in items[name]]) for name in ("hits", "false_alarms"))
        values = term_weighted_values(hits, false_alarms, items["targets"], items["others"])
        return 100.0 * max(0.0, float(values.max()))

    def _value_above(
        self, truths: Sequence[NDArray[Any]], scores: Sequence[NDArray[Any]], threshold: float, equal: bool
    ) -> float:
        """The term-weighted value in percent of accepting scores above one threshold, or equal to it."""
        accepted = [each >= threshold if equal else each > threshold for each in scores]
        hits = [[int((each & (truth == 1)).sum())] for each, truth in zip(accepted, truths, strict=True)]
        alarms = [[int((each & (truth == 0)).sum())] for each, truth in zip(accepted, truths, strict=True)]
        targets = [int(truth.sum()) for truth in truths]
        others = [len(truth) - count for truth, count in zip(truths, targets, strict=True)]
        return 100.0 * float(term_weighted_values(hits, alarms, targets, others)[0])


def qbe() -> Task:
    """The task as SUPERB sets it: the English part of QUESST 2014."""
    return QueryByExample()


def read_split(root: Path, split: str) -> Manifest:
    """Queries and documents of one split as one manifest, from `queries`, `documents` and `occurrences` tables.

    Raises:
        RequestError: for a pair whose query or document is not there.
    """
    queries, documents = (Manifest.read(root / f"{table}.{split}.tsv", root) for table in ("queries", "documents"))
    path = root / f"occurrences.{split}.tsv"
    header, rows = read_table(path, required=("query", "document"))
    inside: dict[str, list[str]] = {name: [] for name in queries.ids}
    known, wrong = set(documents.ids), []
    for line, row in rows:
        cells = dict(zip(header, row, strict=True))
        query, document = cells["query"], cells["document"]
        if query not in inside or document not in known:
            wrong.append(f"line {line}: {query!r} is no query, or {document!r} no document, of {split}")
        else:
            inside[query].append(document)
    if wrong:
        raise all_at_once(str(path), wrong, "name the ids of the two tables beside it")
    made = [_labelled(each, QUERY, " ".join(sorted(set(inside[each.id])))) for each in queries]
    made += [_labelled(each, DOCUMENT, "") for each in documents]
    return Manifest(made, root, f"queries and documents.{split}", corpus="mini")


def occurrences(query: Utterance) -> list[str]:
    """The ids of the documents a query occurs in."""
    return query.labels.get("occurrences", "").split()


def standard_scores(scores: Any, count: int, query: str) -> NDArray[np.float64]:
    """The scores of one query over `count` documents, less their mean, over their standard deviation (of the population)."""
    values = np.asarray(scores, dtype=np.float64)
    if values.shape != (count,) or not np.isfinite(values).all():
        raise RequestError(f"qbe: query {query} needs {count} finite scores, one a document; found {values.shape}")
    standard: NDArray[np.float64] = (values - values.mean()) / max(float(values.std()), LEAST_DEVIATION)
    return standard


def _labelled(utterance: Utterance, role: str, inside: str) -> Utterance:
    labels = {"role": role, "occurrences": inside, "speaker": utterance.labels.get("speaker", "")}
    return replace(utterance, labels=labels)


def _split_problems(manifest: Manifest) -> Iterator[Problem]:
    """What is wrong within one split."""
    roles = manifest.labels("role")
    known = {u.id for u in manifest if u.labels["role"] == DOCUMENT}
    for utterance in manifest:
        where = f"{manifest.name}, utterance {utterance.id}"
        if utterance.labels["role"] not in (QUERY, DOCUMENT):
            yield Problem(where, f"role {utterance.labels['role']!r}", "query or document")
        missing = [name for name in occurrences(utterance) if name not in known]
        if missing:
            yield Problem(where, f"occurs in {', '.join(missing[:3])}, no document of the split", "use their ids")
    for role in (QUERY, DOCUMENT):
        if role not in roles:
            yield Problem(manifest.name, f"no {role}", "each split needs queries and documents")
    if QUERY in roles and not any(occurrences(u) for u in manifest if u.labels["role"] == QUERY):
        what = "no query occurs anywhere: there is nothing to find"
        yield Problem(manifest.name, what, 'fill in "occurrences": the ids of documents, parted by spaces')


def _text(counts: NDArray[np.int64]) -> str:
    return " ".join(map(str, counts.tolist()))


@lru_cache(maxsize=2**16)
def _numbers(text: str) -> NDArray[np.int64]:
    """The counts of an item; the bootstrap reads the same ones again and again."""
    return np.array(text.split(), dtype=np.int64)
