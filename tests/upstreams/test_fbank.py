"""The filter banks against torchaudio's numbers, against a plain loop, and padded against alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from superb_probe.errors import RequestError
from superb_probe.upstreams import fbank as module
from superb_probe.upstreams.fbank import FilterBank, deltas, fbank, fbank_no_cmvn, mfcc


def _golden_waveform() -> torch.Tensor:
    n = torch.arange(1360)
    return ((n * n * n * 31 + n * n * 17 + n * 7919) % 4093).float() / 4093 * 0.4 - 0.2 + 0.3 * torch.sin(0.07 * n)


# Rows 0, 3 and 6 of what torchaudio 2.11 (compliance.kaldi.fbank / mfcc, functional.compute_deltas) gives for that waveform with
# s3prl's options and its CMVN: features of these columns.
GOLDEN = {
    "fbank": (
        [0, 10, 40, 79, 80, 120, 200, 239],
        [
            [0.93058, -1.07869, -0.48556, 1.03276, 1.25652, 0.54358, 0.95949, -0.97919],
            [-0.56501, 0.95712, 1.87503, -1.30792, 0.39355, 0.30353, -1.63306, 1.4467],
            [-1.16058, 0.77064, -1.20935, 1.54043, -0.70285, -0.53496, 1.15816, -1.23079],
        ],
    ),
    "fbank_no_cmvn": (
        [0, 10, 40, 79, 80, 120, 200, 239],
        [
            [-5.12579, -4.73979, 0.54097, 4.61789, -0.01755, 0.11203, 0.02795, 0.00191],
            [-6.22552, -2.90208, 2.08689, 3.90789, -0.1328, 0.04522, -0.20227, 0.11155],
            [-6.66345, -3.07042, 0.06697, 4.77188, -0.27922, -0.18817, 0.04559, -0.00946],
        ],
    ),
    "mfcc": (
        [0, 1, 7, 12, 13, 20, 30, 38],
        [
            [-1.78297, -0.50894, 1.34306, 0.30784, 0.85179, -0.64675, 1.11278, 0.42919],
            [0.2509, -0.84238, -1.22392, -0.69701, -1.96616, 0.45315, -1.44519, 0.40591],
            [1.33526, 1.67776, -0.67019, 0.79884, 0.53451, -0.07324, 0.66027, -0.94485],
        ],
    ),
}
BUILDERS = {"fbank": fbank, "fbank_no_cmvn": fbank_no_cmvn, "mfcc": mfcc}


def _golden_error(name: str, upstream: FilterBank) -> float:
    columns, rows = GOLDEN[name]
    got = upstream.extract([_golden_waveform()]).states[0, 0][[0, 3, 6]][:, columns]
    return float((got - torch.tensor(rows)).abs().max())


@pytest.mark.parametrize("name", BUILDERS)
def test_equals_torchaudio(name: str) -> None:
    assert _golden_error(name, BUILDERS[name]()) < 2e-4


@pytest.mark.parametrize(
    ("constant", "wrong"), [("PREEMPHASIS", 0.95), ("LOW_HZ", 0.0), ("CMVN_EPS", 0.1), ("DELTA_REACH_FRAMES", 3)]
)
def test_the_golden_numbers_notice_a_wrong_constant(
    monkeypatch: pytest.MonkeyPatch, constant: str, wrong: float
) -> None:
    monkeypatch.setattr(module, constant, wrong)
    assert _golden_error("fbank", fbank()) > 2e-3


def _loop_fbank(wav: np.ndarray) -> np.ndarray:
    """80 log-mel bins of one waveform, one frame and one bin at a time, float64."""

    def mel(hz: float) -> float:
        return 1127.0 * np.log(1.0 + hz / 700.0)

    step = (mel(8000.0) - mel(20.0)) / 81
    window = np.array([(0.5 - 0.5 * np.cos(2 * np.pi * i / 399)) ** 0.85 for i in range(400)])
    rows = []
    for start in range(0, len(wav) - 399, 160):
        frame = wav[start : start + 400] - wav[start : start + 400].mean()
        frame = np.concatenate([[frame[0] * (1 - 0.97)], frame[1:] - 0.97 * frame[:-1]]) * window
        power = np.abs(np.fft.rfft(frame, 512)) ** 2
        row = []
        for index in range(80):
            left, centre, right = (mel(20.0) + (index + k) * step for k in (0, 1, 2))
            energy = 0.0
            for k in range(256):
                position = mel(k * 31.25)
                energy += power[k] * max(
                    0.0, min((position - left) / (centre - left), (right - position) / (right - centre))
                )
            row.append(np.log(max(energy, np.finfo(np.float32).eps)))
        rows.append(row)
    return np.array(rows)


def test_equals_a_plain_loop() -> None:
    wav = np.random.default_rng(0).normal(0, 0.1, 1500).astype(np.float32)
    expected = _loop_fbank(wav.astype(np.float64))
    got = fbank_no_cmvn().extract([torch.from_numpy(wav)]).states[0, 0, :, :80].numpy()
    assert got.shape == expected.shape == (7, 80)
    assert np.abs(got - expected).max() < 1e-5
    padded = np.pad(expected, ((2, 2), (0, 0)), mode="edge")
    slope = np.stack([sum(k * padded[t + 2 + k] for k in (-2, -1, 1, 2)) / 10 for t in range(7)])
    assert np.abs(fbank_no_cmvn().extract([torch.from_numpy(wav)]).states[0, 0, :, 80:160].numpy() - slope).max() < 1e-5


@pytest.mark.parametrize("name", BUILDERS)
def test_alone_equals_padded(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    wavs = [0.1 * torch.randn(n, generator=generator) for n in (4000, 400, 2345, 720)]
    upstream = BUILDERS[name]()
    together = upstream.extract(wavs)
    assert together.num_frames.tolist() == [23, 1, 13, 3]
    for row, wav in enumerate(wavs):
        alone = upstream.extract([wav]).states[0, 0]
        got = together.states[0, row]
        assert torch.allclose(got[: len(alone)], alone, atol=1e-6)
        assert not got[len(alone) :].any()


def test_deltas_repeat_each_rows_own_last_frame() -> None:
    features = torch.tensor([[[0.0], [1.0], [4.0], [77.0], [99.0]]])
    own = deltas(features[:, :3], torch.tensor([3]))
    assert torch.equal(deltas(features, torch.tensor([3]))[:, :3], own)
    assert not torch.equal(
        deltas(features, torch.tensor([5]))[:, :3], own
    )  # what zero padding taken as frames would give


def test_normalised_frames_have_mean_zero_and_deviation_one() -> None:
    states = fbank().extract([_golden_waveform()]).states[0, 0]
    assert states.mean(0).abs().max() < 1e-5
    assert (states.std(0) - 1).abs().max() < 1e-4
    raw = fbank_no_cmvn().extract([_golden_waveform()]).states[0, 0]
    assert raw.mean(0).abs().max() > 1


def test_one_frame_and_silence_are_finite() -> None:
    for wav in (_golden_waveform()[:400], torch.zeros(1600)):
        states = fbank().extract([wav]).states
        assert states.isfinite().all()
        assert states.abs().max() < 1e-3


def test_options_without_meaning_are_refused() -> None:
    for options in ({"checkpoint": "a.pt"}, {"random": 0}, {"size": "huge"}):
        with pytest.raises(RequestError, match="fbank: .*Fix"):
            fbank(**options)  # type: ignore[arg-type]
    assert fbank(size="test").info == fbank().info
