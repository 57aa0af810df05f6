"""Reading audio: the exact stretch, one channel, the right rate, or an error that says what and where."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile

from superb_probe.downstreams.audio import AudioHeader, read_header, read_waveform
from superb_probe.downstreams.manifest import Utterance
from superb_probe.downstreams.sox import gain_and_trim
from superb_probe.errors import RequestError


def utterance(audio: str, start_s: float = 0.0, duration_s: float = 1.0) -> Utterance:
    return Utterance("u1", audio, start_s, duration_s, {})


def test_the_exact_stretch_is_read(tmp_path, write_audio):
    write_audio("a.wav")
    whole, _ = soundfile.read(tmp_path / "a.wav", dtype="float32")
    read = read_waveform(utterance("a.wav", 0.25, 0.5), tmp_path)
    assert read.dtype == np.float32 and np.array_equal(read, whole[4000:12000])
    assert not np.array_equal(read, whole[4001:12001])  # a stretch off by a sample would be seen
    assert read_header(tmp_path / "a.wav") == AudioHeader(16000, 1, 16000)


@pytest.mark.parametrize(
    ("name", "subtype"), [("a.flac", "PCM_16"), ("a.ogg", "VORBIS"), ("a.ogg", "OPUS"), ("a.opus", "OPUS")]
)
def test_formats(tmp_path, name, subtype):
    wav = np.sin(np.arange(16000) / 20).astype(np.float32) * 0.3
    soundfile.write(tmp_path / name, wav, 16000, subtype=subtype, format="FLAC" if name == "a.flac" else "OGG")
    read = read_waveform(utterance(name), tmp_path)
    assert read.shape == (16000,) and np.abs(read[1000:-1000] - wav[1000:-1000]).mean() < 0.03


def test_effects(tmp_path, write_audio):
    write_audio("a.wav")
    plain = read_waveform(utterance("a.wav"), tmp_path)
    assert np.array_equal(read_waveform(utterance("a.wav"), tmp_path, waveform="gain_trim"), gain_and_trim(plain))
    with pytest.raises(RequestError, match="unknown waveform effects"):
        read_waveform(utterance("a.wav"), tmp_path, waveform="gian_trim")


def test_another_rate_is_refused_or_converted(tmp_path, write_audio):
    write_audio("slow.wav", rate=8000)
    with pytest.raises(RequestError, match="8000 Hz, expected 16000 Hz"):
        read_waveform(utterance("slow.wav"), tmp_path)
    converted = read_waveform(utterance("slow.wav"), tmp_path, resample=True)
    time_s = np.arange(16000) / 16000
    expected = 0.2 * np.sin(2 * np.pi * 300 * time_s)
    assert converted.shape == (16000,)
    assert np.corrcoef(converted[500:-500], expected[500:-500])[0, 1] > 0.99


def test_bad_files_are_refused(tmp_path, write_audio):
    write_audio("two.wav", channels=2)
    write_audio("a.flac")
    (tmp_path / "text.wav").write_text("hello", encoding="utf-8")
    content = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(content[: len(content) // 2])
    for audio, said in (
        ("two.wav", "2 channels"),
        ("none.wav", "no such audio file"),
        ("text.wav", "cannot be read as audio"),
        ("cut.flac", "damaged|decoded"),
    ):
        with pytest.raises(RequestError, match=said):
            read_waveform(utterance(audio), tmp_path)
    with pytest.raises(RequestError, match="the file ends at 1.0 s"):
        read_waveform(utterance("a.flac", 0.5, 0.75), tmp_path)
    soundfile.write(tmp_path / "nan.wav", np.full(16000, np.nan, dtype=np.float32), 16000, subtype="FLOAT")
    with pytest.raises(RequestError, match="finite"):
        read_waveform(utterance("nan.wav"), tmp_path)
