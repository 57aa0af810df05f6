"""The sizes of the HuBERT encoders: which `HubertConfig` a registered name has at each size.

"small" and "base" are the released configurations of arXiv 2506.12606 (their parameter counts are tested); what those do not say
is marked below. "tiny" has at most 2 M parameters and six layers, and is wider where width 160 would give a family fewer
parameters than the Transformers have, so that all are within 5 %: the size of the shipped weights. "test" is for unit tests,
under 0.5 M.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from superb_probe.errors import RequestError, unknown_name
from superb_probe.upstreams.config import HubertConfig

SIZES = ("test", "tiny", "small", "base")
DEFAULT_SIZE = "tiny"  # what a name is without a size or a checkpoint; shipped weights are of it


@dataclass(frozen=True, slots=True)
class Family:
    """What a registered name stands for, whatever its size.

    Attributes:
        description: in words, for messages.
        layer_types: layer types a checkpoint of this name may have; the first is what random weights get.
        mlp: whether layers have the feed-forward block; None where either is of the family.
        causal_attention: whether a checkpoint's attention is masked to the past.
        mask_at_probing: switch the causal mask on whatever the checkpoint was trained with.
        causal: no layer sees a later frame, so that a causal front end makes the whole encoder causal.
    """

    description: str
    layer_types: tuple[str, ...]
    mlp: bool | None = True
    causal_attention: bool = False
    mask_at_probing: bool = False
    causal: bool = False


FAMILIES: Mapping[str, Family] = {
    "transformer_hubert": Family("a bidirectional Transformer HuBERT", ("transformer",)),
    "transformer_hubert_causal": Family(
        "a causal Transformer HuBERT", ("transformer",), causal_attention=True, causal=True
    ),
    "transformer_hubert_causal_mask": Family(
        "a bidirectional Transformer HuBERT, probed with a causal mask",
        ("transformer",),
        mask_at_probing=True,
        causal=True,
    ),
    "mamba_hubert": Family("a bidirectional Mamba HuBERT (ExtBiMamba)", ("ext_bi_mamba",), mlp=False),
    "mamba_hubert_causal": Family("a causal Mamba HuBERT", ("mamba", "mamba2"), mlp=False, causal=True),
    "mamba_mlp_hubert": Family("a bidirectional Mamba HuBERT (ExtBiMamba) with an MLP", ("ext_bi_mamba",)),
    "mamba_mlp_hubert_causal": Family("a causal Mamba HuBERT with an MLP", ("mamba", "mamba2"), causal=True),
    "mamba_inner_hubert": Family("a bidirectional Mamba HuBERT (InnBiMamba)", ("inn_bi_mamba",), mlp=None),
}

_TEST_FRONT = {
    "conv_layers": ((32, 10, 5), *((32, 3, 2),) * 4, *((32, 2, 2),) * 2),
    "num_heads": 4,
    "conv_pos": 32,
    "conv_pos_groups": 4,
    "final_dim": 16,
    "num_classes": 24,
    "frame_multiple": 1,
}
# The first convolutions run at the highest rates: with 64 channels there and 128 later the front end is half of what 128
# throughout costs, which is most of a tiny encoder on a CPU.
_TINY_FRONT = {
    "conv_layers": ((64, 10, 5), *((64, 3, 2),) * 2, *((128, 3, 2),) * 2, *((128, 2, 2),) * 2),
    "num_heads": 4,
    "conv_pos": 64,
    "conv_pos_groups": 16,
    "final_dim": 64,
    "num_classes": 104,
    "frame_multiple": 1,
}
_FRONTS: dict[str, dict[str, Any]] = {
    "test": {**_TEST_FRONT, "dim": 48, "num_layers": 2},
    "tiny": {**_TINY_FRONT, "dim": 160, "num_layers": 6},
    "small": {"dim": 384, "num_layers": 12, "num_heads": 12},
    "base": {"dim": 768, "num_layers": 12, "num_heads": 12},
}
_TEST_SCAN = {"state_dim": 8, "expand": 2}
_PAPER_SCAN = {"state_dim": 24, "expand": 3}
# Per name: test, tiny, small, base. ExtBiMamba's two mixers of expand 1 cost at tiny what the causal one costs with expand 2.
_LAYERS: dict[str, tuple[dict[str, Any], ...]] = {
    "transformer_hubert": (
        {"ffn_dim": 96},
        {"ffn_dim": 480},
        {"ffn_dim": 1024},
        {"ffn_dim": 3072},
    ),
    "mamba_hubert": (
        _TEST_SCAN,
        {"state_dim": 16, "expand": 1, "dim": 192},
        _PAPER_SCAN,
        _PAPER_SCAN,
    ),
    "mamba_hubert_causal": (
        _TEST_SCAN,
        {"state_dim": 16, "expand": 2, "dim": 192},
        _PAPER_SCAN,
        _PAPER_SCAN,
    ),
    "mamba_mlp_hubert": (
        {**_TEST_SCAN, "ffn_dim": 96},
        {"state_dim": 16, "expand": 1, "ffn_dim": 240},
        {**_PAPER_SCAN, "ffn_dim": 1024},
        {**_PAPER_SCAN, "ffn_dim": 3072},
    ),
    "mamba_mlp_hubert_causal": (
        {**_TEST_SCAN, "ffn_dim": 96},
        {"state_dim": 16, "expand": 2, "ffn_dim": 240},
        {**_PAPER_SCAN, "ffn_dim": 1024},
        {**_PAPER_SCAN, "ffn_dim": 896},
    ),
    # No configuration of InnBiMamba was released: the paper's other Mamba settings are used, and its counts are not reproduced.
    "mamba_inner_hubert": (
        _TEST_SCAN,
        {"state_dim": 16, "expand": 2, "dim": 176},
        _PAPER_SCAN,
        _PAPER_SCAN,
    ),
}
_LAYERS["transformer_hubert_causal"] = _LAYERS["transformer_hubert_causal_mask"] = _LAYERS["transformer_hubert"]


def size_config(name: str, size: str, causal_front_end: bool | None = None) -> HubertConfig:
    """The configuration of a registered name at a size.

    Args:
        name: one of `FAMILIES`.
        size: one of `SIZES`.
        causal_front_end: a front end without the future (left-padded positional convolution, per-frame norm). None: yes for the
            causal names at sizes test and tiny; no at small and base, which are as published, and for a mask put on later.

    Raises:
        RequestError: for an unknown name or size, or a causal front end under layers that see the future.

    >>> size_config("mamba_hubert_causal", "base").dim
    768
    """
    if name not in FAMILIES:
        raise unknown_name("upstream", name, FAMILIES)
    if size not in SIZES:
        raise RequestError(f"{name}: unknown size {size!r}. Fix: one of {', '.join(SIZES)}.")
    family = FAMILIES[name]
    if causal_front_end and not family.causal:
        raise RequestError(f"{name}: causal_front_end is for causal encoders; the layers of this one see the future.")
    config = HubertConfig(
        **{
            "layer_type": family.layer_types[0],
            "causal_attention": family.causal_attention or family.mask_at_probing,
            "ffn_dim": 0,
            **_FRONTS[size],
            **_LAYERS[name][SIZES.index(size)],
        }
    )
    if causal_front_end is None:
        causal_front_end = family.causal and not family.mask_at_probing and size in ("test", "tiny")
    if causal_front_end:
        config = replace(config, extractor_mode="causal", causal_pos_conv=True, frame_multiple=1)
    return config


def family_name(config: HubertConfig) -> str:
    """The registered name whose family and direction a configuration has.

    >>> family_name(HubertConfig(layer_type="mamba", ffn_dim=0))
    'mamba_hubert_causal'
    """
    for name, family in FAMILIES.items():
        if (
            config.layer_type in family.layer_types
            and family.mlp in (None, config.ffn_dim > 0)
            and family.causal_attention == (config.causal_attention and config.layer_type == "transformer")
            and not family.mask_at_probing
        ):
            return name
    raise RequestError(
        f"no registered upstream has layers of type {config.layer_type!r} with ffn_dim {config.ffn_dim}."
    )


def check_family(name: str, config: HubertConfig, where: str) -> None:
    """Compare the family and direction of a checkpoint with those of the name it is to be loaded under.

    Raises:
        RequestError: naming both.
    """
    found = family_name(config)
    accepted = "transformer_hubert" if FAMILIES[name].mask_at_probing else name
    if found != accepted:
        raise RequestError(
            f"{name} takes {FAMILIES[accepted].description}; {where} holds {FAMILIES[found].description}. "
            f"Fix: --upstream {found}, or another checkpoint."
        )
