"""Stand-ins for what s3prl 0.4.18 imports and its wheel, or today's libraries, no longer have.

Only what s3prl asks of other packages is replaced: reading audio, logging, edit distance, files of the wheel that are missing. Its
experts, data loaders, run loop, featurizer and encoders are its own. Every stand-in is at least as fast as what it stands for, so
that none slows the peer down.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

SCALARS: list[tuple[str, float, int]] = []  # what s3prl logs: name, value, update
GAIN_DB = {"value": 0.0}  # what `apply_effects_file` still has to apply; silence is trimmed when the corpus is arranged


def install() -> list[str]:
    """Put every stand-in in place, before s3prl is imported.

    Returns:
        What was replaced, in words.
    """
    replaced = [*_torchaudio(), *_small_packages(), *_huggingface_hub()]
    _module("s3prl.downstream.ctc.corpus", __path__=[])
    _module("s3prl.downstream.ctc.corpus.libriphone", LibriPhoneDataset=LibriPhoneDataset)
    replaced.append(
        "s3prl.downstream.ctc.corpus.libriphone (not in the wheel): windows over a list sorted by label length"
    )
    return replaced


def keep_num_workers() -> None:
    """Let the CTC expert's loaders all have the workers they were asked for.

    `load_dataset` takes the number out of the shared configuration, so that every loader after the first has 12.
    """
    expert = importlib.import_module("s3prl.downstream.ctc.expert")
    original = expert.load_dataset

    def load_dataset(split: str, tokenizer: Any, corpus: dict[str, Any]) -> Any:
        return original(split, tokenizer, dict(corpus))

    expert.load_dataset = load_dataset  # type: ignore[attr-defined]


class SummaryWriter:
    """tensorboardX's writer: keeps scalars in `SCALARS`, writes nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Arguments name a folder that is not needed."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int = 0) -> None:
        """Keep one number."""
        SCALARS.append((tag, float(scalar_value), int(global_step)))

    def close(self) -> None:
        """Nothing is open."""


class LibriPhoneDataset:
    """The corpus class of phoneme recognition, which the wheel lacks.

    One item an utterance: in training the window of `bucket_size` neighbours that begins there in a list sorted by label length
    (longest first), else the utterance itself. `corpus.tsv` in `path` has split, audio and phones.
    """

    def __init__(self, split: list[str], tokenizer: Any, bucket_size: int, path: str, **kwargs: Any) -> None:
        """`kwargs` are the rest of the corpus configuration."""
        self.bucket_size = bucket_size
        rows = [line.split("\t") for line in Path(path, "corpus.tsv").read_text(encoding="utf-8").splitlines()]
        found = [(str(Path(path, audio)), tokenizer.encode(phones)) for name, audio, phones in rows if name in split]
        self.items = sorted(found, key=lambda item: -len(item[1]))

    def __len__(self) -> int:
        """Number of utterances."""
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        """A window of (file, tokens), or one pair."""
        if self.bucket_size == 1:
            return self.items[index]
        start = min(len(self.items) - self.bucket_size, index)
        return self.items[max(0, start) : max(0, start) + self.bucket_size]


def _torchaudio() -> list[str]:
    import torch

    replaced = []
    if torch.version.cuda is None:  # its wheels on PyPI are linked against CUDA
        _module(
            "torchaudio._extension",
            _IS_TORCHAUDIO_EXT_AVAILABLE=False,
            _IS_ALIGN_AVAILABLE=False,
            _check_cuda_version=lambda: None,
            fail_if_no_align=lambda function: function,
        )
        replaced.append("torchaudio._extension (a torch without CUDA)")
    torchaudio = importlib.import_module("torchaudio")
    torchaudio.set_audio_backend = lambda backend: None  # type: ignore[attr-defined]
    torchaudio.load = _load  # type: ignore[attr-defined]
    torchaudio.info = _refuse("torchaudio.info")  # type: ignore[attr-defined]
    effects = _module(
        "torchaudio.sox_effects",
        apply_effects_file=_apply_effects_file,
        apply_effects_tensor=_refuse("torchaudio.sox_effects.apply_effects_tensor"),
    )
    torchaudio.sox_effects = effects  # type: ignore[attr-defined]
    return [*replaced, "torchaudio.load, torchaudio.sox_effects (soundfile; effects applied beforehand)"]


def _load(path: Any, *args: Any, **kwargs: Any) -> Any:
    """A file's samples (1, S) in float32 and its rate."""
    import soundfile
    import torch

    samples, rate = soundfile.read(str(path), dtype="float32")
    return torch.from_numpy(samples)[None], rate


def _apply_effects_file(path: Any, effects: Any, *args: Any, **kwargs: Any) -> Any:
    """A file that is one channel at 16 kHz already, at the gain still to be applied."""
    wav, rate = _load(path)
    return wav * 10.0 ** (GAIN_DB["value"] / 20.0), rate


def _small_packages() -> list[str]:
    _module("tensorboardX", SummaryWriter=SummaryWriter)
    replaced = ["tensorboardX (keeps scalars in memory)"]
    if importlib.util.find_spec("catalyst") is None:
        _module("catalyst", __path__=[])
        _module("catalyst.data", __path__=[])
        _module("catalyst.data.sampler", DistributedSamplerWrapper=_refuse("catalyst's DistributedSamplerWrapper"))
        replaced.append("catalyst (one process needs none of it)")
    if importlib.util.find_spec("editdistance") is None:
        from rapidfuzz.distance import Levenshtein

        _module("editdistance", eval=Levenshtein.distance)
        replaced.append("editdistance (rapidfuzz)")
    if importlib.util.find_spec("sox") is None:
        _module("sox", Transformer=_refuse("sox.Transformer"))
        replaced.append("sox (never called)")
    if importlib.util.find_spec("librosa") is None:
        _module("librosa", __path__=[])
        _module("librosa.util", find_files=lambda root: sorted(str(path) for path in Path(root).rglob("*.wav")))
        replaced.append("librosa.util.find_files (a glob)")
    return replaced


def _huggingface_hub() -> list[str]:
    hub = importlib.import_module("huggingface_hub")
    missing = []
    for name in ("HfFolder", "Repository"):
        if not hasattr(hub, name):
            setattr(hub, name, _refuse(f"huggingface_hub.{name}"))
            missing.append(name)
    return [f"huggingface_hub.{', '.join(missing)} (nothing is uploaded)"] if missing else []


def _module(name: str, **contents: Any) -> ModuleType:
    made = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, None))
    for key, value in contents.items():
        setattr(made, key, value)
    sys.modules[name] = made
    return made


def _refuse(name: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{name}: a stand-in; the bench needs no such thing")

    return refuse
