"""The bench of the encoders: all layers out, beside transformers' HubertModel, and how the cost grows with an utterance's length."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from superb_probe.bench_machine import describe_machine
from superb_probe.bench_race import cost, machine_peaks, race
from superb_probe.engine_ask import choose_device
from superb_probe.upstreams.attention import repeated_shapes
from superb_probe.upstreams.config import HubertConfig
from superb_probe.upstreams.hubert_upstream import HubertUpstream
from superb_probe.upstreams.load import DTYPES, load_upstream
from superb_probe.upstreams.macs import hubert_macs

PEER = "transformers HubertModel"
PLANNED = ", shape planned for"  # attention by kernels that make a plan for every new shape, as if shapes came again
GROWTH_S = {"cuda": (5.0, 20.0, 80.0, 320.0, 1200.0), "cpu": (5.0, 20.0, 80.0)}


def bench_encoders(args: argparse.Namespace) -> dict[str, Any]:
    """Each encoder's seconds of audio a second on a batch (part "batch"), and on one utterance of growing length ("growth")."""
    device = choose_device(args.device)
    encoders, operations = _encoders(args, device)
    peaks = machine_peaks(device, DTYPES[args.dtype])
    shapes = [("batch", args.batch, args.seconds)] if "batch" in args.part else []
    if "growth" in args.part:
        shapes += [("growth", 1, seconds) for seconds in args.growth_seconds or GROWTH_S[device.type]]
    rows = []
    for part, batch, seconds in shapes:
        samples = round(seconds * 16000)
        wavs = 0.1 * torch.randn(batch, samples, generator=torch.Generator().manual_seed(0)).to(device)
        lengths = torch.full((batch,), samples, device=device)
        runs = {name: functools.partial(encode, wavs, lengths) for name, encode in encoders.items()}
        with torch.inference_mode():
            found = race(runs, device, args.repeats, args.limit)
        for name, timing in found.items():
            row = {"part": part, "name": name, "batch": batch, "seconds": seconds, **timing}
            rows.append(row | _rates(timing, batch * seconds, batch * operations[name](samples), peaks))
        del wavs, lengths, runs
    return {
        "bench": "encoders",
        "machine": describe_machine(device),
        "peaks": peaks,
        "size": args.size,
        "dtype": args.dtype,
        "rows": rows,
    }


def _rates(
    timing: dict[str, Any], audio_s: float, operations: int, peaks: dict[str, float | None]
) -> dict[str, float | None]:
    seconds, peak = cost(timing), peaks["matmul_flops_per_s"]
    if seconds is None:
        return {"times_real_time": None, "share_of_matmul": None}
    share = None if peak is None else operations / seconds / peak
    return {"times_real_time": audio_s / seconds, "share_of_matmul": share}


def _encoders(
    args: argparse.Namespace, device: torch.device
) -> tuple[dict[str, Callable[[Tensor, Tensor], Any]], dict[str, Callable[[int], int]]]:
    """By name: what encodes a batch, and the operations of one utterance of some samples (two a multiply-accumulate)."""
    encoders: dict[str, Callable[[Tensor, Tensor], Any]] = {}
    operations: dict[str, Callable[[int], int]] = {}
    for name in args.upstream:
        upstream = load_upstream(name, size=args.size, random=1, dtype=args.dtype, device=str(device))
        encoders[name] = upstream
        config = upstream.encoder.config if isinstance(upstream, HubertUpstream) else None
        operations[name] = functools.partial(_operations, config)
        if (
            device.type == "cuda"
            and args.dtype != "float32"
            and config is not None
            and config.layer_type == "transformer"
        ):
            encoders[name + PLANNED] = repeated_shapes()(upstream)
            operations[name + PLANNED] = operations[name]
    if args.peer:
        from superb_probe.upstreams.sizes import size_config

        model, dtype = hubert_of_transformers(args.size, args.dtype).to(device), DTYPES[args.dtype]
        encoders[PEER] = lambda wavs, lengths: model(wavs.to(dtype), output_hidden_states=True)
        peer_config = size_config("transformer_hubert", args.size)
        operations[PEER] = functools.partial(_operations, peer_config)
    return encoders, operations


def _operations(config: HubertConfig | None, samples: int) -> int:
    return 0 if config is None else 2 * hubert_macs(config, samples)


def hubert_of_transformers(size: str, dtype: str) -> Any:
    """A HubertModel of transformers, of the shape of `transformer_hubert`, with random weights."""
    from transformers import HubertConfig as PeerConfig
    from transformers import HubertModel

    from superb_probe.upstreams.sizes import size_config

    ours = size_config("transformer_hubert", size)
    config = PeerConfig(
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
    from superb_probe.bench_tables import machine_line

    lines = [machine_line(result), f"{result['size']}, {result['dtype']}, all layers out, random weights"]
    shape = None
    for row in result["rows"]:
        if shape != (row["batch"], row["seconds"]):
            shape = row["batch"], row["seconds"]
            lines.append(f"{row['batch']} x {row['seconds']:g} s:")
        lines.append(f"  {row['name']:26} {_describe_row(row)}")
    return lines


def _describe_row(row: dict[str, Any]) -> str:
    if "failed" in row:
        return str(row["failed"])
    share = "" if row["share_of_matmul"] is None else f"  {row['share_of_matmul']:4.0%} of the matmul peak"
    memory = "" if row["peak_bytes"] is None else f"  {row['peak_bytes'] / 1e9:5.2f} GB"
    return f"{1000 * (cost(row) or 0.0):9.1f} ms  {row['times_real_time']:9,.4g} x real time{share}{memory}"
