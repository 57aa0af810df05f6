"""The shape of a HuBERT encoder: one frozen dataclass that a checkpoint's config, its tensors or a size name fill in."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_CONV_LAYERS = ((512, 10, 5), (512, 3, 2), (512, 3, 2), (512, 3, 2), (512, 3, 2), (512, 2, 2), (512, 2, 2))


@dataclass(frozen=True, slots=True)
class HubertConfig:
    """Everything that shapes a HuBERT encoder, with fairseq's meaning and our spelling.

    Attributes:
        layer_type: "transformer", "mamba" (one forward Mamba-1 a layer), "ext_bi_mamba" (two mixers summed), "inn_bi_mamba"
            (shared projections) or "mamba2".
        conv_layers: (channels, kernel, stride) of each layer of the convolutional front end.
        extractor_mode: "default" (GroupNorm over time after the first convolution), "layer_norm" (per frame after each), or
            "causal" (per-frame layer norm after the first convolution only: what replaces GroupNorm in our strictly causal front end).
        conv_bias: whether the front end's convolutions have a bias.
        dim: D of the encoder.
        num_layers: encoder layers (states have one more: layer 0).
        num_heads: attention heads.
        ffn_dim: width of the feed-forward block; 0 for none.
        layer_norm_first: pre-norm layers and a final norm, instead of post-norm.
        conv_pos: kernel of the positional convolution.
        conv_pos_groups: its groups.
        causal_pos_conv: pad the positional convolution on the left only, so that it sees no future frame.
        causal_attention: mask attention to the past (Transformer).
        state_dim: N of the selective scan.
        conv_kernel: kernel of Mamba's depthwise convolution.
        expand: d_inner / D of Mamba.
        head_dim: head width of Mamba-2.
        frame_multiple: frames are padded with zeros to a multiple of this and cut again at the end (fairseq's
            required_seq_len_multiple; 2 in the official checkpoints, 1 in ours).
        waveform_norm: "none" or "utterance".
        final_dim: width of the pre-training head's projection.
        num_classes: rows of the pre-training head's label embeddings; 0 where there is none.
    """

    layer_type: str = "transformer"
    conv_layers: tuple[tuple[int, int, int], ...] = DEFAULT_CONV_LAYERS
    extractor_mode: str = "default"
    conv_bias: bool = False
    dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    ffn_dim: int = 3072
    layer_norm_first: bool = False
    conv_pos: int = 128
    conv_pos_groups: int = 16
    causal_pos_conv: bool = False
    causal_attention: bool = False
    state_dim: int = 24
    conv_kernel: int = 4
    expand: int = 3
    head_dim: int = 48
    frame_multiple: int = 2
    waveform_norm: str = "none"
    final_dim: int = 256
    num_classes: int = 504
