"""transformers' encoders as upstreams: their own hidden states, each utterance as if it were alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from superb_probe.errors import RequestError
from superb_probe.upstreams.check import check_upstream, format_checks
from superb_probe.upstreams.huggingface import TransformersEncoder, build
from superb_probe.upstreams.torchaudio_stub import install_torchaudio_stub

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "hubert-group": ("Hubert", {}),
    "wav2vec2-layer": ("Wav2Vec2", {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}),
    "wavlm-layer": ("WavLM", {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "num_buckets": 16}),
    "wavlm-group": ("WavLM", {"num_buckets": 16}),
    "data2vec": ("Data2VecAudio", {"conv_pos_kernel_size": 5}),
}


def _save(folder: Path, family: str, *, do_normalize: bool | None = True) -> Any:
    install_torchaudio_stub()  # before the first import of transformers, as `build` does
    import transformers

    prefix, options = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}Model")(getattr(transformers, f"{prefix}Config")(**SMALL, **options)).eval()
    model.save_pretrained(folder)
    if do_normalize is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": do_normalize}))
    return model


def _wavs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [0.1 * torch.randn(n, generator=generator) + 0.02 for n in (9000, 5001, 400, 9000)]


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers_and_passes_the_contract(tmp_path: Path, family: str) -> None:
    model = _save(tmp_path, family)
    upstream = build(str(tmp_path))
    together = upstream.extract(_wavs())
    assert together.states.shape == (3, 4, 27, 32)
    for row, wav in enumerate(_wavs()):
        normalised = (wav - wav.mean()) / torch.sqrt(wav.var(correction=0) + 1e-7)
        with torch.no_grad():
            expected = torch.stack(model(normalised[None], output_hidden_states=True).hidden_states)[:, 0]
        got = together.states[:, row, : expected.shape[1]]
        assert int(together.num_frames[row]) == expected.shape[1]
        assert (got - expected).norm() / expected.norm() < 1e-5
    results = check_upstream(upstream)
    assert all(result.passed for result in results), format_checks(results)


@pytest.mark.parametrize("family", ["hubert-group", "data2vec"])
def test_running_unequal_lengths_together_would_be_caught(tmp_path: Path, family: str) -> None:
    _save(tmp_path, family)
    upstream = build(str(tmp_path))
    upstream.masked = True
    assert not next(result for result in check_upstream(upstream) if result.name == "batch").passed


def test_do_normalize_decides_the_waveform_norm(tmp_path: Path) -> None:
    _save(tmp_path, "hubert-group", do_normalize=False)
    plain = build(str(tmp_path))
    assert plain.info.waveform_norm == "none"
    normalised = build(str(tmp_path), waveform_norm="utterance")
    wav = _wavs()[0]
    assert not torch.allclose(plain.extract([wav]).states, normalised.extract([wav]).states, atol=1e-3)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(RequestError, match="waveform_norm"):
        build(str(tmp_path))


def test_info_comes_from_the_folder(tmp_path: Path) -> None:
    _save(tmp_path, "hubert-group")
    (tmp_path / "README.md").write_text("---\nlicense: mit\ndatasets:\n- librispeech_asr\n---\n# Model\n")
    info = build(str(tmp_path)).info
    assert (info.license, info.trained_on) == ("mit", ("librispeech_asr",))
    assert (info.num_layers, info.dim, info.hop_samples, info.layer_convention) == (3, 32, 320, "block_output")
    assert info.revision.startswith("sha256:")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-3}))
    assert build(str(tmp_path)).info.revision != info.revision


def test_random_weights_follow_their_seed(tmp_path: Path) -> None:
    _save(tmp_path, "hubert-group")
    (tmp_path / "model.safetensors").unlink()
    state = torch.random.get_rng_state()
    first, again, other = (build(str(tmp_path), random=seed).extract(_wavs()).states for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert build(str(tmp_path), random=3).info.revision == "random:3"


def test_missing_tensors_are_not_left_random(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _save(tmp_path, "hubert-group")
    tensors = load_file(tmp_path / "model.safetensors")
    dropped = [name for name in tensors if "layers.1" in name]
    kept = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RequestError, match=f"{len(dropped)} tensors"):
        build(str(tmp_path))


def test_what_cannot_be_had_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(RequestError, match="hf:org/name@v1: cannot be loaded: We couldn't connect. Fix: .* folder"):
        build("org/name@v1")


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    import transformers

    transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path)
    with pytest.raises(RequestError, match="a bert model, which has no conv_kernel"):
        build(str(tmp_path))


def test_half_precision_is_near(tmp_path: Path) -> None:
    _save(tmp_path, "wav2vec2-layer")
    upstream = build(str(tmp_path))
    assert isinstance(upstream, TransformersEncoder)
    exact = upstream.extract(_wavs()).states
    half = upstream.to(torch.bfloat16).extract(_wavs()).states
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).norm() / exact.norm() < 2e-2
