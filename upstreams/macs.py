"""How much an encoder computes: multiply-accumulates for a second of audio.

Counted over an utterance of ten seconds, because attention grows with the square of the length, and divided by ten. Matrix products,
convolutions, attention and the selective scan count; norms, activations and Fourier transforms do not, as in SUPERB's own count.
SUPERB counts 32 utterances of LibriSpeech together (1.669e12 for HuBERT Base): its column is not comparable with this one.
"""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from superb_probe.upstreams.base import Upstream
from superb_probe.upstreams.config import HubertConfig
from superb_probe.upstreams.features import StoredFeatures
from superb_probe.upstreams.hubert_upstream import HubertUpstream

SECONDS = 10
_counted: WeakKeyDictionary[Upstream, int | None] = WeakKeyDictionary()


def macs_per_second(upstream: Upstream) -> int | None:
    """Multiply-accumulates for a second of audio; None for stored features and for encoders whose code is not this package's.

    A HuBERT of this project is counted from its shapes; filter banks, transformers' and s3prl's encoders by running them once on ten
    seconds of silence. Nothing beyond what a run needs is asked of a stranger's code: `measured_macs` counts it on demand.
    """
    if upstream not in _counted:
        samples = SECONDS * upstream.info.sample_rate_hz
        if isinstance(upstream, StoredFeatures) or not type(upstream).__module__.startswith("superb_probe."):
            _counted[upstream] = None
        elif isinstance(upstream, HubertUpstream):
            _counted[upstream] = round(hubert_macs(upstream.encoder.config, samples) / SECONDS)
        else:
            _counted[upstream] = round(measured_macs(upstream, samples) / SECONDS)
    return _counted[upstream]


def hubert_macs(config: HubertConfig, samples: int) -> int:
    """Multiply-accumulates of a HuBERT encoder over one utterance, from its shapes.

    Args:
        config: the encoder's shape.
        samples: length of the utterance.

    >>> one = HubertConfig(conv_layers=((4, 10, 5),), dim=8, num_layers=0, conv_pos=3, conv_pos_groups=2)
    >>> 2 * 4 * 10 + 2 * 4 * 8 + 2 * 3 * 8 * 4  # two frames: convolution, projection, positional convolution
    336
    >>> hubert_macs(one, 15)
    336
    """
    total, frames, channels = 0, samples, 1
    for width, kernel, stride in config.conv_layers:
        frames = (frames - kernel) // stride + 1
        total += frames * channels * kernel * width
        channels = width
    dim = config.dim
    total += frames * channels * dim * (channels != dim)
    total += frames * dim * (dim // config.conv_pos_groups) * config.conv_pos
    filled = -(-frames // config.frame_multiple) * config.frame_multiple
    return total + config.num_layers * filled * (_mixer_macs(config, filled) + 2 * dim * config.ffn_dim)


def _mixer_macs(config: HubertConfig, frames: int) -> int:
    """Of one layer and one frame: attention, or the Mamba mixers."""
    dim, states = config.dim, config.state_dim
    if config.layer_type == "transformer":
        return 4 * dim * dim + 2 * frames * dim
    inner, rank = config.expand * dim, math.ceil(dim / 16)
    scan = scan_macs(inner, states)
    if config.layer_type == "mamba2":
        mixed = inner + 2 * states
        return dim * (inner + mixed + inner // config.head_dim) + mixed * config.conv_kernel + scan + inner * dim
    direction = inner * config.conv_kernel + inner * (rank + 2 * states) + rank * inner + scan
    projections = 3 * dim * inner  # in (input and gate) and out
    if config.layer_type == "inn_bi_mamba":
        return projections + 2 * direction
    return (projections + direction) * (2 if config.layer_type == "ext_bi_mamba" else 1)


def scan_macs(width: int, states: int) -> int:
    """Multiplications of a selective scan in one frame.

    Four for every state of every channel (step times A, input times B, decay times state, state times C), two more a channel (step
    times input, D times input); the additions go with them.

    >>> scan_macs(2, 3)
    28
    """
    return width * (4 * states + 2)


def measured_macs(upstream: Upstream, samples: int) -> int:
    """Multiply-accumulates that torch sees when one utterance is encoded: half its count of operations."""
    cpu_attention = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    mapping = {} if cpu_attention is None else {cpu_attention: _attention_flops}
    parameter = next(upstream.parameters(), None)
    wavs = torch.zeros(1, samples, device="cpu" if parameter is None else parameter.device)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        upstream(wavs, torch.tensor([samples], device=wavs.device))
    return int(counter.get_total_flops()) // 2


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Operations of an attention kernel that torch's own table lacks: shapes of query, key and value in."""
    shapes = [tuple(each.shape) if isinstance(each, Tensor) else tuple(each) for each in (query, key, value)]
    return int(sdpa_flop_count(*shapes))  # type: ignore[no-untyped-call]
