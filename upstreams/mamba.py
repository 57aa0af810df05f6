"""Mamba layers of HuBERT: one forward mixer, two mixers summed (ExtBiMamba), shared projections (InnBiMamba), and Mamba-2.

Mixers have the tensor names of mamba_ssm, layers those of the Mamba-HuBERT code. Every mixer knows each row's valid length: the
backward scans start at a row's own end, so that an utterance's states do not depend on the batch it is in.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from superb_probe.upstreams import fused_cpu, fused_cuda
from superb_probe.upstreams.base import frame_mask
from superb_probe.upstreams.cuda_kernels import can_run
from superb_probe.upstreams.linear import Linear, linear
from superb_probe.upstreams.norms import sum_norm
from superb_probe.upstreams.scan import selective_scan
from superb_probe.upstreams.scan_cuda import selective_scan_both
from superb_probe.upstreams.scan_inputs import ScanInputs


class MixerState(NamedTuple):
    """What a forward mixer carries from one stretch of frames to the next.

    Attributes:
        conv: (B, K - 1, E) the last inputs of the depthwise convolution of kernel K (for Mamba-2 also those of B and C).
        scan: (B, E, N) the state of the scan, fp32.
    """

    conv: Tensor
    scan: Tensor


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor | None = None, *, reverse: bool = False
) -> Tensor:
    """A causal depthwise convolution along time; reversed, each frame sees itself and the K - 1 that follow.

    Args:
        x: (B, T, E). For a reversed run, frames past a row's end must be zero.
        weight: (E, 1, K), the last tap meets the frame itself.
        bias: (E,).
        tail: (B, K - 1, E) inputs before the first frame; zeros by default.
        reverse: run backwards in time.

    >>> x = torch.tensor([[[1.0], [0.0], [0.0]]])
    >>> depthwise_conv(x, torch.tensor([[[2.0, 3.0]]]), torch.zeros(1)).flatten().tolist()
    [3.0, 2.0, 0.0]
    """
    kernel = weight.shape[-1]
    if tail is None:
        tail = x.new_zeros(x.shape[0], kernel - 1, x.shape[2])
    padded = torch.cat([x, tail] if reverse else [tail, x], dim=1)
    frames = x.shape[1]
    # At tap k the frame t of the output meets frame t + k of the padded input; reversed, frame t + K - 1 - k.
    taps = [(padded[:, kernel - 1 - tap if reverse else tap :][:, :frames], weight[:, 0, tap]) for tap in range(kernel)]
    y = torch.addcmul(bias, *taps[0])
    for shifted, tap_weight in taps[1:]:
        y.addcmul_(shifted, tap_weight)
    return y


def depthwise_conv_silu(
    x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor | None = None, *, reverse: bool = False
) -> Tensor:
    """SiLU of `depthwise_conv`; in one kernel on a GPU, and without gradients on a CPU with a compiler."""
    if can_run(x.device, x.dtype) and (tail is None or not tail.requires_grad):
        return fused_cuda.depthwise_conv_silu(x, weight, bias, tail, reverse)
    if not torch.is_grad_enabled():
        fused = fused_cpu.depthwise_conv_silu(x, weight, bias, tail, reverse)
        if fused is not None:
            return fused
    return F.silu(depthwise_conv(x, weight, bias, tail, reverse=reverse))


def last_inputs(x: Tensor, tail: Tensor | None, num_frames: Tensor | None, count: int) -> Tensor:
    """The last `count` valid inputs of each row, (B, count, E), reaching back into the tail before them (zeros by default).

    >>> x, tail = torch.arange(1.0, 5.0)[None, :, None], torch.tensor([[[-2.0], [-1.0], [0.0]]])
    >>> [last_inputs(x, tail, torch.tensor([count]), 3).flatten().tolist() for count in (2, 4)]
    [[0.0, 1.0, 2.0], [2.0, 3.0, 4.0]]
    """
    if num_frames is None and x.shape[1] >= count:
        return x[:, x.shape[1] - count :].clone()
    if tail is None:
        tail = x.new_zeros(x.shape[0], count, x.shape[2])
    if num_frames is None:
        num_frames = torch.full((x.shape[0],), x.shape[1], device=x.device)
    index = num_frames[:, None] - count + torch.arange(count, device=x.device)  # (B, count), below zero in the tail
    place = index[..., None].expand(-1, -1, x.shape[2])
    return torch.where(place < 0, tail.gather(1, (place + count).clamp(max=count - 1)), x.gather(1, place.clamp(min=0)))


def zero_padding(x: Tensor, num_frames: Tensor | None) -> Tensor:
    """Copy x (B, T, D) with the frames at or past each row's `num_frames` set to zero."""
    if num_frames is None:
        return x
    return x.masked_fill(~frame_mask(num_frames, x.shape[1])[..., None], 0.0)


class Mamba(nn.Module):
    """The Mamba-1 mixer: in_proj, causal depthwise convolution, selective scan, gate, out_proj.

    Written from the equations of Gu and Dao 2023 (arXiv 2312.00752); parameters named and shaped as in mamba_ssm's `Mamba`.
    """

    def __init__(self, dim: int, state_dim: int = 16, conv_kernel: int = 4, expand: int = 2, reverse: bool = False):
        """`expand` * `dim` is the inner width E, `state_dim` is N; `reverse` runs against time."""
        super().__init__()
        inner = expand * dim
        self.dt_rank = math.ceil(dim / 16)
        self.state_dim = state_dim
        self.reverse = reverse
        self.in_proj = Linear(dim, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, conv_kernel, groups=inner)
        self.x_proj = Linear(inner, self.dt_rank + 2 * state_dim, bias=False)
        self.dt_proj = Linear(self.dt_rank, inner)
        self.A_log = nn.Parameter(initial_a_log(inner, state_dim))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = Linear(inner, dim, bias=False)

    @torch.no_grad()
    def reset_scan_parameters(self, generator: torch.Generator | None = None) -> None:
        """A_log and D as at the start; nothing is drawn."""
        self.A_log.copy_(initial_a_log(*self.A_log.shape))
        self.D.fill_(1.0)

    def forward(self, x: Tensor, num_frames: Tensor | None = None) -> Tensor:
        """Mix along time.

        Args:
            x: (B, T, D).
            num_frames: (B,) frames of each row that count; all by default. The others give zero.

        Returns:
            (B, T, D).
        """
        return self.out_proj(self._mix(x, num_frames, None)[0])  # type: ignore[no-any-return]

    def run(
        self, x: Tensor, num_frames: Tensor | None = None, initial: MixerState | None = None
    ) -> tuple[Tensor, MixerState]:
        """`forward` that also takes and gives the state, so that a long input can be encoded piece by piece.

        Args:
            x: (B, T, D).
            num_frames: (B,) frames that count.
            initial: the state the previous piece ended in.
        """
        if self.reverse and initial is not None:
            raise ValueError("a reversed mixer cannot go on from a past state")
        y, hidden, last = self._mix(x, num_frames, initial)
        tail = None if initial is None else initial.conv
        return self.out_proj(y), MixerState(
            last_inputs(hidden, tail, num_frames, self.conv1d.weight.shape[-1] - 1), last
        )

    def _mix(self, x: Tensor, num_frames: Tensor | None, initial: MixerState | None) -> tuple[Tensor, Tensor, Tensor]:
        """What the output is projected from (B, T, E), the convolution's inputs (B, T, E), the scan's last state."""
        hidden, gate = self.in_proj(zero_padding(x, num_frames)).chunk(2, dim=-1)
        y, last = selective_mix(
            hidden,
            gate,
            self.conv1d,
            self.x_proj,
            self.dt_proj,
            self.A_log,
            self.D,
            reverse=self.reverse,
            num_frames=num_frames,
            initial=initial,
        )
        return y, hidden, last


def at_least_float(x: Tensor) -> Tensor:
    """At least fp32: x widened, or as it is if it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def initial_a_log(inner: int, state_dim: int) -> Tensor:
    """log(1..N) in each of E rows, mamba_ssm's start of A_log (S4D-real)."""
    return torch.arange(1, state_dim + 1, dtype=torch.float32).log().repeat(inner, 1)


def selective_mix(
    hidden: Tensor,
    gate: Tensor | None,
    conv1d: nn.Conv1d,
    x_proj: nn.Linear,
    dt_proj: nn.Linear,
    a_log: Tensor,
    d: Tensor,
    *,
    reverse: bool,
    num_frames: Tensor | None,
    initial: MixerState | None = None,
) -> tuple[Tensor, Tensor]:
    """The part of a Mamba-1 mixer between its projections: convolution, SiLU, selective scan, gate.

    Args:
        hidden: (B, T, E), zero past each row's end.
        gate: (B, T, E), or None for no gate.
        conv1d: holds the depthwise weights.
        x_proj: gives the low-rank step size, B and C.
        dt_proj: widens the step size.
        a_log: (E, N), A = -exp(a_log).
        d: (E,).
        reverse: run against time.
        num_frames: (B,).
        initial: state before the first frame.

    Returns:
        (B, T, E), and the scan's state after the last frame.
    """
    arguments = scan_arguments(hidden, gate, conv1d, x_proj, dt_proj, a_log, d, reverse, num_frames, initial)
    y, last = selective_scan(**arguments)
    return y.transpose(1, 2), last


def scan_arguments(
    hidden: Tensor,
    gate: Tensor | None,
    conv1d: nn.Conv1d,
    x_proj: nn.Linear,
    dt_proj: nn.Linear,
    a_log: Tensor,
    d: Tensor,
    reverse: bool,
    num_frames: Tensor | None,
    initial: MixerState | None = None,
) -> dict[str, Any]:
    """What `selective_scan` is called with in `selective_mix`; arguments as there."""
    if conv1d.bias is None:
        raise ValueError("the depthwise convolution of a Mamba mixer has a bias")
    tail = None if initial is None else initial.conv
    u = depthwise_conv_silu(hidden, conv1d.weight, conv1d.bias, tail, reverse=reverse)
    state_dim = a_log.shape[1]
    step, b, c = torch.split(x_proj(u), [dt_proj.in_features, state_dim, state_dim], dim=-1)
    return {
        "u": u.transpose(1, 2),
        "delta": linear(step, dt_proj.weight).transpose(1, 2),
        "A": -torch.exp(at_least_float(a_log)),
        "B": b.transpose(1, 2),
        "C": c.transpose(1, 2),
        "D": d,
        "z": None if gate is None else gate.transpose(1, 2),
        "delta_bias": dt_proj.bias,
        "delta_softplus": True,
        "reverse": reverse,
        "num_frames": num_frames,
        "initial_state": None if initial is None else initial.scan,
    }


def mix_both(ahead: Mamba, back: Mamba, x: Tensor, num_frames: Tensor | None) -> Tensor:
    """The sum of a mixer forwards in time and one backwards, (B, T, D); on a GPU without gradients, both scans in one launch."""
    if not can_run(x.device, x.dtype) or torch.is_grad_enabled():
        return ahead(x, num_frames) + back(x, num_frames)  # type: ignore[no-any-return]
    x = zero_padding(x, num_frames)
    scans = []
    for mixer in (ahead, back):
        hidden, gate = mixer.in_proj(x).chunk(2, dim=-1)
        parts = (mixer.conv1d, mixer.x_proj, mixer.dt_proj, mixer.A_log, mixer.D)
        scans.append(scan_arguments(hidden, gate, *parts, mixer.reverse, num_frames))
    inputs = [ScanInputs(**each) for each in scans]
    first, second = selective_scan_both(*inputs) or [selective_scan(**each)[0] for each in scans]
    return ahead.out_proj(first.transpose(1, 2)) + back.out_proj(second.transpose(1, 2))  # type: ignore[no-any-return]


class InnBiMamba(nn.Module):
    """Two scans, one per direction, between shared projections (Zhang et al. 2024, arXiv 2405.12609).

    in_proj (input and gate) and out_proj are shared; convolution, x_proj, dt_proj, A and D are each direction's own. The outputs of
    the two directions are added, then gated, then projected. The released Mamba-HuBERT code lacks this layer and the paper leaves
    open whether the sum is halved, which parameters are shared, and all names. Chosen here: a plain sum (as its figure draws it),
    a convolution of its own in each direction, and the names of Vision Mamba (`conv1d_b`, `x_proj_b`, `dt_proj_b`, `A_b_log`,
    `D_b`). Parameter counts follow from that (83.04 M for Base with N 24 and expand 3, where the paper's table has 82.9 M).
    """

    def __init__(self, dim: int, state_dim: int = 16, conv_kernel: int = 4, expand: int = 2):
        """As `Mamba`."""
        super().__init__()
        inner = expand * dim
        rank = math.ceil(dim / 16)
        self.in_proj = Linear(dim, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, conv_kernel, groups=inner)
        self.x_proj = Linear(inner, rank + 2 * state_dim, bias=False)
        self.dt_proj = Linear(rank, inner)
        self.A_log = nn.Parameter(initial_a_log(inner, state_dim))
        self.D = nn.Parameter(torch.ones(inner))
        self.conv1d_b = nn.Conv1d(inner, inner, conv_kernel, groups=inner)
        self.x_proj_b = Linear(inner, rank + 2 * state_dim, bias=False)
        self.dt_proj_b = Linear(rank, inner)
        self.A_b_log = nn.Parameter(initial_a_log(inner, state_dim))
        self.D_b = nn.Parameter(torch.ones(inner))
        self.out_proj = Linear(inner, dim, bias=False)

    @torch.no_grad()
    def reset_scan_parameters(self, generator: torch.Generator | None = None) -> None:
        """A_log and D of both directions as at the start; nothing is drawn."""
        for a_log, d in ((self.A_log, self.D), (self.A_b_log, self.D_b)):
            a_log.copy_(initial_a_log(*a_log.shape))
            d.fill_(1.0)

    def forward(self, x: Tensor, num_frames: Tensor | None = None) -> Tensor:
        """Mix along time, (B, T, D) to (B, T, D), over the first `num_frames` (B,) of each row."""
        hidden, gate = self.in_proj(zero_padding(x, num_frames)).chunk(2, dim=-1)
        forward, _ = selective_mix(
            hidden,
            None,
            self.conv1d,
            self.x_proj,
            self.dt_proj,
            self.A_log,
            self.D,
            reverse=False,
            num_frames=num_frames,
        )
        backward, _ = selective_mix(
            hidden,
            None,
            self.conv1d_b,
            self.x_proj_b,
            self.dt_proj_b,
            self.A_b_log,
            self.D_b,
            reverse=True,
            num_frames=num_frames,
        )
        return self.out_proj((forward + backward) * F.silu(gate))  # type: ignore[no-any-return]


class GatedRMSNorm(nn.Module):
    """RMS norm of x * SiLU(z), with a weight (Mamba-2's norm before its output projection)."""

    def __init__(self, dim: int, eps: float = 1e-5):
        """`dim` is the width normalised over."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """(B, T, E) and its gate to (B, T, E), in fp32 inside."""
        gated = at_least_float(x) * F.silu(at_least_float(gate))
        scale = torch.rsqrt(gated.square().mean(-1, keepdim=True) + self.eps)
        return (gated * scale).to(x.dtype) * self.weight


class Mamba2(nn.Module):
    """The Mamba-2 mixer: scalar decay a head, one convolution over x, B and C, gated RMS norm, one group of B and C.

    Written from Dao and Gu 2024 (arXiv 2405.21060); parameters named and shaped as in mamba_ssm's `Mamba2Simple`.
    """

    def __init__(self, dim: int, state_dim: int = 16, conv_kernel: int = 4, expand: int = 2, head_dim: int = 48):
        """`expand` * `dim` is split into heads of `head_dim`."""
        super().__init__()
        inner = expand * dim
        if inner % head_dim:
            raise ValueError(f"inner width {inner} is not a multiple of head_dim {head_dim}")
        self.inner, self.state_dim, self.num_heads = inner, state_dim, inner // head_dim
        mixed = inner + 2 * state_dim
        self.in_proj = Linear(dim, inner + mixed + self.num_heads, bias=False)
        self.conv1d = nn.Conv1d(mixed, mixed, conv_kernel, groups=mixed)
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.norm = GatedRMSNorm(inner)
        self.out_proj = Linear(inner, dim, bias=False)
        self.reset_scan_parameters()

    @torch.no_grad()
    def reset_scan_parameters(self, generator: torch.Generator | None = None) -> None:
        """mamba_ssm's start: steps log-uniform in [1e-3, 0.1], decays uniform in [1, 16]."""
        step = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp_().clamp_(min=1e-4)
        step.add_(torch.log(-torch.expm1(-step)))
        self.A_log.uniform_(1, 16, generator=generator).log_()
        self.D.fill_(1.0)
        self.norm.weight.fill_(1.0)

    def forward(self, x: Tensor, num_frames: Tensor | None = None) -> Tensor:
        """Mix along time, (B, T, D) to (B, T, D), over the first `num_frames` (B,) of each row."""
        return self.run(x, num_frames)[0]

    def run(
        self, x: Tensor, num_frames: Tensor | None = None, initial: MixerState | None = None
    ) -> tuple[Tensor, MixerState]:
        """`forward` that also takes and gives the state; see `Mamba.run`."""
        if self.conv1d.bias is None:
            raise ValueError("the depthwise convolution of a Mamba mixer has a bias")
        size = self.state_dim
        gate, mixed, step = torch.split(
            self.in_proj(zero_padding(x, num_frames)), [self.inner, self.inner + 2 * size, self.num_heads], dim=-1
        )
        tail = None if initial is None else initial.conv
        convolved = depthwise_conv_silu(mixed, self.conv1d.weight, self.conv1d.bias, tail)
        u, b, c = torch.split(convolved, [self.inner, size, size], dim=-1)
        head_dim = self.inner // self.num_heads

        def per_channel(head_values: Tensor) -> Tensor:
            return head_values.repeat_interleave(head_dim, dim=-1)

        y, last = selective_scan(
            u.transpose(1, 2),
            per_channel(step).transpose(1, 2),
            -torch.exp(at_least_float(per_channel(self.A_log)))[:, None],
            b.transpose(1, 2),
            c.transpose(1, 2),
            per_channel(self.D),
            delta_bias=per_channel(self.dt_bias),
            delta_softplus=True,
            num_frames=num_frames,
            initial_state=None if initial is None else initial.scan,
        )
        tail = last_inputs(mixed, tail, num_frames, self.conv1d.weight.shape[-1] - 1)
        return self.out_proj(self.norm(y.transpose(1, 2), gate)), MixerState(tail, last)


class MambaLayer(nn.Module):
    """A mixer with a residual and a norm, then an optional feed-forward block with its own.

    Post-norm by default, x = norm(x + mixer(x)), as in the Mamba-HuBERT code; pre-norm if `norm_first`.
    """

    def __init__(
        self,
        layer_type: str,
        dim: int,
        state_dim: int,
        conv_kernel: int,
        expand: int,
        head_dim: int,
        ffn_dim: int,
        norm_first: bool = False,
    ):
        """As `HubertConfig`'s fields of these names; `ffn_dim` 0 is no feed-forward block."""
        super().__init__()
        self.layer_type = layer_type
        self.norm_first = norm_first
        if layer_type in ("mamba", "ext_bi_mamba"):
            self.mamba: nn.Module = Mamba(dim, state_dim, conv_kernel, expand)
        if layer_type == "ext_bi_mamba":
            self.mamba_rev = Mamba(dim, state_dim, conv_kernel, expand, reverse=True)
        if layer_type == "inn_bi_mamba":
            self.bimamba = InnBiMamba(dim, state_dim, conv_kernel, expand)
        if layer_type == "mamba2":
            self.mamba = Mamba2(dim, state_dim, conv_kernel, expand, head_dim)
        self.norm_name = "bimamba_layer_norm" if "bi_mamba" in layer_type else "mamba_layer_norm"
        self.add_module(self.norm_name, nn.LayerNorm(dim))
        self.has_ffn = ffn_dim > 0
        if self.has_ffn:
            self.fc1 = Linear(dim, ffn_dim)
            self.fc2 = Linear(ffn_dim, dim)
            self.final_layer_norm = nn.LayerNorm(dim)

    def mix(self, x: Tensor, frames: Tensor | None) -> Tensor:
        """The mixer's output, (B, T, D): both directions summed where there are two."""
        if self.layer_type == "inn_bi_mamba":
            return self.bimamba(x, frames)  # type: ignore[no-any-return]
        if self.layer_type == "ext_bi_mamba":
            return mix_both(self.mamba, self.mamba_rev, x, frames)  # type: ignore[arg-type]
        return self.mamba(x, frames)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, num_frames: Tensor | None, padded_frames: Tensor | None) -> Tensor:
        """Encode.

        Args:
            x: (B, T, D).
            num_frames: not used: a frame that fills up a row is scanned like the others, as in the official code.
            padded_frames: (B,) frames scanned in each row, the one that fills it up to `frame_multiple` included; None: all.

        Returns:
            (B, T, D).
        """
        norm = getattr(self, self.norm_name)
        if self.norm_first:
            x = x + self.mix(norm(x), padded_frames)
            return x + self.feed_forward(self.final_layer_norm(x)) if self.has_ffn else x
        x = sum_norm(x, self.mix(x, padded_frames), norm)
        return sum_norm(x, self.feed_forward(x), self.final_layer_norm) if self.has_ffn else x

    def feed_forward(self, x: Tensor) -> Tensor:
        """fc2(GELU(fc1 x))."""
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]
