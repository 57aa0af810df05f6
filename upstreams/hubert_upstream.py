"""The upstream around a HuBERT encoder: its weights from a checkpoint, the shipped ones or a seed, and what is known of them."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from superb_probe.errors import RequestError
from superb_probe.upstreams.base import LayerStates, Upstream, UpstreamInfo
from superb_probe.upstreams.checkpoints import Checkpoint, read_checkpoint
from superb_probe.upstreams.config import HubertConfig
from superb_probe.upstreams.hubert import HubertEncoder
from superb_probe.upstreams.sizes import DEFAULT_SIZE, FAMILIES, check_family, size_config
from superb_probe.upstreams.stream import HubertStream

WEIGHTS = Path(__file__).parent / "weights"
_CITATION_HUBERT = "Hsu et al., HuBERT, arXiv 2106.07447"
_CITATION_MAMBA = "Lin et al., An Exploration of Mamba for Speech Self-Supervised Models, arXiv 2506.12606"


class RandomWeightsWarning(UserWarning):
    """An encoder got random weights that nobody asked for: its scores say nothing about trained ones."""


class HubertUpstream(Upstream):
    """A HuBERT encoder with the description that probing needs."""

    casts_inputs = True  # the encoder normalises waveforms in float32 before it casts them

    def __init__(self, encoder: HubertEncoder, info: UpstreamInfo, notes: tuple[str, ...] = ()) -> None:
        """`notes` say what of the checkpoint was read differently from what it says."""
        super().__init__()
        self.encoder = encoder
        self.info = info
        self.notes = notes

    def num_frames(self, num_samples: int) -> int:
        """Frames of an utterance of that many samples; 0 if it is too short."""
        return self.encoder.num_frames(num_samples)

    def forward(self, wavs: Tensor, num_samples: Tensor) -> LayerStates:
        """The states of every layer.

        Args:
            wavs: (B, S), zeros after each row's end.
            num_samples: (B,).
        """
        states: LayerStates = self.encoder(wavs, num_samples)
        return states

    def stream(self, *, window_frames: int | None = None) -> HubertStream:
        """A stream over one utterance; see `Upstream.stream`."""
        return HubertStream(self.encoder, self.info, window_frames)


def build_hubert(
    name: str,
    checkpoint: str | None,
    size: str | None,
    random: int | None,
    causal_front_end: bool | None = None,
) -> HubertUpstream:
    """The encoder of a registered name.

    Args:
        name: one of `superb_probe.upstreams.sizes.FAMILIES`.
        checkpoint: a file or folder in any format of `read_checkpoint`; its own configuration and shapes count.
        size: without a checkpoint: one of `superb_probe.upstreams.sizes.SIZES`; None is its DEFAULT_SIZE.
        random: seed of random weights.
        causal_front_end: see `superb_probe.upstreams.sizes.size_config`; not with a checkpoint.

    Raises:
        RequestError: if the checkpoint is unreadable or of another family or direction, or the arguments contradict each other.

    Warns:
        RandomWeightsWarning: when weights are random without `random`.
    """
    if checkpoint is not None and random is not None:
        raise RequestError(f"{name}: both a checkpoint and random weights were asked for. Fix: drop one of them.")
    if checkpoint is not None:
        if size is not None:
            warnings.warn(f"{name}: size {size!r} is not used: the checkpoint's own shapes count.", stacklevel=3)
        return _from_checkpoint(name, read_checkpoint(checkpoint), str(checkpoint), causal_front_end)
    shipped = shipped_weights(name, causal_front_end)
    if random is None and size in (None, DEFAULT_SIZE) and shipped.is_file():
        return _from_checkpoint(name, read_checkpoint(shipped), "the shipped weights", causal_front_end)
    config = size_config(name, size or DEFAULT_SIZE, causal_front_end)
    if random is None:
        random = 0
        warnings.warn(
            f"{name}: no trained weights of size {size or DEFAULT_SIZE} are shipped, so these are RANDOM (seed 0); scores say nothing "
            "about a trained encoder. Give a checkpoint, or --random SEED to ask for random weights.",
            RandomWeightsWarning,
            stacklevel=3,
        )
    return _from_seed(name, config, random)


def shipped_weights(name: str, causal_front_end: bool | None = None) -> Path:
    """Where the weights of a name would lie that ship with the package, whether they do or not.

    A causal encoder may have two: with the front end of its size, and with the published one.
    """
    published = WEIGHTS / f"{name}-published-front-end.safetensors"
    if causal_front_end is False and published.is_file():
        return published
    return WEIGHTS / f"{'transformer_hubert' if FAMILIES[name].mask_at_probing else name}.safetensors"


def _from_checkpoint(name: str, checkpoint: Checkpoint, where: str, causal_front_end: bool | None) -> HubertUpstream:
    config = checkpoint.config
    check_family(name, config, where)
    if causal_front_end is not None and causal_front_end != (
        config.causal_pos_conv and config.extractor_mode == "causal"
    ):
        raise RequestError(
            f"{name}: causal_front_end={causal_front_end} contradicts {where}, whose config says extractor_mode "
            f"{config.extractor_mode!r} and causal_pos_conv {config.causal_pos_conv}. Fix: drop the option."
        )
    if FAMILIES[name].mask_at_probing:
        config = replace(config, causal_attention=True)
    with torch.device("meta"):
        encoder = HubertEncoder(config)
    encoder.load_state_dict(dict(checkpoint.tensors), strict=True, assign=True)
    info = _info(name, encoder, config, checkpoint.revision)
    info = replace(
        info,
        trained_on=checkpoint.trained_on,
        license=checkpoint.license,
        citation=checkpoint.citation or info.citation,
    )
    return HubertUpstream(encoder, info, checkpoint.notes)


def _from_seed(name: str, config: HubertConfig, seed: int) -> HubertUpstream:
    if seed < 0:
        raise RequestError(f"{name}: the seed of random weights is {seed}. Fix: give 0 or more.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = HubertEncoder(config)
    return HubertUpstream(encoder, _info(name, encoder, config, f"random:{seed}"))


def _info(name: str, encoder: HubertEncoder, config: HubertConfig, revision: str) -> UpstreamInfo:
    citation = _CITATION_HUBERT if config.layer_type == "transformer" else f"{_CITATION_MAMBA}; {_CITATION_HUBERT}"
    if FAMILIES[name].causal and config.layer_type == "transformer":
        citation = f"{_CITATION_MAMBA}; {_CITATION_HUBERT}"
    return UpstreamInfo(
        name=name,
        revision=revision,
        num_layers=config.num_layers + 1,
        dim=config.dim,
        sample_rate_hz=16000,
        hop_samples=math.prod(stride for _, _, stride in config.conv_layers),
        waveform_norm=config.waveform_norm,
        lookahead_samples=encoder.lookahead_samples,
        layer_convention="block_output",
        trained_on=(),
        license="Apache-2.0",
        citation=citation,
    )
