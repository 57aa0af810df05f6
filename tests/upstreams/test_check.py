"""The contract check: a right encoder passes it, each broken one fails the check it breaks and no other."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from superb_probe.errors import RequestError
from superb_probe.registry import Registry
from superb_probe.upstreams.base import LayerStates, Upstream, UpstreamInfo, frame_mask, normalize_waveforms
from superb_probe.upstreams.check import ANCHORS, DOCS, NOT_MEASURED, causes, check_upstream, format_checks, to_dicts
from superb_probe.upstreams.lookahead import measure_lookahead, window_samples

WINDOW, HOP, DIM, LAYERS = 50, 20, 8, 2
NAMES = [
    "shape",
    "width",
    "frames",
    "zero_padding",
    "batch",
    "deterministic",
    "lookahead",
    "shortest",
    "finite",
    "frozen",
]


def _info(lookahead_samples: int | None) -> UpstreamInfo:
    return UpstreamInfo(
        "right",
        "random:0",
        LAYERS,
        DIM,
        16000,
        HOP,
        "none",
        lookahead_samples,
        "block_output",
        (),
        "Apache-2.0",
        "none",
    )


class Right(Upstream):
    """Windows through a linear layer, then a layer that adds the frame before: strictly causal and right in everything."""

    lookahead_samples: int | None = 0

    def __init__(self) -> None:
        super().__init__()
        self.info = _info(self.lookahead_samples)
        generator = torch.Generator().manual_seed(0)
        self.project = nn.Linear(WINDOW, DIM)
        self.project.weight.data = torch.randn(DIM, WINDOW, generator=generator)
        self.project.bias.data = torch.randn(DIM, generator=generator)
        self.requires_grad_(False).eval()

    def num_frames(self, num_samples: int) -> int:
        return max(0, (num_samples - WINDOW) // HOP + 1)

    def before(self, wavs: Tensor, num_samples: Tensor) -> Tensor:
        """What is done to waveforms."""
        return wavs

    def first(self, wavs: Tensor, counts: Tensor) -> Tensor:
        """(B, T, D) of layer 0."""
        return self.project(wavs.unfold(1, WINDOW, HOP)[:, : int(counts.max())]).tanh()

    def second(self, frames: Tensor, counts: Tensor) -> Tensor:
        """(B, T, D) of layer 1."""
        return frames + 0.5 * F.pad(frames, (0, 0, 1, -1))

    def after(self, states: Tensor, counts: Tensor) -> Tensor:
        """What is done to states, and the zeros past the end."""
        return states * frame_mask(counts, states.shape[2])[None, :, :, None]

    def counts(self, num_samples: Tensor) -> Tensor:
        return torch.tensor([self.num_frames(int(n)) for n in num_samples])

    def forward(self, wavs: Tensor, num_samples: Tensor) -> LayerStates:
        counts = self.counts(num_samples)
        layer = self.first(self.before(wavs, num_samples), counts)
        return LayerStates(self.after(torch.stack([layer, self.second(layer, counts)]), counts), counts)


class FrameCountOffByOne(Right):
    def counts(self, num_samples: Tensor) -> Tensor:
        return super().counts(num_samples) - 1


class WrongHop(Right):
    def __init__(self) -> None:
        super().__init__()
        self.info = UpstreamInfo(
            **{name: getattr(self.info, name) for name in UpstreamInfo.__slots__ if name != "hop_samples"},
            hop_samples=30,
        )


class NoZerosPastTheEnd(Right):
    def after(self, states: Tensor, counts: Tensor) -> Tensor:
        return states


class BatchNormalisation(Right):
    def before(self, wavs: Tensor, num_samples: Tensor) -> Tensor:
        return wavs / (1.0 + wavs.std(dim=0, correction=0).mean())


class PaddingDependentScale(Right):
    def before(self, wavs: Tensor, num_samples: Tensor) -> Tensor:
        return wavs * (num_samples / wavs.shape[1])[:, None]


class Dropout(Right):
    def first(self, wavs: Tensor, counts: Tensor) -> Tensor:
        return F.dropout(super().first(wavs, counts), 0.1, training=True)


class OneFrameAhead(Right):
    def second(self, frames: Tensor, counts: Tensor) -> Tensor:
        ahead = F.pad(frames, (0, 0, -1, 1)) * frame_mask(counts - 1, frames.shape[1])[..., None]
        return frames + 0.5 * ahead


class OneFrameAheadDeclared(OneFrameAhead):
    lookahead_samples = HOP


class OneSampleAhead(Right):
    def before(self, wavs: Tensor, num_samples: Tensor) -> Tensor:
        return wavs + 0.5 * F.pad(wavs, (-1, 1))


class DeclaresMoreThanItUses(Right):
    lookahead_samples = 3 * HOP


class DeclaresTheWholeUtterance(Right):
    lookahead_samples = None


class UtteranceNormalisation(Right):
    def before(self, wavs: Tensor, num_samples: Tensor) -> Tensor:
        return normalize_waveforms(wavs, num_samples)


class UtteranceNormalisationDeclared(UtteranceNormalisation):
    lookahead_samples = None


class ScaledByTheLength(Right):
    def after(self, states: Tensor, counts: Tensor) -> Tensor:
        return super().after(states * (counts / 100.0)[None, :, None, None], counts)


class NotANumber(Right):
    def before(self, wavs: Tensor, num_samples: Tensor) -> Tensor:
        return wavs / wavs.abs().amax(dim=1, keepdim=True)  # silence divides zero by zero


class WrongWidth(Right):
    def after(self, states: Tensor, counts: Tensor) -> Tensor:
        return super().after(states, counts)[..., :-1]


class WrongLayerCount(Right):
    def after(self, states: Tensor, counts: Tensor) -> Tensor:
        return super().after(states, counts)[:1]


class NumFramesAsInt32(Right):
    def counts(self, num_samples: Tensor) -> Tensor:
        return super().counts(num_samples).int()


class ShortInputCrash(Right):
    def first(self, wavs: Tensor, counts: Tensor) -> Tensor:
        if int(counts.min()) < 2:
            raise ValueError("cannot convolve one frame")
        return super().first(wavs, counts)


class FramesFromNothing(Right):
    def num_frames(self, num_samples: int) -> int:
        return max(1 if num_samples == 0 else 0, super().num_frames(num_samples))


class NotANumberBesideAShorterRow(Right):
    def second(self, frames: Tensor, counts: Tensor) -> Tensor:
        layer = super().second(frames, counts)
        layer[counts > counts.min(), 0] = float("nan")
        return layer


class RequiresGradients(Right):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(True)


class TrainingMode(Right):
    def __init__(self) -> None:
        super().__init__()
        self.train()


MUTANTS = {
    FrameCountOffByOne: "frames",
    WrongHop: "frames",
    NoZerosPastTheEnd: "zero_padding",
    BatchNormalisation: "batch",
    PaddingDependentScale: "batch",
    Dropout: "deterministic",
    OneFrameAhead: "lookahead",
    OneSampleAhead: "lookahead",
    DeclaresMoreThanItUses: "lookahead",
    DeclaresTheWholeUtterance: "lookahead",
    UtteranceNormalisation: "lookahead",
    ScaledByTheLength: "lookahead",
    NotANumber: "finite",
    NotANumberBesideAShorterRow: "batch",
    WrongWidth: "width",
    WrongLayerCount: "shape",
    NumFramesAsInt32: "shape",
    ShortInputCrash: "shortest",
    FramesFromNothing: "shortest",
    RequiresGradients: "frozen",
    TrainingMode: "frozen",
}


@pytest.mark.parametrize("right", [Right, OneFrameAheadDeclared, UtteranceNormalisationDeclared])
def test_a_right_encoder_passes(right: type[Upstream]) -> None:
    results = check_upstream(right())
    assert [result.name for result in results] == NAMES
    assert all(result.passed for result in results), format_checks(results)


@pytest.mark.parametrize(("mutant", "broken"), MUTANTS.items(), ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_encoder_fails_the_check_it_breaks(mutant: type[Upstream], broken: str) -> None:
    results = check_upstream(mutant())
    assert causes(results) == [broken], format_checks(results)
    failed = next(result for result in results if result.name == broken)
    assert f"docs/add-an-upstream.md#{ANCHORS.get(broken, broken)}" in failed.detail


def test_every_check_has_a_mutant() -> None:
    assert set(MUTANTS.values()) == set(NAMES)


def test_every_check_has_its_section_in_the_docs() -> None:
    headings = re.findall(r"^#+ (.+)$", (Path(__file__).parents[2] / DOCS).read_text(encoding="utf-8"), re.MULTILINE)
    assert {ANCHORS.get(name, name) for name in NAMES} <= set(headings)


def test_what_cannot_be_measured_says_what_it_needs() -> None:
    results = {result.name: result for result in check_upstream(Dropout())}
    assert results["lookahead"].measured == NOT_MEASURED
    assert "deterministic" in results["lookahead"].detail
    assert "6 of 10 checks passed" in format_checks(list(results.values()))


def test_lookahead_is_measured_to_the_sample() -> None:
    assert measure_lookahead(Right()).samples == 0
    assert measure_lookahead(OneSampleAhead()).samples == 1
    assert measure_lookahead(OneFrameAhead()).samples == HOP
    assert window_samples(Right()) == WINDOW


class _CentredConvolution(Right):
    """What HuBERT's positional convolution does, under a normalisation over time: frame t sees 9 frames ahead, and all a little."""

    lookahead_samples = None

    def second(self, frames: Tensor, counts: Tensor) -> Tensor:
        valid = frame_mask(counts, frames.shape[1])[..., None]
        padded = F.pad(frames * valid, (0, 0, 9, 9))
        return frames + sum(padded[:, k : k + frames.shape[1]] * 0.1 for k in range(19))

    def before(self, wavs: Tensor, num_samples: Tensor) -> Tensor:
        return normalize_waveforms(wavs, num_samples)


def test_lookahead_tells_the_convolution_from_the_normalisation() -> None:
    found = measure_lookahead(_CentredConvolution())
    assert (found.samples, found.order_frames) == (None, 9)
    assert measure_lookahead(UtteranceNormalisation()).order_frames == 0
    detail = next(result.detail for result in check_upstream(_CentredConvolution()) if result.name == "lookahead")
    assert "9 frames ahead (180 samples)" in detail


def test_lookahead_beyond_what_is_declared_is_found() -> None:
    class Ninety(OneFrameAhead):
        def second(self, frames: Tensor, counts: Tensor) -> Tensor:
            return frames + 0.5 * F.pad(frames, (0, 0, -90, 90)) * frame_mask(counts - 90, frames.shape[1])[..., None]

    assert measure_lookahead(Ninety()).samples == 90 * HOP


@pytest.mark.parametrize(
    "name",
    ["mamba_hubert_causal", "mamba_hubert_causal.fairseq", "mamba_mlp_hubert_causal", "transformer_hubert_causal"],
)
def test_official_causal_checkpoints_are_found_to_look_ahead(shared: Path, name: str) -> None:
    from superb_probe.upstreams.load import load_upstream

    upstream = load_upstream(name.split(".")[0], checkpoint=shared / "fixtures" / "upstreams" / f"{name}.pt")
    found = measure_lookahead(upstream)
    assert (found.samples, found.order_frames) == (None, 63)  # GroupNorm over time; the centred positional convolution
    assert not causes(check_upstream(upstream))
    upstream.info = dataclasses.replace(upstream.info, lookahead_samples=0)
    results = check_upstream(upstream)
    assert causes(results) == ["lookahead"]
    assert "63 frames ahead (20160 samples)" in format_checks(results)


def test_the_centred_positional_convolution_alone_is_measured_to_the_sample() -> None:
    from superb_probe.upstreams.hubert import HubertEncoder
    from superb_probe.upstreams.hubert_upstream import HubertUpstream
    from superb_probe.upstreams.load import load_upstream

    causal = load_upstream("mamba_hubert_causal", size="test", random=0)
    assert isinstance(causal, HubertUpstream)
    assert measure_lookahead(causal).samples == 0
    encoder = HubertEncoder(dataclasses.replace(causal.encoder.config, causal_pos_conv=False, conv_pos=128))
    centred = HubertUpstream(encoder, dataclasses.replace(causal.info, lookahead_samples=63 * 320)).eval()
    assert measure_lookahead(centred).samples == 63 * 320


def test_results_are_plain_data() -> None:
    rows = json.loads(json.dumps(to_dicts(check_upstream(Right()))))
    assert rows[0] | {"name": "shape", "passed": True} == rows[0]
    assert set(rows[0]) == {"name", "passed", "measured", "expected", "detail"}


def test_stored_states_are_refused() -> None:
    class Stored(Right):
        def states_for(self, utterance_id: str) -> Tensor:
            raise KeyError(utterance_id)

    with pytest.raises(RequestError, match="Fix"):
        check_upstream(Stored())


@pytest.mark.parametrize("name", Registry("upstream").names())
def test_every_registered_upstream_passes(name: str) -> None:
    from superb_probe.upstreams.load import load_upstream

    options = {} if name in ("fbank", "fbank_no_cmvn", "mfcc") else {"random": 0}
    results = check_upstream(load_upstream(name, size="test", **options))
    assert all(result.passed for result in results), format_checks(results)
