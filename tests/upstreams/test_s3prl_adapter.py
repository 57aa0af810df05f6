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


def test_what_it_was_trained_on_is_not_known_unless_it_was_not_trained() -> None:
    class Transform(Expert):
        def __init__(self) -> None:
            super().__init__()
            del self.scale
            self.register_buffer("scale", torch.ones(1))  # as a table of mel filters

    assert S3PRLEncoder(Expert(), "s3prl:toy", "sha256:0").info.trained_on == ("unknown",)
    assert S3PRLEncoder(Expert(), "s3prl:toy", "random:0").info.trained_on == ()
    assert S3PRLEncoder(Transform(), "s3prl:toy", "analytic").info.trained_on == ()


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
def test_without_s3prl_it_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"pip install 'superb-probe\[s3prl\]'"):
        build("fbank")
    for line in (
        "from ..interfaces import UpstreamBase",
        "import s3prl.hub",
        "from s3prl.upstream.interfaces import UpstreamBase",
    ):
        (tmp_path / "expert.py").write_text(line)
        with pytest.raises(RequestError, match=r"pip install 'superb-probe\[s3prl\]'"):
            build(str(tmp_path))


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


EXPERT = """
import torch
from .layers import SCALE

class UpstreamExpert(torch.nn.Module):
    def __init__(self, ckpt=None, model_config=None, **kwargs):
        super().__init__()
        value = 1.0 if ckpt is None else float(open(ckpt).read())
        self.scale = torch.nn.Parameter(torch.tensor(value * SCALE))

    def get_downsample_rates(self, key):
        return 160

    def forward(self, wavs):
        frames = [wav.unfold(0, 400, 160)[:, :4] * self.scale for wav in wavs]
        return {"hidden_states": [torch.nn.utils.rnn.pad_sequence(frames, batch_first=True)] * 2}
"""
HUBCONF = """
from .expert import UpstreamExpert as _UpstreamExpert

def mine(*args, **kwargs):
    return _UpstreamExpert(*args, **kwargs)
"""


def _folder(tmp_path: Path, hubconf: str | None = HUBCONF, scale: float = 2.0) -> Path:
    folder = tmp_path / "my-upstream"
    folder.mkdir(exist_ok=True)
    (folder / "expert.py").write_text(EXPERT)
    (folder / "layers.py").write_text(f"SCALE = {scale}\n")
    if hubconf is not None:
        (folder / "hubconf.py").write_text(hubconf)
    return folder


@pytest.mark.parametrize("hubconf", [HUBCONF, None])
def test_a_folder_with_its_own_expert_is_an_upstream(tmp_path: Path, hubconf: str | None) -> None:
    folder = _folder(tmp_path, hubconf)
    upstream = build(str(folder))
    wav = torch.arange(2000.0) / 2000
    assert torch.equal(upstream.extract([wav]).states[1, 0], wav.unfold(0, 400, 160)[:, :4] * 2)
    results = check_upstream(upstream)
    assert all(result.passed for result in results), format_checks(results)
    (tmp_path / "weights.txt").write_text("3.0")
    loaded = build(str(folder), str(tmp_path / "weights.txt"))
    assert torch.equal(loaded.extract([wav]).states[1, 0], wav.unfold(0, 400, 160)[:, :4] * 6)
    assert loaded.info.revision != upstream.info.revision


def test_a_folder_whose_code_changed_is_another_upstream(tmp_path: Path) -> None:
    before = build(str(_folder(tmp_path)))
    assert build(str(_folder(tmp_path))).info.revision == before.info.revision
    (tmp_path / "my-upstream" / "expert.py").write_text(EXPERT.replace("[:, :4]", "[:, 4:8]"))
    after = build(str(tmp_path / "my-upstream"))
    assert after.info.revision != before.info.revision
    wav = torch.arange(2000.0)
    assert not torch.equal(after.extract([wav]).states, before.extract([wav]).states)  # it is the new code that runs


def test_one_of_several_functions_is_named(tmp_path: Path) -> None:
    folder = _folder(tmp_path, HUBCONF + "\ndef mine_large(ckpt):\n    return _UpstreamExpert(ckpt)\n")
    assert build(f"{folder}:mine").info.num_layers == 2
    with pytest.raises(RequestError, match="hubconf.py has 2 functions. Fix: .* one of mine, mine_large"):
        build(str(folder))
    with pytest.raises(RequestError, match="no function 'mine_larg'. Did you mean mine_large"):
        build(f"{folder}:mine_larg")
    with pytest.raises(RequestError, match="its code fails: TypeError: .*give --checkpoint FILE"):
        build(f"{folder}:mine_large")


def test_a_folder_that_is_no_upstream_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no expert.py or hubconf.py in .*; it has nothing"):
        build(str(tmp_path))
    with pytest.raises(RequestError, match="no expert.py or hubconf.py"):
        build("./nowhere")
    folder = _folder(tmp_path, "def mine():\n    return 3\n")
    with pytest.raises(RequestError, match="it gave int, not a torch.nn.Module with get_downsample_rates"):
        build(str(folder))
    with pytest.raises(RequestError, match="no random weights for a folder"):
        build(str(folder), random=1)
    (folder / "hubconf.py").unlink()
    (folder / "expert.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(RequestError, match="ModuleNotFoundError: No module named 'nothing_of_that_name'"):
        build(str(folder))


@needs_s3prl
def test_a_folder_may_import_from_s3prl_beside_it(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    text = EXPERT.replace("import torch\n", "import torch\nfrom ..interfaces import UpstreamBase\n", 1)
    (folder / "expert.py").write_text(text.replace("torch.nn.Module)", "UpstreamBase)"))
    assert build(str(folder)).info.num_layers == 2


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
