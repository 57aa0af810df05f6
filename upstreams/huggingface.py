"""Any speech encoder of transformers (HuBERT, WavLM, data2vec, Whisper ...): `hf:org/name@revision` or `hf:./FOLDER`.

The states are transformers' `hidden_states`: the input of the first layer and the output of each. They equal those of each
utterance alone: utterances are run together only where padding cannot change them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from superb_probe.errors import CheckError, RequestError
from superb_probe.upstreams.attention import kernels_for
from superb_probe.upstreams.base import LayerStates, Upstream, UpstreamInfo, frame_mask
from superb_probe.upstreams.huggingface_features import HOP_OF_FRAMES, BertEncoder, WhisperEncoder
from superb_probe.upstreams.torchaudio_stub import install_torchaudio_stub

NORM_EPS = (
    1e-7  # of transformers' Wav2Vec2FeatureExtractor; fairseq and s3prl use 1e-5, which tells in very quiet recordings
)
# Families whose front end normalises per frame and whose encoder zeroes padding before its only look across frames without a mask.
# data2vec stacks five positional convolutions, so that padding leaks from the second on: it is run by equal lengths.
MASKED_FAMILIES = ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat")
# Families whose original code says whether waveforms are normalised: fairseq's and Microsoft's Base models (group norm in the front
# end) were trained on waveforms as they are, Large and XLS-R (layer norm) on normalised ones, and data2vec-audio always on those.
# Many a preprocessor_config.json on the hub says do_normalize for a Base model too.
RECIPE_FAMILIES = (*MASKED_FAMILIES, "wav2vec2-conformer")
RECIPE_NORMS = {"group": "none", "layer": "utterance"}
FEATURE_FAMILIES = ("whisper", "wav2vec2-bert")  # of log-mel features: their waveforms are left as they are
CONV_SETTINGS = ("conv_kernel", "conv_stride", "hidden_size", "num_hidden_layers")
UNUSED_WEIGHTS = ("masked_spec_embed",)  # of pre-training only; many checkpoints lack it
SEE_CARD = "see the model card"


class TransformersEncoder(Upstream):
    """A transformers model as an upstream."""

    casts_inputs = True

    def __init__(self, model: nn.Module, info: UpstreamInfo, notes: tuple[str, ...] = ()) -> None:
        """`model` returns hidden_states and has a convolutional front end described by config.conv_kernel and conv_stride.

        `notes` are what a reader of its scores must know.
        """
        super().__init__()
        config: Any = model.config
        self.model = model
        self.info = info
        self.notes = notes
        self.conv: tuple[tuple[int, int], ...] = tuple(zip(config.conv_kernel, config.conv_stride, strict=True))
        self.masked = getattr(config, "feat_extract_norm", "") == "layer" and config.model_type in MASKED_FAMILIES
        self.requires_grad_(False).eval()

    def num_frames(self, num_samples: int) -> int:
        """Frames of the convolutional front end."""
        for kernel, stride in self.conv:
            num_samples = (num_samples - kernel) // stride + 1 if num_samples >= kernel else 0
        return num_samples

    def forward(self, wavs: Tensor, num_samples: Tensor) -> LayerStates:
        """The hidden states of every layer, each row as if it were alone."""
        if self.info.waveform_norm == "utterance":
            wavs = _normalize(wavs, num_samples)
        wavs = wavs.to(next(self.parameters()).dtype)
        counts = torch.tensor([self.num_frames(int(n)) for n in num_samples], device=wavs.device)
        states = wavs.new_zeros(self.info.num_layers, wavs.shape[0], int(counts.max()), self.info.dim)
        if self.masked:
            self._encode(wavs, num_samples, counts, list(range(wavs.shape[0])), states)
        else:
            rows_of_length = defaultdict(list)
            for row, length in enumerate(num_samples.tolist()):
                rows_of_length[length].append(row)
            for length, rows in rows_of_length.items():
                self._encode(wavs[:, :length], num_samples, counts, rows, states)
        return LayerStates(states.masked_fill(~frame_mask(counts, states.shape[2])[None, :, :, None], 0.0), counts)

    def _encode(self, wavs: Tensor, num_samples: Tensor, counts: Tensor, rows: list[int], states: Tensor) -> None:
        """Fill in the states of some rows of the batch."""
        index = torch.tensor([row for row in rows if counts[row] > 0], device=wavs.device, dtype=torch.long)
        if not len(index):
            return
        # Samples past a row's end are dropped with the columns nobody needs, so that more zeros cannot change a kernel's choice.
        width = int(num_samples[index].max())
        mask = frame_mask(num_samples[index], width).long() if self.masked else None
        # transformers 4 draws a number a layer for layer drop, even in eval mode.
        with torch.random.fork_rng(devices=[]), kernels_for(len(index), self.num_frames(width)):
            hidden = self.model(wavs[index, :width], attention_mask=mask, output_hidden_states=True).hidden_states
        frames = self.num_frames(width)
        got = torch.stack(list(hidden))
        if got.shape[0] != self.info.num_layers or got.shape[2:] != (frames, self.info.dim):
            raise CheckError(
                f"{self.info.name}: states of shape {tuple(got.shape)} for {width} samples, expected "
                f"({self.info.num_layers}, {len(index)}, {frames}, {self.info.dim}): not a plain wav2vec 2.0-like encoder"
            )
        states[:, index, :frames] = got


def _normalize(wavs: Tensor, num_samples: Tensor) -> Tensor:
    """Zero mean and unit variance over each row's own samples, with transformers' epsilon, zero after it: (B, S)."""
    valid = frame_mask(num_samples, wavs.shape[1])
    count = num_samples[:, None].to(wavs.dtype)
    centred = (wavs - (wavs * valid).sum(1, keepdim=True) / count) * valid
    return centred * torch.rsqrt(centred.square().sum(1, keepdim=True) / count + NORM_EPS)


def build(name: str, *, random: int | None = None, waveform_norm: str | None = None) -> Upstream:
    """An encoder from the Hugging Face hub or from a folder that `save_pretrained` wrote: what `hf:NAME` builds.

    Args:
        name: "org/name", "org/name@revision" or a folder.
        random: seed of random weights; only the configuration is read then.
        waveform_norm: "none" or "utterance", instead of what the family's original recipe (or for unknown families the
            preprocessor's `do_normalize`) says.

    Raises:
        RequestError: if the hub cannot be reached, the model is of another kind, or tensors are missing.
    """
    if waveform_norm not in (None, "none", "utterance"):
        raise RequestError(f"hf:{name}: waveform_norm {waveform_norm!r}. Fix: none or utterance.")
    install_torchaudio_stub()
    import transformers

    source, _, revision = (name, "", "") if Path(name).is_dir() else name.partition("@")
    where: dict[str, Any] = {"revision": revision} if revision else {}
    config = _reached(name, lambda: transformers.AutoConfig.from_pretrained(source, **where))
    of_features = config.model_type in FEATURE_FAMILIES
    absent = [key for key in CONV_SETTINGS if not hasattr(config, key)]
    if absent and not of_features:
        raise RequestError(
            f"hf:{name}: a {config.model_type} model, which has no {', '.join(absent)}: not a wav2vec 2.0-like encoder of waveforms. "
            "Fix: write an upstream of a few lines around it (docs/add-an-upstream.md)."
        )
    if of_features and waveform_norm is not None:
        raise RequestError(
            f"hf:{name}: a {config.model_type} model takes waveforms as they are. Fix: leave waveform_norm out."
        )
    norm, note = ("none", "") if of_features else _waveform_norm(name, source, where, config, waveform_norm)
    model, weights = _model(name, source, config, where, random)
    card = _model_card(source, where)
    info = UpstreamInfo(
        name=f"hf:{name}",
        revision=weights,
        num_layers=config.num_hidden_layers + 1,
        dim=config.hidden_size,
        sample_rate_hz=16000,
        hop_samples=HOP_OF_FRAMES if of_features else math.prod(config.conv_stride),
        waveform_norm=norm,
        lookahead_samples=None,
        layer_convention="block_output",
        trained_on=() if random is not None else tuple(_as_list(card.get("datasets"))) or ("unknown",),
        license=str(card.get("license", SEE_CARD)),
        citation=SEE_CARD,
    )
    if config.model_type == "whisper":
        extractor: Any = transformers.WhisperFeatureExtractor
        filters = extractor(feature_size=config.num_mel_bins).mel_filters
        return WhisperEncoder(model.get_encoder(), info, torch.as_tensor(filters))
    if config.model_type == "wav2vec2-bert":
        return BertEncoder(model, info)
    return TransformersEncoder(model, info, notes=(note,) if note else ())


def _model(name: str, source: str, config: Any, where: dict[str, Any], random: int | None) -> tuple[Any, str]:
    """The model and the identity of its weights."""
    import transformers

    if random is None:
        model, loading = _reached(
            name,
            lambda: transformers.AutoModel.from_pretrained(
                source, output_loading_info=True, dtype=torch.float32, **where
            ),
        )
        _refuse_missing(name, loading)
        return model, _weights_identity(name, source, config, where)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random)
        auto: Any = transformers.AutoModel
        return auto.from_config(config, dtype=torch.float32), f"random:{random}"


def _reached(name: str, load: Any) -> Any:
    """What `load` gives, or the one error a user can act on."""
    try:
        return load()
    except (OSError, ValueError, ImportError) as error:
        first = str(error).strip().split("\n")[0]
        raise RequestError(
            f"hf:{name}: cannot be loaded: {first}. "
            "Fix: check the name; without a network give a folder that `save_pretrained` or `hf download` wrote: hf:./FOLDER."
        ) from error


def _refuse_missing(name: str, loading: Any) -> None:
    missing = sorted(key for key in loading["missing_keys"] if not key.endswith(UNUSED_WEIGHTS))
    missing += sorted(f"{item[0]} (another shape)" for item in loading["mismatched_keys"])
    if missing:
        raise RequestError(
            f"hf:{name}: {len(missing)} tensors of the encoder are not in the checkpoint and would be random: {', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}. Fix: take a complete checkpoint, or ask for random weights (--random SEED)."
        )


def _cached(source: str, file: str, where: dict[str, Any]) -> Path | None:
    """A small file of the model, if it has it."""
    from transformers.utils.hub import cached_file

    found = cached_file(
        source,
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **where,
    )
    return Path(found) if found else None


def _waveform_norm(name: str, source: str, where: dict[str, Any], config: Any, asked: str | None) -> tuple[str, str]:
    """How waveforms are normalised, and what to say about it."""
    path = _cached(source, "preprocessor_config.json", where)
    settings = json.loads(path.read_text(encoding="utf-8")) if path else {}
    flag = {True: "utterance", False: "none"}.get(settings.get("do_normalize", ""), "")
    kind = getattr(config, "feat_extract_norm", "")
    recipe = RECIPE_NORMS.get(kind, "") if config.model_type in RECIPE_FAMILIES else ""
    if config.model_type == "data2vec-audio":
        recipe = "utterance"
    chosen = asked or recipe or flag
    if not chosen:
        raise RequestError(
            f"hf:{name}: a {config.model_type} model, whose recipe is not known here, without a preprocessor_config.json with "
            "do_normalize: nothing says whether waveforms are normalised. Fix: --upstream-option waveform_norm=none or =utterance."
        )
    others = []
    if recipe and recipe != chosen:
        others.append(f"the original recipe of its family says {recipe}")
    if flag and flag != chosen:
        others.append(f"its preprocessor_config.json says {flag}")
    if not others:
        return chosen, ""
    by = "as asked" if asked else f"by the original recipe of {config.model_type}{f' with {kind} norm' if kind else ''}"
    return chosen, f"hf:{name}: waveform normalisation {chosen}, {by}; {'; '.join(others)} (option waveform_norm)"


def _weights_identity(name: str, source: str, config: Any, where: dict[str, Any]) -> str:
    """The commit on the hub, or the sha256 of a folder's weights."""
    commit = getattr(config, "_commit_hash", None)
    if commit:
        return f"hf:{commit}"
    if not Path(source).is_dir():
        path = _cached(source, "config.json", where)  # .../snapshots/<commit>/config.json
        if path is not None and path.parent.parent.name == "snapshots":
            return f"hf:{path.parent.name}"
        raise RequestError(
            f"hf:{name}: its commit cannot be told. Fix: download it into a folder and give hf:./FOLDER."
        )
    folder = Path(source)
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    digest = hashlib.sha256()
    for path in [folder / "config.json", *files]:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def _model_card(source: str, where: dict[str, Any]) -> dict[str, Any]:
    """The header of the model card (README.md); empty where there is none."""
    path = _cached(source, "README.md", where)
    parts = path.read_text(encoding="utf-8").split("---\n", 2) if path else []
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        header = yaml.safe_load(parts[1])
    except (
        yaml.YAMLError
    ):  # a card is prose: a broken header costs its licence and corpora, and says so by their absence
        return {}
    return header if isinstance(header, dict) else {}


def _as_list(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)] if value else []
