"""The task that needs no data: the same tones every time, which its labels can be read from."""

from __future__ import annotations

import numpy as np

from superb_probe.downstreams.audio import read_waveform
from superb_probe.downstreams.manifest import Manifest, audio_digest
from superb_probe.downstreams.synthetic_sid import UTTERANCES, make_corpus


def spectrum(manifest: Manifest) -> np.ndarray:
    """Log energy in 64 bands, a row an utterance."""
    rows = []
    for utterance in manifest:
        power = np.abs(np.fft.rfft(read_waveform(utterance, manifest.root), 8192)) ** 2
        rows.append(np.log([band.sum() for band in np.array_split(power[:1024], 64)]))
    return np.asarray(rows)


def nearest_mean(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    names = np.unique(labels)
    means = np.stack([train[labels == name].mean(0) for name in names])
    return names[np.argmin(((test[:, None] - means) ** 2).sum(-1), axis=1)]


def test_the_corpus_is_the_same_every_time(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = make_corpus(tmp_path / "a"), make_corpus(tmp_path / "b")
    for split in UTTERANCES:
        one, other = Manifest.read(first / f"{split}.tsv"), Manifest.read(second / f"{split}.tsv")
        assert one.digest == other.digest and audio_digest(one) == audio_digest(other)
        assert one.problems(read_audio=True) == []
    assert make_corpus(tmp_path / "a") == first and len(list((tmp_path / "a").iterdir())) == 1


def test_voices_differ_and_shuffled_labels_do_not_help(tmp_path):
    folder = make_corpus(tmp_path)
    train, test = Manifest.read(folder / "train.tsv"), Manifest.read(folder / "test.tsv")
    x, labels = spectrum(train), np.asarray(train.labels("speaker"))
    right = np.asarray(test.labels("speaker"))
    assert (nearest_mean(x, labels, spectrum(test)) == right).mean() > 0.8
    shuffled = np.random.default_rng(0).permutation(labels)
    assert (nearest_mean(x, shuffled, spectrum(test)) == right).mean() < 0.4
