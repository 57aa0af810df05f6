"""Transformer HuBERT: bidirectional, causal, and bidirectional probed with a causal mask (arXiv 2106.07447, 2506.12606)."""

from __future__ import annotations

from superb_probe.upstreams.base import Upstream
from superb_probe.upstreams.hubert_upstream import build_hubert

PROVIDES = ("transformer_hubert", "transformer_hubert_causal", "transformer_hubert_causal_mask")


def transformer_hubert(
    checkpoint: str | None = None, *, size: str | None = None, random: int | None = None
) -> Upstream:
    """A HuBERT as published: every frame attends to the whole utterance.

    Args:
        checkpoint: a fairseq, s3prl, transformers or superb-probe checkpoint.
        size: "test", "tiny", "small" or "base", without a checkpoint.
        random: seed of random weights.

    >>> transformer_hubert(size="test", random=0).info.lookahead_samples is None
    True
    """
    return build_hubert("transformer_hubert", checkpoint, size, random)


def transformer_hubert_causal(
    checkpoint: str | None = None,
    *,
    size: str | None = None,
    random: int | None = None,
    causal_front_end: bool | None = None,
) -> Upstream:
    """A HuBERT trained with attention masked to the past.

    Args:
        checkpoint: a fairseq, s3prl or superb-probe checkpoint.
        size: "test", "tiny", "small" or "base", without a checkpoint.
        random: seed of random weights.
        causal_front_end: a front end that sees no future either; None: not at small and base, which are as published.

    >>> transformer_hubert_causal(size="test", random=0).info.lookahead_samples
    0
    """
    return build_hubert("transformer_hubert_causal", checkpoint, size, random, causal_front_end)


def transformer_hubert_causal_mask(
    checkpoint: str | None = None, *, size: str | None = None, random: int | None = None
) -> Upstream:
    """A HuBERT trained with full attention, probed with attention masked to the past (arXiv 2506.12606, Table 3).

    Args:
        checkpoint: a checkpoint of a bidirectional Transformer HuBERT.
        size: "test", "tiny", "small" or "base", without a checkpoint.
        random: seed of random weights.

    >>> transformer_hubert_causal_mask(size="test", random=0).info.name
    'transformer_hubert_causal_mask'
    """
    return build_hubert("transformer_hubert_causal_mask", checkpoint, size, random)
