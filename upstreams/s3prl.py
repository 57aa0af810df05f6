"""Any upstream of s3prl: `s3prl:NAME`, where the `s3prl` extra is installed, and folders written for it: `s3prl:./FOLDER`.

s3prl's expert is called on one utterance at a time, so that states do not depend on the batch. The frames are the expert's own:
neither cut to round(S / hop), as s3prl's downstream code does, nor filled up to ceil(S / hop) by repeating the last one, as its
`S3PRLUpstream` does. How many there are is measured when the upstream is built, and what does not follow from a window and a hop
is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from superb_probe.errors import CheckError, RequestError, nearest
from superb_probe.upstreams.base import LayerStates, Upstream, UpstreamInfo, frame_mask
from superb_probe.upstreams.lookahead import measure_lookahead
from superb_probe.upstreams.s3prl_folder import is_folder, load_expert, needs_s3prl
from superb_probe.upstreams.torchaudio_stub import install_s3prl_stand_ins

SAMPLE_RATE_HZ = 16000
PROBE_SAMPLES = 16000  # about where frames are counted
CONTROL_SAMPLES = (8000, 12345, 20001, 31999)  # where the count found is held against the expert


class S3PRLEncoder(Upstream):
    """An s3prl expert as an upstream.

    s3prl does not say how far its models look ahead: `info.lookahead_samples` is measured when the upstream is built.
    """

    casts_inputs = True

    def __init__(self, expert: nn.Module, name: str, revision: str) -> None:
        """`expert` takes a list of (S,) waveforms, gives {"hidden_states": layers of (B, T, D)} and has get_downsample_rates."""
        super().__init__()
        self.expert = expert.eval()
        self.requires_grad_(False)
        self.name = name
        rate = expert.get_downsample_rates("hidden_states")  # type: ignore[operator]
        rates = {int(rate)} if isinstance(rate, int) else {int(each) for each in rate}
        if len(rates) != 1:
            raise RequestError(
                f"{name}: its layers have different hops ({sorted(rates)} samples). Fix: probe them one at a time."
            )
        self.hop_samples = rates.pop()
        states = self._layers(torch.zeros(PROBE_SAMPLES))
        self.window_samples = self._measure_window()
        self.info = UpstreamInfo(
            name=name,
            revision=revision,
            num_layers=states.shape[0],
            dim=states.shape[2],
            sample_rate_hz=SAMPLE_RATE_HZ,
            hop_samples=self.hop_samples,
            waveform_norm="utterance" if _normalizes(expert) else "none",
            lookahead_samples=None,
            layer_convention="block_output",
            # s3prl does not say what its models heard; random weights, and transforms without any, have heard nothing
            trained_on=() if revision.startswith("random:") or not list(expert.parameters()) else ("unknown",),
            license="see the model's own",
            citation="S.-w. Yang et al., SUPERB, Interspeech 2021, and the model's own",
        )
        self.eval()
        self.info = dataclasses.replace(self.info, lookahead_samples=measure_lookahead(self).samples)

    def num_frames(self, num_samples: int) -> int:
        """Frames the expert gives, from the window and the hop measured when it was built."""
        return max(0, (num_samples - self.window_samples) // self.hop_samples + 1) if num_samples > 0 else 0

    def forward(self, wavs: Tensor, num_samples: Tensor) -> LayerStates:
        """The expert's hidden states, row by row."""
        parameter = next(self.parameters(), None)
        wavs = wavs if parameter is None else wavs.to(parameter.dtype)
        counts = torch.tensor([self.num_frames(int(n)) for n in num_samples], device=wavs.device)
        states = wavs.new_zeros(self.info.num_layers, wavs.shape[0], int(counts.max()), self.info.dim)
        for row, length in enumerate(num_samples.tolist()):
            if counts[row] < 1:
                continue
            got = self._layers(wavs[row, :length])
            if got.shape[1] != counts[row]:
                raise CheckError(
                    f"{self.name}: {got.shape[1]} frames for {length} samples, expected {int(counts[row])}"
                )
            states[:, row, : got.shape[1]] = got
        return LayerStates(states.masked_fill(~frame_mask(counts, states.shape[2])[None, :, :, None], 0.0), counts)

    def _layers(self, wav: Tensor) -> Tensor:
        """(L, T, D) of one waveform (S,)."""
        return self.layers([wav])[:, 0]

    def layers(self, wavs: Sequence[Tensor]) -> Tensor:
        """What the expert gives for some waveforms (S,) together, (L, B, T, D): frames of padding included, and heard."""
        parameter = next(self.parameters(), None)
        with torch.no_grad():
            given = [wav if parameter is None else wav.to(parameter.device) for wav in wavs]
            layers = self.expert(given)["hidden_states"]
        layers = list(layers) if isinstance(layers, (list, tuple)) else [layers]
        shapes = {tuple(layer.shape) for layer in layers}
        if len(shapes) != 1:
            raise RequestError(
                f"{self.name}: its layers differ in shape ({sorted(shapes)}). Fix: probe them one at a time."
            )
        return torch.stack(layers)

    def _measure_window(self) -> int:
        """The shortest input that gives a frame, as far as the counts near a second say."""

        def frames(num_samples: int) -> int:
            return int(self._layers(torch.zeros(num_samples)).shape[1])

        target = frames(PROBE_SAMPLES)
        low, high = (
            PROBE_SAMPLES - self.hop_samples,
            PROBE_SAMPLES,
        )  # the first length with `target` frames is in (low, high]
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if frames(middle) >= target else (middle, high)
        window = high - (target - 1) * self.hop_samples
        wrong = {
            num_samples: (given, expected)
            for num_samples in CONTROL_SAMPLES
            if (given := frames(num_samples)) != (expected := max(0, (num_samples - window) // self.hop_samples + 1))
        }
        if wrong:
            listed = "; ".join(f"{n} samples: {given}, expected {expected}" for n, (given, expected) in wrong.items())
            raise RequestError(
                f"{self.name}: its frame counts do not follow from a window and a hop of {self.hop_samples} samples ({listed}). "
                "Fix: write an upstream of a few lines around it (docs/add-an-upstream.md)."
            )
        return window


def _normalizes(expert: nn.Module) -> bool:
    """Whether the expert says that it normalises waveforms itself."""
    if getattr(expert, "wav_normalize", False):
        return True
    return any(bool(getattr(getattr(expert, key, None), "normalize", False)) for key in ("task_cfg", "cfg"))


def _identity(expert: nn.Module, checkpoint: str | None) -> str:
    """The sha256 of a checkpoint file, else of the tensors, else s3prl's version for what has none."""
    digest = hashlib.sha256()
    if checkpoint is not None and Path(checkpoint).is_file():
        with Path(checkpoint).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return f"sha256:{digest.hexdigest()}"
    tensors = expert.state_dict()
    if not tensors:
        return (
            f"analytic:s3prl-{importlib.metadata.version('s3prl')}" if importlib.util.find_spec("s3prl") else "analytic"
        )
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def build(name: str, checkpoint: str | None = None, *, random: int | None = None) -> S3PRLEncoder:
    """An upstream of s3prl: what `s3prl:NAME` builds.

    Args:
        name: as s3prl lists it, e.g. "fbank", "hubert", "hubert_local"; or a folder with an expert.py and a hubconf.py, which needs
            s3prl only if its code does ("./folder", or "./folder:function").
        checkpoint: for the names that end in _local, _url or _custom; a folder's function gets it as `ckpt`.
        random: seed of random weights, made by s3prl's own rule; the model is still built from its checkpoint.

    Raises:
        RequestError: if s3prl is not installed, does not know the name, or cannot get the checkpoint.
    """
    if is_folder(name):
        if random is not None:
            raise RequestError(
                f"s3prl:{name}: no random weights for a folder. Fix: leave --random out, or draw them in its code."
            )
        if needs_s3prl(name):
            _import_s3prl(name)
        expert, code = load_expert(name, checkpoint)
        return S3PRLEncoder(expert, f"s3prl:{name}", _with_code(_identity(expert, checkpoint), code))
    upstream_class = _import_s3prl(name)
    known = upstream_class.available_names()
    if name not in known:
        close = nearest(name, known)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise RequestError(f"s3prl:{name}: s3prl has no upstream of that name.{hint} Its documentation lists them all.")
    try:
        model = _construct(upstream_class, name, checkpoint, random)
    except (OSError, TypeError, ValueError, AssertionError, KeyError) as error:
        raise RequestError(
            f"s3prl:{name}: s3prl cannot build it: {type(error).__name__}: {error}. "
            "Fix: without a network give its checkpoint, e.g. s3prl:hubert_local with --checkpoint FILE."
        ) from error
    revision = _identity(model.upstream, checkpoint) if random is None else f"random:{random}"
    return S3PRLEncoder(model.upstream, f"s3prl:{name}", revision)


def _import_s3prl(name: str) -> Any:
    """s3prl's class of upstreams, its imports mended where this torchaudio lacks what it asks for."""
    if importlib.util.find_spec("s3prl") is None:
        raise RequestError(f"s3prl:{name}: s3prl is not installed. Fix: pip install 'superb-probe[s3prl]'.")
    try:
        install_s3prl_stand_ins()
        from s3prl.nn import S3PRLUpstream
    except (ImportError, OSError, AttributeError) as error:
        raise RequestError(
            f"s3prl:{name}: s3prl cannot be imported: {type(error).__name__}: {error}. "
            "Fix: `superb-probe doctor` says which versions work together."
        ) from error
    return S3PRLUpstream


def _with_code(identity: str, code: str) -> str:
    """The identity of weights together with that of the code around them.

    >>> _with_code("sha256:ab", "cd")[:7]
    'sha256:'
    """
    return "sha256:" + hashlib.sha256(f"{identity} {code}".encode()).hexdigest()


def _construct(cls: Any, name: str, checkpoint: str | None, random: int | None) -> Any:
    """s3prl draws random numbers while it builds: the process's own generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random or 0)
        return cls(name, path_or_url=checkpoint, randomize=random is not None)
