"""fairseq's and s3prl's HuBERT checkpoints: their configuration keys, defaults and quirks, to and from `HubertConfig`.

Keys and defaults are those of the HuBERT and Mamba-HuBERT code (arXiv 2106.07447, arXiv 2506.12606): a key that is absent has the
default of fairseq's configuration class. Where a size in the configuration disagrees with the tensors, the tensors are right.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from superb_probe.errors import RequestError, all_at_once
from superb_probe.upstreams.config import HubertConfig
from superb_probe.upstreams.unpickler import ForeignObject, plain

LAYER_TYPES = {
    "transformer": "transformer",
    "mambaformer": "mamba",
    "bimambaformer": "ext_bi_mamba",
    "mamba2former": "mamba2",
}
_DEFAULT_CONV_LAYERS = "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"
_MAX_CONV_LAYERS = 64
# Defaults of the configuration class for the keys read here (digest of the code: reference values of the paper, section 1.5).
_MODEL_DEFAULTS: dict[str, Any] = {
    "layer_type": "transformer",
    "extractor_mode": "default",
    "conv_feature_layers": _DEFAULT_CONV_LAYERS,
    "conv_bias": False,
    "encoder_layers": 12,
    "encoder_embed_dim": 768,
    "encoder_ffn_embed_dim": 3072,
    "encoder_attention_heads": 12,
    "activation_fn": "gelu",
    "layer_norm_first": False,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "required_seq_len_multiple": 2,
    "mamba_ssm_state_expand": 16,
    "mamba_conv_kernel_size": 4,
    "mamba_block_expand": 2,
    "mamba_head_dim": 48,
    "causal_attn": False,
    "final_dim": 0,
}
# Options of later fairseq versions that change the encoder and that this encoder does not have: (key, the value it has).
_UNSUPPORTED = {"conv_pos_batch_norm": False, "pos_conv_depth": 1, "pos_enc_type": "abs"}


@dataclass(frozen=True, slots=True)
class Content:
    """What a checkpoint of another tool holds, in our terms.

    Attributes:
        config: the encoder's shape.
        tensors: fairseq's tensor names to tensors.
        labels: symbols of the pre-training dictionaries, one tuple a dictionary; empty if unknown.
        notes: what was read differently from what the file says, for the record.
    """

    config: HubertConfig
    tensors: dict[str, Tensor]
    labels: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()


def parse_conv_layers(text: str) -> tuple[tuple[int, int, int], ...]:
    """The front end's (channels, kernel, stride) from fairseq's expression, which is read and never run.

    Args:
        text: a list of triples, with ``+`` between lists and ``*`` by an integer.

    Raises:
        RequestError: if it is anything else.

    >>> parse_conv_layers("[(32,10,5)] + [(32,3,2)] * 2")
    ((32, 10, 5), (32, 3, 2), (32, 3, 2))
    """
    fault = RequestError(
        f"conv_feature_layers is {text!r}; expected a list of (channels, kernel, stride) like {_DEFAULT_CONV_LAYERS!r}."
    )

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, (ast.List, ast.Tuple)):
            items = [value(element) for element in node.elts]
            return items if isinstance(node, ast.List) else tuple(items)
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mult)):
            left, right = value(node.left), value(node.right)
            if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
                return left + right
            if isinstance(left, int) and isinstance(right, list):
                left, right = right, left
            repeated = isinstance(node.op, ast.Mult) and isinstance(left, list) and isinstance(right, int)
            if repeated and len(left) * right <= _MAX_CONV_LAYERS:
                return left * right
        raise fault

    try:
        layers = value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise fault from None
    if not isinstance(layers, list) or not 0 < len(layers) <= _MAX_CONV_LAYERS:
        raise fault
    for layer in layers:
        if not isinstance(layer, tuple) or len(layer) != 3 or not all(isinstance(n, int) and n > 0 for n in layer):
            raise fault
    return tuple((layer[0], layer[1], layer[2]) for layer in layers)


def format_conv_layers(layers: Sequence[tuple[int, int, int]]) -> str:
    """The expression of fairseq for a front end.

    >>> format_conv_layers(((32, 10, 5), (32, 3, 2), (32, 3, 2)))
    '[(32,10,5), (32,3,2), (32,3,2)]'
    """
    return "[" + ", ".join(f"({channels},{kernel},{stride})" for channels, kernel, stride in layers) + "]"


def from_fairseq(content: Mapping[str, Any]) -> Content:
    """A raw fairseq checkpoint: `cfg` (or the older `args`), `model` and `task_state`.

    Raises:
        RequestError: if it is not a HuBERT checkpoint; every reason is given.
    """
    cfg = plain(content.get("cfg"))
    if isinstance(cfg, Mapping):
        model_cfg, task_cfg = cfg.get("model"), cfg.get("task")
    else:
        model_cfg = task_cfg = plain(content.get("args"))
    if not isinstance(model_cfg, Mapping) or not isinstance(task_cfg, Mapping):
        raise RequestError(
            "expected fairseq's `cfg` with `model` and `task` (or `args`), found "
            f"cfg: {_kind(content.get('cfg'))}, args: {_kind(content.get('args'))}."
        )
    state = content.get("task_state")
    dictionaries = state.get("dictionaries") if isinstance(state, Mapping) else None
    return _content(model_cfg, task_cfg, content.get("model"), _symbols(dictionaries), "model")


def from_s3prl(content: Mapping[str, Any]) -> Content:
    """A checkpoint converted by s3prl: `task_cfg`, `model_cfg`, `model_weight`, `dictionaries_symbols`.

    Raises:
        RequestError: if it is not a HuBERT checkpoint; every reason is given.
    """
    model_cfg, task_cfg = plain(content["model_cfg"]), plain(content["task_cfg"])
    if not isinstance(model_cfg, Mapping) or not isinstance(task_cfg, Mapping):
        raise RequestError(
            f"expected model_cfg and task_cfg to be mappings, found {_kind(model_cfg)} and {_kind(task_cfg)}."
        )
    labels = _symbols(content.get("dictionaries_symbols"))
    return _content(model_cfg, task_cfg, content["model_weight"], labels, "model_weight")


def to_s3prl(config: HubertConfig, tensors: Mapping[str, Tensor], labels: Sequence[Sequence[str]]) -> dict[str, Any]:
    """The dictionary that s3prl's `hubert_local` and `from_s3prl` read.

    Raises:
        RequestError: if the official code has no words for this encoder.
    """
    types = {ours: theirs for theirs, ours in LAYER_TYPES.items()}
    problems = []
    if config.layer_type not in types:
        problems.append(f"layer_type {config.layer_type!r} has no counterpart in the published code")
    if config.causal_pos_conv:
        problems.append("causal_pos_conv: the published positional convolution is centred")
    if config.extractor_mode not in ("default", "layer_norm"):
        problems.append(f"extractor_mode {config.extractor_mode!r} is ours alone")
    if problems:
        raise all_at_once("cannot write an s3prl checkpoint", problems, "write the project's own format instead")
    model_cfg: dict[str, Any] = {
        "_name": "hubert",
        "label_rate": 50.0,
        "layer_type": types[config.layer_type],
        "extractor_mode": config.extractor_mode,
        "conv_feature_layers": format_conv_layers(config.conv_layers),
        "conv_bias": config.conv_bias,
        "encoder_layers": config.num_layers,
        "encoder_embed_dim": config.dim,
        "encoder_ffn_embed_dim": config.ffn_dim or -1,
        "encoder_attention_heads": config.num_heads,
        "activation_fn": "gelu",
        "layer_norm_first": config.layer_norm_first,
        "conv_pos": config.conv_pos,
        "conv_pos_groups": config.conv_pos_groups,
        "required_seq_len_multiple": config.frame_multiple,
        "mamba_ssm_state_expand": config.state_dim,
        "mamba_conv_kernel_size": config.conv_kernel,
        "mamba_block_expand": config.expand,
        "mamba_head_dim": config.head_dim,
        "causal_attn": config.causal_attention,
        "final_dim": config.final_dim,
        "untie_final_proj": True,
    }
    task_cfg = {
        "_name": "hubert_pretraining",
        "label_rate": 50.0,
        "sample_rate": 16000,
        "normalize": config.waveform_norm == "utterance",
    }
    symbols = [list(dictionary) for dictionary in labels] or [[str(i) for i in range(config.num_classes)]]
    weights = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    return {"task_cfg": task_cfg, "model_cfg": model_cfg, "model_weight": weights, "dictionaries_symbols": symbols}


def _content(
    model_cfg: Mapping[str, Any],
    task_cfg: Mapping[str, Any],
    weights: Any,
    labels: tuple[tuple[str, ...], ...],
    where: str,
) -> Content:
    if not isinstance(weights, Mapping) or not weights:
        raise RequestError(f"expected tensors under {where!r}, found {_kind(weights)}.")
    foreign = [f"{name}: {_kind(value)}" for name, value in weights.items() if not isinstance(value, Tensor)]
    if foreign:
        raise all_at_once(f"expected only tensors under {where!r}", foreign, "convert the checkpoint again")
    notes: list[str] = []
    problems = _foreign_model(model_cfg, task_cfg)
    tensors = _standard_names(dict(weights))
    config = _config(model_cfg, task_cfg, tensors, problems, notes)
    if problems or config is None:
        raise all_at_once("not a HuBERT checkpoint this encoder can run", problems, "check that it is the right file")
    return Content(config, tensors, labels, tuple(notes))


def _foreign_model(model_cfg: Mapping[str, Any], task_cfg: Mapping[str, Any]) -> list[str]:
    problems = []
    name = model_cfg.get("_name")
    if name is None:  # before fairseq's configuration classes: the architecture, e.g. hubert_base
        name = str(model_cfg.get("arch", "hubert")).split("_")[0]
    if name != "hubert":
        problems.append(f"model: expected hubert, found {name!r}")
    for key, value in _UNSUPPORTED.items():
        if model_cfg.get(key, value) not in (value, None):
            problems.append(f"{key}: expected {value!r}, found {model_cfg[key]!r}")
    if model_cfg.get("activation_fn", "gelu") != "gelu":
        problems.append(f"activation_fn: expected 'gelu', found {model_cfg['activation_fn']!r}")
    if task_cfg.get("sample_rate", 16000) != 16000:
        problems.append(f"sample_rate: expected 16000, found {task_cfg['sample_rate']!r}")
    return problems


def _config(
    model_cfg: Mapping[str, Any],
    task_cfg: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    problems: list[str],
    notes: list[str],
) -> HubertConfig | None:
    cfg = {key: model_cfg.get(key, default) for key, default in _MODEL_DEFAULTS.items()}
    cfg = {key: _MODEL_DEFAULTS[key] if value is None else value for key, value in cfg.items()}
    for key, default in _MODEL_DEFAULTS.items():
        if type(cfg[key]) is not type(default):
            problems.append(f"{key}: expected {type(default).__name__}, found {cfg[key]!r}")
    if cfg["layer_type"] not in LAYER_TYPES:
        problems.append(f"layer_type: expected one of {', '.join(LAYER_TYPES)}, found {cfg['layer_type']!r}")
    if cfg["extractor_mode"] not in ("default", "layer_norm"):
        problems.append(f"extractor_mode: expected default or layer_norm, found {cfg['extractor_mode']!r}")
    if problems:
        return None
    layer_type = LAYER_TYPES[cfg["layer_type"]]
    try:
        conv_layers = parse_conv_layers(cfg["conv_feature_layers"])
    except RequestError as error:
        problems.append(str(error))
        return None
    shown = _layer_type(tensors)
    if shown not in (None, layer_type):
        problems.append(
            f"layer_type: the config says {cfg['layer_type']} ({layer_type}), the tensors are those of {shown}"
        )
        return None
    sizes = tensor_sizes(tensors, layer_type, conv_layers, cfg, problems)
    notes += _disagreements(cfg, sizes)
    if sizes["dim"] % cfg["conv_pos_groups"]:
        problems.append(f"conv_pos_groups {cfg['conv_pos_groups']} does not divide the width {sizes['dim']}")
    if layer_type == "transformer" and sizes["dim"] % cfg["encoder_attention_heads"]:
        problems.append(f"encoder_attention_heads {cfg['encoder_attention_heads']} does not divide {sizes['dim']}")
    return HubertConfig(
        layer_type=layer_type,
        extractor_mode=cfg["extractor_mode"],
        num_heads=cfg["encoder_attention_heads"],
        layer_norm_first=cfg["layer_norm_first"],
        conv_pos=cfg["conv_pos"],
        conv_pos_groups=cfg["conv_pos_groups"],
        causal_attention=cfg["causal_attn"] and layer_type == "transformer",
        head_dim=cfg["mamba_head_dim"] if layer_type == "mamba2" else 48,
        frame_multiple=cfg["required_seq_len_multiple"],
        waveform_norm="utterance" if task_cfg.get("normalize") else "none",
        **sizes,
    )


def _disagreements(cfg: Mapping[str, Any], sizes: Mapping[str, Any]) -> list[str]:
    told = {
        "encoder_layers": "num_layers",
        "encoder_embed_dim": "dim",
        "encoder_ffn_embed_dim": "ffn_dim",
        "mamba_ssm_state_expand": "state_dim",
        "mamba_block_expand": "expand",
    }
    return [
        f"{key}: the config says {cfg[key]}, the tensors {sizes[name]}"
        for key, name in told.items()
        if name in sizes and max(cfg[key], 0) != sizes[name]
    ]


def tensor_sizes(
    tensors: Mapping[str, Tensor],
    layer_type: str,
    conv_layers: tuple[tuple[int, int, int], ...],
    cfg: Mapping[str, Any],
    problems: list[str],
) -> dict[str, Any]:
    """The sizes that the tensors settle, by `HubertConfig` field; those of `cfg` where the tensor is absent."""

    def shape(*suffixes: str) -> tuple[int, ...] | None:
        return next((tuple(t.shape) for s in suffixes for name, t in tensors.items() if name.endswith(s)), None)

    found = [int(match[1]) for match in (re.match(r"encoder\.layers\.(\d+)\.", name) for name in tensors) if match]
    dim = (shape("encoder.layer_norm.weight") or (cfg["encoder_embed_dim"],))[0]
    sizes: dict[str, Any] = {
        "num_layers": max(found) + 1 if found else cfg["encoder_layers"],
        "dim": dim,
        "conv_layers": _conv_sizes(tensors, conv_layers, problems),
        "conv_bias": any(re.fullmatch(r"feature_extractor\.conv_layers\.\d+\.0\.bias", name) for name in tensors),
        "ffn_dim": _ffn_dim(shape, layer_type, cfg),
        "final_dim": (shape("label_embs_concat") or (0, cfg["final_dim"]))[-1],
        "num_classes": (shape("label_embs_concat") or (0,))[0],
    }
    if layer_type == "transformer":
        return sizes
    sizes["state_dim"] = cfg["mamba_ssm_state_expand"]
    sizes["conv_kernel"] = cfg["mamba_conv_kernel_size"]
    sizes["expand"] = cfg["mamba_block_expand"]
    inner = shape("mamba.out_proj.weight")
    if inner is not None and len(inner) == 2:
        sizes["expand"] = inner[1] // dim
        if inner[1] % dim:
            problems.append(f"mamba.out_proj.weight: inner width {inner[1]} is no multiple of the width {dim}")
    transition, projection = shape("mamba.A_log"), shape("mamba.in_proj.weight")
    if transition is not None and len(transition) == 2:
        sizes["state_dim"] = transition[1]
    elif transition is not None and inner is not None and projection is not None:  # Mamba-2: 2 E + 2 N + heads rows
        sizes["state_dim"] = (projection[0] - 2 * inner[1] - transition[0]) // 2
    kernel = shape("mamba.conv1d.weight")
    if kernel is not None and len(kernel) == 3:
        sizes["conv_kernel"] = kernel[2]
    return sizes


def _layer_type(tensors: Mapping[str, Tensor]) -> str | None:
    """The layer type that the names show, None if there are no layers."""
    for part, layer_type in {
        ".self_attn.": "transformer",
        ".mamba_rev.": "ext_bi_mamba",
        ".bimamba.": "inn_bi_mamba",
    }.items():
        if any(part in name for name in tensors):
            return layer_type
    transitions = [tensor.ndim for name, tensor in tensors.items() if name.endswith(".mamba.A_log")]
    return ("mamba2" if transitions[0] == 1 else "mamba") if transitions else None


def _ffn_dim(shape: Any, layer_type: str, cfg: Mapping[str, Any]) -> int:
    first, second = shape(".fc1.weight"), shape(".fc2.weight")
    if first is not None and len(first) == 2:
        return int(first[0])
    if second is not None and len(second) == 2:
        return int(second[1])
    if layer_type == "transformer" or shape(".final_layer_norm.weight") is not None:
        return max(int(cfg["encoder_ffn_embed_dim"]), 0)
    return 0


def _conv_sizes(
    tensors: Mapping[str, Tensor], conv_layers: tuple[tuple[int, int, int], ...], problems: list[str]
) -> tuple[tuple[int, int, int], ...]:
    shapes = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"feature_extractor\.conv_layers\.(\d+)\.0\.weight", name)
        if match and tensor.ndim == 3:
            shapes[int(match[1])] = tuple(tensor.shape)
    if shapes and max(shapes) + 1 != len(conv_layers):
        problems.append(
            f"conv_feature_layers: {len(conv_layers)} layers in the config, {max(shapes) + 1} in the tensors"
        )
        return conv_layers
    for i, (_, kernel, _) in enumerate(conv_layers):
        if i in shapes and shapes[i][2] != kernel:  # then the stride, which no tensor shows, is in doubt too
            problems.append(f"conv_feature_layers[{i}]: kernel {kernel} in the config, {shapes[i][2]} in the tensors")
    return tuple(
        (shapes[i][0] if i in shapes else channels, kernel, stride)
        for i, (channels, kernel, stride) in enumerate(conv_layers)
    )


def _standard_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of today's code: an older version calls ExtBiMamba's layer norm as Mamba's."""
    if not any(".mamba_rev." in name for name in tensors):
        return tensors
    return {name.replace(".mamba_layer_norm.", ".bimamba_layer_norm."): tensor for name, tensor in tensors.items()}


def _symbols(dictionaries: Any) -> tuple[tuple[str, ...], ...]:
    """The symbols of fairseq Dictionary records, or of lists of strings."""
    if not isinstance(dictionaries, (list, tuple)):
        return ()
    lists = [d.state.get("symbols", ()) if isinstance(d, ForeignObject) else d for d in dictionaries]
    return tuple(tuple(str(symbol) for symbol in symbols) for symbols in lists if isinstance(symbols, (list, tuple)))


def _kind(value: Any) -> str:
    if isinstance(value, ForeignObject):
        return value.qualified_name
    return "nothing" if value is None else type(value).__name__
