"""HuBERT encoders against the official code's states, and their promises: sizes, padding, causality, lookahead."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from superb_probe.errors import RequestError
from superb_probe.upstreams import convolutions, hubert, mamba, transformer
from superb_probe.upstreams.base import LayerStates
from superb_probe.upstreams.config import HubertConfig
from superb_probe.upstreams.hubert import HubertEncoder
from superb_probe.upstreams.sizes import size_config

SMALL = HubertConfig(
    conv_layers=((8, 10, 5), (12, 3, 2), (12, 3, 2), (12, 2, 16)), dim=24, num_layers=3, num_heads=3, ffn_dim=20,
    conv_pos=14, conv_pos_groups=4, state_dim=4, expand=2, head_dim=8, final_dim=5, num_classes=7,
)  # fmt: skip
HOP = 320
CAUSAL = {"extractor_mode": "causal", "causal_pos_conv": True, "causal_attention": True}
LAYER_TYPES = ("transformer", "mamba", "ext_bi_mamba", "inn_bi_mamba", "mamba2")
KINDS: dict[str, HubertConfig] = {kind: replace(SMALL, layer_type=kind) for kind in LAYER_TYPES}
KINDS |= {
    "transformer_prenorm": replace(
        SMALL, layer_norm_first=True, extractor_mode="layer_norm", waveform_norm="utterance"
    ),
    "mamba_prenorm_no_ffn": replace(SMALL, layer_type="mamba", layer_norm_first=True, ffn_dim=0, frame_multiple=1),
    "ext_bi_mamba_prenorm": replace(SMALL, layer_type="ext_bi_mamba", layer_norm_first=True, frame_multiple=3),
}
CAUSAL_KINDS = {kind: replace(KINDS[kind], **CAUSAL) for kind in ("transformer", "mamba", "mamba2")}


def encoder(config: HubertConfig, seed: int = 0) -> HubertEncoder:
    """An encoder whose every weight matters: drawn wide enough that each layer changes its input."""
    made = HubertEncoder(config, torch.Generator().manual_seed(seed)).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in made.named_parameters():
        if name.startswith("encoder.layers") and parameter.ndim == 2 and "A_" not in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[1])
        elif "norm" in name or name.endswith("bias"):
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return made.requires_grad_(False)


def noise(*samples: int, seed: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, generator=generator) * 0.1 + 0.02 for count in samples]


def encode(model: HubertEncoder, wavs: list[Tensor], garbage: float = 0.0) -> LayerStates:
    lengths = torch.tensor([len(wav) for wav in wavs])
    padded = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True, padding_value=garbage)
    with torch.inference_mode():
        return model(padded, lengths)  # type: ignore[no-any-return]


def relative(a: Tensor, b: Tensor) -> float:
    """The numeric contract's error of (L, T, D): the worst layer."""
    return max(float((x - y).norm() / y.norm()) for x, y in zip(a, b, strict=True))


# The official code's states


def official_config(checkpoint: dict[str, Any]) -> HubertConfig:
    model, weights = checkpoint["model_cfg"], checkpoint["model_weight"]
    kernels = [weights[f"feature_extractor.conv_layers.{i}.0.weight"] for i in range(7)]
    convs = [
        (len(kernel), kernel.shape[2], stride) for kernel, stride in zip(kernels, (5, 2, 2, 2, 2, 2, 2), strict=True)
    ]
    return HubertConfig(
        layer_type={"mambaformer": "mamba", "bimambaformer": "ext_bi_mamba"}.get(model["layer_type"], "transformer"),
        conv_layers=tuple(convs), extractor_mode=model["extractor_mode"], dim=model["encoder_embed_dim"],
        num_layers=model["encoder_layers"], num_heads=model.get("encoder_attention_heads", 12),
        ffn_dim=max(0, model["encoder_ffn_embed_dim"]), layer_norm_first=model.get("layer_norm_first", False),
        conv_pos=model["conv_pos"], conv_pos_groups=model["conv_pos_groups"],
        causal_attention=model.get("causal_attn", False), state_dim=model.get("mamba_ssm_state_expand", 16),
        conv_kernel=model.get("mamba_conv_kernel_size", 4), expand=model.get("mamba_block_expand", 2),
        waveform_norm="utterance" if checkpoint["task_cfg"]["normalize"] else "none",
        final_dim=model["final_dim"], num_classes=len(weights["label_embs_concat"]),
    )  # fmt: skip


OFFICIAL = (
    "transformer_hubert", "transformer_hubert_causal", "transformer_hubert_prenorm", "mamba_hubert", "mamba_hubert_causal",
    "mamba_mlp_hubert", "mamba_mlp_hubert_causal",
)  # fmt: skip


def official(shared: Path, name: str) -> tuple[HubertEncoder, dict[str, Any], list[Tensor], list[Tensor]]:
    """The encoder with the checkpoint's weights, the checkpoint, the waveforms and the official states (L, T, D) of each."""
    folder = shared / "fixtures" / "upstreams"
    checkpoint = torch.load(folder / f"{name}.pt", weights_only=True)
    model = HubertEncoder(official_config(checkpoint)).eval()
    model.load_state_dict(checkpoint["model_weight"], strict=True)
    with np.load(folder / f"{name}.npz") as saved:
        wavs = [torch.from_numpy(saved[f"utt{i}/wav"]) for i in range(2)]
        keys = [[f"utt{i}/layer{layer:02d}" for layer in range(model.num_layers)] for i in range(2)]
        states = [torch.from_numpy(np.stack([saved[key] for key in utterance])) for utterance in keys]
    return model, checkpoint, wavs, states


def official_error(model: HubertEncoder, wavs: list[Tensor], states: list[Tensor]) -> float:
    return max(relative(encode(model, [wav]).states[:, 0], truth) for wav, truth in zip(wavs, states, strict=True))


@pytest.mark.parametrize("name", OFFICIAL)
def test_states_are_the_official_codes(name: str, shared: Path) -> None:
    model, _, wavs, states = official(shared, name)
    assert official_error(model, wavs, states) < 5e-6  # the contract asks for 1e-4
    batch = encode(model, wavs)
    for row, truth in enumerate(states):
        assert relative(batch.states[:, row, : truth.shape[1]], truth) < 5e-6


MUTANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "no frame that fills up": ("mamba_hubert", {"frame_multiple": 1}),
    "causal positional convolution": ("mamba_hubert_causal", {"causal_pos_conv": True}),
    "attention to the future": ("transformer_hubert_causal", {"causal_attention": False}),
    "waveform as it is": ("transformer_hubert_prenorm", {"waveform_norm": "none"}),
    "post-norm": ("transformer_hubert_prenorm", {"layer_norm_first": False}),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_config_is_seen_in_the_states(mutant: str, shared: Path) -> None:
    name, change = MUTANTS[mutant]
    _, checkpoint, wavs, states = official(shared, name)
    wrong = HubertEncoder(replace(official_config(checkpoint), **change)).eval()
    wrong.load_state_dict(checkpoint["model_weight"])
    assert official_error(wrong, wavs, states) > 2e-4  # the contract's bound is 1e-4


# Padding and batch


BATCH = (9000, 5300, 720, 8999, 3000)


def batch_error(config: HubertConfig) -> float:
    """The worst relative difference between an utterance alone and in a padded batch with garbage after its end."""
    model, wavs = encoder(config), noise(*BATCH)
    together = encode(model, wavs, garbage=float("nan"))
    worst = 0.0
    for row, wav in enumerate(wavs):
        alone = encode(model, [wav])
        frames = model.num_frames(len(wav))
        assert together.num_frames[row] == alone.num_frames[0] == alone.states.shape[2] == frames
        assert not together.states[:, row, frames:].any()
        worst = max(worst, relative(together.states[:, row, :frames], alone.states[:, 0]))
    return worst


@pytest.mark.parametrize("kind", KINDS)
def test_states_do_not_depend_on_the_batch(kind: str) -> None:
    assert batch_error(KINDS[kind]) < 1e-5


fold_group_norm = convolutions.fold_group_norm


def group_norm_over_padding(wavs: Tensor, conv: Any, norm: Any, num_frames: list[int]) -> convolutions.FoldedNorm:
    return fold_group_norm(wavs, conv, norm, [max(num_frames)] * len(num_frames))


PADDING_MUTANTS: dict[str, tuple[str, Any, str, Callable[..., Any]]] = {
    "group norm over padding": ("mamba", convolutions, "fold_group_norm", group_norm_over_padding),
    "padding not zeroed": ("mamba", hubert, "zero_padding", lambda x, n: x),
    "waveform norm over padding": (
        "transformer_prenorm", hubert, "normalize_waveforms", lambda w, n: F.layer_norm(w, w.shape[1:]),
    ),
    "flip with the padding": ("ext_bi_mamba", mamba, "frame_mask", lambda n, t: torch.ones(len(n), t, dtype=torch.bool)),
    "attention to padding": (
        "transformer", transformer, "frame_mask", lambda n, t: torch.ones(len(n), t, dtype=torch.bool),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", PADDING_MUTANTS)
def test_padding_mutants_are_caught(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, module, function, replacement = PADDING_MUTANTS[mutant]
    monkeypatch.setattr(module, function, replacement)
    try:
        error = batch_error(KINDS[kind])
    except AssertionError:  # states past an utterance's end are not zero: also a catch
        error = math.inf
    assert not error < 1e-4


def test_each_row_has_its_own_frame_that_fills_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    config = KINDS["ext_bi_mamba"]
    assert {HubertEncoder(config).num_frames(count) % 2 for count in BATCH} == {
        0,
        1,
    }  # both kinds of row are in the batch
    assert batch_error(config) < 1e-5
    original = mamba.MambaLayer.forward
    # The mutant pads only what the batch's longest row needs.

    def forward(self: Any, x: Tensor, n: Tensor | None, p: Tensor | None) -> Tensor:
        return original(self, x, n, p if n is None or p is None else torch.where(n == n.max(), p, n))

    monkeypatch.setattr(mamba.MambaLayer, "forward", forward)
    assert batch_error(config) > 1e-4


def test_slabs_of_the_front_end_do_not_change_the_states(monkeypatch: pytest.MonkeyPatch) -> None:
    model, wavs = encoder(KINDS["mamba"]), noise(*BATCH)
    monkeypatch.setattr(convolutions, "_SLAB_ELEMENTS", {"cpu": 10**9})
    whole = encode(model, wavs).states
    monkeypatch.setattr(convolutions, "_SLAB_ELEMENTS", {"cpu": 1})
    torch.testing.assert_close(encode(model, wavs).states, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_weight_the_states_depend_on(kind: str) -> None:
    config = replace(KINDS[kind], num_classes=0, final_dim=0)
    model = encoder(config).requires_grad_(True)
    wavs = torch.stack(noise(3000, 3000))
    result = model(wavs, torch.tensor([3000, 2500]))
    torch.testing.assert_close(
        result.states.detach(), encode(model, [wavs[0], wavs[1, :2500]]).states, rtol=1e-4, atol=1e-5
    )
    (result.states**3).sum().backward()
    without = {
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    }
    assert without == {"mask_emb"}


# Causality


def first_changed_sample_offset(model: HubertEncoder, at: int = 6000) -> int | None:
    """How many samples before `at` the earliest frame changed by a new waveform from `at` on has its last own sample.

    At most 0 for a strictly causal encoder.
    """
    (wav,), (other,) = noise(9000), noise(9000, seed=5)
    changed = torch.cat([wav[:at], other[at:]])
    difference = (encode(model, [wav]).states - encode(model, [changed]).states).abs().amax((0, 1, 3))
    scale = float(encode(model, [wav]).states.abs().max())
    first = int((difference > 1e-6 * scale).nonzero()[0])
    window = 1
    for _, kernel, stride in reversed(model.config.conv_layers):
        window = (window - 1) * stride + kernel
    return at - (first * model.hop_samples + window)


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_causal_encoders_do_not_look_ahead(kind: str) -> None:
    config = CAUSAL_KINDS[kind]
    model = encoder(config)
    assert model.lookahead_samples == 0
    assert -HOP < first_changed_sample_offset(model) < 0
    centred = encoder(replace(config, causal_pos_conv=False))
    right = (config.conv_pos // 2 - 1) * HOP
    assert centred.lookahead_samples == right
    assert right - HOP < first_changed_sample_offset(centred) <= right  # all of it, and no more
    assert first_changed_sample_offset(encoder(replace(config, extractor_mode="default"))) > 10 * HOP


def test_a_prefix_has_the_same_states() -> None:
    for config in CAUSAL_KINDS.values():
        model, (wav,) = encoder(config), noise(9000)
        prefix, whole = encode(model, [wav[:4000]]), encode(model, [wav])
        frames = prefix.states.shape[2]
        assert relative(whole.states[:, 0, :frames], prefix.states[:, 0]) < 1e-6


def test_declared_lookahead() -> None:
    def lookahead(**change: Any) -> int | None:
        config = replace(HubertConfig(layer_type="mamba", ffn_dim=0, num_layers=1), **change)
        with torch.device("meta"):
            return HubertEncoder(config).lookahead_samples

    assert lookahead() is None  # GroupNorm over the utterance
    assert lookahead(extractor_mode="causal") == lookahead(extractor_mode="layer_norm") == 63 * HOP
    assert lookahead(extractor_mode="causal", conv_pos=127) == 63 * HOP
    assert lookahead(extractor_mode="causal", causal_pos_conv=True) == 0
    assert lookahead(extractor_mode="causal", causal_pos_conv=True, waveform_norm="utterance") is None
    for kind in ("ext_bi_mamba", "inn_bi_mamba", "transformer"):
        assert lookahead(**CAUSAL | {"layer_type": kind, "causal_attention": False, "ffn_dim": 8}) is None


# Sizes and names

PAPER_SIZES = {
    "transformer base": ({}, 94_697_600),
    "mamba base": ({"layer_type": "mamba", "ffn_dim": 0}, 78_200_960),
    "mamba+mlp base": ({"layer_type": "mamba", "ffn_dim": 896}, 94_754_432),
    "ext base": ({"layer_type": "ext_bi_mamba", "ffn_dim": 0}, 146_740_352),
    "transformer small": ({"dim": 384, "ffn_dim": 1024}, 22_376_192),
    "mamba small": ({"dim": 384, "layer_type": "mamba", "ffn_dim": 0}, 23_497_472),
    "mamba+mlp small": ({"dim": 384, "layer_type": "mamba", "ffn_dim": 1024}, 32_960_768),
    "ext small": ({"dim": 384, "layer_type": "ext_bi_mamba", "ffn_dim": 0}, 41_178_368),
}


@pytest.mark.parametrize("size", PAPER_SIZES)
def test_parameter_counts_are_the_papers(size: str) -> None:
    change, total = PAPER_SIZES[size]
    config = HubertConfig(**change)
    with torch.device("meta"):
        counts = HubertEncoder(config).parameter_counts()
        bare = HubertEncoder(replace(config, num_classes=0, final_dim=0)).parameter_counts()
        other = HubertEncoder(
            replace(config, state_dim=config.state_dim + 1, ffn_dim=config.ffn_dim + 1)
        ).parameter_counts()
    head = 504 * 256 + config.dim * 256 + 256
    assert counts == {"total": total, "encoder": total - head}
    assert bare == {"total": total - head, "encoder": total - head}
    assert other["total"] != total


def test_counts_of_what_the_paper_leaves_open() -> None:
    with torch.device("meta"):
        inn = [HubertEncoder(HubertConfig(layer_type="inn_bi_mamba", dim=dim, ffn_dim=0)) for dim in (768, 384)]
    assert [round(model.parameter_counts()["total"] / 1e6, 2) for model in inn] == [83.04, 25.25]


def test_names_of_the_front_end() -> None:
    def names(mode: str, **change: Any) -> set[str]:
        state = HubertEncoder(replace(SMALL, num_layers=0, extractor_mode=mode, **change)).state_dict()
        return {name for name in state if name.startswith(("feature_extractor", "encoder.pos", "post"))}

    common = {f"feature_extractor.conv_layers.{i}.0.weight" for i in range(4)}
    common |= {"encoder.pos_conv.0.bias", "encoder.pos_conv.0.weight_g", "encoder.pos_conv.0.weight_v"}
    project = {"post_extract_proj.weight", "post_extract_proj.bias"}
    first = {"feature_extractor.conv_layers.0.2.weight", "feature_extractor.conv_layers.0.2.bias"}
    layer = {f"feature_extractor.conv_layers.{i}.2.1.{kind}" for i in range(4) for kind in ("weight", "bias")}
    biases = {f"feature_extractor.conv_layers.{i}.0.bias" for i in range(4)}
    assert names("default") == common | project | first
    assert names("layer_norm", conv_bias=True) == common | project | layer | biases
    assert names("causal", dim=12) == common | {name for name in layer if ".0.2.1" in name}


def test_positional_convolution_is_torchs_weight_norm() -> None:
    ours = encoder(SMALL).encoder.pos_conv[0]
    theirs = torch.nn.Conv1d(24, 24, 14, padding=7, groups=4)
    theirs.weight.data, theirs.bias.data = ours.weight_v.data.clone(), ours.bias.data
    theirs = torch.nn.utils.parametrizations.weight_norm(theirs, dim=2)
    theirs.parametrizations.weight.original0.data = ours.weight_g.data
    x = torch.randn(2, 30, 24)
    expected = F.gelu(theirs(x.transpose(1, 2))[..., :-1]).transpose(1, 2)
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)
    ours.weight_g.data = ours.weight_g.data * 2
    assert (ours(x) - expected).abs().max() > 1e-2


# Numbers, requests, seeds


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2e-2), (torch.float16, 1e-2)])
@pytest.mark.parametrize("name", OFFICIAL)
def test_half_precision_states_are_close(name: str, dtype: torch.dtype, bound: float, shared: Path) -> None:
    model, _, wavs, states = official(shared, name)
    half = encode(model.to(dtype), wavs)
    assert half.states.dtype == dtype
    for row, truth in enumerate(states):
        assert 1e-5 < relative(half.states[:, row, : truth.shape[1]].float(), truth) < bound


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_runs_for_every_kind(kind: str) -> None:
    model, wavs = encoder(KINDS[kind]), noise(9000, 5300)
    exact = encode(model, wavs)
    rounded = encode(model.to(torch.bfloat16), wavs)
    for row, frames in enumerate(exact.num_frames.tolist()):
        assert relative(rounded.states[:, row, :frames].float(), exact.states[:, row, :frames]) < 4e-2


def test_too_short_and_too_long_rows_are_named() -> None:
    model = encoder(SMALL)
    shortest = next(count for count in range(1, 2000) if model.num_frames(count))
    assert encode(model, noise(shortest)).states.shape == (4, 1, 1, 24)
    with pytest.raises(
        RequestError, match=rf"row 1: {shortest - 1} samples, too few.*row 2: 99999 samples, but only 9000"
    ):
        model(torch.zeros(3, 9000), torch.tensor([9000, shortest - 1, 99999]))


def test_unknown_kinds_are_requests() -> None:
    for change in ({"layer_type": "lstm"}, {"extractor_mode": "batch_norm"}):
        with pytest.raises(RequestError, match="is none of"):
            HubertEncoder(replace(SMALL, **change))


@pytest.mark.parametrize("kind", LAYER_TYPES)
def test_weights_follow_the_generator(kind: str) -> None:
    def weights(seed: int, model: HubertEncoder | None = None) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        if model is None:
            return HubertEncoder(KINDS[kind], generator).state_dict()
        model.reset_parameters(generator)
        return model.state_dict()

    first = weights(1)
    used = encoder(KINDS[kind], seed=9)
    for parameter in used.parameters():
        parameter.data += 1
    for same in (weights(1), weights(1, used)):  # a model with other weights is drawn anew, down to A_log and the norms
        assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other) for name, other in weights(2).items())


@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_full_rows_needs_no_mask_and_no_filling(causal: bool) -> None:
    config = replace(
        size_config("transformer_hubert_causal" if causal else "transformer_hubert", "test"), frame_multiple=2
    )
    encoder = HubertEncoder(config, torch.Generator().manual_seed(0)).eval()
    seen: list[tuple[int, bool]] = []
    encoder.encoder.layers[0].register_forward_pre_hook(
        lambda _, given: seen.append((given[0].shape[1], given[1] is None))
    )
    wavs = 0.1 * torch.randn(2, 16000, generator=torch.Generator().manual_seed(1))
    full = torch.tensor([16000, 16000])
    with torch.inference_mode():
        states = encoder(wavs, full).states
        encoder.encoder.scans = True  # filled up to 50 frames, the last one masked: what a scan needs
        filled = encoder(wavs, full).states
    assert seen == [(49, True), (50, False)] and states.shape[2] == 49
    assert (states - filled).norm() <= 1e-6 * filled.norm()
