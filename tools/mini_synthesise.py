"""Speak every utterance of the corpus `mini` once, cleanly, into a cache: the slow step, about half of real time.

One file an utterance: `audio` (S,) int16 at 24 kHz, `frames` the model's token durations. A file that exists is not
made again, so the step can be stopped and resumed, and run as several processes (`--part I N`). Test and dev come
first.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
from mini_model import SYNTHESIS_RATE_HZ, Packages, Synthesiser, spell
from mini_text import place, read_utterances

ORDER = {"test": 0, "dev": 1, "train": 2}


def main() -> None:
    """Synthesise this process's part of the utterances."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True, help="folder of the downloaded archives")
    parser.add_argument(
        "--cache", type=Path, required=True, help="folder with utterances.tsv; audio goes to clean/ in it"
    )
    parser.add_argument(
        "--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="every Nth utterance from I"
    )
    arguments = parser.parse_args()
    packages = Packages(arguments.packages)
    synthesise = Synthesiser(packages)
    folder = arguments.cache / "clean"
    folder.mkdir(parents=True, exist_ok=True)
    # Within a split every speaker gets its first utterance before any gets its second; what is not kept comes last.
    rows = read_utterances(arguments.cache / "utterances.tsv")
    rows.sort(key=lambda row: (place(row) > 1, ORDER[row["split"]], place(row), row["style"], row["id"]))
    index, parts = arguments.part
    spoken_s, begun = 0.0, time.monotonic()
    for row in rows[index::parts]:
        target = folder / f"{row['id']}.npz"
        if target.exists():
            continue
        symbols = spell(row["text"], packages.pronunciations)
        # A warped speaker's audio is played `warp` times faster later on: the model speaks that much slower.
        rate = float(row["rate"]) / float(row["warp"])
        melody = (float(row["pitch"]), float(row["spread"])) if row["pitch"] else None
        audio, frames = synthesise(symbols.text, packages.voices[row["voice"]], rate, melody)
        if not np.isfinite(audio).all() or np.abs(audio).max() < 0.01:
            raise RuntimeError(f"{row['id']}: the model gave silence or a value that is not finite")
        peak = max(1.0, float(np.abs(audio).max()))
        temporary = target.with_suffix(f".{os.getpid()}.tmp.npz")
        np.savez(temporary, audio=np.round(audio / peak * 32767).astype(np.int16), frames=frames.astype(np.int16))
        temporary.rename(target)
        spoken_s += len(audio) / SYNTHESIS_RATE_HZ
        print(f"{row['id']} {spoken_s:.0f} s spoken in {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
