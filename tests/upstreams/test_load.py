"""Loading upstreams: doors, weights, sizes, families, devices and number formats."""

from __future__ import annotations

import sys
import types
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from superb_probe.errors import RequestError
from superb_probe.upstreams import features, hubert_upstream, huggingface
from superb_probe.upstreams.base import LayerStates, Upstream, UpstreamInfo
from superb_probe.upstreams.checkpoints import write_checkpoint
from superb_probe.upstreams.hubert import HubertEncoder
from superb_probe.upstreams.hubert_upstream import RandomWeightsWarning
from superb_probe.upstreams.load import compute_in, load_upstream
from superb_probe.upstreams.sizes import FAMILIES, family_name, size_config

WAV = 0.1 * torch.randn(6000, generator=torch.Generator().manual_seed(0))
CHECKPOINTS = {
    "mamba_hubert": "mamba_hubert",
    "mamba_hubert_causal": "mamba_hubert_causal",
    "mamba_hubert_causal.fairseq": "mamba_hubert_causal",
    "mamba_mlp_hubert": "mamba_mlp_hubert",
    "mamba_mlp_hubert_causal": "mamba_mlp_hubert_causal",
    "transformer_hubert": "transformer_hubert",
    "transformer_hubert_causal": "transformer_hubert_causal",
    "transformer_hubert_causal.fairseq": "transformer_hubert_causal",
    "transformer_hubert_prenorm": "transformer_hubert",
}


def relative_error(found: Tensor, reference: Tensor) -> float:
    """Of the worst layer; both (L, T, D)."""
    assert found.shape == reference.shape
    difference = (found.float() - reference.float()).flatten(1).norm(dim=1)
    return float((difference / reference.float().flatten(1).norm(dim=1)).max())


def one(upstream: Upstream, wav: Tensor = WAV) -> Tensor:
    return upstream.extract([wav]).states[:, 0]


@pytest.mark.parametrize("stem", list(CHECKPOINTS))
def test_official_checkpoints(shared: Path, stem: str) -> None:
    folder = shared / "fixtures/upstreams"
    upstream = load_upstream(CHECKPOINTS[stem], checkpoint=folder / f"{stem}.pt")
    assert upstream.info.name == CHECKPOINTS[stem] and upstream.info.revision.startswith("sha256:")
    assert upstream.info.lookahead_samples is None and upstream.info.hop_samples == 320
    assert upstream.info.waveform_norm == ("utterance" if "prenorm" in stem else "none")
    with np.load(folder / f"{stem.removesuffix('.fairseq')}.npz") as arrays:
        for number in (0, 1):
            if f"utt{number}/wav" not in arrays:
                continue
            layers = sorted(key for key in arrays if key.startswith(f"utt{number}/layer"))
            assert len(layers) == upstream.info.num_layers
            reference = torch.from_numpy(np.stack([arrays[key] for key in layers]))
            found = one(upstream, torch.from_numpy(arrays[f"utt{number}/wav"]))
            assert relative_error(found, reference) <= 1e-5
            assert relative_error(found * 1.001, reference) > 1e-4  # what a wrong state would show


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_checkpoint_of_another_family_names_both(tmp_path: Path, name: str) -> None:
    config = size_config("transformer_hubert" if FAMILIES[name].mask_at_probing else name, "test")
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, config, HubertEncoder(config).state_dict(), name="", trained_on=("mini",), license="MIT")
    held = family_name(config)
    for other in FAMILIES:
        accepted = "transformer_hubert" if FAMILIES[other].mask_at_probing else other
        if accepted == held:
            upstream = load_upstream(other, checkpoint=path)
            assert (upstream.info.trained_on, upstream.info.license) == (("mini",), "MIT")
            continue
        with pytest.raises(RequestError) as caught:
            load_upstream(other, checkpoint=path)
        assert other in str(caught.value) and held in str(caught.value)


def test_a_mask_put_on_a_bidirectional_checkpoint(shared: Path) -> None:
    path = shared / "fixtures/upstreams/transformer_hubert.pt"
    plain = load_upstream("transformer_hubert", checkpoint=path)
    masked = load_upstream("transformer_hubert_causal_mask", checkpoint=path)
    assert masked.info.revision == plain.info.revision and masked.info.name != plain.info.name
    expected = HubertEncoder(replace(plain.encoder.config, causal_attention=True)).eval()  # type: ignore[union-attr]
    expected.load_state_dict(plain.encoder.state_dict())  # type: ignore[union-attr]
    with torch.inference_mode():
        reference = expected(WAV[None], torch.tensor([len(WAV)])).states[:, 0]
    assert torch.equal(one(masked), reference)
    assert torch.equal(one(masked)[0], one(plain)[0])
    assert not torch.allclose(one(masked)[1], one(plain)[1], atol=1e-3)
    with pytest.raises(RequestError, match="a bidirectional Transformer HuBERT; .* holds a causal Transformer HuBERT"):
        load_upstream(
            "transformer_hubert_causal_mask", checkpoint=path.with_name("transformer_hubert_causal.fairseq.pt")
        )


@pytest.mark.parametrize(
    ("name", "size", "total"),
    [
        # "params from code" of the paper's released configurations, pre-training head included
        ("transformer_hubert", "base", 94_697_600),
        ("transformer_hubert_causal", "base", 94_697_600),
        ("transformer_hubert_causal_mask", "base", 94_697_600),
        ("mamba_hubert_causal", "base", 78_200_960),
        ("mamba_mlp_hubert_causal", "base", 94_754_432),
        ("mamba_hubert", "base", 146_740_352),
        ("transformer_hubert", "small", 22_376_192),
        ("transformer_hubert_causal", "small", 22_376_192),
        ("mamba_hubert_causal", "small", 23_497_472),
        ("mamba_mlp_hubert_causal", "small", 32_960_768),
        ("mamba_hubert", "small", 41_178_368),
    ],
)
def test_parameters_of_the_released_sizes(name: str, size: str, total: int) -> None:
    with torch.device("meta"):
        counts = HubertEncoder(size_config(name, size)).parameter_counts()
    head = 256 * (size_config(name, size).dim + 1) + 504 * 256
    assert counts == {"total": total, "encoder": total - head}


@pytest.mark.parametrize("name", list(FAMILIES))
def test_small_sizes_and_causality(name: str) -> None:
    for size, limit in (("test", 500_000), ("tiny", 2_000_000)):
        with torch.device("meta"):
            encoder = HubertEncoder(size_config(name, size))
        assert encoder.parameter_counts()["total"] < limit
        assert encoder.num_frames(16000) == 49
        causal = FAMILIES[name].causal and not FAMILIES[name].mask_at_probing
        assert encoder.lookahead_samples == (0 if causal else None)
        assert size_config(name, size).frame_multiple == 1
    for size in ("small", "base"):
        assert size_config(name, size).frame_multiple == 2
        if FAMILIES[name].causal:
            with torch.device("meta"):
                assert HubertEncoder(size_config(name, size)).lookahead_samples is None
                assert HubertEncoder(size_config(name, size, causal_front_end=True)).lookahead_samples == 0
        else:
            with pytest.raises(RequestError, match="causal_front_end"):
                size_config(name, size, causal_front_end=True)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_random_weights_come_from_the_seed_alone(name: str) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # they were asked for
        first, again, other = (load_upstream(name, size="test", random=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (first.info.revision, other.info.revision) == ("random:3", "random:4")
    assert torch.equal(one(first), one(again)) and not torch.equal(one(first), one(other))
    assert first.info.num_layers == one(first).shape[0] and first.info.dim == one(first).shape[2]
    assert not first.training and not any(parameter.requires_grad for parameter in first.parameters())


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(hubert_upstream, "WEIGHTS", tmp_path)
    return tmp_path


@pytest.mark.parametrize("size", [None, "test", "tiny"])
def test_random_weights_nobody_asked_for_are_announced(no_weights: Path, size: str | None) -> None:
    with pytest.warns(RandomWeightsWarning, match="RANDOM"):
        upstream = load_upstream("mamba_hubert_causal", size=size)
    assert upstream.info.revision == "random:0"
    assert upstream.info.dim == (48 if size == "test" else 192)


@pytest.mark.parametrize("name", ["mamba_hubert_causal", "transformer_hubert_causal_mask"])
def test_shipped_weights_are_used_when_there_are_some(no_weights: Path, name: str) -> None:
    stored = "transformer_hubert" if FAMILIES[name].mask_at_probing else name
    config = size_config(stored, "tiny")
    path = no_weights / f"{stored}.safetensors"
    revision = write_checkpoint(
        path, config, HubertEncoder(config).state_dict(), name=stored, trained_on=("mini",), license="MIT"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_upstream(name).info.revision == load_upstream(name, size="tiny").info.revision == revision
        assert load_upstream(name, random=1).info.revision == "random:1"
        assert load_upstream(name, size="test", random=1).info.dim == 48
    if FAMILIES[name].causal and not FAMILIES[name].mask_at_probing:
        with pytest.raises(RequestError, match="contradicts the shipped weights"):
            load_upstream(name, causal_front_end=False)


def test_both_front_ends_may_ship(no_weights: Path) -> None:
    revisions = {}
    for causal, ending in ((True, ""), (False, "-published-front-end")):
        config = size_config("mamba_hubert_causal", "tiny", causal)
        path = no_weights / f"mamba_hubert_causal{ending}.safetensors"
        weights = HubertEncoder(config).state_dict()
        revisions[causal] = write_checkpoint(
            path, config, weights, name="mamba_hubert_causal", trained_on=("mini",), license="MIT", dtype=torch.float16
        )
    assert load_upstream("mamba_hubert_causal").info.revision == revisions[True]
    assert load_upstream("mamba_hubert_causal", causal_front_end=True).info.revision == revisions[True]
    published = load_upstream("mamba_hubert_causal", causal_front_end=False)
    assert published.info.revision == revisions[False] and published.info.lookahead_samples is None
    assert published.info.trained_on == ("mini",)


def test_tiny_encoders_have_as_many_parameters() -> None:
    counts = {name: HubertEncoder(size_config(name, "tiny")).parameter_counts()["encoder"] for name in FAMILIES}
    assert max(counts.values()) <= 2_000_000
    assert (
        max(counts.values()) / min(counts.values()) < 1.06 and counts["mamba_hubert"] == counts["mamba_hubert_causal"]
    )


def test_causal_front_end_is_an_option(no_weights: Path) -> None:
    as_published = load_upstream("mamba_hubert_causal", size="test", random=0, causal_front_end=False)
    assert as_published.info.lookahead_samples is None
    assert load_upstream("mamba_hubert_causal", size="test", random=0).info.lookahead_samples == 0


def test_contradictions_are_errors(shared: Path) -> None:
    path = shared / "fixtures/upstreams/mamba_hubert_causal.pt"
    with pytest.raises(RequestError, match="both a checkpoint and random"):
        load_upstream("mamba_hubert_causal", checkpoint=path, random=0)
    with pytest.raises(RequestError, match="contradicts"):
        load_upstream("mamba_hubert_causal", checkpoint=path, causal_front_end=True)
    with pytest.raises(RequestError, match="seed"):
        load_upstream("mamba_hubert_causal", random=-1)
    with pytest.warns(UserWarning, match="the checkpoint's own shapes count"):
        assert load_upstream("mamba_hubert_causal", checkpoint=path, size="base").info.dim == 48


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "mamba_hubrt"}, "Did you mean.* mamba_hubert"),
        ({"size": "huge"}, "unknown size 'huge'"),
        ({"checkpoint": "absent.pt"}, "absent.pt: no such checkpoint"),
        ({"dtype": "int8"}, "unknown dtype"),
        ({"device": "warp"}, "unknown device"),
        ({"device": "meta"}, "not supported"),
        (
            {"causal_frontend": True},
            "did you mean causal_front_end.* It has: checkpoint, size, random, causal_front_end",
        ),
        ({"name": "fbank", "causal_front_end": True}, "'causal_front_end'.* It has: checkpoint, size, random"),
        ({"name": "hf:"}, "nothing after 'hf:'"),
        ({"name": "./absent.py:mine"}, "no file"),
    ],
)
def test_wrong_requests(arguments: dict[str, Any], words: str) -> None:
    name = arguments.get("name", "mamba_hubert_causal")
    with pytest.raises(RequestError, match=words):
        load_upstream(name, **{key: value for key, value in arguments.items() if key != "name"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there(device: str) -> None:
    with pytest.raises(RequestError, match="no GPU here"):
        load_upstream("mamba_hubert_causal", size="test", random=0, device=device)


def test_bfloat16_is_close_and_no_more() -> None:
    for name in FAMILIES:
        single = one(load_upstream(name, size="test", random=0))
        half = one(load_upstream(name, size="test", random=0, dtype="bfloat16"))
        assert half.dtype == torch.bfloat16 and single.dtype == torch.float32
        error = relative_error(half, single)
        assert 1e-5 < error <= 2e-2, name  # below: it would not have been computed in bfloat16


def flags() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


class Stranger(Upstream):
    """An upstream of somebody else's: one weight, which scales the waveform."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))
        self.info = UpstreamInfo("mine", "random:0", 1, 1, 16000, 320, "none", 0, "block_output", (), "MIT", "")
        self.seen: list[Any] = []

    def num_frames(self, num_samples: int) -> int:
        return num_samples // 320

    def forward(self, wavs: Tensor, num_samples: Tensor) -> LayerStates:
        self.seen.append((wavs.dtype, flags()))
        if wavs.shape[1] == 320:
            raise ValueError("too short for me")
        frames = wavs.unfold(1, 320, 320).mean(2) * self.gain
        return LayerStates(frames[None, ..., None], num_samples // 320)


@pytest.mark.parametrize(
    ("dtype", "number_type", "tf32"),
    [
        ("float32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bfloat16", torch.bfloat16, False),
        ("float16", torch.float16, False),
    ],
)
def test_number_format_of_a_stranger(dtype: str, number_type: torch.dtype, tf32: bool) -> None:
    upstream = Stranger()
    compute_in(upstream, dtype)
    before = flags()
    states = upstream.extract([torch.ones(640)]).states
    assert states.dtype == number_type
    with pytest.raises(ValueError, match="too short for me"):
        upstream.extract([torch.ones(320)])
    assert upstream.seen == [(number_type, (tf32, tf32))] * 2
    assert flags() == before  # also after the failure


FILE = """
from torch import nn
from strangers_home import Stranger

def mine(checkpoint=None):
    return Stranger()

def no_upstream():
    return nn.Linear(2, 2)

def no_info():
    upstream = Stranger()
    del upstream.info
    return upstream
"""


def test_a_file_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = types.ModuleType("strangers_home")
    home.Stranger = Stranger  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "strangers_home", home)
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    upstream = load_upstream(f"{path}:mine")
    assert upstream.info.name == "mine" and not upstream.gain.requires_grad and not upstream.training  # type: ignore[union-attr]
    for function, words in {
        "no_upstream": "returned a Linear, expected a superb_probe.Upstream",
        "no_info": "is not an UpstreamInfo",
        "absent": "has no function",
    }.items():
        with pytest.raises(RequestError, match=words):
            load_upstream(f"{path}:{function}")
    with pytest.raises(RequestError, match="'size'.* It has: checkpoint"):
        load_upstream(f"{path}:mine", size="test")


@pytest.mark.parametrize(("prefix", "module"), [("hf:", huggingface), ("features:", features)])
def test_prefixed_doors(prefix: str, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def build(name: str, *, waveform_norm: str | None = None) -> Stranger:
        asked.append((name, waveform_norm))
        return Stranger()

    monkeypatch.setattr(module, "build", build)
    assert load_upstream(f"{prefix}org/name@v1", waveform_norm="none").info.name == "mine"
    assert asked == [("org/name@v1", "none")]
    with pytest.raises(RequestError, match="'name'|'size'"):
        load_upstream(f"{prefix}org/name", size="test")
