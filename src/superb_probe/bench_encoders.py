"""Benches of the encoders and of the selective scan: every back end this machine can run beside the peers that are installed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from superb_probe.bench_machine import describe_machine, timed
from superb_probe.engine_ask import choose_device
from superb_probe.errors import RequestError
from superb_probe.upstreams.load import DTYPES, load_upstream
from superb_probe.upstreams.scan import selective_scan
from superb_probe.upstreams.scan_cuda import supports

SCAN_SHAPES = {"cuda": ((16, 1500), (64, 1500), (1, 15_000), (1, 60_000)), "cpu": ((1, 250), (1, 1500))}
WIDTH, STATES = 2304, 24  # of the paper's Base model
PEER_NAMES = ("GreedySearchDecoderOnlyOutput", "SampleDecoderOnlyOutput", "TextStreamer")  # gone from transformers 5


def bench_encoders(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of audio a second of each encoder, all layers out; transformers' HubertModel of the same shape beside them."""
    device = choose_device(args.device)
    samples = round(args.seconds * 16000)
    wavs = 0.1 * torch.randn(args.batch, samples, generator=torch.Generator().manual_seed(0))
    lengths = torch.full((args.batch,), samples)
    wavs, lengths = wavs.to(device), lengths.to(device)
    rows = []
    for name in args.upstream:
        upstream = load_upstream(name, size=args.size, random=1, dtype=args.dtype, device=str(device))
        rows.append(_timed_row(name, lambda each=upstream: each(wavs, lengths), args, device))  # type: ignore[misc]
        del upstream
    model = _hubert_of_transformers(args.size, args.dtype).to(device)
    narrow = wavs.to(DTYPES[args.dtype])
    rows.append(_timed_row("transformers HubertModel", lambda: model(narrow, output_hidden_states=True), args, device))
    return {
        "bench": "encoders",
        "machine": describe_machine(device),
        "size": args.size,
        "dtype": args.dtype,
        "batch": args.batch,
        "seconds": args.seconds,
        "rows": rows,
    }


def _timed_row(name: str, run: Callable[[], Any], args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.inference_mode():
        seconds = timed(run, device, args.repeats, warm_up=2)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    audio_s = args.batch * args.seconds
    return {"name": name, "s": seconds, "times_real_time": audio_s / seconds, "peak_gpu_bytes": peak}


def _hubert_of_transformers(size: str, dtype: str) -> Any:
    from transformers import HubertConfig, HubertModel

    from superb_probe.upstreams.sizes import size_config

    ours = size_config("transformer_hubert", size)
    config = HubertConfig(
        hidden_size=ours.dim,
        num_hidden_layers=ours.num_layers,
        num_attention_heads=ours.num_heads,
        intermediate_size=ours.ffn_dim,
        conv_dim=[channels for channels, _, _ in ours.conv_layers],
        conv_kernel=[kernel for _, kernel, _ in ours.conv_layers],
        conv_stride=[stride for _, _, stride in ours.conv_layers],
        num_conv_pos_embeddings=ours.conv_pos,
        num_conv_pos_embedding_groups=ours.conv_pos_groups,
    )
    return HubertModel(config).eval().to(DTYPES[dtype])  # type: ignore[no-untyped-call]


def describe_encoders(result: dict[str, Any]) -> list[str]:
    """Lines for a person."""
    rows = [
        f"  {row['name']:26} {1000 * row['s']:9.1f} ms  {row['times_real_time']:9.0f} x real time"
        + ("" if row["peak_gpu_bytes"] is None else f"  {row['peak_gpu_bytes'] / 1e9:5.1f} GB")
        for row in result["rows"]
    ]
    shape = f"{result['batch']} x {result['seconds']:g} s"
    return [
        _machine_line(result),
        f"{result['size']}, {result['dtype']}, {shape}, all layers out, random weights",
        *rows,
    ]


def bench_kernels(args: argparse.Namespace) -> dict[str, Any]:
    """The selective scan at the paper's Base width: plain, the GPU's kernel, and mamba_ssm where it is importable."""
    device = choose_device(args.device)
    if args.dtype not in DTYPES:
        raise RequestError(f"unknown dtype {args.dtype!r}. Fix: one of {', '.join(DTYPES)}")
    peer = _peer_scan()
    rows = []
    for batch, frames in SCAN_SHAPES[device.type]:
        values = _scan_inputs(batch, frames, DTYPES[args.dtype], device)
        runs: dict[str, Callable[[], Any]] = {}
        if frames <= 1500 and batch <= 16:
            runs["plain"] = lambda each=values: selective_scan(*each, True, backend="plain")  # type: ignore[misc]
        if supports(values[0], values[3], values[2]):
            runs["cuda"] = lambda each=values: selective_scan(*each, True, backend="cuda")  # type: ignore[misc]
        if peer is not None and device.type == "cuda":
            dense = [each.contiguous() for each in values]
            runs["mamba_ssm"] = lambda each=dense: peer(*each, True)  # type: ignore[misc]
        with torch.inference_mode():
            took = {name: timed(run, device, args.repeats, warm_up=2) for name, run in runs.items()}
        rows.append({"batch": batch, "frames": frames, "s": took})
    machine = describe_machine(device)
    return {"bench": "kernels", "machine": machine, "dtype": args.dtype, "width": WIDTH, "states": STATES, "rows": rows}


def _scan_inputs(batch: int, frames: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    u, delta, z = (draw(batch, frames, WIDTH).to(dtype).transpose(1, 2) for _ in range(3))
    b, c = (draw(batch, frames, STATES).to(dtype).transpose(1, 2) for _ in range(2))
    a = -torch.arange(1.0, STATES + 1, device=device).repeat(WIDTH, 1)
    return [u, delta, a, b, c, draw(WIDTH), z, draw(WIDTH) - 4.0]


def _peer_scan() -> Callable[..., Any] | None:
    """mamba_ssm's scan, or None where it is not installed; its import asks transformers for names that are gone from it."""
    try:
        from transformers import generation

        for name in PEER_NAMES:
            if not hasattr(generation, name):
                setattr(generation, name, object)
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    return selective_scan_fn  # type: ignore[no-any-return]


def describe_kernels(result: dict[str, Any]) -> list[str]:
    """Lines for a person."""
    lines = [
        _machine_line(result),
        f"selective scan forward, {result['dtype']}, width {result['width']}, {result['states']} states",
    ]
    for row in result["rows"]:
        took = ", ".join(f"{name} {1000 * seconds:.3f} ms" for name, seconds in row["s"].items())
        best, peer = row["s"].get("cuda"), row["s"].get("mamba_ssm")
        ratio = f"; mamba_ssm over cuda {peer / best:.2f}" if best and peer else ""
        lines.append(f"  {row['batch']} x {row['frames']}: {took}{ratio}")
    return lines


def _machine_line(result: dict[str, Any]) -> str:
    machine = result["machine"]
    name = machine["gpu"]["name"] if machine["gpu"] else f"{machine['processor']}, {machine['threads']} threads"
    return f"{name}; torch {machine['versions']['torch']}; commit {machine['commit']}"
