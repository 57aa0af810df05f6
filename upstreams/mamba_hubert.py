"""Mamba HuBERT: ExtBiMamba, InnBiMamba and causal Mamba layers, with and without an MLP (arXiv 2506.12606)."""

from __future__ import annotations

from superb_probe.upstreams.base import Upstream
from superb_probe.upstreams.hubert_upstream import build_hubert

PROVIDES = (
    "mamba_hubert",
    "mamba_hubert_causal",
    "mamba_mlp_hubert",
    "mamba_mlp_hubert_causal",
    "mamba_inner_hubert",
)


def mamba_hubert(checkpoint: str | None = None, *, size: str | None = None, random: int | None = None) -> Upstream:
    """ExtBiMamba: a forward and a backward Mamba in each layer, summed.

    Args:
        checkpoint: a fairseq, s3prl or superb-probe checkpoint.
        size: "test", "tiny", "small" or "base", without a checkpoint.
        random: seed of random weights.

    >>> mamba_hubert(size="test", random=0).info.lookahead_samples is None
    True
    """
    return build_hubert("mamba_hubert", checkpoint, size, random)


def mamba_hubert_causal(
    checkpoint: str | None = None,
    *,
    size: str | None = None,
    random: int | None = None,
    causal_front_end: bool | None = None,
) -> Upstream:
    """One forward Mamba in each layer.

    Args:
        checkpoint: a fairseq, s3prl or superb-probe checkpoint.
        size: "test", "tiny", "small" or "base", without a checkpoint.
        random: seed of random weights.
        causal_front_end: a front end that sees no future either; None: not at small and base, which are as published.

    >>> mamba_hubert_causal(size="test", random=0).info.lookahead_samples
    0
    """
    return build_hubert("mamba_hubert_causal", checkpoint, size, random, causal_front_end)


def mamba_mlp_hubert(checkpoint: str | None = None, *, size: str | None = None, random: int | None = None) -> Upstream:
    """ExtBiMamba with a feed-forward block in each layer.

    Args:
        checkpoint: a fairseq, s3prl or superb-probe checkpoint.
        size: "test", "tiny", "small" or "base", without a checkpoint.
        random: seed of random weights.

    >>> mamba_mlp_hubert(size="test", random=0).info.lookahead_samples is None
    True
    """
    return build_hubert("mamba_mlp_hubert", checkpoint, size, random)


def mamba_mlp_hubert_causal(
    checkpoint: str | None = None,
    *,
    size: str | None = None,
    random: int | None = None,
    causal_front_end: bool | None = None,
) -> Upstream:
    """One forward Mamba and a feed-forward block in each layer.

    Args:
        checkpoint: a fairseq, s3prl or superb-probe checkpoint.
        size: "test", "tiny", "small" or "base", without a checkpoint.
        random: seed of random weights.
        causal_front_end: a front end that sees no future either; None: not at small and base, which are as published.

    >>> mamba_mlp_hubert_causal(size="test", random=0).info.lookahead_samples
    0
    """
    return build_hubert("mamba_mlp_hubert_causal", checkpoint, size, random, causal_front_end)


def mamba_inner_hubert(
    checkpoint: str | None = None, *, size: str | None = None, random: int | None = None
) -> Upstream:
    """InnBiMamba: two scans, one in each direction, between shared projections.

    Args:
        checkpoint: a superb-probe checkpoint.
        size: "test", "tiny", "small" or "base", without a checkpoint.
        random: seed of random weights.

    >>> mamba_inner_hubert(size="test", random=0).info.lookahead_samples is None
    True
    """
    return build_hubert("mamba_inner_hubert", checkpoint, size, random)
