"""Speech for finetune_grid.py as WAV files with manifests: mini's sentences and, with --pack, what pretrain_pack.py packed.

    python tools/finetune_speech.py --pack PACK --out speech
    python tools/finetune_grid.py length --manifest speech/train.tsv speech/dev.tsv speech/test.tsv --root speech ...

Train holds every train table of mini that has a text, and the pack's clips that have theirs; dev and test are mini's sentences. A
document is ten utterances in a row of a corpus sorted by voice: of one voice in test, where each has ten, of several where voices
have fewer.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby
from pathlib import Path

import soundfile
from finetune_grid import mini_manifests

from superb_probe.downstreams.asr import normalise
from superb_probe.downstreams.audio import SAMPLE_RATE_HZ, read_waveform
from superb_probe.downstreams.manifest import Manifest, Utterance, read_table
from superb_probe.errors import RequestError

DOCUMENT = 10  # utterances: as many as mini's test speakers say
_PIECE = re.compile(r".*-\d")  # a clip that the pack cut has all of its transcript in every piece
_UNSPOKEN = re.compile(r"[^A-Z' ]")


def packed(pack: Path) -> Manifest:
    """The clips of a pack that have a text, in letters, apostrophes and spaces; "speaker" is the voice.

    Raises:
        RequestError: if it is no pack, or a clip's audio is missing.
    """
    table = pack / "train.tsv"
    header, rows = read_table(table, ("id", "audio", "start_s", "duration_s", "corpus", "voice", "text"))
    found = []
    for _, cells in rows:
        row = dict(zip(header, cells, strict=True))
        text = normalise(_UNSPOKEN.sub("", normalise(row["text"])))
        if text and not _PIECE.fullmatch(row["id"]):
            labels = {"text": text, "speaker": row["voice"], "corpus": row["corpus"]}
            found.append(Utterance(row["id"], row["audio"], float(row["start_s"]), float(row["duration_s"]), labels))
    missing = [each.audio for each in found if not (pack / each.audio).is_file()]
    if missing:
        raise RequestError(f"{pack}: {len(missing)} clips are missing, first {missing[0]}. Fix: pack them again")
    return Manifest(found, pack, "pack")


def with_documents(rows: Iterable[Utterance], size: int) -> list[tuple[Utterance, str]]:
    """The utterances of each corpus by voice, each with the name of its document.

    >>> rows = [Utterance(name, "", 0.0, 1.0, {"speaker": name[0]}) for name in ("b1", "a1", "a2", "a3", "c1")]
    >>> [(row.id, document) for row, document in with_documents(rows, 2)]
    [('a1', 'a1'), ('a2', 'a1'), ('a3', 'a3'), ('b1', 'a3'), ('c1', 'c1')]
    """
    ordered = sorted(rows, key=lambda row: (row.labels.get("corpus", ""), row.labels["speaker"]))
    found = []
    for _, group in groupby(ordered, key=lambda row: row.labels.get("corpus", "")):
        members = list(group)
        found += [(row, members[place - place % size].id) for place, row in enumerate(members)]
    return found


def write(parts: Iterable[Manifest], split: str, out: Path, size: int, pool: ProcessPoolExecutor) -> Manifest:
    """A split's WAV files and manifest."""
    roots = {row.id: part.root for part in parts for row in part}
    rows = []
    for row, document in with_documents((row for part in parts for row in part), size):
        labels = {"text": normalise(row.labels["text"]), "speaker": row.labels["speaker"], "document": document}
        rows.append((row, Utterance(row.id, f"wav/{split}/{row.id}.wav", 0.0, row.duration_s, labels)))
    (out / "wav" / split).mkdir(parents=True, exist_ok=True)
    sources = [(row, roots[row.id]) for row, _ in rows]
    seconds = list(pool.map(decode, sources, [out / new.audio for _, new in rows], chunksize=16))
    written = [
        Utterance(new.id, new.audio, 0.0, length, new.labels) for (_, new), length in zip(rows, seconds, strict=True)
    ]
    manifest = Manifest(written, out, split)
    manifest.write(out / f"{split}.tsv")
    return manifest


def decode(source: tuple[Utterance, Path], target: Path) -> float:
    """Write an utterance as 16-bit WAV; its seconds."""
    wave = read_waveform(*source, SAMPLE_RATE_HZ)
    soundfile.write(target, wave, SAMPLE_RATE_HZ, subtype="PCM_16")
    return len(wave) / SAMPLE_RATE_HZ


def main() -> int:
    """Write the three splits and say what they hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, help="folder that pretrain_pack.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--document", type=int, default=DOCUMENT, help="most utterances of one (default: 10)")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.document < 1:
        parser.error("--document: at least 1")
    try:
        splits = {split: [manifest] for split, manifest in mini_manifests().items()}
        if args.pack is not None:
            splits["train"].append(packed(args.pack))
    except RequestError as error:
        parser.error(str(error))
    with ProcessPoolExecutor(args.workers) as pool:
        for split, parts in splits.items():
            made = write(parts, split, args.out, args.document, pool)
            documents = len(set(made.labels("document")))
            print(f"{split}: {len(made)} utterances, {documents} documents, {made.total_s / 3600:.2f} h")
    return 0


if __name__ == "__main__":
    sys.exit(main())
