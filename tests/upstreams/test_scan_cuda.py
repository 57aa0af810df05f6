"""The GPU's kernels against the plain ones in float64; what can be checked without a GPU runs everywhere."""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from superb_probe.upstreams import convolutions, cuda_kernels, fused_cuda, mamba, scan_cuda, scan_layout
from superb_probe.upstreams.scan import selective_scan
from superb_probe.upstreams.scan_cuda import selective_scan_cuda
from superb_probe.upstreams.scan_inputs import ScanInputs
from superb_probe.upstreams.scan_layout import Split, choose_split

cuda = pytest.mark.cuda
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
BOUNDS = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def inputs(batch: int, width: int, frames: int, states: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(batch * width + frames + states)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    u, z = (draw(batch, frames, width).to(dtype).transpose(1, 2) for _ in range(2))
    delta = (0.5 * draw(batch, frames, width)).to(dtype).transpose(1, 2)
    mixed = draw(batch, frames, 2 * states + 8).to(dtype).transpose(1, 2)
    a = -torch.rand(width, states, device="cuda", generator=generator) * states
    return [
        u, delta, a, mixed[:, 8 : 8 + states], mixed[:, 8 + states :], draw(width), z, 0.5 * draw(width) - 4.0
    ]  # fmt: skip


CASES = [
    # batch, width, frames, states, dtype, reverse, lengths, initial state, split
    (3, 200, 37, 24, torch.float32, False, None, False, Split(1, 1, 1)),
    (3, 200, 37, 24, torch.float32, True, [37, 5, 1], True, Split(1, 2, 1)),
    (2, 130, 1, 16, torch.float32, False, None, True, None),
    (2, 63, 70, 24, torch.bfloat16, True, [70, 33], True, None),
    (2, 64, 700, 24, torch.float32, True, [700, 333], True, Split(2, 2, 3)),
    (2, 64, 700, 24, torch.float32, False, [699, 2], True, Split(2, 4, 5)),
    (1, 768, 3000, 24, torch.bfloat16, False, None, False, None),
    (2, 96, 333, 1, torch.float32, False, None, True, Split(1, 1, 2)),
    (2, 96, 333, 64, torch.float32, True, None, True, Split(1, 4, 2)),
    (2, 96, 333, 7, torch.float32, True, [300, 299], True, Split(1, 2, 2)),
    (4, 256, 500, 24, torch.float16, False, None, False, Split(2, 2, 1, 2)),
    (3, 200, 137, 24, torch.float32, False, None, True, Split(1, 2, 1, 2)),
]


def scan_errors(case: tuple, lengths_for_kernel: list[int] | None) -> tuple[float, float]:  # type: ignore[type-arg]
    batch, width, frames, states, dtype, reverse, lengths, initial, split = case
    arguments = inputs(batch, width, frames, states, dtype)
    generator = torch.Generator("cuda").manual_seed(1)
    state = torch.randn(batch, width, states, device="cuda", generator=generator) if initial else None
    wide = [each.double() for each in arguments]
    options = {"reverse": reverse, "initial_state": None if state is None else state.double()}
    valid = None if lengths is None else torch.tensor(lengths, device="cuda")
    expected, expected_state = selective_scan(*wide, True, num_frames=valid, backend="plain", **options)
    given = None if lengths_for_kernel is None else torch.tensor(lengths_for_kernel, device="cuda")
    found, found_state = selective_scan_cuda(ScanInputs(*arguments, True, reverse, given, state), split)
    for row, length in enumerate(lengths or []):
        if given is not None and lengths_for_kernel == lengths:
            assert not found[row, :, length:].any()
    return relative(found, expected), relative(found_state, expected_state)


@cuda
@needs_gpu
@pytest.mark.parametrize("case", CASES)
def test_the_scan_equals_the_plain_one_in_float64(case: tuple) -> None:  # type: ignore[type-arg]
    error, state_error = scan_errors(case, case[6])
    assert error < BOUNDS[case[4]] and state_error < (1e-5 if case[4] == torch.float32 else 5e-5)


@cuda
@needs_gpu
def test_a_scan_that_ignores_lengths_is_found() -> None:
    case = CASES[1]
    assert scan_errors(case, None)[0] > 1e-2


@cuda
@needs_gpu
@pytest.mark.parametrize("frames", [70, 2000])
def test_two_directions_in_one_launch(frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    layer = mamba.MambaLayer("ext_bi_mamba", 32, 24, 4, 3, 24, 0).cuda()
    with torch.no_grad():
        for mixer in (layer.mamba, layer.mamba_rev):
            mixer.dt_proj.bias.fill_(-4.0)
        x, lengths = torch.randn(2, frames, 32, device="cuda"), torch.tensor([frames, 33], device="cuda")
        launched: list[int] = []
        real = scan_cuda.launch
        monkeypatch.setattr(
            scan_cuda, "launch", lambda *a, **k: (launched.append(a[2].get("BOTH", 0)), real(*a, **k))[1]
        )
        found = layer.mix(x, lengths)
        assert launched and all(launched), "one launch for both"
        layer = layer.double()
        expected = layer.mamba(x.double(), lengths) + layer.mamba_rev(x.double(), lengths)
    assert relative(found, expected) < 1e-5
    assert relative(found, expected.flip(1)) > 1e-2


@cuda
@needs_gpu
@pytest.mark.parametrize("reverse", [False, True])
def test_the_fused_convolution_equals_the_plain_one(reverse: bool) -> None:
    x = torch.randn(3, 400, 50, device="cuda").transpose(1, 2)[..., :200]
    weight, bias = torch.randn(200, 1, 4, device="cuda"), torch.randn(200, device="cuda")
    tail = None if reverse else torch.randn(3, 3, 200, device="cuda")
    expected = F.silu(mamba.depthwise_conv(x, weight, bias, tail, reverse=reverse))
    found = fused_cuda.depthwise_conv_silu(x, weight, bias, tail, reverse)
    assert relative(found, expected) < 1e-6
    assert relative(fused_cuda.depthwise_conv_silu(x, weight, bias, None, not reverse), expected) > 1e-2


@cuda
@needs_gpu
def test_the_fused_waveform_convolution_equals_the_plain_one() -> None:
    wavs, weight, shift = (torch.randn(*shape, device="cuda") for shape in ((2, 3001), (2, 300, 10), (2, 300)))
    expected = F.gelu(torch.baddbmm(shift[:, None], wavs.unfold(1, 10, 5), weight.transpose(1, 2)))
    found = fused_cuda.waveform_conv_gelu(wavs, weight, shift, 5, torch.float32)
    assert found.shape == expected.shape and relative(found, expected) < 1e-6


@cuda
@needs_gpu
def test_the_fused_convolution_and_norm_equal_the_plain_ones() -> None:
    layer = convolutions.ConvLayer(1, 96, 10, 5, True, "layer").cuda()
    wavs = torch.randn(2, 3001, 1, device="cuda")
    with torch.no_grad():
        for part in layer.parameters():
            part.normal_()
        found = layer(wavs, [599, 599])
        expected = layer.double()(wavs.double(), [599, 599])
        assert found.shape == expected.shape and relative(found, expected) < 1e-6
        assert relative(layer.float()(wavs.roll(1, 1), [599, 599]), expected) > 1e-2


def test_the_positional_convolution_as_a_matrix_product() -> None:
    for causal in (False, True):
        conv = convolutions.PositionalConv(24, 16, 4, causal)
        with torch.no_grad():
            convolutions.reset_pos_conv_(conv)
            for frames in (1, 7, 8, 33):
                x = torch.randn(3, frames, 24)
                torch.testing.assert_close(F.gelu(conv._matrix_product(x) + conv.bias), conv(x))
            before = conv._matrix_product(x)
            conv.weight_v.mul_(torch.rand_like(conv.weight_v))  # what is kept must notice
            assert not torch.allclose(conv._matrix_product(x), before)


def test_a_strided_convolution_without_copies() -> None:
    weight = torch.randn(5, 8, 3)
    for x in (torch.randn(2, 101, 8), torch.randn(3, 101, 16)[1:, :, ::2]):  # the second is a view, not in one piece
        found = convolutions._taps(x, weight[..., :2], 0, 50, 2)
        found = found.baddbmm_(*convolutions._tap_operands(x, weight[..., 2:], 2, 50, 2))
        torch.testing.assert_close(found, convolutions.strided_conv(x, weight, None, 2))
        torch.testing.assert_close(found, F.conv1d(x.transpose(1, 2), weight, stride=2).transpose(1, 2))


def test_layouts_cover_all_states_and_frames() -> None:
    for batch, width, frames, states in ((1, 2304, 60000, 24), (16, 2304, 1500, 24), (1, 6, 1, 1), (4, 768, 90, 64)):
        for pairs in (False, True):
            split = choose_split(batch, width, frames, states, pairs, 132)
            lane_states = -(-states // split.group)
            assert lane_states <= 24 and 32 % split.group == 0 and lane_states * split.group >= states
            assert split.tile % split.group == 0
            assert 1 <= split.chunks <= max(1, frames // scan_layout.MIN_CHUNK_FRAMES)
    assert choose_split(1, 2304, 60000, 24, True, 132).chunks > 16
    assert choose_split(16, 2304, 1500, 24, True, 132).chunks == 1


def test_blocks_share_no_more_memory_than_there_is() -> None:
    for states in range(1, scan_cuda.MAX_STATES + 1):
        for pairs in (False, True):
            split = choose_split(3, 200, 90, states, pairs, 132)
            assert split.shared_bytes(states) <= scan_layout.MAX_SHARED_BYTES and split.threads >= 32
    assert Split(2, 1, 1).shared_bytes(1) == 0xC480  # what the assembler says that this layout takes: too much
    assert choose_split(3, 200, 90, 1, True, 132).threads == 64


def test_a_thread_new_to_the_device_is_given_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd calls from threads of its own, in which no context is current yet."""
    current = threading.local()

    class Driver:
        """Refuses what needs a context, as the driver does."""

        def __getattr__(self, name: str) -> Callable[..., int]:
            return lambda *a: 0 if name in ("cuDeviceGet", "cuDevicePrimaryCtxRetain") else self.needs_context()

        def needs_context(self) -> int:
            return 0 if getattr(current, "context", None) else 201

        def cuCtxSetCurrent(self, context: object) -> int:
            current.context = context
            return 0

    driver = Driver()
    monkeypatch.setattr(cuda_kernels, "_driver", lambda: driver)
    monkeypatch.setattr(cuda_kernels, "_context", lambda device: "context")
    monkeypatch.setattr(cuda_kernels, "compile_source", lambda *a: b"")
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=0))
    cuda_kernels._function.cache_clear()

    def launch() -> None:
        cuda_kernels.launch("x.cu", "x", {}, torch.device("cuda", 0), (1, 1, 1), 32, [], 64)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(launch).result()
    cuda_kernels._function.cache_clear()
    monkeypatch.setattr(Driver, "cuCtxSetCurrent", lambda self, context: 0)
    monkeypatch.setattr(Driver, "cuGetErrorString", lambda self, status, text: 0, raising=False)
    with ThreadPoolExecutor(1) as pool, pytest.raises(cuda_kernels.KernelError, match="201"):
        pool.submit(launch).result()
    cuda_kernels._function.cache_clear()


def test_back_ends_that_cannot_run_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    ones = torch.ones(1, 1, 3)
    with pytest.raises(ValueError, match="unknown back end 'fast'"):
        selective_scan(ones, ones, torch.zeros(1, 1), ones, ones, backend="fast")
    with pytest.raises(ValueError, match="runs on a GPU.*on cpu"):
        selective_scan(ones, ones, torch.zeros(1, 1), ones, ones, backend="cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    cuda_kernels._compiler.cache_clear()
    with pytest.raises(cuda_kernels.KernelError, match="has no CUDA"):
        cuda_kernels.compile_source("scan_forward.cu", (), "sm_90")


def test_the_compilers_words_are_passed_on() -> None:
    """Where the run-time compiler is installed, with or without a GPU: the sources compile, and a wrong macro is told."""
    try:
        cuda_kernels._compiler.cache_clear()
        cuda_kernels._compiler()
    except cuda_kernels.KernelError as error:
        pytest.skip(str(error))
    macros = tuple(sorted({"KIND": 1, "KERNEL": 10, "STRIDE": 5, "CHANNELS": 512}.items()))
    assert cuda_kernels.compile_source("front_end.cu", macros, "sm_90")
    with pytest.raises(cuda_kernels.KernelError, match="does not compile for sm_90"):
        cuda_kernels.compile_source("front_end.cu", (("KERNEL", 10), ("STRIDE", 5)), "sm_90")
