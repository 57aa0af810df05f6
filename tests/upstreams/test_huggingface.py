"""transformers' encoders as upstreams: their own hidden states, each utterance as if it were alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from superb_probe.errors import RequestError
from superb_probe.upstreams import huggingface as module
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
    "xls-r": ("Wav2Vec2", {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "feat_proj_dropout": 0.1}),
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
    upstream = build(str(tmp_path), waveform_norm="utterance")
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


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("hubert-group", "none"),
        ("wavlm-group", "none"),
        ("wavlm-layer", "utterance"),
        ("xls-r", "utterance"),
        ("data2vec", "utterance"),
    ],
)
def test_the_original_recipe_decides_the_waveform_norm(tmp_path: Path, family: str, recipe: str) -> None:
    _save(tmp_path, family, do_normalize=recipe == "none")  # the preprocessor says the contrary
    upstream = build(str(tmp_path))
    assert upstream.info.waveform_norm == recipe
    assert "original recipe" in upstream.notes[0] and "preprocessor_config.json says" in upstream.notes[0]
    other = {"none": "utterance", "utterance": "none"}[recipe]
    overridden = build(str(tmp_path), waveform_norm=other)
    assert overridden.info.waveform_norm == other and "as asked" in overridden.notes[0]
    wav = _wavs()[0]
    assert not torch.allclose(upstream.extract([wav]).states, overridden.extract([wav]).states, atol=1e-3)
    (tmp_path / "preprocessor_config.json").unlink()
    assert build(str(tmp_path)).info.waveform_norm == recipe and build(str(tmp_path)).notes == ()


def test_an_unknown_family_follows_its_preprocessor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path, "hubert-group", do_normalize=True)
    monkeypatch.setattr(module, "RECIPE_FAMILIES", ())
    assert build(str(tmp_path)).info.waveform_norm == "utterance"
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(RequestError, match="--upstream-option waveform_norm"):
        build(str(tmp_path))


def _save_whisper(folder: Path) -> Any:
    install_torchaudio_stub()
    import transformers

    special = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    sizes = {
        f"{part}_{what}": value for part in ("encoder", "decoder") for what, value in (("layers", 1), ("ffn_dim", 16))
    }
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.WhisperConfig(d_model=16, num_mel_bins=80, **special, **sizes, **heads)
    model = transformers.WhisperModel(config).eval()
    model.save_pretrained(folder)
    return model


def test_whisper_equals_transformers_and_passes_the_contract(tmp_path: Path) -> None:
    import transformers

    model = _save_whisper(tmp_path)
    upstream = build(str(tmp_path))
    assert upstream.info.num_layers == 2 and upstream.info.hop_samples == 320 and "30 s" in upstream.notes[0]
    wavs = _wavs()[:2]
    got = upstream.extract(wavs)
    extractor = transformers.WhisperFeatureExtractor()
    for row, wav in enumerate(wavs):
        features = extractor(wav.numpy(), sampling_rate=16000, return_tensors="pt").input_features
        assert (upstream.features(wav) - features[0]).abs().max() < 1e-4
        with torch.no_grad():
            hidden = torch.stack(model.encoder(features, output_hidden_states=True).hidden_states)[:, 0]
        frames = len(wav) // 320
        assert int(got.num_frames[row]) == frames
        assert (got.states[:, row, :frames] - hidden[:, :frames]).norm() / hidden[:, :frames].norm() < 1e-4
    results = check_upstream(upstream)
    assert all(result.passed for result in results), format_checks(results)


def test_whisper_hears_more_than_30_s_in_pieces(tmp_path: Path) -> None:
    _save_whisper(tmp_path)
    upstream = build(str(tmp_path))
    wav = 0.1 * torch.randn(480_000 + 1000, generator=torch.Generator().manual_seed(0))
    whole = upstream.extract([wav]).states[:, 0]
    first, rest = (upstream.extract([piece]).states[:, 0] for piece in (wav[:480_000], wav[480_000:]))
    assert whole.shape[1] == 1503 and torch.equal(whole, torch.cat([first, rest], dim=1))


def test_w2v_bert_equals_transformers_and_passes_the_contract(tmp_path: Path) -> None:
    install_torchaudio_stub()
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model = transformers.Wav2Vec2BertModel(transformers.Wav2Vec2BertConfig(**sizes)).eval()
    model.save_pretrained(tmp_path)
    upstream = build(str(tmp_path))
    got = upstream.extract([*_wavs()[:2], _wavs()[0][:560]])
    extractor = transformers.SeamlessM4TFeatureExtractor()
    for row, wav in enumerate(_wavs()[:2]):  # 54 and 29 windows: an odd one, whose last frame transformers masks
        inputs = extractor(wav.numpy(), sampling_rate=16000, return_tensors="pt")
        with torch.no_grad():
            hidden = torch.stack(model(**inputs, output_hidden_states=True).hidden_states)[:, 0]
        frames = int(inputs.attention_mask.sum())
        quiet = extractor(1e-6 * wav.numpy(), sampling_rate=16000, return_tensors="pt").input_features[:, :frames]
        assert (
            upstream.features(1e-6 * wav[None]) - quiet
        ).abs().max() < 1e-2  # where the floor under the energies tells
        assert int(got.num_frames[row]) == frames
        assert (got.states[:, row, :frames] - hidden[:, :frames]).norm() / hidden[:, :frames].norm() < 1e-4
    results = check_upstream(upstream)
    assert all(result.passed for result in results), format_checks(results)
    with pytest.raises(RequestError, match="takes waveforms as they are"):
        build(str(tmp_path), waveform_norm="utterance")


def test_info_comes_from_the_folder(tmp_path: Path) -> None:
    _save(tmp_path, "hubert-group")
    (tmp_path / "README.md").write_text("---\nlicense: mit\ndatasets:\n- librispeech_asr\n---\n# Model\n")
    info = build(str(tmp_path)).info
    assert (info.license, info.trained_on) == ("mit", ("librispeech_asr",))
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Model\n")
    assert build(str(tmp_path)).info.trained_on == ("unknown",)
    assert build(str(tmp_path), random=0).info.trained_on == ()
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
