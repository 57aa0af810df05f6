"""The bench of the selective scan and of whole Mamba blocks: every back end of this machine beside the peers that are installed."""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from superb_probe.bench_machine import describe_machine
from superb_probe.bench_race import cost, machine_peaks, race
from superb_probe.engine_ask import choose_device
from superb_probe.errors import RequestError
from superb_probe.upstreams.load import DTYPES
from superb_probe.upstreams.mamba import Mamba
from superb_probe.upstreams.scan import choose_backend, mamba_ssm_scan, selective_scan
from superb_probe.upstreams.scan_inputs import ScanInputs
from superb_probe.upstreams.transformer import TransformerLayer

PARTS = ("scan", "scan-gradients", "block", "block-gradients")
SHAPES: dict[str, dict[str, tuple[tuple[int, int], ...]]] = {
    "cuda": {
        "scan": ((16, 1500), (64, 1500), (1, 15_000), (1, 60_000)),
        "scan-gradients": ((16, 1500), (1, 60_000)),
        "block": ((16, 1500), (64, 1500), (1, 15_000), (1, 60_000)),
        "block-gradients": ((16, 1500),),
    },
    "cpu": dict.fromkeys(PARTS, ((1, 500), (1, 1500))),
}
DIM, EXPAND, STATES = 768, 3, 24  # of the paper's Base model
WIDTH = DIM * EXPAND
QUADRATIC_FRAMES = 500  # beyond it peers that index frame by frame are not differentiated: their backward is quadratic
PLAIN_SHAPE = (
    16,
    1500,
)  # the largest on which the plain back end is timed on a GPU, forward only: it launches kernels a frame there

Runs = dict[str, Callable[[], Any]]


def bench_kernels(args: argparse.Namespace) -> dict[str, Any]:
    """Scans and blocks at the paper's Base width, in every part asked for."""
    device = choose_device(args.device)
    if args.dtype not in DTYPES:
        raise RequestError(f"unknown dtype {args.dtype!r}. Fix: one of {', '.join(DTYPES)}")
    dtype = DTYPES[args.dtype]
    peaks = machine_peaks(device, dtype)
    rows = []
    for part in args.part:
        for batch, frames in shapes_of(part, device, args.shape):
            gradients = part.endswith("-gradients")
            build = _scan_runs if part.startswith("scan") else _block_runs
            runs, outputs = build(batch, frames, dtype, device, gradients)
            differences = _differences(outputs)
            with torch.enable_grad() if gradients else torch.inference_mode():
                found = race(runs, device, args.repeats, args.limit)
            row = {"part": part, "batch": batch, "frames": frames, "runs": found}
            rows.append(row | {"differences": differences, "floors": floors(part, batch, frames, dtype, peaks)})
            del runs, outputs
    return {
        "bench": "kernels",
        "machine": describe_machine(device),
        "peaks": peaks,
        "dtype": args.dtype,
        "width": WIDTH,
        "states": STATES,
        "rows": rows,
    }


def shapes_of(part: str, device: torch.device, asked: list[str] | None) -> list[tuple[int, int]]:
    """Rows and frames of a part: those asked for, else the part's own.

    >>> shapes_of("scan", torch.device("cpu"), ["2x30"])
    [(2, 30)]
    """
    if not asked:
        return list(SHAPES[device.type][part])
    shapes: list[tuple[int, int]] = []
    for text in asked:
        batch, _, frames = text.partition("x")
        if not (batch.isdigit() and frames.isdigit() and int(batch) and int(frames)):
            raise RequestError(f"--shape {text!r} is not ROWSxFRAMES, such as 16x1500")
        shapes.append((int(batch), int(frames)))
    return shapes


def floors(
    part: str, batch: int, frames: int, dtype: torch.dtype, peaks: Mapping[str, float | None]
) -> dict[str, float | None]:
    """Seconds below which a part cannot be, by counting, at the peaks measured: of its bytes, exponentials and matrix products.

    A scan reads u, delta, z, B and C and writes y once; with gradients it reads them and y's gradient again and writes theirs. A
    state of a channel takes an exponential a frame, with gradients two. A block adds its four projections (three times with
    gradients), and counts the bytes of its scan alone.
    """
    passes = 2 if part.endswith("-gradients") else 1
    size = torch.finfo(dtype).bits // 8
    wide, narrow = batch * frames * WIDTH * size, batch * frames * STATES * size
    moved = 4 * wide + 2 * narrow + (passes - 1) * (7 * wide + 4 * narrow)
    copy, exponentials, flops = (
        peaks[name] for name in ("copy_bytes_per_s", "exponentials_per_s", "matmul_flops_per_s")
    )
    found = {
        "bytes_s": None if copy is None else moved / copy,
        "exponentials_s": None if exponentials is None else passes * batch * frames * WIDTH * STATES / exponentials,
    }
    if part.startswith("block"):
        rank = math.ceil(DIM / 16)
        products = 3 * DIM * WIDTH + WIDTH * (2 * rank + 2 * STATES)
        found["products_s"] = None if flops is None else (2 * passes - 1) * 2 * batch * frames * products / flops
    return found


def _scan_runs(batch: int, frames: int, dtype: torch.dtype, device: torch.device, gradients: bool) -> tuple[Runs, Runs]:
    values = scan_inputs(batch, frames, dtype, device)
    dense = [each.contiguous() for each in values]
    scans: dict[str, Callable[..., Tensor]] = {}
    for backend in ("plain", "cpu", "cuda"):
        slow = device.type == "cuda" and (gradients or batch > PLAIN_SHAPE[0] or frames > PLAIN_SHAPE[1])
        if not (slow and backend == "plain") and _can_run(backend, values):
            scans[backend] = functools.partial(_scan_by, backend)
    peer = mamba_ssm_scan() if device.type == "cuda" else None
    if peer is not None:
        scans["mamba_ssm"] = lambda *x: peer(*x, True)
    if device.type == "cpu" and not (gradients and frames > QUADRATIC_FRAMES):
        scans["reference loop"] = reference_scan
    outputs: Runs = {}
    for name, scan in scans.items():
        inputs = dense if name in ("mamba_ssm", "reference loop") else values
        outputs[name] = functools.partial(scan, *inputs)
    if not gradients:
        return outputs, outputs
    return {
        name: _with_gradients(scan, dense if name in ("mamba_ssm", "reference loop") else values)
        for name, scan in scans.items()
    }, outputs


def _scan_by(backend: str, *values: Tensor) -> Tensor:
    u, delta, a, b, c, d, z, bias = values
    return selective_scan(u, delta, a, b, c, d, z, bias, True, backend=backend)[0]


def _can_run(backend: str, values: list[Tensor]) -> bool:
    u, delta, a, b, c, d, z, bias = values
    try:
        return choose_backend(backend, ScanInputs(u, delta, a, b, c, d, z, bias)) == backend
    except ValueError:
        return False


def _with_gradients(work: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], Any]:
    leaves = [each.detach().requires_grad_() for each in inputs]

    def run() -> Any:
        y = work(*leaves)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    return run


def scan_inputs(batch: int, frames: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """u, delta, A, B, C, D, z and delta's bias as a Mamba block of Base width gives them: (B, T, E) in memory, seen as (B, E, T)."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    u, delta, z = (draw(batch, frames, WIDTH).to(dtype).transpose(1, 2) for _ in range(3))
    b, c = (draw(batch, frames, STATES).to(dtype).transpose(1, 2) for _ in range(2))
    a = -torch.arange(1.0, STATES + 1, device=device).repeat(WIDTH, 1)
    return [u, delta, a, b, c, draw(WIDTH), z, draw(WIDTH) - 4.0]


def reference_scan(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    """The loop of mamba_ssm's `selective_scan_ref`, written again here: it is what runs that package without a GPU.

    Exponentials and inputs of all frames at once, (B, E, T, N), then a multiplication, an addition and a sum a frame.
    """
    delta = F.softplus(delta + bias[:, None])
    decays = torch.exp(torch.einsum("bdl,dn->bdln", delta, a))
    added = torch.einsum("bdl,bnl,bdl->bdln", delta, b, u)
    state = u.new_zeros(u.shape[0], u.shape[1], b.shape[1])
    outputs = []
    for t in range(u.shape[2]):
        state = decays[:, :, t] * state + added[:, :, t]
        outputs.append(torch.einsum("bdn,bn->bd", state, c[:, :, t]))
    return (torch.stack(outputs, dim=2) + u * d[:, None]) * F.silu(z)


def _block_runs(
    batch: int, frames: int, dtype: torch.dtype, device: torch.device, gradients: bool
) -> tuple[Runs, Runs]:
    torch.manual_seed(0)
    block = Mamba(DIM, STATES, 4, EXPAND)
    with torch.no_grad():
        block.dt_proj.bias.sub_(4.0)
    block = block.to(device, dtype)
    x = torch.randn(batch, frames, DIM, device=device).to(dtype)
    blocks: dict[str, Callable[[Tensor], Tensor]] = {"ours": block}
    blocks |= _peer_blocks(block, frames, gradients)
    outputs: Runs = {name: functools.partial(each, x) for name, each in blocks.items()}
    products = _Products(block)
    blocks["matrix products"] = products
    if not gradients:
        blocks["Transformer layer"] = _transformer_layer(device, dtype)
        return {name: functools.partial(each, x) for name, each in blocks.items()}, outputs
    runs: Runs = {}
    for name, each in blocks.items():
        parameters = list(each.parameters()) if isinstance(each, nn.Module) else list(block.parameters())
        runs[name] = _block_gradients(each, x, parameters)
    return runs, outputs


def _block_gradients(block: Callable[[Tensor], Tensor], x: Tensor, parameters: list[nn.Parameter]) -> Callable[[], Any]:
    leaf = x.detach().requires_grad_()

    def run() -> Any:
        y = block(leaf)
        return torch.autograd.grad(y, [leaf, *parameters], torch.ones_like(y), allow_unused=True)

    return run


class _Products(nn.Module):
    """The four projections of a block on values of their shapes, and nothing else."""

    def __init__(self, block: Mamba) -> None:
        super().__init__()
        self.projections = nn.ModuleList([block.in_proj, block.x_proj, block.out_proj])
        self.dt_weight = block.dt_proj.weight

    def forward(self, x: Tensor) -> Tensor:
        in_proj, x_proj, out_proj = self.projections
        hidden = in_proj(x)[..., :WIDTH]
        step = x_proj(hidden)[..., : self.dt_weight.shape[1]]
        return out_proj(F.linear(step, self.dt_weight))  # type: ignore[no-any-return]


def _transformer_layer(device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    layer = TransformerLayer(DIM, 12, 4 * DIM).to(device, dtype)
    return functools.partial(layer, num_frames=None, padded_frames=None)


def _peer_blocks(block: Mamba, frames: int, gradients: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    """Blocks of other packages with the weights of ours."""
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    weight = block.in_proj.weight
    weights = block.state_dict()
    if weight.is_cuda:
        if mamba_ssm_scan() is not None:
            from mamba_ssm.modules.mamba_simple import Mamba as Peer

            peer = Peer(DIM, d_state=STATES, d_conv=4, expand=EXPAND).to(weight.device, weight.dtype)
            peer.load_state_dict(weights)
            found["mamba_ssm"] = peer
        return found
    if not (gradients and frames > QUADRATIC_FRAMES):
        found["reference loop"] = _WithReferenceScan(block)
        found["transformers"] = _block_of_transformers(weights)
    try:
        from mambapy.mamba import MambaBlock, MambaConfig
    except ImportError:
        return found
    peer = MambaBlock(MambaConfig(d_model=DIM, n_layers=1, d_state=STATES, expand_factor=EXPAND))
    peer.load_state_dict(weights)
    found["mambapy"] = peer.to(weight.dtype)
    return found


def _block_of_transformers(weights: dict[str, Tensor]) -> nn.Module:
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(hidden_size=DIM, state_size=STATES, expand=EXPAND, num_hidden_layers=1)
    mixer = MambaMixer(config, layer_idx=0)
    mixer.load_state_dict(weights)
    return mixer.eval().to(weights["D"].dtype)


class _WithReferenceScan(nn.Module):
    """A block of ours in the plain operations of PyTorch with `reference_scan`, as mamba_ssm runs without its kernels."""

    def __init__(self, block: Mamba) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        hidden, gate = block.in_proj(x).chunk(2, dim=-1)
        conv = block.conv1d
        u = F.silu(
            F.conv1d(F.pad(hidden.transpose(1, 2), (conv.kernel_size[0] - 1, 0)), conv.weight, conv.bias, groups=WIDTH)
        )
        step, b, c = block.x_proj(u.transpose(1, 2)).split([block.dt_rank, STATES, STATES], dim=-1)
        delta, a = F.linear(step, block.dt_proj.weight), -torch.exp(block.A_log.float())
        sequences = (u, delta.transpose(1, 2), a, b.transpose(1, 2), c.transpose(1, 2), block.D)
        y = reference_scan(*sequences, gate.transpose(1, 2), block.dt_proj.bias)
        return block.out_proj(y.transpose(1, 2))  # type: ignore[no-any-return]


def _differences(outputs: Runs) -> dict[str, float]:
    """Relative difference of every result from the first one's."""
    with torch.inference_mode():
        results = {name: run().float() for name, run in outputs.items()}
    first = next(iter(results.values()))
    return {name: float((each - first).norm() / first.norm()) for name, each in list(results.items())[1:]}


def describe_kernels(result: dict[str, Any]) -> list[str]:
    """Lines for a person."""
    from superb_probe.bench_tables import machine_line

    lines = [machine_line(result), f"{result['dtype']}, width {result['width']}, {result['states']} states"]
    for row in result["rows"]:
        lines.append(f"{row['part']}, {row['batch']} x {row['frames']}:")
        for name, timing in row["runs"].items():
            lines.append(f"  {name:18} {_describe_run(name, timing, row)}")
        counted = ", ".join(f"{name[:-2]} {1e3 * s:.3f}" for name, s in row["floors"].items() if s is not None)
        lines.append(f"  {'floors':18} {counted} ms")
    return lines


def _describe_run(name: str, timing: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    if "failed" in timing:
        return str(timing["failed"])
    memory = "" if timing["peak_bytes"] is None else f", {timing['peak_bytes'] / 1e6:.0f} MB"
    ratio = peer_ratio(name, row)
    over = "" if ratio is None else f", {ratio:.2f} x the time of {own_name(row)}"
    wrong = row["differences"].get(name)
    return f"{1e3 * (cost(timing) or 0.0):.3f} ms{memory}{over}" + (
        "" if wrong is None else f", results differ by {wrong:.1e}"
    )


def own_name(row: Mapping[str, Any]) -> str:
    """The run of ours that peers are compared with: the block, or the fastest back end of the scan."""
    own = [name for name in ("ours", "cuda", "cpu", "plain") if cost(row["runs"].get(name, {})) is not None]
    return own[0]


def peer_ratio(name: str, row: Mapping[str, Any]) -> float | None:
    """How many times what ours costs a run costs; None for ours itself.

    >>> peer_ratio("mamba_ssm", {"runs": {"cuda": {"s": 1.0}, "mamba_ssm": {"s": 4.0}}})
    4.0
    """
    own, other = cost(row["runs"][own_name(row)]), cost(row["runs"][name])
    return None if name == own_name(row) or own is None or other is None else other / own
