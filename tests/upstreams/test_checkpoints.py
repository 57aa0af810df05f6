"""Checkpoints of four formats: read right, written and read again, and refused when they are not what they should be."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from states import states_error
from torch import Tensor

from superb_probe.errors import RequestError
from superb_probe.upstreams.checkpoints import (
    Checkpoint,
    config_from_dict,
    convert_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from superb_probe.upstreams.config import HubertConfig
from superb_probe.upstreams.fairseq_format import parse_conv_layers
from superb_probe.upstreams.hubert import HubertEncoder
from superb_probe.upstreams.sizes import FAMILIES, size_config

OFFICIAL = [
    "mamba_hubert",
    "mamba_hubert_causal",
    "mamba_hubert_causal.fairseq",
    "mamba_mlp_hubert",
    "mamba_mlp_hubert_causal",
    "transformer_hubert",
    "transformer_hubert_causal",
    "transformer_hubert_causal.fairseq",
    "transformer_hubert_prenorm",
]


def truth(path: Path) -> tuple[Tensor, Tensor]:
    """The first utterance of a fixture and the official code's states."""
    with np.load(path) as arrays:
        layers = sorted(key for key in arrays if key.startswith("utt0/layer"))
        return torch.from_numpy(arrays["utt0/wav"]), torch.from_numpy(np.stack([arrays[key] for key in layers]))


def fixture_error(checkpoint: Checkpoint, shared: Path, stem: str) -> float:
    wav, reference = truth(shared / "fixtures/upstreams" / f"{stem.removesuffix('.fairseq')}.npz")
    return states_error(checkpoint, wav, reference)


@pytest.fixture(scope="module")
def made() -> Callable[..., dict[str, Any]]:
    """A function that makes an s3prl-converted dictionary of a small random encoder."""

    def make(name: str = "mamba_hubert_causal", **changes: Any) -> dict[str, Any]:
        from superb_probe.upstreams.fairseq_format import to_s3prl

        config = replace(size_config(name, "test"), extractor_mode="default", causal_pos_conv=False)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            encoder = HubertEncoder(replace(config, **changes))
        return to_s3prl(encoder.config, encoder.state_dict(), ())

    return make


def save(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("stem", OFFICIAL)
def test_official_checkpoints_give_the_official_states(shared: Path, stem: str) -> None:
    checkpoint = read_checkpoint(shared / "fixtures/upstreams" / f"{stem}.pt")
    assert checkpoint.source_format == ("fairseq" if "fairseq" in stem else "s3prl")
    assert checkpoint.labels[0][:4] == ("<s>", "<pad>", "</s>", "<unk>") and len(checkpoint.labels[0]) == 24
    assert checkpoint.notes == ()
    assert fixture_error(checkpoint, shared, stem) <= 1e-5


@pytest.mark.parametrize(
    "field", ["frame_multiple", "num_heads", "layer_norm_first", "waveform_norm", "causal_attention"]
)
def test_every_config_value_matters(shared: Path, field: str) -> None:
    """The mutant of the test above: a value read wrongly shows in the states."""
    stem = {
        "frame_multiple": "mamba_hubert",
        "layer_norm_first": "transformer_hubert_prenorm",
        "waveform_norm": "transformer_hubert_prenorm",
        "causal_attention": "transformer_hubert_causal",
    }.get(field, "transformer_hubert")
    wrong = {
        "frame_multiple": 1,
        "num_heads": 12,
        "layer_norm_first": False,
        "waveform_norm": "none",
        "causal_attention": False,
    }
    checkpoint = read_checkpoint(shared / "fixtures/upstreams" / f"{stem}.pt")
    mutant = replace(checkpoint, config=replace(checkpoint.config, **{field: wrong[field]}))
    assert fixture_error(mutant, shared, stem) > 1e-4


def test_a_changed_tensor_changes_revision_and_states(shared: Path, tmp_path: Path) -> None:
    stem = "mamba_mlp_hubert_causal"
    source = shared / "fixtures/upstreams" / f"{stem}.pt"
    content = torch.load(source, weights_only=True)
    again = read_checkpoint(save(content, tmp_path / "same.pt"))
    content["model_weight"]["encoder.layers.1.mamba.D"][7] *= 1.5
    changed = read_checkpoint(save(content, tmp_path / "changed.pt"))
    assert fixture_error(again, shared, stem) <= 1e-5
    assert fixture_error(changed, shared, stem) > 1e-4
    assert len({again.revision, changed.revision, read_checkpoint(source).revision}) == 3
    assert changed.revision.startswith("sha256:") and len(changed.revision) == 7 + 64


def test_sizes_come_from_the_tensors_where_the_config_disagrees(tmp_path: Path, made: Any) -> None:
    content = made("mamba_mlp_hubert", num_layers=3)
    right = read_checkpoint(save(content, tmp_path / "right.pt"))
    content["model_cfg"].update(
        encoder_layers=12,
        encoder_embed_dim=768,
        encoder_ffn_embed_dim=-1,
        mamba_ssm_state_expand=24,
        mamba_block_expand=3,
        final_dim=256,
    )
    found = read_checkpoint(save(content, tmp_path / "wrong.pt"))
    assert found.config == right.config
    assert len(found.notes) == 5 and "encoder_layers: the config says 12, the tensors 3" in found.notes
    assert right.notes == ()


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mamba_inner_hubert"])
def test_absent_keys_have_the_defaults_of_the_code(tmp_path: Path, made: Any, name: str) -> None:
    content = made(name, num_heads=12, frame_multiple=2, conv_pos=128, conv_pos_groups=16)
    whole = read_checkpoint(save(content, tmp_path / "whole.pt")).config
    dropped = {
        "required_seq_len_multiple",
        "encoder_attention_heads",
        "extractor_mode",
        "conv_bias",
        "conv_pos",
        "conv_pos_groups",
        "layer_norm_first",
        "activation_fn",
        "mamba_ssm_state_expand",
        "mamba_block_expand",
        "mamba_head_dim",
        "mamba_conv_kernel_size",
        "encoder_layers",
        "encoder_embed_dim",
        "encoder_ffn_embed_dim",
    }
    content["model_cfg"] = {key: value for key, value in content["model_cfg"].items() if key not in dropped}
    assert read_checkpoint(save(content, tmp_path / "bare.pt")).config == whole


@pytest.mark.parametrize("key", ["layer_type", "conv_feature_layers", "causal_attn", "normalize"])
def test_a_dropped_key_that_is_no_default_is_noticed(tmp_path: Path, made: Any, key: str) -> None:
    name = {"causal_attn": "transformer_hubert_causal"}.get(key, "mamba_hubert_causal")
    content = made(name, waveform_norm="utterance", conv_layers=((32, 10, 5), (32, 8, 4), (32, 4, 4), (32, 4, 4)))
    whole = read_checkpoint(save(content, tmp_path / "whole.pt")).config
    content["task_cfg" if key == "normalize" else "model_cfg"].pop(key)
    path = save(content, tmp_path / "file.pt")
    if key in ("causal_attn", "normalize"):  # another encoder, which the tensors cannot tell
        assert read_checkpoint(path).config != whole
    else:
        with pytest.raises(RequestError, match="layers in the config|the tensors are those of mamba"):
            read_checkpoint(path)


def test_the_older_name_of_the_layer_norm(tmp_path: Path, made: Any) -> None:
    content = made("mamba_hubert")
    today = read_checkpoint(save(content, tmp_path / "today.pt"))
    content["model_weight"] = {
        key.replace("bimamba_layer_norm", "mamba_layer_norm"): value for key, value in content["model_weight"].items()
    }
    older = read_checkpoint(save(content, tmp_path / "older.pt"))
    assert list(older.tensors) == list(today.tensors) and older.config == today.config


def test_half_precision_becomes_float32(tmp_path: Path, made: Any) -> None:
    content = made()
    content["model_weight"] = {key: value.half() for key, value in content["model_weight"].items()}
    found = read_checkpoint(save(content, tmp_path / "half.pt"))
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.float32}


def test_every_wrong_tensor_is_named_at_once(tmp_path: Path, made: Any) -> None:
    content = made()
    weights = content["model_weight"]
    del weights["encoder.layers.1.mamba.D"]
    weights["encoder.layers.0.mamba.dt_proj.bias"] = torch.zeros(7)
    weights["quantizer.vars"] = torch.zeros(1, 2, 3)
    weights["mask_emb"][3] = float("nan")
    with pytest.raises(RequestError) as caught:
        read_checkpoint(save(content, tmp_path / "file.pt"))
    text = str(caught.value)
    assert "4 problems" in text and str(tmp_path / "file.pt") in text
    assert "encoder.layers.1.mamba.D: missing, expected (96,)" in text
    assert "encoder.layers.0.mamba.dt_proj.bias: expected (96,), found (7,)" in text
    assert "quantizer.vars: unexpected, (1, 2, 3)" in text
    assert "mask_emb: 1 of 48 values are not finite" in text


def test_foreign_content_is_refused(tmp_path: Path, made: Any) -> None:
    other = made()
    other["model_cfg"].update(_name="wav2vec2", activation_fn="relu", conv_pos_batch_norm=True)
    strange = made()
    strange["model_cfg"].update(conv_feature_layers="__import__('os').system('true')")
    cases = {
        "wav2vec2": (other, "3 problems(.|\n)*found 'wav2vec2'"),
        "expression": (strange, "conv_feature_layers is"),
        "type": ({**made(), "model_cfg": {"encoder_layers": "12"}}, "encoder_layers: expected int, found '12'"),
        "dict": ({"state_dict": {}, "epoch": 3}, "2 entries: state_dict, epoch"),
        "list": ([1, 2], "found a list"),
        "tensor": ({**made(), "model_weight": {"a": 3}}, "a: int"),
        "empty": ({"args": None, "cfg": None, "model": {}}, "cfg: nothing, args: nothing"),
    }
    for name, (content, words) in cases.items():
        with pytest.raises(RequestError, match=words) as caught:
            read_checkpoint(save(content, tmp_path / f"{name}.pt"))
        assert str(tmp_path / f"{name}.pt") in str(caught.value), name


def test_missing_paths_and_empty_folders(tmp_path: Path) -> None:
    for path, words in {
        tmp_path / "absent.pt": "no such checkpoint",
        tmp_path: "found 0 pairs among: nothing",
    }.items():
        with pytest.raises(RequestError, match=words):
            read_checkpoint(path)
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(RequestError, match=r"found no a\.json"):
        read_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2", 7),
        ("2 * [(8, 3, 2), (8, 3, 1)]", 4),
    ],
)
def test_conv_layers_are_parsed(text: str, layers: int) -> None:
    assert len(parse_conv_layers(text)) == layers


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[(8,3,0)]",
        "[(8,3,2)] * 10**9",
        "[(8,3,2)] - []",
        "(" * 9999,
        "open('x')",
    ],
)
def test_other_expressions_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="conv_feature_layers"):
        parse_conv_layers(text)


def write_small(
    path: Path, name: str = "mamba_hubert_causal", **keywords: Any
) -> tuple[HubertConfig, dict[str, Tensor], str]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = HubertEncoder(size_config(name, "test"))
    described = {"name": name, "trained_on": ("mini",), "license": "Apache-2.0", "citation": "nobody", **keywords}
    return (
        encoder.config,
        encoder.state_dict(),
        write_checkpoint(path, encoder.config, encoder.state_dict(), **described),
    )


@pytest.mark.parametrize("name", list(FAMILIES))
def test_own_format_round_trip(tmp_path: Path, name: str) -> None:
    path = tmp_path / "folder/weights.safetensors"
    config, tensors, revision = write_small(path, name, metadata={"recipe": "none"})
    for where in (path, path.with_suffix(".json"), path.parent):
        found = read_checkpoint(where)
        assert found.config == config and found.revision == revision and found.source_format == "superb-probe"
        assert all(torch.equal(found.tensors[key], value) for key, value in tensors.items())
        assert (found.name, found.trained_on, found.license, found.citation) == (
            name,
            ("mini",),
            "Apache-2.0",
            "nobody",
        )
        assert found.metadata == {"recipe": "none"}


def test_own_format_in_half_precision(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    _, tensors, _ = write_small(path, dtype=torch.float16)
    found = read_checkpoint(path)
    assert all(tensor.dtype == torch.float32 for tensor in found.tensors.values())
    assert all(torch.equal(found.tensors[key], value.half().float()) for key, value in tensors.items())


def test_damaged_pairs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    config, tensors, _ = write_small(path)
    weights, text = path.read_bytes(), path.with_suffix(".json").read_text()
    described = json.loads(text)

    def refused(words: str, content: bytes = weights, **changes: Any) -> None:
        path.write_bytes(content)
        kept = {key: value for key, value in {**described, **changes}.items() if value is not None}
        path.with_suffix(".json").write_text(json.dumps(kept))
        with pytest.raises(RequestError, match=words):
            read_checkpoint(path)

    refused("cannot be read", weights[:-100])
    refused("cannot be read", b"text")
    refused("expected the weights", safetensors.torch.save({**tensors, "mask_emb": torch.zeros(48)}))
    refused("expected format", format="other/1")
    refused("2 problems(.|\n)*license: missing(.|\n)*licence: unknown", license=None, licence="MIT")
    refused("did you mean dim", config={**described["config"], "dmi": 48})
    refused("layer_type: expected transformer or", config={**described["config"], "layer_type": "rnn"})
    refused("the tensors are not those of", config={**described["config"], "num_layers": 3})
    path.with_suffix(".json").write_text("{")
    with pytest.raises(RequestError, match="expected a JSON object"):
        read_checkpoint(path)
    with pytest.raises(RequestError, match="missing"):
        write_checkpoint(path, config, {}, name="x", trained_on=(), license="x")
    path.write_bytes(weights)
    path.with_suffix(".json").write_text(text)
    assert read_checkpoint(path).config == config


def test_a_config_field_left_out_is_noticed() -> None:
    whole = asdict(HubertConfig())
    assert config_from_dict(whole, "here") == HubertConfig()
    for name in whole:
        with pytest.raises(RequestError, match=f"{name}: missing"):
            config_from_dict({key: value for key, value in whole.items() if key != name}, "here")


@pytest.mark.parametrize("stem", ["mamba_hubert", "transformer_hubert_causal.fairseq", "transformer_hubert_prenorm"])
def test_conversion_keeps_the_states(shared: Path, tmp_path: Path, stem: str) -> None:
    source = shared / "fixtures/upstreams" / f"{stem}.pt"
    own = convert_checkpoint(source, tmp_path / "own.safetensors", "superb-probe")
    back = convert_checkpoint(own, tmp_path / "back.pt", "s3prl")
    first, second = read_checkpoint(source), read_checkpoint(back)
    assert second.config == first.config
    assert all(torch.equal(second.tensors[key], value) for key, value in first.tensors.items())
    assert read_checkpoint(own).metadata["converted_from"] == first.revision
    if stem == "transformer_hubert_prenorm":
        folder = convert_checkpoint(source, tmp_path / "folder", "transformers")
        assert fixture_error(read_checkpoint(folder), shared, stem) <= 1e-5
        with pytest.raises(RequestError, match="not an empty folder"):
            convert_checkpoint(source, folder, "transformers")


def test_conversions_without_words_are_refused(tmp_path: Path) -> None:
    write_small(tmp_path / "a.safetensors")
    for form, words in {"s3prl": "2 problems", "transformers": "2 problems", "onnx": "unknown format"}.items():
        with pytest.raises(RequestError, match=words):
            convert_checkpoint(tmp_path / "a.safetensors", tmp_path / form, form)
        assert not (tmp_path / form).exists()
