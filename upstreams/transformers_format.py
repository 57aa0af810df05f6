"""Folders of the transformers library that hold a HuBERT: `config.json` with its weights, to and from `HubertConfig`.

Both libraries count layers alike (state 0 is the input of the first layer, state i the output of layer i, the last one after the
final norm of pre-norm models), so the layer convention is "block_output" for either. transformers does not pad frames to a
multiple, so `frame_multiple` is 1, and it keeps no pre-training head.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from superb_probe.errors import RequestError, all_at_once
from superb_probe.upstreams.config import HubertConfig
from superb_probe.upstreams.fairseq_format import Content
from superb_probe.upstreams.unpickler import read_torch_file

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")

# Values of keys that a config.json may leave out (transformers' HubertConfig).
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "layer_norm_eps": 1e-5,
    "feat_extract_norm": "group",
    "feat_proj_layer_norm": True,
    "conv_dim": [512] * 7,
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_bias": False,
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "conv_pos_batch_norm": False,
    "do_stable_layer_norm": False,
}
_REQUIRED = {
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "layer_norm_eps": 1e-5,
    "feat_proj_layer_norm": True,
    "conv_pos_batch_norm": False,
}
_NAMES = {
    "masked_spec_embed": "mask_emb",
    "feature_projection.layer_norm.": "layer_norm.",
    "feature_projection.projection.": "post_extract_proj.",
    "encoder.pos_conv_embed.conv.parametrizations.weight.original0": "encoder.pos_conv.0.weight_g",
    "encoder.pos_conv_embed.conv.parametrizations.weight.original1": "encoder.pos_conv.0.weight_v",
    "encoder.pos_conv_embed.conv.": "encoder.pos_conv.0.",
    "encoder.layer_norm.": "encoder.layer_norm.",
}
_LAYER_NAMES = {
    "attention.": "self_attn.",
    "layer_norm.": "self_attn_layer_norm.",
    "feed_forward.intermediate_dense.": "fc1.",
    "feed_forward.output_dense.": "fc2.",
    "final_layer_norm.": "final_layer_norm.",
}


def from_transformers(folder: Path) -> Content:
    """The HuBERT in a transformers folder.

    Args:
        folder: holds `config.json`, weights, and `preprocessor_config.json` where waveforms are normalised.

    Raises:
        RequestError: if it is another model or one this encoder cannot run; every reason is given.
    """
    cfg = {**_DEFAULTS, **read_json(folder / "config.json")}
    if cfg.get("model_type") != "hubert":
        raise RequestError(
            f"{folder}: expected a HuBERT (model_type 'hubert'), found {cfg.get('model_type')!r}. "
            f"Fix: load other models as hf:{folder}."
        )
    problems = [f"{k}: expected {v!r}, found {cfg[k]!r}" for k, v in _REQUIRED.items() if cfg[k] != v]
    norms = {"group": "default", "layer": "layer_norm"}
    if cfg["feat_extract_norm"] not in norms:
        problems.append(f"feat_extract_norm: expected group or layer, found {cfg['feat_extract_norm']!r}")
    fronts = [cfg["conv_dim"], cfg["conv_kernel"], cfg["conv_stride"]]
    if len({len(front) for front in fronts}) != 1:
        problems.append(f"conv_dim, conv_kernel, conv_stride: lengths {[len(front) for front in fronts]} differ")
    if cfg["conv_dim"][-1] == cfg["hidden_size"]:
        # fairseq's encoder has no projection then, transformers' always one.
        problems.append(
            f"conv_dim[-1] equals hidden_size ({cfg['hidden_size']}): fairseq's encoder has no projection there"
        )
    if problems:
        raise all_at_once(
            f"{folder / 'config.json'}: not a HuBERT this encoder can run", problems, f"load it as hf:{folder}"
        )
    notes: list[str] = []
    tensors = _our_names(_read_weights(folder), cfg, notes)
    config = HubertConfig(
        layer_type="transformer",
        conv_layers=tuple((int(d), int(k), int(s)) for d, k, s in zip(*fronts, strict=True)),
        extractor_mode=norms[cfg["feat_extract_norm"]],
        conv_bias=bool(cfg["conv_bias"]),
        dim=cfg["hidden_size"],
        num_layers=cfg["num_hidden_layers"],
        num_heads=cfg["num_attention_heads"],
        ffn_dim=cfg["intermediate_size"],
        layer_norm_first=bool(cfg["do_stable_layer_norm"]),
        conv_pos=cfg["num_conv_pos_embeddings"],
        conv_pos_groups=cfg["num_conv_pos_embedding_groups"],
        frame_multiple=1,
        waveform_norm=_waveform_norm(folder, notes),
        num_classes=0,
        final_dim=0,
    )
    return Content(config, tensors, (), tuple(notes))


def to_transformers(config: HubertConfig, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write a folder that `transformers.HubertModel.from_pretrained` reads; the pre-training head is left out.

    Raises:
        RequestError: if transformers has no words for this encoder, or the folder holds something already.
    """
    problems = []
    if config.layer_type != "transformer":
        problems.append(f"layer_type {config.layer_type!r}: transformers' HuBERT has Transformer layers only")
    if config.causal_attention:
        problems.append("causal_attention: transformers' HuBERT has no causal mask")
    if config.causal_pos_conv or config.extractor_mode == "causal":
        problems.append("a causal front end: transformers' HuBERT has none")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        problems.append(f"{folder} exists and is not an empty folder")
    if problems:
        raise all_at_once("cannot write a transformers folder", problems, "write the project's own format elsewhere")
    cfg = {
        "architectures": ["HubertModel"],
        "model_type": "hubert",
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.ffn_dim,
        "feat_extract_norm": "group" if config.extractor_mode == "default" else "layer",
        "conv_dim": [channels for channels, _, _ in config.conv_layers],
        "conv_kernel": [kernel for _, kernel, _ in config.conv_layers],
        "conv_stride": [stride for _, _, stride in config.conv_layers],
        "num_feat_extract_layers": len(config.conv_layers),
        "conv_bias": config.conv_bias,
        "num_conv_pos_embeddings": config.conv_pos,
        "num_conv_pos_embedding_groups": config.conv_pos_groups,
        "do_stable_layer_norm": config.layer_norm_first,
        **_REQUIRED,
    }
    preprocessor = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": 16000,
        "padding_value": 0.0,
        "do_normalize": config.waveform_norm == "utterance",
        "return_attention_mask": config.extractor_mode != "default",
    }
    renamed = {
        their_name(name, config.extractor_mode): tensor.detach().cpu().float().contiguous()
        for name, tensor in tensors.items()
        if not name.startswith(("final_proj.", "label_embs_concat"))
    }
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(renamed, str(folder / "model.safetensors"), metadata={"format": "pt"})
    for name, value in (("preprocessor_config.json", preprocessor), ("config.json", cfg)):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def our_name(name: str, feat_extract_norm: str = "group") -> str:
    """The fairseq name of a transformers tensor.

    >>> our_name("encoder.layers.3.feed_forward.output_dense.bias")
    'encoder.layers.3.fc2.bias'
    """
    match = re.fullmatch(r"feature_extractor\.conv_layers\.(\d+)\.(conv|layer_norm)\.(weight|bias)", name)
    if match:
        place = "0" if match[2] == "conv" else "2" if feat_extract_norm == "group" else "2.1"
        return f"feature_extractor.conv_layers.{match[1]}.{place}.{match[3]}"
    match = re.fullmatch(r"(encoder\.layers\.\d+\.)(.*)", name)
    prefix, rest, table = (match[1], match[2], _LAYER_NAMES) if match else ("", name, _NAMES)
    for theirs, ours in table.items():
        if rest.startswith(theirs):
            return prefix + ours + rest[len(theirs) :]
    return name


def their_name(name: str, extractor_mode: str = "default") -> str:
    """The transformers name of a fairseq tensor: the inverse of `our_name`.

    >>> their_name("encoder.pos_conv.0.weight_g")
    'encoder.pos_conv_embed.conv.parametrizations.weight.original0'
    """
    match = re.fullmatch(r"feature_extractor\.conv_layers\.(\d+)\.(0|2|2\.1)\.(weight|bias)", name)
    if match:
        return f"feature_extractor.conv_layers.{match[1]}.{'conv' if match[2] == '0' else 'layer_norm'}.{match[3]}"
    match = re.fullmatch(r"(encoder\.layers\.\d+\.)(.*)", name)
    prefix, rest, table = (match[1], match[2], _LAYER_NAMES) if match else ("", name, _NAMES)
    for theirs, ours in table.items():
        if rest.startswith(ours):
            return prefix + theirs + rest[len(ours) :]
    raise RequestError(f"{name}: no tensor of transformers' HuBERT corresponds to it.")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        RequestError: if it is missing, damaged or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RequestError(f"{path}: expected a JSON object, found {type(error).__name__}: {error}.") from error
    if not isinstance(value, dict):
        raise RequestError(f"{path}: expected a JSON object, found a {type(value).__name__}.")
    return value


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        RequestError: if it is missing, truncated or of another format.
    """
    try:
        return dict(safetensors.torch.load_file(str(path)))
    except (OSError, safetensors.SafetensorError) as error:
        size = f"{path.stat().st_size} bytes" if path.is_file() else "no file"
        raise RequestError(
            f"{path}: expected a safetensors file, found {size} that cannot be read: {error}. Fix: copy or download it again."
        ) from error


def weight_paths(folder: Path) -> list[Path]:
    """The files that hold a transformers folder's weights."""
    for name in WEIGHT_FILES:
        path = folder / name
        if path.is_file():
            if not name.endswith(".index.json"):
                return [path]
            shards = sorted(set(read_json(path).get("weight_map", {}).values()))
            if not shards or any(Path(shard).name != shard for shard in shards):
                raise RequestError(f"{path}: weight_map names no files of this folder. Fix: download it again.")
            return [folder / shard for shard in shards]
    raise RequestError(f"{folder}: expected {' or '.join(WEIGHT_FILES)} beside config.json, found none of them.")


def _read_weights(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in weight_paths(folder):
        content = read_safetensors(path) if path.suffix == ".safetensors" else read_torch_file(path)
        if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
            raise RequestError(f"{path}: expected a mapping of names to tensors, found {type(content).__name__}.")
        tensors.update(content)
    return tensors


def _our_names(tensors: Mapping[str, Tensor], cfg: Mapping[str, Any], notes: list[str]) -> dict[str, Tensor]:
    if any(name.startswith("hubert.") for name in tensors):  # a model with a head on top, e.g. HubertForCTC
        dropped = sorted(name for name in tensors if not name.startswith("hubert."))
        notes.append(f"tensors outside the encoder were left out: {', '.join(dropped) or 'none'}")
        tensors = {name.removeprefix("hubert."): t for name, t in tensors.items() if name.startswith("hubert.")}
    renamed = {our_name(name, cfg["feat_extract_norm"]): tensor for name, tensor in tensors.items()}
    if (
        "mask_emb" not in renamed
    ):  # transformers leaves it out where no masking is configured; states do not depend on it
        notes.append("mask_emb: absent from the folder, zeros instead")
        renamed["mask_emb"] = torch.zeros(cfg["hidden_size"])
    return renamed


def _waveform_norm(folder: Path, notes: list[str]) -> str:
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        notes.append("no preprocessor_config.json: waveforms are not normalised")
        return "none"
    return "utterance" if read_json(path).get("do_normalize", True) else "none"
