"""Measure what the corpus `mini` promises, and write its table of speaker cosines.

`files`, `levels`, `labels` and `made` need nothing but the corpus. `silence` shows that what surrounds the speech says nothing of
the labels, and that noise which depended on them would be found. `speakers` needs the clean cache and Resemblyzer. `asv`,
`pooled` and `sequences` run rough stand-ins for the tasks on log-mel frames, to see that they are neither trivial nor impossible.
Exit status 1 when a promise is broken.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import soxr
from mini_model import SYNTHESIS_RATE_HZ
from mini_voices import SAMPLE_RATE_HZ, mean_embedding, play_faster, read_speakers
from scipy.signal import stft

SPLITS = ("train", "dev", "test")
STYLES = ("read", "phrases", "commands", "words", "slots", "queries")  # tables of utterances, by split
MADE = ("speakers_id", "documents", "mixtures")  # tables of stretches of these, and of mixtures
SESSIONS = ("1", "2", "3", "4", "5")
PROBED = 1500  # utterances the silence probe for speakers takes, evenly from all
COSINE_BOUND = 0.80
LARGEST_BYTES = 19_000_000
CHECKS = ("files", "levels", "labels", "made", "silence", "speakers", "asv", "pooled", "sequences")
SLOTS = ("slot_action", "slot_object", "slot_location")

Row = dict[str, str]


def read_table(path: Path) -> list[Row]:
    """The rows of a TSV."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


class Corpus:
    """The tables of the corpus and its audio."""

    def __init__(self, root: Path) -> None:
        """Read the tables.

        Args:
            root: the corpus folder.
        """
        self.root = root
        tables = [(style, split) for style in (*STYLES, *MADE) for split in SPLITS]
        tables += [("styles", session) for session in SESSIONS]
        self.rows = {
            (style, split): read_table(path)
            for style, split in tables
            if (path := root / f"{style}.{split}.tsv").exists() or split != "train"
        }
        self.alignments = {row["id"]: row for split in SPLITS for row in read_table(root / f"alignments.{split}.tsv")}

    def every(self, style: str | None = None, split: str | None = None) -> list[Row]:
        """The rows of one style or split; for no style, all utterances that were spoken for the corpus."""
        return [
            row
            for (row_style, row_split), rows in self.rows.items()
            if (style == row_style or (style is None and row_style not in MADE)) and split in (None, row_split)
            for row in rows
        ]

    def audio(self, row: Row) -> np.ndarray:
        """Samples (S,) float32."""
        audio, rate_hz = soundfile.read(self.root / row["audio"], dtype="float32")
        if rate_hz != SAMPLE_RATE_HZ:
            raise ValueError(f"{row['audio']}: {rate_hz} Hz")
        begin = round(float(row["start_s"]) * SAMPLE_RATE_HZ)
        return audio[begin : begin + round(float(row["duration_s"]) * SAMPLE_RATE_HZ)]


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share.

    >>> [round(bound, 3) for bound in wilson(5, 10)]
    [0.237, 0.763]
    """
    z, share = 1.96, right / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * np.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return float(centre - half), float(centre + half)


def mel_matrix(filters: int, points: int) -> np.ndarray:
    """Triangular filters (filters, points // 2 + 1), equally wide on the mel scale."""
    edges_mel = np.linspace(0, 2595 * np.log10(1 + SAMPLE_RATE_HZ / 2 / 700), filters + 2)
    edges_hz = 700 * (10 ** (edges_mel / 2595) - 1)
    bins_hz = np.fft.rfftfreq(points, 1 / SAMPLE_RATE_HZ)
    rising = (bins_hz - edges_hz[:-2, None]) / (edges_hz[1:-1] - edges_hz[:-2])[:, None]
    falling = (edges_hz[2:, None] - bins_hz) / (edges_hz[2:] - edges_hz[1:-1])[:, None]
    return np.maximum(0.0, np.minimum(rising, falling))


MEL = mel_matrix(80, 512)


def log_mel(audio: np.ndarray) -> np.ndarray:
    """Log-mel frames (T, 80), 25 ms every 10 ms."""
    _, _, spectrum = stft(audio, SAMPLE_RATE_HZ, nperseg=400, noverlap=240, nfft=512, boundary=None, padded=False)
    return np.log(MEL @ (np.abs(spectrum) ** 2) + 1e-10).T


def check_files(corpus: Corpus, report: Callable[[str, bool], None]) -> None:
    """Files, labels and splits."""
    rows = corpus.every()
    spoken = [row for row in rows if row["id"] in corpus.alignments]
    made = corpus.every("mixtures")
    listed = {row["audio"] for style in (None, *MADE) for row in corpus.every(style)}
    stored = {path.relative_to(corpus.root).as_posix() for path in corpus.root.glob("audio/**/*.opus")}
    ids = {row["id"] for row in rows + made}
    report(
        f"{len(spoken)} utterances, {len(rows) - len(spoken)} stretches of noise, {len(made)} mixtures; {len(listed)} files listed, "
        f"{len(stored)} stored",
        listed == stored and len(ids) == len(rows + made) and len(spoken) == len(corpus.alignments),
    )
    lengths = [abs(len(corpus.audio(row)) - float(row["duration_s"]) * SAMPLE_RATE_HZ) for row in rows + made]
    report(f"length: at most {max(lengths):.3f} samples from duration_s", max(lengths) < 0.5)
    total_s = sum(float(row["duration_s"]) for row in rows + made)
    total_bytes = sum(path.stat().st_size for path in corpus.root.rglob("*") if path.is_file())
    report(f"{total_s / 60:.1f} minutes, {total_bytes / 1e6:.2f} MB with tables", total_bytes < LARGEST_BYTES)
    for style in ("read", "phrases", "commands", "slots", "queries"):
        sets = {split: {row["text"] for row in corpus.every(style, split)} for split in SPLITS}
        shared = (sets["train"] & sets["dev"]) | (sets["train"] & sets["test"]) | (sets["dev"] & sets["test"])
        counts = {split: len(values) for split, values in sets.items()}
        report(
            f"{style}: texts {counts}, {len(shared)} in two splits",
            not shared,
        )
    speakers = {split: {row["speaker"] for row in corpus.every("words", split) if row["speaker"]} for split in SPLITS}
    strangers = [
        row["id"]
        for split in SPLITS
        for row in corpus.every(split=split)
        if row["speaker"] and row["speaker"] not in speakers[split]
    ]
    overlap = (speakers["train"] & speakers["dev"]) | (speakers["train"] | speakers["dev"]) & speakers["test"]
    report(
        f"speakers { {split: len(names) for split, names in speakers.items()} }, {len(overlap)} in two splits",
        not overlap and not strangers,
    )
    for style in ("phrases", "commands"):
        for slot in SLOTS:
            classes = {split: {row[slot] for row in corpus.every(style, split)} for split in SPLITS}
            report(
                f"{style}, {slot}: {len(classes['train'])} classes",
                classes["dev"] <= classes["train"] and classes["test"] <= classes["train"],
            )
    words = {split: [word for row in corpus.every("read", split) for word in row["text"].split()] for split in SPLITS}
    unseen = np.mean([word not in set(words["train"]) for word in words["test"]])
    types = len({word for row in rows for word in row["text"].split()})
    report(
        f"{types} word types; {100 * unseen:.1f} % of the read test words are not in read train",
        types >= 1000 and unseen < 0.5,
    )
    bad = [row["id"] for row in corpus.every("read") if without_pauses(corpus.alignments[row["id"]]) != row["phones"]]
    steps = [np.diff([int(start) for start in row["starts_ms"].split()]).min() for row in corpus.alignments.values()]
    report(f"alignments: {len(bad)} differ from the phones, shortest phone {min(steps)} ms", not bad and min(steps) > 0)


def without_pauses(alignment: Row) -> str:
    """The phones of an alignment without SIL."""
    return " ".join(phone for phone in alignment["phones"].split() if phone != "SIL")


def check_levels(corpus: Corpus, report: Callable[[str, bool], None]) -> None:
    """Mean level of vowels, other phones and silence by the alignment."""
    levels: dict[str, list[float]] = {"vowel": [], "other": [], "silence": []}
    for row in corpus.every("read", "test"):
        audio, alignment = corpus.audio(row), corpus.alignments[row["id"]]
        bounds = [int(start) * 16 for start in alignment["starts_ms"].split()] + [len(audio)]
        for phone, begin, end in zip(alignment["phones"].split(), bounds[:-1], bounds[1:], strict=True):
            kind = "silence" if phone == "SIL" else "vowel" if phone[-1].isdigit() else "other"
            if end - begin >= 160:
                levels[kind].append(
                    float(10 * np.log10(np.mean(audio[begin:end] ** 2) + 1e-10)) - float(row["gain_db"])
                )
    medians = {kind: float(np.median(values)) for kind, values in levels.items()}
    text = ", ".join(f"{kind} {value:.1f} dB" for kind, value in medians.items())
    report(f"median level of test reads: {text}", medians["vowel"] > medians["other"] + 3 > medians["silence"] + 3)


def cross_validated(features: np.ndarray, labels: np.ndarray) -> int:
    """How many labels logistic regression gets right in five folds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    return int((cross_val_predict(model, features, labels, cv=folds) == labels).sum())


def leading(corpus: Corpus, row: Row) -> np.ndarray:
    """The noise before the speech, less 60 ms: cutting begins 20 ms early, and the codec smears by a frame or two."""
    samples = int(corpus.alignments[row["id"]]["starts_ms"].split()[1]) * 16
    return corpus.audio(row)[: samples - 960]


def check_silence(corpus: Corpus, report: Callable[[str, bool], None]) -> None:
    """A probe on the noise before the speech stays at chance for every label; planted noise is found."""
    every = [row for row in corpus.every() if row["id"] in corpus.alignments and row["start_s"] == "0.0"]
    words = [row for row in corpus.every("words") if row["id"] in corpus.alignments]
    for name, rows, label in (
        ("speaker", every[:: max(1, len(every) // PROBED)], lambda row: row["speaker"]),
        ("intent of phrases", corpus.every("phrases"), lambda row: "/".join(row[slot] for slot in SLOTS)),
        ("intent of commands", corpus.every("commands"), lambda row: "/".join(row[slot] for slot in SLOTS)),
        ("keyword", words, lambda row: row["keyword"]),
        ("style", corpus.every("styles"), lambda row: row["emotion"]),
    ):
        features = np.array([np.r_[(mel := log_mel(leading(corpus, row))).mean(0), mel.std(0)] for row in rows])
        labels = np.array([label(row) for row in rows])
        counts = np.array(list(Counter(labels).values())) / len(labels)
        # The share of the largest class: what a probe reaches without looking.
        chance = float(counts.max())
        even = float((counts**2).sum())
        right = cross_validated(features, labels)
        low, high = wilson(right, len(rows))
        interval = f"{100 * right / len(rows):.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
        text = f"{interval}, chance {100 * even:.1f} to {100 * chance:.1f} %"
        report(f"silence probe, {name}: {text}", low <= chance)
        # The mutant: every class has a noise spectrum of its own, 3 dB (standard deviation) from the others'.
        generator = np.random.default_rng(0)
        offsets = {key: generator.normal(0, 3, len(MEL)) * np.log(10) / 10 for key in sorted(set(labels))}
        planted = features.copy()
        planted[:, : len(MEL)] += np.array([offsets[key] for key in labels])
        planted_low, _ = wilson(cross_validated(planted, labels), len(rows))
        report(f"  with planted noise: from {100 * planted_low:.1f} %, found", planted_low > chance)


def check_speakers(corpus: Corpus, cache: Path, report: Callable[[str, bool], None]) -> None:
    """Cosines between the speakers' mean Resemblyzer embeddings, clean and finished; writes speaker_cosines.tsv."""
    speakers = read_speakers(corpus.root / "speakers.tsv")
    means: dict[str, list[np.ndarray]] = {"clean": [], "finished": []}
    for speaker in speakers:
        rows = [row for row in corpus.every("read") if row["speaker"] == speaker.id]
        clean = []
        for row in rows:
            with np.load(cache / "clean" / f"{row['id']}.npz") as stored:
                warped = play_faster(stored["audio"].astype(np.float32) / 32767, speaker.warp)
            clean.append(soxr.resample(warped, SYNTHESIS_RATE_HZ, SAMPLE_RATE_HZ))
        means["clean"].append(mean_embedding(clean))
        means["finished"].append(mean_embedding([corpus.audio(row) for row in rows]))
    columns: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for kind, vectors in means.items():
        matrix = np.array(vectors) @ np.array(vectors).T
        np.fill_diagonal(matrix, -1.0)
        columns[kind] = (matrix.argmax(1), matrix.max(1))
        off = matrix[np.triu_indices(len(speakers), 1)]
        text = f"median {np.median(off):.3f}, 99th percentile {np.percentile(off, 99):.3f}, largest {off.max():.3f}"
        # The bound is promised for the voices themselves, that is for clean audio.
        report(f"speaker cosines, {kind}: {text}", kind == "finished" or off.max() < COSINE_BOUND)
    with (corpus.root / "speaker_cosines.tsv").open("w", encoding="utf-8") as file:
        print("speaker", "nearest_clean", "cosine_clean", "nearest_finished", "cosine_finished", sep="\t", file=file)
        for index, speaker in enumerate(speakers):
            cells = [f"{speakers[near[index]].id}\t{cosine[index]:.3f}" for near, cosine in columns.values()]
            print(speaker.id, *cells, sep="\t", file=file)


def eer(scores: np.ndarray, labels: np.ndarray) -> float:
    """Equal error rate, by interpolation."""
    from sklearn.metrics import roc_curve

    accepted, right, _ = roc_curve(labels, scores)
    missed = 1 - right
    crossing = np.nonzero(accepted >= missed)[0][0]
    a, b = accepted[crossing - 1] - missed[crossing - 1], accepted[crossing] - missed[crossing]
    return float(np.interp(0.0, [a, b], [accepted[crossing - 1], accepted[crossing]]))


def check_asv(corpus: Corpus, report: Callable[[str, bool], None]) -> None:
    """Rough stand-ins for ASV: the error rate lies under chance by a factor of 1.3."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def statistics(row: Row) -> np.ndarray:
        mel = log_mel(corpus.audio(row))
        return np.r_[mel.mean(0), mel.std(0), np.diff(mel, axis=0).std(0)]

    train = corpus.every("read", "train")
    model = make_pipeline(StandardScaler(), LinearDiscriminantAnalysis(n_components=30))
    model.fit(np.array([statistics(row) for row in train]), [row["speaker"] for row in train])
    for split in ("dev", "test"):
        rows = corpus.every("read", split)
        pairs = read_table(corpus.root / f"trials.{split}.tsv")
        labels = np.array([int(pair["label"]) for pair in pairs])
        by_mel = dict(
            zip([row["id"] for row in rows], model.transform(np.array([statistics(row) for row in rows])), strict=True)
        )
        by_encoder = {row["id"]: mean_embedding([corpus.audio(row)]) for row in rows}
        results = {}
        for name, vectors in (("log-mel statistics, LDA", by_mel), ("Resemblyzer", by_encoder)):
            unit = {key: vector / np.linalg.norm(vector) for key, vector in vectors.items()}
            results[name] = eer(np.array([unit[pair["id_a"]] @ unit[pair["id_b"]] for pair in pairs]), labels)
        text = ", ".join(f"{name} {100 * value:.1f} %" for name, value in results.items())
        report(f"ASV {split}, EER of {len(pairs)} trials: {text}", max(results.values()) < 0.5 / 1.3)


def main() -> int:
    """Run the checks that were asked for."""
    from mini_more_check import check_labels, check_made, check_pooled, check_sequences

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=Path("downstreams/mini"))
    parser.add_argument("--cache", type=Path, help="the clean cache, for `speakers`")
    parser.add_argument("--only", nargs="+", choices=CHECKS)
    arguments = parser.parse_args()
    corpus, failed = Corpus(arguments.corpus), []

    def report(text: str, passed: bool) -> None:
        print("ok  " if passed else "FAIL", text, flush=True)
        if not passed:
            failed.append(text)

    checks: dict[str, Callable[[], None]] = {
        "files": lambda: check_files(corpus, report),
        "levels": lambda: check_levels(corpus, report),
        "labels": lambda: check_labels(corpus, report),
        "made": lambda: check_made(corpus, report),
        "silence": lambda: check_silence(corpus, report),
        "speakers": lambda: check_speakers(corpus, arguments.cache, report),
        "asv": lambda: check_asv(corpus, report),
        "pooled": lambda: check_pooled(corpus, report),
        "sequences": lambda: check_sequences(corpus, report),
    }
    for name in arguments.only or checks:
        checks[name]()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
