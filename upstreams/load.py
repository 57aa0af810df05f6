"""Loading an upstream by name: the doors through which one comes in, and the device and number format it computes in."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from superb_probe.errors import RequestError, nearest
from superb_probe.registry import Registry
from superb_probe.upstreams.base import LayerStates, Upstream, UpstreamInfo

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
PREFIXES: Mapping[str, str] = {
    "hf:": "superb_probe.upstreams.huggingface",
    "s3prl:": "superb_probe.upstreams.s3prl",
    "features:": "superb_probe.upstreams.features",
}
_SHARED = ("checkpoint", "size", "random")


def load_upstream(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    size: str | None = None,
    random: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    **options: Any,
) -> Upstream:
    """A frozen upstream in eval mode.

    Args:
        name: registered, or "hf:org/name@revision", "s3prl:name", "features:DIR" or "./file.py:function".
        checkpoint: a file or folder in any format of `superb_probe.upstreams.checkpoints`; None takes the shipped weights.
        size: "test" (under 0.5 M parameters), "tiny" (at most 2 M, as shipped), "small" or "base".
        random: seed of random weights, instead of trained ones.
        device: "cpu", "cuda" or "cuda:N".
        dtype: number format it computes in and gives states in: "float32" (TF32 off everywhere), "tf32", "bfloat16", "float16".
        options: the builder's own, e.g. causal_front_end=True.

    Raises:
        RequestError: for an unknown name, option, dtype or device, a checkpoint that does not fit, or a builder whose result is no
            `Upstream`.

    >>> load_upstream("mamba_hubert_causal", size="test", random=0).info.revision
    'random:0'
    """
    if dtype not in DTYPES:
        raise RequestError(f"{name}: unknown dtype {dtype!r}. Fix: one of {', '.join(DTYPES)}.")
    target = find_device(device)
    builder, arguments = _builder(name)
    asked = {"checkpoint": None if checkpoint is None else str(checkpoint), "size": size, "random": random}
    wanted = {**options, **{key: value for key, value in asked.items() if value is not None}}
    _check_options(name, builder, wanted)
    upstream = _checked(name, builder(*arguments, **wanted))
    for parameter in upstream.parameters():
        parameter.requires_grad_(False)
    upstream.eval()
    upstream.to(device=target)
    compute_in(upstream, dtype)
    return upstream


def find_device(device: str) -> torch.device:
    """The device of that name, if this machine has it.

    Raises:
        RequestError: if it has not, or there is no such kind of device.

    >>> find_device("cpu")
    device(type='cpu')
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise RequestError(f"unknown device {device!r}. Fix: cpu, cuda or cuda:N.") from error
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
            raise RequestError(
                f"device {device!r} was asked for, but there is no GPU here (torch {torch.__version__}, built with {built}). "
                "Fix: --device cpu, or install a CUDA build of torch on a machine with a GPU."
            )
        if found.index is not None and found.index >= count:
            raise RequestError(
                f"device {device!r} was asked for, but there are {count} GPUs here. Fix: cuda:0 to cuda:{count - 1}."
            )
    elif found.type not in ("cpu", "mps"):
        raise RequestError(f"device {device!r} is not supported. Fix: cpu, cuda or cuda:N.")
    return found


def compute_in(upstream: Upstream, dtype: str) -> None:
    """Make an upstream compute in a number format: its weights, its inputs and what TF32 is allowed while it runs.

    Args:
        upstream: changed in place. One with a true attribute `casts_inputs` is given float32 waveforms whatever the format.
        dtype: one of `DTYPES`.
    """
    number_type = DTYPES[dtype]
    if number_type != torch.float32:
        upstream.to(dtype=number_type)
    has_weights = any(parameter.is_floating_point() for parameter in upstream.parameters())
    cast = number_type != torch.float32 and has_weights and not getattr(upstream, "casts_inputs", False)
    saved: list[tuple[bool, bool]] = []

    def before(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        # Both switches are the process's: they are set while this upstream runs, and put back.
        saved.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        _allow_tf32(dtype == "tf32", dtype == "tf32")
        if not cast:
            return None
        cast_arguments = tuple(_cast(argument, number_type) for argument in arguments)
        return cast_arguments, {key: _cast(value, number_type) for key, value in keywords.items()}

    def after(module: nn.Module, arguments: tuple[Any, ...], result: Any) -> Any:
        _allow_tf32(*saved.pop())
        if isinstance(result, LayerStates) and result.states.dtype != number_type:
            return LayerStates(result.states.to(number_type), result.num_frames)
        return None

    upstream.register_forward_pre_hook(before, with_kwargs=True)
    upstream.register_forward_hook(after, always_call=True)


def _allow_tf32(matmul: bool, convolution: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = matmul
    torch.backends.cudnn.allow_tf32 = convolution


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _builder(name: str) -> tuple[Callable[..., Any], tuple[str, ...]]:
    """The function that builds an upstream, and its arguments."""
    for prefix, module in PREFIXES.items():
        if name.startswith(prefix):
            rest = name[len(prefix) :]
            if not rest:
                raise RequestError(
                    f"{name}: nothing after {prefix!r}. Fix: e.g. hf:org/name, s3prl:hubert_base, features:DIR."
                )
            return importlib.import_module(module).build, (rest,)
    return Registry("upstream").find(name).load(), ()


def _check_options(name: str, builder: Callable[..., Any], wanted: Mapping[str, Any]) -> None:
    parameters = inspect.signature(builder).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    positional = 1 if name.startswith(tuple(PREFIXES)) else 0
    accepted = [key for key, parameter in list(parameters.items())[positional:] if parameter.kind in kinds]
    unknown = sorted(set(wanted) - set(accepted))
    if unknown:
        close = {key: nearest(key, accepted, 1) for key in unknown}
        named = ", ".join(f"{key!r}" + (f" (did you mean {close[key][0]}?)" if close[key] else "") for key in unknown)
        own = [key for key in accepted if key not in _SHARED]
        has = ", ".join([key for key in _SHARED if key in accepted] + own) or "none"
        raise RequestError(f"{name}: it does not have the options {named}. It has: {has}.")


def _checked(name: str, upstream: Any) -> Upstream:
    if not isinstance(upstream, Upstream):
        raise RequestError(
            f"{name}: its builder returned a {type(upstream).__name__}, expected a superb_probe.Upstream. "
            "Fix: subclass superb_probe.upstreams.base.Upstream."
        )
    if not isinstance(getattr(upstream, "info", None), UpstreamInfo):
        raise RequestError(f"{name}: its `info` is not an UpstreamInfo. Fix: set self.info in the upstream's __init__.")
    return upstream
