"""Streams against one pass: any chunks, any causal encoder, finite look-ahead; constant memory; and what cannot stream."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from superb_probe.errors import RequestError
from superb_probe.upstreams import stream as streams
from superb_probe.upstreams.base import Upstream
from superb_probe.upstreams.config import HubertConfig
from superb_probe.upstreams.hubert import HubertEncoder
from superb_probe.upstreams.hubert_upstream import HubertUpstream
from superb_probe.upstreams.load import load_upstream
from superb_probe.upstreams.sizes import size_config
from superb_probe.upstreams.transformer import SelfAttention

BOUND = 1e-5
NAMES = ("mamba_hubert_causal", "mamba_mlp_hubert_causal", "transformer_hubert_causal")


def waveform(samples: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def built(name: str, **changes: Any) -> HubertUpstream:
    """A test-size encoder with some fields of its config changed, and weights large enough for the past to matter."""
    upstream = load_upstream(name, size="test", random=0)
    assert isinstance(upstream, HubertUpstream)
    encoder = HubertEncoder(replace(upstream.encoder.config, **changes), torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        for key, parameter in encoder.encoder.layers.named_parameters():
            if key.endswith(("proj.weight", "fc1.weight", "fc2.weight")):
                parameter.mul_(8.0)
            if key.endswith(("dt_proj.bias", "dt_bias")):
                parameter.fill_(-3.0)  # steps of 0.05: a state lasts
    return HubertUpstream(encoder, upstream.info)


def random_chunks(wav: Tensor, seed: int = 0) -> list[Tensor]:
    """Pieces of 0 to 6,000 samples, many of them tiny."""
    draw = random.Random(seed)
    chunks, start = [], 0
    while start < len(wav):
        size = draw.choice([0, 1, 2, 79, 320, 399, 401, 1280, 6000])
        chunks.append(wav[start : start + size])
        start += size
    return chunks


def streamed(upstream: Upstream, chunks: list[Tensor], **options: Any) -> Tensor:
    stream = upstream.stream(**options)
    states = torch.cat([*(stream.push(chunk) for chunk in chunks), stream.finish()], dim=1)
    assert stream.num_frames == states.shape[1] == upstream.num_frames(stream.num_samples)
    return states


def error(found: Tensor, expected: Tensor) -> float:
    """The worst layer's relative error."""
    assert found.shape == expected.shape
    difference = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    return float(difference.max())


def one_pass(upstream: Upstream, wav: Tensor) -> Tensor:
    return upstream.extract([wav]).states[:, 0]


VARIANTS: dict[str, Callable[[], HubertUpstream]] = {
    **{name: lambda name=name: built(name) for name in NAMES},  # type: ignore[misc]
    "mamba2": lambda: built("mamba_hubert_causal", layer_type="mamba2", head_dim=16),
    "pre-norm mamba": lambda: built("mamba_hubert_causal", layer_norm_first=True),
    "pre-norm transformer": lambda: built("transformer_hubert_causal", layer_norm_first=True),
    "layer-norm front end": lambda: built("transformer_hubert_causal", extractor_mode="layer_norm", conv_bias=True),
    "centred positional convolution": lambda: built("mamba_hubert_causal", causal_pos_conv=False),
    "centred, frames filled up to two": lambda: built(
        "transformer_hubert_causal", causal_pos_conv=False, frame_multiple=2
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_random_chunks_give_one_pass(variant: str) -> None:
    upstream = VARIANTS[variant]()
    wav = waveform(16_000 * 2 + 111)
    assert error(streamed(upstream, random_chunks(wav)), one_pass(upstream, wav)) <= BOUND


@pytest.mark.parametrize("name", [*NAMES, "fbank_no_cmvn"])
def test_single_samples_give_one_pass(name: str) -> None:
    upstream = load_upstream(name, **({"size": "test", "random": 0} if "hubert" in name else {}))
    wav = waveform(1300)
    assert error(streamed(upstream, list(wav.split(1))), one_pass(upstream, wav)) <= BOUND


def test_a_chunk_longer_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "BLOCK_SAMPLES", 5000)
    for name in NAMES:
        upstream, wav = built(name), waveform(40_000)
        assert error(streamed(upstream, [wav]), one_pass(upstream, wav)) <= BOUND


def test_filter_banks_stream() -> None:
    upstream, wav = load_upstream("fbank_no_cmvn"), waveform(16_123)
    assert error(streamed(upstream, random_chunks(wav)), one_pass(upstream, wav)) <= BOUND


def test_a_lost_convolution_tail_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    upstream, wav = built("mamba_hubert_causal"), waveform(32_000)
    step = streams.step

    def forgetful(layer: Any, x: Tensor, memory: Any, window: int | None) -> Any:
        forgotten = None if memory is None else memory._replace(conv=torch.zeros_like(memory.conv))
        return step(layer, x, forgotten, window)

    monkeypatch.setattr(streams, "step", forgetful)
    assert error(streamed(upstream, list(wav.split(1280))), one_pass(upstream, wav)) > 10 * BOUND


def test_a_lost_scan_state_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    upstream, wav = built("mamba_hubert_causal"), waveform(32_000)
    step = streams.step

    def forgetful(layer: Any, x: Tensor, memory: Any, window: int | None) -> Any:
        forgotten = None if memory is None else memory._replace(scan=torch.zeros_like(memory.scan))
        return step(layer, x, forgotten, window)

    monkeypatch.setattr(streams, "step", forgetful)
    assert error(streamed(upstream, list(wav.split(1280))), one_pass(upstream, wav)) > 10 * BOUND


def test_frames_come_as_soon_as_they_are_determined() -> None:
    upstream = built("mamba_hubert_causal")
    stream = upstream.stream()
    for sample in range(1, 1400):
        stream.push(torch.zeros(1))
        assert stream.num_frames == upstream.num_frames(sample)
    assert stream.delay_frames == 0
    assert stream.finish().shape[1] == 0


def test_a_look_ahead_delays_by_as_much() -> None:
    upstream = built("mamba_hubert_causal", causal_pos_conv=False)  # kernel 32: 15 frames ahead
    stream = upstream.stream()
    assert stream.delay_frames == 15
    total = upstream.num_frames(16_000)
    assert stream.push(waveform(16_000)).shape[1] == total - 15
    assert stream.finish().shape[1] == 15


def test_mamba_remembers_the_same_whatever_has_passed_and_attention_what_its_window_holds() -> None:
    def sizes(name: str, **options: Any) -> list[int]:
        stream, found = built(name).stream(**options), []
        for second in range(4):
            stream.push(waveform(16_000, second))
            found.append(stream.state_bytes)
        return found

    assert len(set(sizes("mamba_hubert_causal"))) == 1
    assert len(set(sizes("transformer_hubert_causal", window_frames=20)[1:])) == 1
    growing = sizes("transformer_hubert_causal")
    assert (
        growing[3] - growing[2] == growing[2] - growing[1] == 50 * 2 * 48 * 4 * 2
    )  # frames, keys and values, D, bytes, layers


def banded(attention: SelfAttention, x: Tensor, window: int) -> Tensor:
    """Windowed causal attention of a whole utterance, by its mask."""
    frames = x.shape[1]
    query, key, value = (
        project(x).view(1, frames, attention.num_heads, -1).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    apart = torch.arange(frames)[:, None] - torch.arange(frames)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=(apart >= 0) & (apart < window))
    return cast(Tensor, attention.out_proj(mixed.transpose(1, 2).reshape(x.shape)))


@pytest.mark.parametrize("window", [1, 7])
def test_windowed_attention_is_a_band(window: int) -> None:
    attention = SelfAttention(12, 3, causal=True).eval()
    x = torch.randn(1, 40, 12, generator=torch.Generator().manual_seed(0))
    past, outputs = None, []
    with torch.no_grad():
        for chunk in x.split([1, 9, 2, 28], dim=1):
            out, past = streams.attend(attention, chunk, past, window)
            outputs.append(out)
        expected, narrower = banded(attention, x, window), banded(attention, x, window + 1)
    found = torch.cat(outputs, dim=1)
    assert float((found - expected).abs().max()) < 1e-5 < float((found - narrower).abs().max())


def test_a_window_of_everything_is_one_pass() -> None:
    upstream, wav = built("transformer_hubert_causal"), waveform(20_000)
    chunks = random_chunks(wav)
    assert error(streamed(upstream, chunks, window_frames=1000), one_pass(upstream, wav)) <= BOUND
    assert error(streamed(upstream, chunks, window_frames=5), one_pass(upstream, wav)) > 10 * BOUND


@pytest.mark.parametrize(
    ("name", "options", "reason", "variant"),
    [
        ("transformer_hubert", {"size": "test", "random": 0}, "transformer layers", "transformer_hubert_causal"),
        ("mamba_hubert", {"size": "test", "random": 0}, "ext_bi_mamba layers", "mamba_hubert_causal"),
        ("mamba_inner_hubert", {"size": "test", "random": 0}, "inn_bi_mamba layers", "mamba_hubert_causal"),
        ("transformer_hubert_causal_mask", {"size": "test", "random": 0}, "GroupNorm", "transformer_hubert_causal"),
        (
            "mamba_hubert_causal",
            {"size": "test", "random": 0, "causal_front_end": False},
            "GroupNorm",
            "causal_front_end=True",
        ),
        ("fbank", {}, "normalises over the utterance", "fbank_no_cmvn"),
    ],
)
def test_what_needs_the_whole_utterance_names_its_strict_variant(
    name: str, options: dict[str, Any], reason: str, variant: str
) -> None:
    with pytest.raises(RequestError) as raised:
        load_upstream(name, **options).stream()
    assert reason in str(raised.value)
    assert variant in str(raised.value).partition("Fix:")[2]


def test_waveforms_normalised_over_the_utterance_cannot_stream() -> None:
    with pytest.raises(RequestError, match="waveform_norm"):
        built("mamba_hubert_causal", waveform_norm="utterance").stream()


def test_wrong_requests() -> None:
    upstream = built("mamba_hubert_causal")
    with pytest.raises(RequestError, match="window_frames"):
        upstream.stream(window_frames=10)
    with pytest.raises(RequestError, match="window_frames is 0"):
        built("transformer_hubert_causal").stream(window_frames=0)
    stream = upstream.stream()
    with pytest.raises(RequestError, match=r"shape \(1, 5\)"):
        stream.push(torch.zeros(1, 5))
    assert stream.push(torch.zeros(0)).shape == (3, 0, 48)
    stream.finish()
    for again in (stream.finish, lambda: stream.push(torch.zeros(5))):
        with pytest.raises(RequestError, match="ended"):
            again()


def test_half_precision_streams_too() -> None:
    upstream = load_upstream("mamba_hubert_causal", size="test", random=0, dtype="bfloat16")
    wav = waveform(16_000)
    states = streamed(upstream, list(wav.split(1280)))
    assert states.dtype == torch.bfloat16
    exact = one_pass(load_upstream("mamba_hubert_causal", size="test", random=0), wav)
    assert error(states.float(), exact) <= 2e-2


def test_the_published_front_end_is_what_cannot_stream() -> None:
    config: HubertConfig = size_config("mamba_hubert_causal", "base")
    assert config.extractor_mode == "default" and not config.causal_pos_conv


def test_encoding_anew_is_one_pass_for_a_causal_encoder_and_with_all_the_look_ahead_for_any() -> None:
    wav = waveform(16_000)
    for name, lookahead, same in (
        ("mamba_hubert_causal", 0, True),
        ("mamba_hubert", 49, True),
        ("mamba_hubert", 2, False),
    ):
        upstream = built(name)
        stream = streams.ReencodedStream(upstream, lookahead)
        states = torch.cat([*(stream.push(chunk) for chunk in wav.split(1280)), stream.finish()], dim=1)
        assert (error(states, one_pass(upstream, wav)) <= BOUND) == same
    with pytest.raises(RequestError, match="lookahead_frames is -1"):
        streams.ReencodedStream(upstream, -1)


class Stranger(Upstream):
    """Anyone's upstream, which says nothing of streaming."""

    info = load_upstream("fbank").info

    def num_frames(self, num_samples: int) -> int:
        return num_samples // 160

    def forward(self, wavs: Tensor, num_samples: Tensor) -> Any:
        raise AssertionError("not called")


def test_strangers_name_what_can_stream() -> None:
    with pytest.raises(RequestError, match="before it has the whole utterance.*mamba_hubert_causal"):
        Stranger().stream()
