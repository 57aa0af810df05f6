"""Libri2Mix with the Kaldi tables that s3prl's script makes, for speaker diarisation (sd)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from superb_probe.downstreams.checks import some
from superb_probe.downstreams.corpus_base import Corpus, CorpusInfo, Draft, Extra, Row, Tree, missing_audio

SPLITS = ("train", "dev", "test")
FIX = "make the tables again for these mixtures (s3prl/LibriMix, scripts/prepare_diarization.py; 16 kHz, mode max, mix_both)"

AUDIO = Extra(
    name="audio",
    what="the folder of the mixtures, where it is not with the Kaldi tables",
    source="https://github.com/s3prl/LibriMix (generate_librimix_sd.sh)",
    files=(),
    tasks=("sd",),
)


class Libri2Mix(Corpus):
    """Two readers and noise; Kaldi's `{train,dev,test}/{wav.scp,segments,utt2spk,rttm,reco2dur}`, the mixtures there or anywhere."""

    info = CorpusInfo(
        name="libri2mix",
        title="Libri2Mix with Kaldi tables",
        source="https://github.com/s3prl/LibriMix",
        license="LibriSpeech: CC BY 4.0, WHAM! noise: CC BY-NC 4.0",
        citation="Cosentino et al., LibriMix: An Open-Source Dataset for Generalizable Speech Separation, arXiv:2005.11262",
        landmarks=tuple(f"{split}/wav.scp" for split in SPLITS),
        published={"sd": {"train": 13900, "dev": 3000, "test": 3000}},
        extras=(AUDIO,),
        aliases=("librimix",),
    )

    def locate(self, folder: Path, extras: Mapping[str, Path]) -> Path:
        """The folder that holds both the tables and the mixtures."""
        tables = super().locate(folder, extras).resolve()
        return Path(os.path.commonpath([tables, _audio_folder(folder, tables, extras).resolve()]))

    def drafts(self, tree: Tree, task: str) -> list[Draft]:
        """One fold: the RTTM file of each recording, which may hold many."""
        tables = super().locate(tree.given, tree.extras).resolve()
        folder = _audio_folder(tree.given, tables, tree.extras).resolve().relative_to(tree.root).as_posix()
        audio: dict[str, str] = {}
        for key, path in tree.audio(folder).items():
            parts = key.split("/")
            audio[parts[-1]] = path  # the last resort; the fuller names below come first when looked up
            for count in (2, 3):
                audio["/".join(parts[-count:])] = path
        place = tables.relative_to(tree.root)
        return [Draft(None, {split: _split(tree, (place / split).as_posix(), audio) for split in SPLITS})]


def _audio_folder(folder: Path, tables: Path, extras: Mapping[str, Path]) -> Path:
    """Where the mixtures are: what --extra says, else where wav.scp points if that is there, else the folder that was given."""
    if "audio" in extras:
        return extras["audio"]
    parents = []
    for split in SPLITS:
        scp = tables / split / "wav.scp"
        first = (
            scp.read_text(encoding="utf-8", errors="replace").partition("\n")[0].split(maxsplit=1)
            if scp.is_file()
            else []
        )
        if len(first) == 2 and Path(first[1]).is_absolute() and Path(first[1].strip()).is_file():
            parents.append(str(Path(first[1].strip()).resolve().parent))
    return Path(os.path.commonpath(parents)) if parents else folder


def _split(tree: Tree, place: str, audio: dict[str, str]) -> list[Row]:
    wavs = _table(tree, f"{place}/wav.scp")
    durations = _table(tree, f"{place}/reco2dur")
    turns = _check_turns(tree, place, set(wavs))
    rows: list[Row] = []
    missing = []
    for name, entry in wavs.items():
        if entry.endswith("|"):
            tree.findings.problem(
                f"{place}/wav.scp", f"{name} is a command, which is not run", "give the path of a file"
            )
            continue
        parts = entry.rpartition(".")[0].replace("\\", "/").split("/")
        path = next((audio[key] for key in ("/".join(parts[-count:]) for count in (3, 2, 1)) if key in audio), None)
        if path is None:
            missing.append(name)
        elif not _is_number(durations.get(name, "")):
            tree.findings.problem(f"{place}/reco2dur", f"no length of {name}", FIX)
        elif name in turns:
            rows.append(Row(name, path, {"rttm": f"{place}/rttm"}, listed_s=float(durations[name])))
    missing_audio(tree, place, list(wavs), missing)
    return rows


def _check_turns(tree: Tree, place: str, recordings: set[str]) -> Counter[str]:
    """By recording, its turns in the RTTM file, which must be those of segments and utt2spk."""
    turns = Counter(line.split()[1] for line in tree.lines(f"{place}/rttm") if line.startswith("SPEAKER "))
    speakers = _table(tree, f"{place}/utt2spk")
    segments = {name: cells.split() for name, cells in _table(tree, f"{place}/segments").items()}
    uneven = [name for name, cells in segments.items() if len(cells) != 3]
    if uneven:
        tree.findings.problem(f"{place}/segments", f"not recording, start, end: {some(uneven, 'line')}", FIX)
    listed = Counter(cells[0] for cells in segments.values() if len(cells) == 3)
    different = sorted(name for name in recordings if turns[name] != listed[name])
    if different:
        tree.findings.problem(place, f"rttm and segments differ: {some(different, 'recording')}", FIX)
    silent = sorted(name for name in recordings if not turns[name])
    if silent:
        tree.findings.problem(f"{place}/rttm", f"no turns: {some(silent, 'recording')}", FIX)
    nobody = sorted(set(segments) - set(speakers))
    if nobody:
        tree.findings.problem(f"{place}/utt2spk", f"no speaker: {some(nobody, 'segment')}", FIX)
    return turns


def _table(tree: Tree, place: str) -> dict[str, str]:
    """The lines of a Kaldi table: a name, and the rest."""
    found: dict[str, str] = {}
    for number, line in enumerate(tree.lines(place), start=1):
        name, _, rest = line.strip().partition(" ")
        if not name:
            continue
        if name in found or not rest.strip():
            what = f"{name!r} twice" if name in found else f"nothing after {name!r}"
            tree.findings.problem(f"{place}, line {number}", what, FIX)
        found[name] = rest.strip()
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
