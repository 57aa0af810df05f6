"""Passages: utterances or documents, from manifests, LibriSpeech's chapters and TED-LIUM's STM files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from superb_probe.downstreams.manifest import Manifest, Utterance
from superb_probe.errors import RequestError
from superb_probe.probes.finetune_data import Passage, passages, stm_manifest, too_dense

STM = """\
;; a comment
Talk 1 Talk 0.50 1.00 <NA> so here 's <unk> a start
Talk 1 inter_segment_gap 1.00 1.20 <NA> ignore_time_segment_in_scoring
Talk 1 Talk 1.20 1.90 <NA> and an end
"""


def manifest(*ids: str, **columns: list[str]) -> Manifest:
    rows = [
        Utterance(
            name,
            "a.wav",
            0.5 * number,
            0.5,
            {"text": f"W{number}", **{key: each[number] for key, each in columns.items()}},
        )
        for number, name in enumerate(ids)
    ]
    return Manifest(rows, Path("."), "train")


def talk(folder: Path, text: str = STM, name: str = "Talk") -> Path:
    (folder / "stm").mkdir(parents=True, exist_ok=True)
    (folder / "sph").mkdir(exist_ok=True)
    (folder / "stm" / f"{name}.stm").write_text(text)
    samples = np.linspace(-0.5, 0.5, 32_000).astype(np.float32)
    soundfile.write(folder / "sph" / f"{name}.sph", samples, 16_000, format="NIST", subtype="PCM_16")
    return folder


def test_chapters_are_joined_in_order() -> None:
    found = passages(manifest("1-2-0000", "1-2-0001", "1-3-0000"), "document")
    assert [(each.id, each.text, [part.id for part in each.parts]) for each in found] == [
        ("1-2", "W0 W1", ["1-2-0000", "1-2-0001"]),
        ("1-3", "W2", ["1-3-0000"]),
    ]


def test_documents_are_told_by_a_column() -> None:
    rows = manifest("a", "b", "c", document=["x", "y", "x"], speaker=["s", "s", "t"])
    assert [each.text for each in passages(rows, "document")] == ["W0 W2", "W1"]
    assert [each.text for each in passages(rows, "document", "speaker")] == ["W0 W1", "W2"]
    assert [each.text for each in passages(rows, "utterance")] == ["W0", "W1", "W2"]
    assert [each.cluster for each in passages(rows, "utterance")] == ["s", "s", "t"]


def test_the_joined_waveform_is_its_parts(tmp_path: Path) -> None:
    samples = np.arange(16_000, dtype=np.float32) / 32_000
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    rows = [Utterance(str(k), "a.wav", start, 0.25, {"text": "A"}) for k, start in enumerate((0.5, 0.0))]
    (found,) = passages(
        Manifest([Utterance(f"1-1-{u.id}", u.audio, u.start_s, u.duration_s, u.labels) for u in rows], tmp_path, "t"),
        "document",
    )
    assert found.duration_s == 0.5
    assert np.array_equal(found.waveform().numpy(), np.concatenate([samples[8000:12_000], samples[:4000]]))


def test_long_ones_are_left_out() -> None:
    rows = manifest("1-2-0", "1-2-1", "1-3-0")
    assert [each.id for each in passages(rows, "document", longest_s=0.6)] == ["1-3"]
    with pytest.raises(RequestError, match="none of 2 passages"):
        passages(rows, "document", longest_s=0.1)


@pytest.mark.parametrize(
    ("rows", "context", "column", "what"),
    [
        (manifest("a"), "document", None, "which document is it of"),
        (manifest("a"), "document", "talk", "no 'talk'"),
        (manifest("a"), "talk", None, "utterance or document"),
        (Manifest([Utterance("a", "a.wav", 0.0, 1.0, {})], Path("."), "t"), "utterance", None, "no column 'text'"),
    ],
)
def test_wrong_requests(rows: Manifest, context: str, column: str | None, what: str) -> None:
    with pytest.raises(RequestError, match=what):
        passages(rows, context, column)


def test_segments_of_a_talk(tmp_path: Path) -> None:
    found = stm_manifest(talk(tmp_path / "dev"), "utterance", "dev")
    assert [(each.id, each.start_s, each.duration_s, each.labels["text"]) for each in found] == [
        ("Talk-0000050-0000100", 0.5, 0.5, "SO HERE'S A START"),
        ("Talk-0000120-0000190", 1.2, 0.7, "AND AN END"),
    ]
    (first, _) = passages(found, "utterance")
    assert len(first.waveform()) == 8000 and first.cluster == "Talk"


def test_a_whole_talk(tmp_path: Path) -> None:
    (found,) = passages(stm_manifest(talk(tmp_path / "dev"), "document", "dev"), "utterance")
    assert (found.text, found.duration_s) == ("SO HERE'S A START AND AN END", 1.4)
    expected = np.linspace(-0.5, 0.5, 32_000)[8000:30_400]
    assert np.abs(found.waveform().numpy() - expected).max() < 1e-4


def test_wrong_talks_are_named_at_once(tmp_path: Path) -> None:
    folder = talk(tmp_path / "dev", "Talk 1 Talk x 1 <NA> a\nTalk 1 Talk 2 1 <NA> b\n")
    (folder / "sph" / "Talk.sph").unlink()
    with pytest.raises(RequestError) as raised:
        stm_manifest(folder, "utterance", "dev")
    for what in ("Talk.stm, line 1", "from 2 to 1 s", "no audio sph/Talk.sph"):
        assert what in str(raised.value)
    with pytest.raises(RequestError, match=r"no stm/\*.stm"):
        stm_manifest(tmp_path, "utterance", "dev")


def test_texts_that_ctc_cannot_align_are_said() -> None:
    row = Passage("p", (), Path("."), "AA", "p")
    assert too_dense([row], [3], [torch.tensor([2, 2])]) == []
    assert too_dense([row], [2], [torch.tensor([2, 2])]) == ["p: 2 frames for 3 tokens and blanks"]
