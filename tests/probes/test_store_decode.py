"""Decoding in processes of their own: the same samples, the same refusals, and what happens when one ends."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from superb_probe.downstreams.audio import read_waveform
from superb_probe.downstreams.manifest import Manifest
from superb_probe.errors import CheckError, RequestError
from superb_probe.probes import store_decode
from superb_probe.probes.store import FeatureStore, duration_batches
from superb_probe.probes.store_decode import Decoders
from superb_probe.probes.store_extract import Extractor, decoding_processes

pytestmark = pytest.mark.skipif(not store_decode.possible(), reason="needs memory shared without a file (Linux)")


@pytest.fixture
def train(corpus: Path) -> Manifest:
    return Manifest.read(corpus / "train.tsv")


@pytest.fixture(scope="module")
def decoders() -> Iterator[Decoders]:
    made = Decoders(1)
    yield made
    made.close()


@pytest.mark.parametrize("waveform", ["none", "gain_trim"])
def test_processes_give_the_samples_that_threads_give(
    decoders: Decoders, train: Manifest, waveform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_decode, "FIRST_BYTES", 1)  # so that the memory grows
    for chunk in ([train[0]], list(train)[:7], [train[3]]):
        found = decoders.read(chunk, train.root, 16000, waveform)
        for utterance, wave in zip(chunk, found, strict=True):
            assert wave.dtype == np.float32
            np.testing.assert_array_equal(wave, read_waveform(utterance, train.root, 16000, waveform))


def test_what_a_process_cannot_read_is_said_as_here_and_it_goes_on(
    decoders: Decoders, train: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = dataclasses.replace(train[0], duration_s=99.0)
    with pytest.raises(RequestError, match="but the file ends at") as here:
        read_waveform(long, train.root)
    with pytest.raises(RequestError) as there:
        decoders.read([train[1], long], train.root, 16000)
    assert str(there.value) == str(here.value)
    monkeypatch.setattr(store_decode, "SPARE_SAMPLES", 2 - train[1].duration_s * 16000)  # room for two samples
    monkeypatch.setattr(store_decode, "FIRST_BYTES", 4)
    other = Decoders(1)
    with pytest.raises(RuntimeError, match="(?s)in a process that decodes.*Traceback"):
        other.read([train[1]], train.root, 16000)
    other.close()
    monkeypatch.undo()
    assert decoders.read([train[1]], train.root, 16000)[0].size


def test_a_process_that_ended_is_said(train: Manifest) -> None:
    made = Decoders(1)
    made.read([train[0]], train.root, 16000)
    made._workers[0]._process.kill()
    made._workers[0]._process.wait()
    with pytest.raises(CheckError, match="a process that decodes audio ended"):
        made.read([train[0]], train.root, 16000)
    made.close()


def test_a_process_ends_with_its_input(train: Manifest) -> None:
    made = Decoders(2)
    made.read([train[0]], train.root, 16000)
    processes = [worker._process for worker in made._workers]
    made.close()
    assert [process.returncode for process in processes] == [0, 0]


def test_a_process_that_decodes_has_no_torch() -> None:
    words = "import sys, superb_probe.probes.store_decode; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", words], check=False).returncode == 0


def test_an_extraction_with_processes_gives_the_same_states(
    decoders: Decoders, toy: SimpleNamespace, train: Manifest
) -> None:
    assert decoding_processes(torch.device("cpu")) is None
    batches = duration_batches(train, 1.0)
    keeping = FeatureStore(dtype="float32").keeping
    made = [Extractor(toy.Upstream(), train.root, keeping, decoders=each).run(batches) for each in (decoders, None)]
    for (ours, states), (theirs, expected) in zip(*made, strict=True):
        assert ours == theirs
        assert all(torch.equal(*pair) for pair in zip(states, expected, strict=True))
