"""Times of phones and words: read from TextGrid, CTM, LibriSpeech-alignments, CSV and TSV, written as CSV, CTM and TextGrid.

Times count from the beginning of the utterance. Nothing between two segments belongs to either: such frames have no label.
"""

from __future__ import annotations

import csv
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from superb_probe.errors import RequestError, all_at_once

SILENCES = frozenset({"", "sil", "sp", "spn", "<eps>", "<sil>", "pau", "_", "h#", "#"})
TIERS = ("phones", "words")
_ARPABET = re.compile(r"([A-Z]{1,2})[012]")
_LIBRISPEECH_LINE = re.compile(r'(\S+)\s+"([^"]*)"\s+"([^"]*)"')


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of an utterance with a label.

    Attributes:
        start_s: where it begins.
        end_s: where it ends, later than it begins.
        label: a phone or a word; "" where nothing is said.
    """

    start_s: float
    end_s: float
    label: str


Segments = tuple[Segment, ...]


def is_silence(label: str) -> bool:
    """Whether a label stands for silence or noise rather than for speech.

    >>> is_silence("SIL"), is_silence("AH")
    (True, False)
    """
    return label.lower() in SILENCES


def without_stress(label: str) -> str:
    """An ARPAbet vowel without its stress mark; any other label as it is.

    >>> without_stress("AH0"), without_stress("a6")
    ('AH', 'a6')
    """
    found = _ARPABET.fullmatch(label)
    return found[1] if found else label


def fold_labels(segments: Iterable[Segment]) -> Segments:
    """Segments without stress marks, all silences as "SIL", and "spn" (noise) as "SPN"."""
    folded = []
    for each in segments:
        label = without_stress(each.label)
        if is_silence(label):
            label = "SPN" if label.lower() == "spn" else "SIL"
        folded.append(Segment(each.start_s, each.end_s, label))
    return tuple(folded)


def scale_times(segments: Iterable[Segment], factor: float) -> Segments:
    """Segments of the same utterance played so that every time is multiplied by `factor`."""
    return tuple(Segment(each.start_s * factor, each.end_s * factor, each.label) for each in segments)


def frame_labels(segments: Sequence[Segment], num_frames: int, hop_s: float) -> NDArray[np.int64]:
    """(T,) which segment each frame lies in, by its middle (t + 1/2) hop; -1 outside of all.

    >>> frame_labels((Segment(0.0, 0.04, "a"), Segment(0.04, 0.06, "b")), 4, 0.02).tolist()
    [0, 0, 1, -1]
    """
    middles = (np.arange(num_frames) + 0.5) * hop_s
    starts = np.array([each.start_s for each in segments])
    ends = np.array([each.end_s for each in segments])
    found = np.searchsorted(starts, middles, side="right") - 1
    # a frame in the middle of nothing, or past the last segment, has no label
    inside = (found >= 0) & (middles < ends[np.maximum(found, 0)]) if len(segments) else np.zeros(num_frames, bool)
    return np.where(inside, found, -1)


def segment_frames(segment: Segment, num_frames: int, hop_s: float) -> tuple[int, int]:
    """First frame of a segment and the one past its last, by the middles of frames; at least one frame, the nearest.

    >>> segment_frames(Segment(0.02, 0.06, "a"), 10, 0.02), segment_frames(Segment(0.021, 0.022, "a"), 10, 0.02)
    ((1, 3), (1, 2))
    """
    first = int(np.ceil(round(segment.start_s / hop_s - 0.5, 9)))
    last = int(np.ceil(round(segment.end_s / hop_s - 0.5, 9)))
    if last <= first:
        first = min(int((segment.start_s + segment.end_s) / 2 / hop_s), num_frames - 1)
        last = first + 1
    return max(0, min(first, num_frames - 1)), min(last, num_frames)


def read_alignments(path: Path, tier: str = "phones") -> dict[str, Segments]:
    """The segments of every utterance of a file or folder, by utterance id.

    Args:
        path: a folder of `.TextGrid` files or of LibriSpeech-alignments' `.alignment.txt` files (searched below it), or one file:
            `.TextGrid`, `.ctm`, `.alignment.txt`, `.csv` or `.tsv`. Tables have the columns `utt_id` (or `id`), `start_s`, `end_s`
            and the tier's name in the singular or as it is, or `tier` and `label`, a line a segment; or, as in the embedded
            corpus, `id`, `phones`, `starts_ms` (each ends where the next begins; the last has no end, `math.inf`), `words`,
            `word_starts_ms`, `word_ends_ms`, a line an utterance.
        tier: "phones" or "words". LibriSpeech-alignments have words only.

    Raises:
        RequestError: for a form that is not known, a tier that is not there, or times that run backwards; all of them at once.
    """
    if tier not in TIERS:
        raise RequestError(f"unknown tier {tier!r}. Fix: one of {', '.join(TIERS)}.")
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _reader_of(file) in (_textgrid, _librispeech))
        if not files:
            raise RequestError(
                f"{path}: no .TextGrid and no .alignment.txt below it. Fix: give the folder, or a CTM, CSV or TSV file."
            )
    elif path.is_file():
        files = [path]
    else:
        raise RequestError(f"{path}: no such file or folder. Fix: --alignment FILE or DIR.")
    found: dict[str, Segments] = {}
    problems: list[str] = []
    for file in files:
        reader = _reader_of(file)
        if reader is None:
            raise RequestError(
                f"{file}: unknown form of alignment. Fix: .TextGrid, .ctm, .alignment.txt, .csv or .tsv."
            )
        for name, segments in reader(file, tier).items():
            if name in found:
                problems.append(f"{file}: utterance {name} is there twice")
            problems += [f"{file}, utterance {name}: {wrong}" for wrong in _wrong_times(segments)]
            found[name] = segments
    if problems:
        raise all_at_once(str(path), problems, "times in seconds, in order, each segment longer than nothing")
    return found


def _wrong_times(segments: Sequence[Segment]) -> list[str]:
    wrong = [
        f"{each.label!r} ends at {each.end_s} s, not after its beginning at {each.start_s} s"
        for each in segments
        if not each.start_s < each.end_s
    ]
    wrong += [
        f"{later.label!r} begins at {later.start_s} s, before {earlier.label!r} ends at {earlier.end_s} s"
        for earlier, later in itertools.pairwise(segments)
        if later.start_s < earlier.end_s - 1e-6
    ]
    return wrong[:1]


def _reader_of(path: Path) -> Callable[[Path, str], dict[str, Segments]] | None:
    name = path.name.lower()
    endings = {".textgrid": _textgrid, ".ctm": _ctm, ".alignment.txt": _librispeech, ".csv": _table, ".tsv": _table}
    return next((reader for ending, reader in endings.items() if name.endswith(ending)), None)


def _textgrid(path: Path, tier: str) -> dict[str, Segments]:
    """The one tier of a Praat TextGrid, long or short form (Praat's manual, "TextGrid file formats")."""
    text = _text(path)
    body = text[text.find("tiers?") :] if "tiers?" in text else text.partition("<exists>")[2]
    tokens = re.findall(r'"(?:[^"]|"")*"|(?<![\[\w.])-?\d+(?:\.\d+)?(?:[eE]-?\d+)?(?![\]\w])', body)
    found: dict[str, list[Segment]] = {}
    at = 1  # after the number of tiers
    while at + 4 <= len(tokens):
        kind, name = tokens[at].strip('"'), tokens[at + 1].strip('"')
        count = int(float(tokens[at + 4]))
        width = 3 if kind == "IntervalTier" else 2
        rows = tokens[at + 5 : at + 5 + width * count]
        if len(rows) < width * count:
            raise RequestError(
                f"{path}: tier {name!r} has {count} intervals, but the file ends before. Fix: the file is damaged."
            )
        if kind == "IntervalTier":
            found[name] = [
                Segment(float(rows[i]), float(rows[i + 1]), rows[i + 2][1:-1].replace('""', '"').strip())
                for i in range(0, len(rows), 3)
            ]
        at += 5 + width * count
    for name, segments in found.items():
        if name.lower().rpartition(" - ")[2].rstrip("s") == tier.rstrip(
            "s"
        ):  # "phones", "phone", "speaker - phones" (MFA)
            return {path.stem: tuple(each for each in segments if each.end_s > each.start_s)}
    raise RequestError(
        f"{path}: no tier {tier!r}, it has {', '.join(found) or 'none'}. Fix: rename a tier to {tier!r}."
    )


def _text(path: Path) -> str:
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not {encoding} (byte {error.start}). Fix: save it as UTF-8.") from error


def _ctm(path: Path, tier: str) -> dict[str, Segments]:
    """NIST's CTM: utterance, channel, start, duration, label; times in seconds; ";;" begins a comment."""
    found: dict[str, list[Segment]] = {}
    problems = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        cells = line.split()
        if not cells or line.startswith(";;"):
            continue
        try:
            start, duration = float(cells[2]), float(cells[3])
            found.setdefault(cells[0], []).append(Segment(start, round(start + duration, 6), cells[4]))
        except (IndexError, ValueError):
            problems.append(f"line {number}: expected `utterance channel start_s duration_s label`, found {line!r}")
    if problems:
        raise all_at_once(str(path), problems, "five columns a line")
    return {name: tuple(sorted(segments, key=lambda each: each.start_s)) for name, segments in found.items()}


def _librispeech(path: Path, tier: str) -> dict[str, Segments]:
    """LibriSpeech-alignments: a line `id ",WORD,...," "end,end,..."`, empty words are silences; the first begins at 0."""
    if tier != "words":
        raise RequestError(f"{path}: LibriSpeech-alignments have words only. Fix: TextGrid, CTM or CSV for phones.")
    found: dict[str, Segments] = {}
    problems = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        match = _LIBRISPEECH_LINE.fullmatch(line.strip())
        words, ends = (match[2].split(","), match[3].split(",")) if match else ([], [""])
        if not match or len(words) != len(ends):
            problems.append(f'line {number}: expected `id ",WORD,..." "end,..."` with an end for every word')
            continue
        times = [0.0, *map(float, ends)]
        spans = zip(times, times[1:], words, strict=False)
        found[match[1]] = tuple(Segment(start, end, word) for start, end, word in spans if end > start)
    if problems:
        raise all_at_once(str(path), problems, "one line an utterance")
    return found


def _table(path: Path, tier: str) -> dict[str, Segments]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ","))
    columns = set(rows[0]) if rows else set()
    if {"id", "phones", "starts_ms"} <= columns:
        return {row["id"]: _packed_row(row, tier) for row in rows}
    key = next((name for name in ("utt_id", "id") if name in columns), None)
    if {"tier", "label"} <= columns:  # what `superb-probe align` writes
        rows = [row for row in rows if row["tier"] == tier]
        label: str | None = "label"
    else:
        label = next((name for name in (tier, tier.rstrip("s")) if name in columns), None)
    if key is None or label is None or not {"start_s", "end_s"} <= columns:
        raise RequestError(
            f"{path}: columns {', '.join(sorted(columns)) or 'none'}; expected utt_id, start_s, end_s and {tier.rstrip('s')}."
        )
    found: dict[str, list[Segment]] = {}
    for row in rows:
        found.setdefault(row[key], []).append(Segment(float(row["start_s"]), float(row["end_s"]), row[label]))
    if tier == "words" and label != "label":  # a line a phone that names its word: equal neighbours are one
        return {name: _merged(segments) for name, segments in found.items()}
    return {name: tuple(segments) for name, segments in found.items()}


def _packed_row(row: Mapping[str, str], tier: str) -> Segments:
    """A line of the embedded corpus' alignments."""
    if tier == "words":
        times = [[int(time) / 1000 for time in row[name].split()] for name in ("word_starts_ms", "word_ends_ms")]
        return tuple(Segment(*each) for each in zip(*times, row["words"].split(), strict=True))
    labels, starts = row["phones"].split(), [int(time) / 1000 for time in row["starts_ms"].split()]
    ends = [*starts[1:], math.inf]
    return tuple(Segment(*each) for each in zip(starts, ends, labels, strict=True))


def _merged(segments: Sequence[Segment]) -> Segments:
    merged: list[Segment] = []
    for each in segments:
        if merged and merged[-1].label == each.label and abs(merged[-1].end_s - each.start_s) < 1e-6:
            merged[-1] = Segment(merged[-1].start_s, each.end_s, each.label)
        else:
            merged.append(each)
    return tuple(merged)


def write_alignments(
    path: Path, phones: Mapping[str, Segments], words: Mapping[str, Segments], durations_s: Mapping[str, float]
) -> list[Path]:
    """Write alignments: `.csv` (a line a segment, with its tier), `.ctm` (one file a tier), or a folder of TextGrids.

    Args:
        path: a file ending in `.csv` or `.ctm`, or a folder.
        phones: by utterance; may be empty.
        words: by utterance; may be empty.
        durations_s: of every utterance, for TextGrids.

    Returns:
        The files written.

    Raises:
        RequestError: if they cannot be written.
    """
    tiers = {name: tier for name, tier in (("phones", phones), ("words", words)) if tier}
    files: dict[Path, str] = {}
    if path.suffix == ".csv":
        lines = ["utt_id,tier,start_s,end_s,label"]
        lines += [
            f"{name},{tier},{each.start_s:.4f},{each.end_s:.4f},{each.label}"
            for tier, by_name in tiers.items()
            for name, segments in by_name.items()
            for each in segments
        ]
        files[path] = "\n".join(lines) + "\n"
    elif path.suffix == ".ctm":
        for tier, by_name in tiers.items():
            lines = [
                f"{name} 1 {each.start_s:.4f} {each.end_s - each.start_s:.4f} {each.label}"
                for name, segments in by_name.items()
                for each in segments
            ]
            files[path.with_name(f"{path.stem}.{tier}.ctm")] = "\n".join(lines) + "\n"
    else:
        for name, duration_s in durations_s.items():
            there = {tier: by_name[name] for tier, by_name in tiers.items() if name in by_name}
            if there:
                files[path / f"{name}.TextGrid"] = _textgrid_text(there, duration_s)
    try:
        for file, text in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror or error}. Fix: another --out.") from error
    return list(files)


def _textgrid_text(tiers: Mapping[str, Segments], duration_s: float) -> str:
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "xmin = 0", f"xmax = {duration_s:.4f}", "tiers? <exists>",
             f"size = {len(tiers)}", "item []:"]  # fmt: skip
    for number, (name, segments) in enumerate(tiers.items(), start=1):
        filled = _filled(segments, duration_s)
        lines += [f"    item [{number}]:", '        class = "IntervalTier"', f'        name = "{name}"', "        xmin = 0",
                  f"        xmax = {duration_s:.4f}", f"        intervals: size = {len(filled)}"]  # fmt: skip
        for index, each in enumerate(filled, start=1):
            quoted = each.label.replace('"', '""')
            lines += [f"        intervals [{index}]:", f"            xmin = {each.start_s:.4f}",
                      f"            xmax = {each.end_s:.4f}", f'            text = "{quoted}"']  # fmt: skip
    return "\n".join(lines) + "\n"


def _filled(segments: Sequence[Segment], duration_s: float) -> list[Segment]:
    """The segments with empty ones between them, as TextGrids want it."""
    filled: list[Segment] = []
    end_s = 0.0
    for each in (*segments, Segment(duration_s, duration_s, "")):
        if each.start_s - end_s > 5e-5:
            filled.append(Segment(end_s, each.start_s, ""))
        if each.end_s > each.start_s:
            filled.append(each)
        end_s = each.end_s
    return filled
