"""s3prl's experts as upstreams, on a stand-in of one, and on s3prl itself where it is installed; and the torchaudio stand-ins."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from superb_probe.errors import CheckError, RequestError
from superb_probe.upstreams.check import causes, check_upstream, format_checks
from superb_probe.upstreams.fbank import fbank, fbank_no_cmvn
from superb_probe.upstreams.s3prl import S3PRLEncoder, build

HAS_S3PRL = importlib.util.find_spec("s3prl") is not None
needs_s3prl = pytest.mark.skipif(not HAS_S3PRL, reason="s3prl is not installed (pip install 'superb-probe[s3prl]')")


class Expert(nn.Module):
    """What s3prl calls an expert: a list of waveforms in, padded layers out; it divides by the batch's loudest sample."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def get_downsample_rates(self, key: str) -> int:
        assert key == "hidden_states"
        return 40

    def frames(self, wav: Tensor) -> Tensor:
        return wav.unfold(0, 100, 40)[:, :6]

    def forward(self, wavs: list[Tensor]) -> dict[str, list[Tensor]]:
        loudest = max(float(wav.abs().max()) for wav in wavs) + 1e-3
        padded = nn.utils.rnn.pad_sequence([self.frames(wav) / loudest * self.scale for wav in wavs], batch_first=True)
        return {"hidden_states": [padded, padded.tanh()]}


class TwoRates(Expert):
    def get_downsample_rates(self, key: str) -> list[int]:  # type: ignore[override]
        return [40, 80]


class UnequalLayers(Expert):
    def forward(self, wavs: list[Tensor]) -> dict[str, list[Tensor]]:
        layer = super().forward(wavs)["hidden_states"][0]
        return {"hidden_states": [layer, layer[:, :, :3]]}


class EvenFrames(Expert):
    def frames(self, wav: Tensor) -> Tensor:
        whole = super().frames(wav)
        return whole[: len(whole) // 2 * 2]


class ThirteenthIsLong(Expert):
    """One frame too many for one length, which no control length shows."""

    def frames(self, wav: Tensor) -> Tensor:
        whole = super().frames(wav)
        return torch.cat([whole, whole[-1:]]) if len(wav) == 5000 else whole


def test_an_expert_is_run_row_by_row() -> None:
    upstream = S3PRLEncoder(Expert(), "s3prl:toy", "random:0")
    assert (upstream.info.num_layers, upstream.info.dim, upstream.info.hop_samples, upstream.window_samples) == (
        2,
        6,
        40,
        100,
    )
    assert upstream.info.lookahead_samples is None  # it divides by the loudest sample of the utterance
    results = check_upstream(upstream)
    assert all(result.passed for result in results), format_checks(results)


def test_running_an_expert_on_a_batch_would_be_caught() -> None:
    class Batched(S3PRLEncoder):
        def forward(self, wavs: Tensor, num_samples: Tensor):  # type: ignore[no-untyped-def]
            result = super().forward(wavs, num_samples)
            return type(result)(result.states / (1 + wavs.abs().max()), result.num_frames)

    assert causes(check_upstream(Batched(Expert(), "s3prl:toy", "random:0"))) == ["batch"]


@pytest.mark.parametrize(
    ("expert", "says"),
    [(TwoRates, "different hops"), (UnequalLayers, "differ in shape"), (EvenFrames, "do not follow from a window")],
)
def test_what_has_no_one_grid_is_refused(expert: type[Expert], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        S3PRLEncoder(expert(), "s3prl:toy", "random:0")


def test_a_frame_too_many_is_not_cut() -> None:
    upstream = S3PRLEncoder(ThirteenthIsLong(), "s3prl:toy", "random:0")
    upstream.extract([torch.ones(4999)])
    with pytest.raises(CheckError, match="124 frames for 5000 samples, expected 123"):
        upstream.extract([torch.ones(5000)])


@pytest.mark.skipif(HAS_S3PRL, reason="s3prl is installed")
def test_without_s3prl_it_says_what_to_install() -> None:
    with pytest.raises(RequestError, match=r"pip install 'superb-probe\[s3prl\]'"):
        build("fbank")


@needs_s3prl
def test_s3prl_fbank_equals_ours() -> None:
    generator = torch.Generator().manual_seed(0)
    for name, ours in (("fbank", fbank()), ("fbank_no_cmvn", fbank_no_cmvn())):
        theirs = build(name)
        for num_samples in (16000, 12345, 900):
            wav = 0.1 * torch.randn(num_samples, generator=generator)
            expected = theirs.extract([wav]).states
            assert (ours.extract([wav]).states - expected).norm() / expected.norm() < 1e-4
    assert theirs.info.lookahead_samples == 640


@needs_s3prl
def test_s3prl_hubert_equals_ours(shared: Path) -> None:
    from superb_probe.upstreams.load import load_upstream

    checkpoint = str(shared / "fixtures" / "upstreams" / "transformer_hubert.pt")
    wav = 0.1 * torch.randn(12345, generator=torch.Generator().manual_seed(0))
    theirs = build("hubert_local", checkpoint).extract([wav]).states
    ours = load_upstream("transformer_hubert", checkpoint=checkpoint).extract([wav]).states
    assert (ours - theirs).norm() / theirs.norm() < 1e-4


@needs_s3prl
def test_a_name_s3prl_does_not_have_gets_the_nearest() -> None:
    with pytest.raises(RequestError, match="Did you mean hubert"):
        build("huberd")


def _fake_torchaudio(folder: Path, extension: str) -> None:
    package = folder / "torchaudio"
    (package / "_extension").mkdir(parents=True)
    (package / "__init__.py").write_text("from . import functional\n")
    (package / "_extension" / "__init__.py").write_text(extension)
    (package / "functional.py").write_text(
        "from torchaudio._extension import fail_if_no_align\n@fail_if_no_align\ndef forced_align():\n    return 'aligned'\n"
    )


def _run(folder: Path, code: str) -> str:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


INSTALL = """
import torch
torch.version.cuda = None
from superb_probe.upstreams.torchaudio_stub import install_s3prl_stand_ins, install_torchaudio_stub
"""


def test_a_torchaudio_that_does_not_load_is_mended(tmp_path: Path) -> None:
    _fake_torchaudio(tmp_path, "raise OSError('libcudart.so.13: cannot open shared object file')")
    code = """
print(install_torchaudio_stub(), install_torchaudio_stub())
import torchaudio
try:
    torchaudio.functional.forced_align()
except RuntimeError as error:
    print(error)
install_s3prl_stand_ins(); install_s3prl_stand_ins()
torchaudio.set_audio_backend("sox_io")
from torchaudio.sox_effects import apply_effects_tensor
try:
    apply_effects_tensor()
except NotImplementedError as error:
    print(error)
"""
    lines = _run(tmp_path, INSTALL + code).split("\n")
    assert lines[0] == "True True"
    assert "forced_align needs its compiled extension" in lines[1]
    assert "apply_effects_tensor is not in this torchaudio" in lines[2]


def test_a_torchaudio_that_loads_is_left_alone(tmp_path: Path) -> None:
    _fake_torchaudio(tmp_path, "def fail_if_no_align(function):\n    return function\n")
    code = "print(install_torchaudio_stub())\nimport torchaudio\nprint(torchaudio.functional.forced_align())"
    assert _run(tmp_path, INSTALL + code).split("\n") == ["False", "aligned"]
