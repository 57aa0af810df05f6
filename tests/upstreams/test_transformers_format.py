"""Folders of transformers: their HuBERTs give their states here, ours load there, and other kinds are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from states import states_error
from torch import Tensor

from superb_probe.errors import RequestError
from superb_probe.upstreams.checkpoints import convert_checkpoint, read_checkpoint, write_checkpoint
from superb_probe.upstreams.hubert import HubertEncoder
from superb_probe.upstreams.sizes import size_config


def transformers_model(folder: Path, **changes: Any) -> Any:
    from transformers import HubertConfig as TheirConfig
    from transformers import HubertModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = TheirConfig(
            **{
                "hidden_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 96,
                "conv_dim": (32,) * 7,
                "num_conv_pos_embeddings": 32,
                "num_conv_pos_embedding_groups": 4,
                **changes,
            }
        )
        model = HubertModel(config).eval()
        for parameter in model.parameters():  # norms and biases start at ones and zeros, which would hide a mistake
            parameter.data.add_(0.05 * torch.randn(parameter.shape))
        model.save_pretrained(folder)
    return model


def their_states(model: Any, wav: Tensor) -> Tensor:
    """(L, T, D). The last one is after the final norm of pre-norm models, as in fairseq and transformers 4 (5 gives it before)."""
    output = model(wav[None], output_hidden_states=True)
    return torch.cat([*output.hidden_states[:-1], output.last_hidden_state])


VARIANTS = {
    "base": {},
    "large": {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True},
    "no_mask_emb": {"mask_time_prob": 0.0, "conv_bias": True},
}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_transformers_folders_give_the_states_of_transformers(tmp_path: Path, variant: str) -> None:
    model = transformers_model(tmp_path, **VARIANTS[variant])
    wav = 0.1 * torch.randn(8000, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        reference = their_states(model, wav)
    found = read_checkpoint(tmp_path)
    assert found.source_format == "transformers" and found.config.num_classes == 0
    assert states_error(found, wav, reference) <= 1e-5
    wrong = replace(found, config=replace(found.config, num_heads=12))
    assert states_error(wrong, wav, reference) > 1e-4
    assert any("mask_emb" in note for note in found.notes) == (variant == "no_mask_emb")


@pytest.mark.parametrize("layer_norm_first", [False, True])
def test_our_folders_load_in_transformers(tmp_path: Path, layer_norm_first: bool) -> None:
    from transformers import HubertModel

    config = replace(
        size_config("transformer_hubert", "test"),
        layer_norm_first=layer_norm_first,
        extractor_mode="layer_norm" if layer_norm_first else "default",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tensors = {name: t + 0.05 * torch.randn(t.shape) for name, t in HubertEncoder(config).state_dict().items()}
    write_checkpoint(tmp_path / "a.safetensors", config, tensors, name="transformer_hubert", trained_on=(), license="x")
    folder = convert_checkpoint(tmp_path / "a.safetensors", tmp_path / "folder", "transformers")
    model, report = HubertModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    wav = 0.1 * torch.randn(8000, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        theirs = their_states(model.eval(), wav)
    assert states_error(read_checkpoint(tmp_path / "a.safetensors"), wav, theirs) <= 1e-5


def test_transformers_folders_of_other_kinds(tmp_path: Path) -> None:
    transformers_model(tmp_path)
    path = tmp_path / "config.json"
    described = json.loads(path.read_text())
    plain = read_checkpoint(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True}))
    normalised = read_checkpoint(tmp_path)
    assert (plain.config.waveform_norm, normalised.config.waveform_norm) == ("none", "utterance")
    assert plain.revision != normalised.revision
    for changes, words in [
        ({"model_type": "wav2vec2"}, "found 'wav2vec2'"),
        ({"hidden_act": "relu", "conv_pos_batch_norm": True}, "2 problems"),
        ({"hidden_size": 32}, "conv_dim"),
        ({"num_hidden_layers": 3}, "encoder.layers.2.fc1.weight: missing"),
    ]:
        path.write_text(json.dumps({**described, **changes}))
        with pytest.raises(RequestError, match=words):
            read_checkpoint(tmp_path)
    path.write_text(json.dumps(described))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(RequestError, match="found none of them"):
        read_checkpoint(tmp_path)


def test_transformers_torch_weights_and_models_with_a_head(tmp_path: Path) -> None:
    model = transformers_model(tmp_path)
    whole = read_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    older = {
        key.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): v
        for key, v in model.state_dict().items()
    }
    headed = {**{f"hubert.{key}": value for key, value in older.items()}, "lm_head.weight": torch.zeros(32, 48)}
    torch.save(headed, tmp_path / "pytorch_model.bin")
    found = read_checkpoint(tmp_path)
    assert all(torch.equal(found.tensors[key], value) for key, value in whole.tensors.items())
    assert "lm_head.weight" in found.notes[0]
