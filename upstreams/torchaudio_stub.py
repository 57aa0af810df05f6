"""Stand-ins that let torchaudio, transformers and s3prl be imported beside a torch without CUDA.

torchaudio's wheels on PyPI are linked against CUDA: beside a CPU build of torch `import torchaudio` raises OSError, and merely
having it installed breaks `from transformers import HubertModel` and s3prl. The functions used here (Kaldi features, deltas, masks)
need no extension, so the module that loads it is replaced by one that says there is none. Where the extension loads, nothing is
replaced.
s3prl 0.4.18 also asks for four names that torchaudio 2.9 and later no longer have.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

EXTENSION = "torchaudio._extension"


def install_torchaudio_stub() -> bool:
    """Make `import torchaudio` work, if it is installed and does not; to be called before anything else imports it.

    Returns:
        Whether the stand-in is in place. False where torchaudio is absent, or works by itself.

    Raises:
        ImportError: if torchaudio cannot be imported for another reason.
    """
    if EXTENSION in sys.modules:
        return getattr(sys.modules[EXTENSION], "__superb_probe_stub__", False)
    if torch.version.cuda is not None or importlib.util.find_spec("torchaudio") is None:
        return False
    try:
        importlib.import_module("torchaudio")
    except OSError:
        for name in [name for name in sys.modules if name == "torchaudio" or name.startswith("torchaudio.")]:
            del sys.modules[name]
    else:
        return False
    sys.modules[EXTENSION] = _extension_stub()
    importlib.import_module("torchaudio")
    return True


def _extension_stub() -> ModuleType:
    stub = _module(EXTENSION)

    def check_cuda_version() -> None:
        return None

    def fail_if_no_align(function: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError(
                f"torchaudio's {function.__name__} needs its compiled extension, which does not load beside a CPU torch"
            )

        return refuse

    contents = {
        "_IS_TORCHAUDIO_EXT_AVAILABLE": False,
        "_IS_ALIGN_AVAILABLE": False,
        "_check_cuda_version": check_cuda_version,
        "fail_if_no_align": fail_if_no_align,
        "__superb_probe_stub__": True,
    }
    for name, value in contents.items():
        setattr(stub, name, value)
    return stub


def _module(name: str) -> ModuleType:
    """An empty module that import machinery takes for one it has loaded."""
    return importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, None))


def install_s3prl_stand_ins() -> None:
    """Give torchaudio the names that s3prl 0.4.18 looks for while it is imported and that newer versions dropped.

    Choosing an audio backend does nothing any more; the others belong to s3prl's own corpora and say so when they are called.
    """
    install_torchaudio_stub()
    torchaudio = importlib.import_module("torchaudio")
    if not hasattr(torchaudio, "set_audio_backend"):
        torchaudio.set_audio_backend = lambda backend: None  # type: ignore[attr-defined]
    for name in ("load", "info"):
        if not hasattr(torchaudio, name):
            setattr(torchaudio, name, _missing(f"torchaudio.{name}"))
    if "torchaudio.sox_effects" not in sys.modules and importlib.util.find_spec("torchaudio.sox_effects") is None:
        effects = _module("torchaudio.sox_effects")
        for name in ("apply_effects_tensor", "apply_effects_file"):
            setattr(effects, name, _missing(f"torchaudio.sox_effects.{name}"))
        sys.modules["torchaudio.sox_effects"] = effects
        torchaudio.sox_effects = effects  # type: ignore[attr-defined]


def _missing(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{name} is not in this torchaudio; superb-probe reads audio with soundfile")

    return refuse
