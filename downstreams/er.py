"""ER: emotion recognition over five folds, one linear classifier on the mean of the frames."""

from __future__ import annotations

from pathlib import Path

import torch

from superb_probe.downstreams.base import Budget, Fold, ProtocolSettings, S3prlBatches, Task, TaskInfo
from superb_probe.downstreams.classification import HEADS, MEAN_NOTE, SMALL_HEADS, Classification
from superb_probe.downstreams.manifest import Manifest, Utterance
from superb_probe.downstreams.mini import check_folder
from superb_probe.downstreams.support import COMMON_DEVIATIONS, SUPERB_CITATION, own_corpus
from superb_probe.errors import RequestError

PROVIDES = ("er",)

SESSION = "session"  # the label column whose values are the folds
SESSIONS = ("1", "2", "3", "4", "5")
TRAIN_SHARE = 0.8  # of the sessions that are not tested; the rest is dev
SPLIT_SEED = 0
DEVIATIONS = (
    *COMMON_DEVIATIONS,
    "initial values and order follow the run's seed; s3prl sets the seed to 0 for both, whatever it is asked",
    "dev is a random fifth drawn over the manifest's order of utterances; s3prl draws it over the order of its metadata files",
    "class ids are sorted by name; s3prl numbers neutral, happy, angry, sad",
)

INFO = TaskInfo(
    name="er",
    version=1,
    metric="accuracy",
    unit="percent",
    higher_is_better=True,
    view="mean",
    protocols={
        "strict": ProtocolSettings(default_lr=1e-4),
        "superb": ProtocolSettings(default_lr=1e-4, deviations=DEVIATIONS),
        "mamba_hubert": ProtocolSettings(default_lr=1e-4, layer_norm=True, deviations=DEVIATIONS),
    },
    optimizer="adam",
    clip=1.0,
    budgets={
        "full": Budget(steps=30_000, batch=4, accumulate=8, evaluate_every=1000),
        "small": Budget(
            steps=1000,
            batch=128,
            accumulate=1,
            evaluate_every=100,
            head={"width": 128},
            second_heads=SMALL_HEADS,
        ),
    },
    label_columns=("emotion",),
    speakers="test_disjoint",
    license="IEMOCAP: by agreement with its authors",
    citation=SUPERB_CITATION,
    published={
        "lr": 1e-4,
        "batch": "4 x 8",
        "updates": 30_000,
        "accuracy": {"fbank_no_cmvn": 48.24, "hubert_base": 64.92, "wavlm_large": 70.62},
    },
    heads=HEADS,
    s3prl_batches=S3prlBatches(evaluation=4),
    notes=(MEAN_NOTE, "the score is the mean of the folds' test accuracies, each fold counted the same"),
)


class EmotionRecognition(Classification):
    """Which emotion is spoken, tested on the speakers of one session, trained on the others; five sessions, five folds."""

    info = INFO

    def splits(self, root: Path) -> list[Fold]:
        """The five sessions of the embedded corpus, or of a folder laid out like it: styles.1.tsv to styles.5.tsv."""
        root = Path(root)
        check_folder(root, [f"styles.{session}.tsv" for session in SESSIONS])
        utterances = [
            Utterance(each.id, each.audio, each.start_s, each.duration_s, {**each.labels, SESSION: session})
            for session in SESSIONS
            for each in Manifest.read(root / f"styles.{session}.tsv", root)
        ]
        return session_folds(own_corpus(Manifest(utterances, root, "styles"), "mini"))

    def folds_of(self, whole: Manifest) -> list[Fold]:
        """One fold a session of anyone's own data.

        Raises:
            RequestError: without the column "session", or with fewer than two sessions.
        """
        if SESSION not in whole.columns or "" in whole.labels(SESSION) or len(set(whole.labels(SESSION))) < 2:
            raise RequestError(
                f"er: train= alone is divided by its column {SESSION!r}, which {whole.name} must have, filled in, with two sessions "
                f"or more; its columns are {', '.join(whole.columns)}. Fix: add it, or give dev= and test= too"
            )
        return session_folds(whole)


def session_folds(whole: Manifest) -> list[Fold]:
    """One fold a session: it is test; of the others, a random 80 % is train and the rest dev, as s3prl divides them.

    Args:
        whole: all utterances, with the label column "session".
    """
    folds = []
    for session in sorted(set(whole.labels(SESSION))):
        name = f"session{session}"
        tested = [each.labels[SESSION] == session for each in whole]
        others = [each.id for each, is_test in zip(whole, tested, strict=True) if not is_test]
        order = torch.randperm(len(others), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
        count = int(TRAIN_SHARE * len(others))
        chosen = {
            "train": [others[row] for row in order[:count]],
            "dev": [others[row] for row in order[count:]],
            "test": [each.id for each, is_test in zip(whole, tested, strict=True) if is_test],
        }
        manifests = {}
        for split, ids in chosen.items():
            kept = whole.keep(ids)
            manifests[split] = Manifest(tuple(kept), whole.root, f"{name} {split}", corpus=whole.corpus)
        folds.append(Fold(name, manifests))
    return folds


def er() -> Task:
    """The task as SUPERB sets it: IEMOCAP, four emotions, leave one session out."""
    return EmotionRecognition()
