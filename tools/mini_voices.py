"""Choose the speakers of the corpus `mini`: voices, and warped voices, that a speaker encoder tells apart.

A speaker is one of Kokoro's voices, or such a voice with a constant warp: the audio is played that much faster, which
moves pitch and formants, while the model speaks that much slower, so that the tempo stays. `probe` speaks three
sentences with every voice; `select` chooses by seed the largest set of speakers whose mean Resemblyzer embeddings lie
under a cosine of 0.78 to all others (the corpus promises 0.80), and gives a voice with its warps to one split.
"""

from __future__ import annotations

import argparse
import csv
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr
from mini_model import SYNTHESIS_RATE_HZ, Packages, Synthesiser, spell

SAMPLE_RATE_HZ = 16_000
PROBE_SENTENCES = (
    "my brother found a yellow kite behind the old garden wall",
    "they usually watch the boats leave the harbor at seven",
    "please join us for a good hot supper on thursday evening",
)
WARPS = (0.88, 0.94, 1.0, 1.06, 1.12)
PROBE_BOUND = 0.78
SPEAKERS_BY_SPLIT = {"train": 34, "dev": 9, "test": 14}
SEED = 20_261_122
# Speakers that were chosen and spoken, but lie at 0.80 or more to another over all their sentences: not in the corpus.
WITHDRAWN = ("sp24", "sp36", "sp41")


@dataclass(frozen=True, slots=True)
class Speaker:
    """One speaker of the corpus.

    Attributes:
        id: `sp01` and on, in an order that tells nothing.
        split: `train`, `dev` or `test`.
        voice: Kokoro's name of the voice; its second letter is the sex.
        warp: 1.0, or the factor by which the audio is played faster.
    """

    id: str
    split: str
    voice: str
    warp: float

    @property
    def sex(self) -> str:
        """`f` or `m`, by the voice's name (a warp can make it sound otherwise)."""
        return self.voice[1]


def read_speakers(path: Path) -> list[Speaker]:
    """The speakers of a speakers.tsv."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return [Speaker(row["speaker"], row["split"], row["voice"], float(row["warp"])) for row in rows]


def play_faster(audio: np.ndarray, factor: float) -> np.ndarray:
    """Audio (S,) at the same rate, `factor` times as fast: pitch and formants move with it."""
    if factor == 1.0:
        return audio
    return soxr.resample(audio, SYNTHESIS_RATE_HZ * factor, SYNTHESIS_RATE_HZ, quality="HQ")


def probe(voices: list[str], packages: Packages, cache: Path) -> None:
    """Speak the probe sentences with every voice that has no file in the cache yet."""
    synthesise = Synthesiser(packages)
    cache.mkdir(parents=True, exist_ok=True)
    for voice in voices:
        target = cache / f"{voice}.npz"
        if target.exists():
            continue
        texts = [spell(sentence, packages.pronunciations).text for sentence in PROBE_SENTENCES]
        audios = [synthesise(text, packages.voices[voice], 1.0)[0] for text in texts]
        temporary = target.with_suffix(f".{os.getpid()}.tmp.npz")
        np.savez(temporary, *[np.round(audio * 32767).astype(np.int16) for audio in audios])
        temporary.rename(target)


def mean_embedding(audios: list[np.ndarray]) -> np.ndarray:
    """Mean Resemblyzer embedding (256,) of one speaker's utterances at 16 kHz, unit length."""
    from resemblyzer import VoiceEncoder, preprocess_wav

    if not hasattr(mean_embedding, "encoder"):
        mean_embedding.encoder = VoiceEncoder("cpu", verbose=False)
    embeddings = [mean_embedding.encoder.embed_utterance(preprocess_wav(audio, SAMPLE_RATE_HZ)) for audio in audios]
    mean = np.mean(embeddings, axis=0)
    return mean / np.linalg.norm(mean)


def candidates(voices: list[str], cache: Path) -> tuple[list[tuple[str, float]], np.ndarray]:
    """All (voice, warp) pairs and the cosines between their mean embeddings.

    The warp is applied to the unwarped probe audio; the tempo, which the corpus keeps, changes with it here.
    """
    pairs, embeddings = [], []
    for voice in voices:
        with np.load(cache / f"{voice}.npz") as stored:
            audios = [stored[name].astype(np.float32) / 32767 for name in stored.files]
        for warp in WARPS:
            warped = [play_faster(audio, warp) for audio in audios]
            resampled = [soxr.resample(audio, SYNTHESIS_RATE_HZ, SAMPLE_RATE_HZ) for audio in warped]
            pairs.append((voice, warp))
            embeddings.append(mean_embedding(resampled))
    matrix = np.array(embeddings)
    return pairs, matrix @ matrix.T


def largest_set(pairs: list[tuple[str, float]], cosines: np.ndarray, generator: np.random.Generator) -> list[int]:
    """Indices of candidates that are mutually under the bound: as many as wanted, of these the most unwarped voices."""
    best: tuple[int, int] = (0, 0)
    chosen: list[int] = []
    near = cosines >= PROBE_BOUND
    warped = np.array([warp != 1.0 for _, warp in pairs])
    wanted = sum(SPEAKERS_BY_SPLIT.values())
    for _ in range(4000):
        # Candidates with few near ones come early, unwarped ones are favoured, both by a random amount.
        handicap = generator.uniform(0.0, 6.0) * warped
        order = np.argsort(near.sum(0) + handicap + generator.gumbel(scale=1.5, size=len(pairs)))
        taken: list[int] = []
        for index in order:
            if not near[index, taken].any():
                taken.append(int(index))
        score = (min(len(taken), wanted), int((~warped[taken]).sum()))
        if score > best:
            best, chosen = score, taken
    return chosen


def assign(chosen: list[tuple[str, float]], generator: np.random.Generator) -> dict[tuple[str, float], str]:
    """A split for every speaker: a voice's warps together, sexes in about equal shares, sizes as asked.

    Raises:
        RuntimeError: no assignment was found.
    """
    voices = sorted({voice for voice, _ in chosen})
    for _ in range(200_000):
        splits: dict[tuple[str, float], str] = {}
        room = dict(SPEAKERS_BY_SPLIT)
        for voice in generator.permutation(voices):
            family = [pair for pair in chosen if pair[0] == voice]
            split = next((name for name in ("test", "dev", "train") if room[name] >= len(family)), None)
            if split is None:
                break
            room[split] -= len(family)
            splits.update(dict.fromkeys(family, split))
        shares = [
            np.mean([pair[0][1] == "f" for pair, name in splits.items() if name == split] or [0.0])
            for split in SPEAKERS_BY_SPLIT
        ]
        if not any(room.values()) and max(shares) - min(shares) < 0.1:
            return splits
    raise RuntimeError(f"no assignment of {len(chosen)} speakers to {SPEAKERS_BY_SPLIT}")


def select(voices: list[str], cache: Path, target: Path) -> None:
    """Choose the speakers and write their table."""
    generator = np.random.default_rng(SEED)
    pairs, cosines = candidates(voices, cache)
    chosen = largest_set(pairs, cosines, generator)
    wanted = sum(SPEAKERS_BY_SPLIT.values())
    print(
        f"{len(chosen)} speakers under {PROBE_BOUND}, {sum(pairs[i][1] == 1.0 for i in chosen)} unwarped; {wanted} wanted"
    )
    if len(chosen) < wanted:
        raise RuntimeError(f"only {len(chosen)} speakers are apart, {wanted} wanted")
    # Of more than enough, the warped ones that lie nearest to another go first.
    while len(chosen) > wanted:
        worst = max(chosen, key=lambda i: (pairs[i][1] != 1.0, max(cosines[i, j] for j in chosen if j != i)))
        chosen.remove(worst)
    splits = assign([pairs[index] for index in chosen], generator)
    order = [chosen[position] for position in generator.permutation(len(chosen))]
    ids = {index: f"sp{number + 1:02d}" for number, index in enumerate(order)}
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["speaker", "split", "sex", "voice", "warp", "nearest", "probe_cosine"])
        for index in order:
            nearest = max((other for other in order if other != index), key=lambda other: cosines[index, other])
            voice, warp = pairs[index]
            row = [ids[index], splits[pairs[index]], voice[1], voice, f"{warp:.2f}", ids[nearest]]
            writer.writerow([*row, f"{cosines[index, nearest]:.3f}"])


def main() -> None:
    """Run `probe` or `select`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("probe", "select"))
    parser.add_argument("--packages", type=Path, required=True, help="folder of the downloaded archives")
    parser.add_argument("--cache", type=Path, required=True, help="folder for synthesised audio")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="every Nth voice from I")
    arguments = parser.parse_args()
    packages = Packages(arguments.packages)
    if arguments.step == "probe":
        index, parts = arguments.part
        probe(list(packages.voices)[index::parts], packages, arguments.cache / "probe")
    else:
        select(list(packages.voices), arguments.cache / "probe", arguments.cache / "speakers.tsv")


if __name__ == "__main__":
    main()
