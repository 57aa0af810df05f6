"""The data of a pre-training run: audio of folders and manifests, decoded once, less everything that a test or dev split holds.

The exclusion list has a line for each thing of a dev or test split: `file` and the digest of an audio file's bytes, `text` and the
normalised words of an utterance, `voice` and its speaker. Audio of which any is on the list is refused. The list itself is not kept,
only its digest: it can be made again from the tables by the function that made it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from superb_probe.downstreams.audio import read_header, read_waveform
from superb_probe.downstreams.manifest import Manifest, Utterance, read_table
from superb_probe.downstreams.mini import ROOT as MINI
from superb_probe.errors import RequestError, all_at_once
from superb_probe.upstreams.pretrain_data import FULL_SCALE, SAMPLE_RATE_HZ, Clips, Phones

AUDIO_ENDINGS = (".flac", ".wav", ".opus", ".ogg")
FRAME_SAMPLES, HOP_SAMPLES = 400, 320
# Tables of `mini` that pre-training may hear: speakers and texts of these are of train alone, but for what the list takes out.
MINI_TRAIN = ("read", "commands", "phrases", "words", "slots")
MINI_HELD_OUT = "read.dev"
_SILENCE = "_silence_"
_DECODED_AT_ONCE = 512  # clips, which bounds memory


@dataclass(frozen=True, slots=True)
class Item:
    """One utterance that may be trained on or is held out.

    Attributes:
        corpus: where it is from.
        utterance: id and stretch of a file.
        root: what the file is relative to.
        text: its words; empty if not known.
        voices: its speakers, each as `corpus:speaker`; a synthetic voice that blends two has both.
        license: of the audio; empty if not known.
    """

    corpus: str
    utterance: Utterance
    root: Path
    text: str = ""
    voices: tuple[str, ...] = ()
    license: str = ""

    @property
    def path(self) -> Path:
        """The audio file."""
        return self.root / self.utterance.audio


@dataclass(frozen=True, slots=True)
class Exclusion:
    """What pre-training must not hear.

    Attributes:
        files: sha256 of audio files.
        texts: normalised.
        voices: `corpus:speaker`.
    """

    files: frozenset[str]
    texts: frozenset[str]
    voices: frozenset[str]

    def lines(self) -> list[str]:
        """The list, sorted."""
        parts = (("file", self.files), ("text", self.texts), ("voice", self.voices))
        return sorted(f"{kind}\t{value}" for kind, values in parts for value in values)

    @property
    def digest(self) -> str:
        """Of the lines: sha256."""
        return "sha256:" + hashlib.sha256("\n".join(self.lines()).encode()).hexdigest()

    def reasons(self, item: Item) -> list[str]:
        """Why an item must not be trained on; empty if it may."""
        reasons = [f"voice {voice}" for voice in item.voices if voice in self.voices]
        if item.text and normal_text(item.text) in self.texts:
            reasons.append(f"text {item.text!r}")
        if self.files and file_digest(item.path) in self.files:
            reasons.append(f"file {item.utterance.audio}")
        return reasons


def normal_text(text: str) -> str:
    """Words as they are compared: small letters, digits and apostrophes.

    >>> normal_text("Volume up,  please!")
    'volume up please'
    """
    return " ".join(re.sub(r"[^\w']", " ", text.lower()).split())


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def build_exclusion(manifests: Sequence[Path] = (), *, mini: bool = True) -> Exclusion:
    """The exclusion list of manifests (dev and test splits) and of the embedded corpus.

    Of `mini` every table but those named train counts, and each file that one of them reads any stretch of. Its voices are the
    synthesiser's: a warp of a dev or test voice is excluded with it. Closed-set speaker identification is the exception it must
    be: its dev and test sentences are excluded, its speakers are train's.

    Args:
        manifests: TSVs of held-out utterances; `speaker` (or `voice`), `text` and `corpus` columns are read where they are. A file
            that ends in .txt is a list made before, as `Exclusion.lines` gives it.
        mini: whether to count the embedded corpus.
    """
    items = [item for path in manifests if path.suffix != ".txt" for item in manifest_items(path)]
    closed_set = set[str]()
    if mini:
        for table in sorted(MINI.glob("*.tsv")):
            header, _ = read_table(table, required=())
            if ".train." in table.name or "audio" not in header:
                continue
            rows = mini_items(table)
            items += rows
            if table.name.startswith("speakers_id."):
                closed_set |= {item.utterance.id for item in rows}
    voices = {voice for item in items if item.utterance.id not in closed_set for voice in item.voices}
    with ThreadPoolExecutor() as pool:
        files = set(pool.map(file_digest, sorted({item.path for item in items})))
    texts = {normal_text(item.text) for item in items if item.text}
    for path in manifests:
        if path.suffix == ".txt":
            _add_list(path, {"file": files, "text": texts, "voice": voices})
    return Exclusion(frozenset(files), frozenset(texts), frozenset(voices))


def _add_list(path: Path, kinds: dict[str, set[str]]) -> None:
    """Add the lines of a list."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        kind, tab, value = line.partition("\t")
        if kind not in kinds or not tab:
            raise RequestError(
                f"{path}, line {number}: expected file, text or voice, a tab and a value, found {line!r}."
            )
        kinds[kind].add(value)


def mini_items(table: Path) -> list[Item]:
    """Utterances of one table of `mini`, speakers replaced by the synthesiser's voices; stretches of noise are left out."""
    header, rows = read_table(MINI / "speakers.tsv", required=("speaker", "voice"))
    speaker, voice = header.index("speaker"), header.index("voice")
    voice_of = {row[speaker]: row[voice] for _, row in rows}
    items = []
    for each in Manifest.read(table, MINI):
        if each.labels.get("keyword") == _SILENCE:
            continue
        voices = (f"kokoro:{voice_of[each.labels['speaker']]}",) if each.labels.get("speaker") else ()
        items.append(Item("mini", each, MINI, each.labels.get("text", ""), voices, "Apache-2.0"))
    return items


def manifest_items(path: Path) -> list[Item]:
    """Utterances of a manifest; its columns `corpus`, `text`, `license`, and `voice` or `speaker` are read where they are.

    A voice without a colon gets the corpus before it; `kokoro:a+kokoro:b` is a blend of two.
    """
    items = []
    for each in Manifest.read(path):
        corpus = each.labels.get("corpus") or path.stem
        voice = each.labels.get("voice") or each.labels.get("speaker") or ""
        voices = tuple(name if ":" in name else f"{corpus}:{name}" for name in voice.split("+") if name)
        text, licence = each.labels.get("text", ""), each.labels.get("license", "")
        items.append(Item(corpus, each, path.parent, text, voices, licence))
    return items


def folder_items(folder: Path) -> list[Item]:
    """Every audio file below a folder, speakers and words not known.

    Raises:
        RequestError: if there is none.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_ENDINGS)
    if not files:
        raise RequestError(f"{folder}: no audio files ({', '.join(AUDIO_ENDINGS)}) below it. Fix: another --data.")
    items = []
    for path in files:
        name = path.relative_to(folder).as_posix()
        items.append(Item(folder.name, Utterance(name, name, 0.0, read_header(path).duration_s, {}), folder))
    return items


def find_items(data: Sequence[str | Path], exclusion: Exclusion) -> list[Item]:
    """The utterances to train on.

    Args:
        data: folders, manifests, or "mini": its train tables, less what the list excludes (they are made to be trained on, so what a
            closed-set test or a shared word takes out of them is not an error).
        exclusion: what must not be heard.

    Raises:
        RequestError: naming data that the list excludes, or two utterances with one id.
    """
    items: list[Item] = []
    for source in data:
        if str(source) == "mini":
            listed = [item for name in MINI_TRAIN for item in mini_items(MINI / f"{name}.train.tsv")]
            items += [item for item in listed if not exclusion.reasons(item)]
            continue
        path = Path(source).expanduser()
        found = folder_items(path) if path.is_dir() else manifest_items(path)
        wrong = [f"{item.utterance.id}: {', '.join(reasons)}" for item in found if (reasons := exclusion.reasons(item))]
        if wrong:
            raise all_at_once(
                f"{path}: held out from pre-training", wrong, "leave these utterances out; docs/pretrain.md says why"
            )
        items += found
    repeated = _repeated(items)
    if repeated:
        raise all_at_once("--data", repeated, "give every utterance once")
    return items


def _repeated(items: Iterable[Item]) -> list[str]:
    seen, repeated = set[tuple[str, str]](), []
    for item in items:
        key = (item.corpus, item.utterance.id)
        if key in seen:
            repeated.append(f"{key[0]}/{key[1]} is there twice")
        seen.add(key)
    return repeated


def held_out_items(manifest: Path | None) -> list[Item]:
    """What training is measured on: the utterances of a manifest, or `mini`'s dev sentences."""
    return mini_items(MINI / f"{MINI_HELD_OUT}.tsv") if manifest is None else manifest_items(manifest)


def aligned_phones(held_out: Sequence[Item], first: int, alignments: Path) -> Phones:
    """The phone at the middle of every frame of aligned clips, stress marks dropped.

    Args:
        held_out: clips, the first of which has index `first`.
        first: clips before them.
        alignments: a TSV with `id`, `phones` and `starts_ms`, as `mini`'s.
    """
    header, rows = read_table(alignments, required=("id", "phones", "starts_ms"))
    place = {name: header.index(name) for name in ("id", "phones", "starts_ms")}
    found = {row[place["id"]]: (row[place["phones"]].split(), row[place["starts_ms"]].split()) for _, row in rows}
    names = sorted({re.sub(r"\d", "", phone) for phones, _ in found.values() for phone in phones})
    number = {name: index for index, name in enumerate(names)}
    clips, values = [], []
    for index, item in enumerate(held_out, start=first):
        if item.utterance.id not in found:
            continue
        phones, starts = found[item.utterance.id]
        samples = round(item.utterance.duration_s * SAMPLE_RATE_HZ)
        middles_ms = (np.arange(frame_count(samples)) * HOP_SAMPLES + FRAME_SAMPLES / 2) / (SAMPLE_RATE_HZ / 1000)
        at = np.searchsorted(np.array([float(start) for start in starts]), middles_ms, side="right") - 1
        known = np.array([-1, *(number[re.sub(r"\d", "", phone)] for phone in phones)])
        clips.append(index)
        values.append(known[np.maximum(at, -1) + 1].astype(np.int16))
    if not clips:
        raise RequestError(f"{alignments}: no utterance of the held-out clips is in it. Fix: another --alignments.")
    offsets = np.concatenate([[0], np.cumsum([len(each) for each in values])]).astype(np.int64)
    return Phones(np.array(clips, dtype=np.int64), np.concatenate(values), offsets, tuple(names))


def frame_count(samples: int) -> int:
    """Frames of HuBERT's front end: windows of 400 samples, 320 apart.

    >>> frame_count(16000), frame_count(399)
    (49, 0)
    """
    return max(0, (samples - FRAME_SAMPLES) // HOP_SAMPLES + 1)


def prepare_clips(
    folder: Path,
    data: Sequence[str | Path],
    exclusion: Exclusion,
    *,
    held_out: Path | None = None,
    alignments: Path | None = None,
) -> Clips:
    """The clips of these data in a folder: decoded now, or as they were if they are there from the same data and list.

    Args:
        folder: for the clips.
        data: as `find_items`.
        exclusion: as there; an item of the held-out set may be on it.
        held_out: a manifest to measure on; None: `mini`'s dev sentences, with their alignments.
        alignments: of the held-out clips.
    """
    items, measured = find_items(data, exclusion), held_out_items(held_out)
    overlap = {item.path.resolve() for item in items} & {item.path.resolve() for item in measured}
    if overlap:
        raise RequestError(f"{min(overlap)} is both trained on and held out. Fix: another --held-out.")
    seen = [
        f"{item.corpus}/{item.utterance.id}\t{item.path}\t{item.path.stat().st_size}" for item in [*items, *measured]
    ]
    key = hashlib.sha256("\n".join([*seen, exclusion.digest, str(alignments)]).encode()).hexdigest()
    if (folder / "clips.json").is_file():
        there = Clips.read(folder)
        if there.facts.get("key") != key:
            raise RequestError(f"{folder}: it holds clips of other data. Fix: another --cache, or delete it.")
        return there
    phones = None
    if held_out is None:
        phones = aligned_phones(measured, len(items), MINI / "alignments.dev.tsv")
    elif alignments is not None:
        phones = aligned_phones(measured, len(items), alignments)
    facts = {
        "key": key,
        "exclusion_digest": exclusion.digest,
        "exclusion_counts": {
            "files": len(exclusion.files),
            "texts": len(exclusion.texts),
            "voices": len(exclusion.voices),
        },
        "corpora": corpus_hours(items),
        "licenses": {item.corpus: item.license or "unknown" for item in items},
        "voices": len({item.voices for item in items if item.voices}),
        "held_out": sorted({item.corpus for item in measured}),
    }
    return Clips.write(folder, _decoded(items, measured), facts, phones)


def corpus_hours(items: Sequence[Item]) -> dict[str, float]:
    """Hours of each corpus."""
    hours: dict[str, float] = {}
    for item in items:
        hours[item.corpus] = hours.get(item.corpus, 0.0) + item.utterance.duration_s / 3600
    return {name: round(value, 3) for name, value in sorted(hours.items())}


def _decoded(items: Sequence[Item], measured: Sequence[Item]) -> Iterator[tuple[str, bool, NDArray[np.int16]]]:
    everything = [(item, False) for item in items] + [(item, True) for item in measured]
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(everything), _DECODED_AT_ONCE):
            chunk = everything[start : start + _DECODED_AT_ONCE]
            decoded = pool.map(lambda pair: read_waveform(pair[0].utterance, pair[0].root), chunk)
            for (item, held_out), wav in zip(chunk, decoded, strict=True):
                samples = np.clip(np.round(wav * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)
                yield f"{item.corpus}/{item.utterance.id}", held_out, samples
