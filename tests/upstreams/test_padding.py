"""Padded batches as s3prl encodes them: the official states of a padded batch, and s3prl itself where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from superb_probe.engine_record import exact_arithmetic
from superb_probe.errors import RequestError
from superb_probe.upstreams import padding
from superb_probe.upstreams.base import LayerStates, Upstream
from superb_probe.upstreams.fbank import fbank
from superb_probe.upstreams.load import load_upstream
from superb_probe.upstreams.padding import PaddedUpstream, hubert_states, unmasked_frames

BOUND = 1e-5
NAMES = (
    "mamba_hubert",
    "mamba_hubert_causal",
    "mamba_mlp_hubert",
    "mamba_mlp_hubert_causal",
    "transformer_hubert",
    "transformer_hubert_causal",
    "transformer_hubert_prenorm",
)
HAS_S3PRL = importlib.util.find_spec("s3prl") is not None


def official(shared: Path, name: str) -> tuple[Upstream, list[Tensor], Tensor]:
    """An official checkpoint, the waveforms of a batch, and the states (L, B, T, D) that the official code gives for it."""
    upstream = load_upstream(name.replace("_prenorm", ""), checkpoint=shared / "fixtures" / "upstreams" / f"{name}.pt")
    with np.load(shared / "fixtures" / "upstreams" / f"{name}.npz") as stored:
        wavs = [torch.from_numpy(stored[f"utt{row}/wav"]) for row in range(2)]
        layers = [torch.from_numpy(stored[f"padded/layer{layer:02d}"]) for layer in range(upstream.info.num_layers)]
    return upstream, wavs, torch.stack(layers)


def worst(states: Tensor, expected: Tensor) -> float:
    """The relative error of the worst layer."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(states, expected, strict=True))


def whole(upstream: Upstream, wavs: list[Tensor]) -> Tensor:
    """What the encoder gives for a padded batch, its padding included."""
    batch = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True)
    with torch.inference_mode():
        return hubert_states(upstream.encoder, batch, torch.tensor([len(wav) for wav in wavs]))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_states_of_a_padded_batch_are_the_official_ones(shared: Path, name: str) -> None:
    upstream, wavs, expected = official(shared, name)
    assert worst(whole(upstream, wavs), expected) < BOUND

    got = PaddedUpstream(upstream).extract(wavs)
    assert got.num_frames.tolist() == [49, 35]  # alone the second has 34
    for row, count in enumerate(got.num_frames.tolist()):
        assert worst(got.states[:, row, :count], expected[:, row, :count]) < BOUND
        assert not got.states[:, row, count:].any()
    exact = upstream.extract(wavs).states[:, 1, :34]
    assert worst(exact, expected[:, 1, :34]) > 0.01, "the fixture's padding is heard"


@pytest.mark.parametrize("part", ["mask", "silence", "norm"])
def test_every_part_of_the_padding_counts(shared: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """Mutants: a frame less unmasked, padding silenced behind the positional convolution, a norm that does not hear it."""
    upstream, wavs, expected = official(shared, "mamba_hubert" if part == "silence" else "transformer_hubert")
    if part == "mask":
        exact = torch.tensor([49, 34])
        monkeypatch.setattr(padding, "unmasked_frames", lambda *given: exact)
    elif part == "silence":
        monkeypatch.setattr(padding, "_attended", lambda encoder, x, valid: x[1, valid[1] :].zero_())
    else:
        front_end = upstream.encoder.feature_extractor.forward  # type: ignore[union-attr, operator]
        monkeypatch.setattr(
            upstream.encoder.feature_extractor, "forward", lambda wavs, lengths: front_end(wavs, [16000, 11200])
        )
    assert worst(whole(upstream, wavs), expected) > 10 * BOUND


@pytest.mark.cuda
@pytest.mark.parametrize("name", NAMES)
def test_states_of_a_padded_batch_are_the_official_ones_on_a_gpu(shared: Path, name: str) -> None:
    upstream, wavs, expected = official(shared, name)
    with exact_arithmetic(torch.device("cuda")):
        got = PaddedUpstream(upstream).to("cuda").extract(wavs)
    for row, count in enumerate([49, 35]):
        assert worst(got.states[:, row, :count].cpu(), expected[:, row, :count]) < 10 * BOUND


def test_alone_in_a_batch_an_utterance_has_its_own_states() -> None:
    upstream = load_upstream("mamba_hubert", size="test", random=0)
    wav = torch.randn(9000, generator=torch.Generator().manual_seed(0))
    got, expected = PaddedUpstream(upstream).extract([wav]), upstream.extract([wav])
    assert torch.equal(got.num_frames, expected.num_frames)
    assert worst(got.states[:, 0], expected.states[:, 0]) < BOUND


def test_unmasked_frames_are_those_of_s3prls_mask() -> None:
    """As the official code makes its mask: cut to whole shares, a share is padding when all of it is."""
    for lengths in ([16000, 11200, 400], [160123, 149000, 100640, 32200, 4000], [5000, 4999, 4680, 401]):
        longest = max(lengths)
        frames = load_upstream("transformer_hubert", size="test", random=0).num_frames(longest)
        masked = torch.arange(longest) >= torch.tensor(lengths)[:, None]
        shares = masked[:, : longest - longest % frames].view(len(lengths), frames, -1).all(-1)
        assert unmasked_frames(torch.tensor(lengths), longest, frames).tolist() == (~shares).sum(1).tolist()


def test_filter_banks_get_frames_of_zeros_where_the_batch_has_room() -> None:
    wavs = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (16000, 8000)]
    got = PaddedUpstream(fbank()).extract(wavs)
    assert got.num_frames.tolist() == [98, 50]  # 48 windows fit into 8000 samples
    assert torch.equal(got.states, F.pad(fbank().extract(wavs).states, (0, 0, 0, 0)))
    assert not got.states[:, 1, 48:].any()


class Unknown(Upstream):
    """An encoder of somebody's own."""

    def __init__(self) -> None:
        super().__init__()
        self.info = fbank().info

    def num_frames(self, num_samples: int) -> int:
        return num_samples // 160

    def forward(self, wavs: Tensor, num_samples: Tensor) -> LayerStates:
        raise NotImplementedError


def test_an_encoder_that_s3prl_does_not_know_is_refused() -> None:
    with pytest.raises(RequestError, match="s3prl's code for it is not known. Fix: --padding exact"):
        PaddedUpstream(Unknown())


@pytest.mark.skipif(not HAS_S3PRL, reason="s3prl is not installed (pip install 'superb-probe[s3prl]')")
@pytest.mark.parametrize("name", ["transformer_hubert", "transformer_hubert_prenorm"])
def test_a_batch_of_many_lengths_is_s3prls_own(shared: Path, name: str) -> None:
    upstream, _, _ = official(shared, name)
    theirs = load_upstream("s3prl:hubert_local", checkpoint=shared / "fixtures" / "upstreams" / f"{name}.pt")
    generator = torch.Generator().manual_seed(0)
    wavs = [torch.randn(n, generator=generator) / 10 for n in (160123, 149000, 100640, 32200, 4000, 400)]
    got, expected = PaddedUpstream(upstream).extract(wavs), PaddedUpstream(theirs).extract(wavs)
    assert got.num_frames.tolist() == expected.num_frames.tolist() == [500, 466, 314, 101, 12, 1]
    for row in range(len(wavs)):
        assert worst(got.states[:, row], expected.states[:, row]) < BOUND
