"""The GPU's kernels without a GPU: their sources compiled for the CPU (`cuda_on_cpu.h`), against the plain ones in float64."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from superb_probe.upstreams import cpu_kernels, cuda_kernels, fused_cuda, mamba, norms, scan_cuda
from superb_probe.upstreams.scan import selective_scan
from superb_probe.upstreams.scan_cuda import selective_scan_both, selective_scan_cuda
from superb_probe.upstreams.scan_inputs import ScanInputs
from superb_probe.upstreams.scan_layout import GradientLayout, Split

COMPILER = cpu_kernels.find_compiler()
pytestmark = pytest.mark.skipif(sys.platform != "linux" or COMPILER is None, reason="no C++ compiler, or not Linux")
# What C++ cannot say: lines of machine code, and shared memory whose size the host gives.
REWRITES = {
    r'float y;\s*asm\("ex2[^\n]*\s*return y;': "return std::exp2(x);",
    r'value_t y;\s*asm\("cvt.rn.bf16[^\n]*\s*return y;': "return to_bfloat16(x);",
    r"extern __shared__ __align__\(16\) float (\w+)\[\];": r"float* \1 = dynamic_shared;",
}


class Emulator:
    """`cuda_kernels.launch` on the CPU; `mutation` is a text of a source and what to put there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mutation = ("", "")
        self.launched: list[tuple[str, int]] = []

    def launch(
        self,
        name: str,
        entry: str,
        macros: Mapping[str, int],
        device: torch.device,
        grid: tuple[int, int, int],
        threads: int,
        arguments: list[Any],
        shared_bytes: int = 0,
    ) -> None:
        self.launched.append((entry, macros.get("BOTH", 0)))
        text = (cuda_kernels.SOURCES / name).read_text(encoding="utf-8")
        if self.mutation[0] and name in (scan_cuda.GRADIENT_SOURCE, fused_cuda.NORM_SOURCE):
            assert self.mutation[0] in text
            text = text.replace(*self.mutation)
        text = (cuda_kernels.SOURCES / cuda_kernels.COMMON).read_text(encoding="utf-8") + text
        for pattern, replacement in REWRITES.items():
            text = re.sub(pattern, replacement, text)
        found = re.search(rf"__global__ void\s+(?:__launch_bounds__\([^)]*\)\s+)?{entry}\(([^)]*)\)", text)
        assert found is not None
        types = [parameter.rsplit(maxsplit=1)[0] for parameter in found[1].split(",")]
        values = ", ".join(
            f"*({kind.removeprefix('const ') if '*' not in kind else kind}*)given[{i}]" for i, kind in enumerate(types)
        )
        defines = "".join(f"#define {key} {value}\n" for key, value in macros.items())
        code = f"""#include "cuda_on_cpu.h"
{defines}{text}
static void** given;
static void call() {{ {entry}({values}); }}
extern "C" int run(void** a, int x, int y, int z, int n) {{ given = a; return run_grid(call, x, y, z, n); }}
"""
        place = self.folder / f"{abs(hash(code))}.cpp"
        library = place.with_suffix(".so")
        if not library.exists():
            place.write_text(code, encoding="utf-8")
            flags = ["-O1", "-std=c++17", "-w", "-shared", "-fPIC", f"-I{Path(__file__).parent}"]
            subprocess.run([str(COMPILER), *flags, str(place), "-o", str(library)], check=True, timeout=120)
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(each) for each in arguments))
        assert ctypes.CDLL(str(library)).run(pointers, *grid, threads) == 0, "a thread missed a barrier or a shuffle"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def emulator(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    emulator = Emulator(folder)
    for module in (scan_cuda, fused_cuda):
        monkeypatch.setattr(module, "launch", emulator.launch)
    monkeypatch.setattr(scan_cuda, "can_run", lambda device, dtype: dtype in cuda_kernels.KINDS)
    monkeypatch.setattr(scan_cuda, "processor_count", lambda device: 132)
    return emulator


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def draw(dtype: torch.dtype, batch: int, width: int, frames: int, states: int) -> list[Tensor]:
    torch.manual_seed(frames)
    u, delta, z = (torch.randn(batch, frames, width).to(dtype).transpose(1, 2) for _ in range(3))
    b, c = (torch.randn(batch, frames, states).to(dtype).transpose(1, 2) for _ in range(2))
    a = -torch.rand(width, states) * states
    return [u, delta, a, b, c, torch.randn(width), z, torch.randn(width) - 3.0, torch.randn(batch, width, states)]


def gradients(
    values: list[Tensor], layouts: tuple[Split, GradientLayout] | None = None, **options: Any
) -> list[Tensor]:
    """The outputs of a scan, and the gradients of all it is given: the kernel's, or without layouts the plain one's in float64."""
    given = [(value.clone() if layouts else value.double()).detach().requires_grad_() for value in values]
    if layouts:
        y, last = selective_scan_cuda(ScanInputs(*given[:8], True, initial_state=given[8], **options), *layouts)
    else:
        y, last = selective_scan(*given[:8], True, initial_state=given[8], backend="plain", **options)
    torch.manual_seed(0)
    loss = (y * torch.randn(y.shape)).sum() + (last * torch.randn(last.shape)).sum()
    return [y, last, *torch.autograd.grad(loss, given)]


CASES: list[tuple[tuple[int, int, int, int], bool, list[int] | None, Split, GradientLayout]] = [
    ((2, 18, 37, 24), True, [37, 5], Split(2, 4, 1), GradientLayout(2, 128, 3, 16)),
    ((1, 9, 21, 3), False, None, Split(1, 1, 2, 1, 32), GradientLayout(1, 64, 1, 8)),
]


@pytest.mark.parametrize(("shape", "reverse", "lengths", "split", "layout"), CASES)
def test_the_scan_and_its_gradients(
    emulator: Emulator,
    shape: tuple[int, int, int, int],
    reverse: bool,
    lengths: list[int] | None,
    split: Split,
    layout: GradientLayout,
) -> None:
    values = draw(torch.float32, *shape)
    options = {"reverse": reverse, "num_frames": None if lengths is None else torch.tensor(lengths)}
    expected = gradients(values, **options)
    found = gradients(values, (split, layout), **options)
    errors = [relative(one, other) for one, other in zip(found, expected, strict=True)]
    assert all(error < 2e-6 for error in errors), errors
    assert {entry for entry, _ in emulator.launched} >= {"selective_scan_forward", "selective_scan_backward"}


def test_a_wrong_gradient_is_found(emulator: Emulator) -> None:
    shape, reverse, _, split, layout = CASES[0]
    values = draw(torch.float32, *shape)
    emulator.mutation = ("carry *= decay[i];", "carry *= 1.0001f * decay[i];")
    expected = gradients(values, reverse=reverse)
    found = gradients(values, (split, layout), reverse=reverse)
    assert not all(relative(one, other) < 1e-5 for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("right", [True, False])
def test_a_sum_and_its_norm(
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    bound: float,
    right: bool,
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(norms, "can_run", lambda device, dtype: True)
    if not right:
        emulator.mutation = ("value[j][0] -= mean;", "value[j][0] -= 0.9f * mean;")
    norm = torch.nn.LayerNorm(192).to(dtype)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
        x, y = torch.randn(2, 2, 7, 192).add(1.0).to(dtype).transpose(1, 2).unbind()  # not in the order of memory
        found = norms.sum_norm(x, y, norm)
        expected = F.layer_norm(x.double() + y.double(), (192,), norm.weight.double(), norm.bias.double(), norm.eps)
    assert emulator.launched == [("sum_layer_norm", 0)]
    assert (relative(found, expected) < bound) == right
    with torch.enable_grad():
        norms.sum_norm(x, y, norm)
    with torch.no_grad():
        norms.sum_norm(x[..., :100], y[..., :100], torch.nn.LayerNorm(100).to(dtype))
    assert len(emulator.launched) == 1, "with gradients, and for other widths, torch's own"


def test_two_directions_share_a_launch(emulator: Emulator) -> None:
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    ahead, back = (dict(zip(names, draw(torch.bfloat16, 2, 18, frames, 24), strict=False)) for frames in (21, 22))
    back = {name: value[..., :21] if value.dim() == 3 else value for name, value in back.items()}
    lengths = {"delta_softplus": True, "num_frames": torch.tensor([21, 4])}
    found = selective_scan_both(ScanInputs(**ahead, **lengths), ScanInputs(**back, **lengths, reverse=True))  # type: ignore[arg-type]
    assert found is not None and emulator.launched == [("selective_scan_forward", 1)]
    for y, given, reverse in zip(found, (ahead, back), (False, True), strict=True):
        wide = {name: value.double() for name, value in given.items()}
        assert relative(y, selective_scan(**wide, **lengths, reverse=reverse, backend="plain")[0]) < 4e-3  # type: ignore[arg-type]
    other = back | {"u": back["u"][:, :16]}
    forwards = ScanInputs(**ahead, **lengths)  # type: ignore[arg-type]
    for second in (ScanInputs(**other, **lengths, reverse=True), ScanInputs(**back, **lengths)):  # type: ignore[arg-type]
        assert selective_scan_both(forwards, second) is None, "unequal shapes, or both forwards"


@pytest.mark.parametrize("both", [False, True])
def test_pieces_of_time_go_on_from_each_other(emulator: Emulator, both: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is taken from the end of the last piece, which is not run: memory that nobody wrote is NaN here."""
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    given = dict(zip(names, draw(torch.float32, 2, 6, 50, 5), strict=False))
    options: dict[str, Any] = {"delta_softplus": True, "num_frames": torch.tensor([50, 23])}
    expected = [
        selective_scan(
            **{name: value.double() for name, value in given.items()}, **options, reverse=reverse, backend="plain"
        )
        for reverse in (False, True)
    ]
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: filled(empty(*a, **k)))
    monkeypatch.setattr(scan_cuda, "choose_split", lambda *_: Split(1, 2, 4))
    scans = [ScanInputs(**given, **options, reverse=reverse) for reverse in (False, True)]
    found = selective_scan_both(*scans) if both else [selective_scan_cuda(each)[0] for each in scans]
    assert found is not None and [entry for entry, _ in emulator.launched].count("carry_states") == 2
    for y, (wanted, _) in zip(found, expected, strict=True):
        assert relative(y, wanted) < 2e-6


def filled(x: Tensor) -> Tensor:
    return x.fill_(float("nan")) if x.is_floating_point() else x


def test_the_fused_convolution_and_its_gradients(emulator: Emulator) -> None:
    x, weight, bias = torch.randn(2, 70, 20)[..., :10], torch.randn(10, 1, 4), torch.randn(10)
    for reverse in (False, True):

        def run(fused: bool, reverse: bool = reverse) -> list[Tensor]:
            given = [(value if fused else value.double()).detach().requires_grad_() for value in (x, weight, bias)]
            if fused:
                y = fused_cuda.depthwise_conv_silu(*given, None, reverse)
            else:
                y = F.silu(mamba.depthwise_conv(*given, reverse=reverse))
            return [y, *torch.autograd.grad(y.square().sum(), given)]

        expected = run(False)
        assert all(relative(one, other) < 2e-6 for one, other in zip(run(True), expected, strict=True))
        assert relative(run(True, not reverse)[0], expected[0]) > 1e-2
