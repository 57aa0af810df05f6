"""IEMOCAP, Libri2Mix, Audio SNIPS and QUESST 2014, read from miniature trees of the published form."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from superb_probe.downstreams.audio import read_waveform
from superb_probe.downstreams.corpora import CORPORA, corpus_folds
from superb_probe.downstreams.corpus_base import Findings, read_tasks
from superb_probe.downstreams.load import load_folds, load_task
from superb_probe.probes.diarization import read_rttm

Write = Callable[..., Path]


def read(name, root, task, *, partial=True, **options):
    """The folds and the findings of a tree."""
    findings = Findings(partial=partial)
    folds = read_tasks(CORPORA[name], root, (task,), findings=findings, **options)[task]
    return folds, findings


def said(findings):
    return "\n".join([*map(str, findings.problems), *findings.notes])


@pytest.fixture
def iemocap(tmp_path: Path, write_speech: Write) -> Path:
    """Five sessions, an improvised and a scripted dialogue each, with raters' lines, other emotions and what macOS leaves behind."""
    root = tmp_path / "IEMOCAP_full_release"
    number = 0
    for session in range(1, 6):
        for dialog, emotions in (("impro01", ("neu", "exc", "xxx")), ("script01_1", ("ang", "sad", "hap", "fru"))):
            name = f"Ses0{session}F_{dialog}"
            lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", ""]
            for index, emotion in enumerate(emotions):
                turn = f"{name}_{'FM'[index % 2]}{index:03d}"
                write_speech(root / f"Session{session}/sentences/wav/{name}/{turn}.wav", number)
                lines += [f"[6.2901 - 8.2357]\t{turn}\t{emotion}\t[2.5000, 2.5000, 2.5000]", "C-E2:\tNeutral;\t()", ""]
                number += 1
            folder = root / f"Session{session}/dialog/EmoEvaluation"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
            (folder / f"._{name}.txt").write_bytes(b"\x00\x05\x16\x07\xff")
    return root


def test_iemocap_is_read_and_divided_by_session(iemocap):
    (whole,), findings = read("iemocap", iemocap, "er")
    assert findings.problems == [] and len(whole.manifests["train"]) == 25
    by_id = {each.id: each.labels for each in whole.manifests["train"]}
    assert by_id["Ses01F_impro01_M001"] == {"speaker": "Ses01M", "emotion": "hap", "session": "1"}  # excited is happy
    assert set(whole.manifests["train"].labels("emotion")) == {"neu", "hap", "ang", "sad"}
    folds = corpus_folds("iemocap", iemocap, load_task("er"), partial=True)
    assert [len(fold.manifests["test"]) for fold in folds] == [5] * 5
    assert [len(fold.manifests["train"]) + len(fold.manifests["dev"]) for fold in folds] == [20] * 5
    assert all("PARTIAL" in fold.notes[0] for fold in folds)


def test_what_is_wrong_with_iemocap_is_named(iemocap):
    (iemocap / "Session2/sentences/wav/Ses02F_impro01/Ses02F_impro01_F000.wav").unlink()
    table = iemocap / "Session3/dialog/EmoEvaluation/Ses03F_impro01.txt"
    table.write_text(
        table.read_text(encoding="utf-8").replace("Ses03F_impro01_M001", "Ses03F_impro01_F000") + "[1.0 - oops]\tx\n",
        encoding="utf-8",
    )
    for file in (iemocap / "Session5/dialog/EmoEvaluation").iterdir():
        file.unlink()
    _, findings = read("iemocap", iemocap, "er", partial=False)
    for part in (
        "Session1: 5 utterances of the four classes, 1085 published",
        "Session2: 1 of 5 listed utterances have no audio, first Ses02F_impro01_F000",
        "a second label of Ses03F_impro01_F000",
        "'[1.0 - oops]",
        "Session5/dialog/EmoEvaluation: no labels there",
    ):
        assert part in said(findings), part


@pytest.fixture
def libri2mix(tmp_path: Path, write_speech: Write) -> Path:
    """The tables with absolute paths of another machine, the mixtures beside them as LibriMix lays them out."""
    number = 0
    for split, place in (("train", "train-100"), ("dev", "dev"), ("test", "test")):
        tables: dict[str, list[str]] = {name: [] for name in ("wav.scp", "segments", "utt2spk", "rttm", "reco2dur")}
        for index in range(2):
            reco = f"{split}{index}-1_b-2"
            for kind in ("mix_both", "mix_clean"):
                write_speech(tmp_path / "Libri2Mix/wav16k/max" / place / kind / f"{reco}.wav", number, seconds=1.5)
            tables["wav.scp"].append(f"{reco} /elsewhere/Libri2Mix/wav16k/max/{place}/mix_both/{reco}.wav")
            tables["reco2dur"].append(f"{reco} 1.5")
            for speaker, (start, end) in (("103", (0.0, 1.0)), ("1240", (0.5, 1.5))):
                tables["segments"].append(f"{speaker}_{reco}_{start} {reco} {start} {end}")
                tables["utt2spk"].append(f"{speaker}_{reco}_{start} {speaker}")
                tables["rttm"].append(f"SPEAKER {reco} 1 {start:.2f} {end - start:.2f} <NA> <NA> {speaker} <NA> <NA>")
            number += 1
        folder = tmp_path / "data" / split
        folder.mkdir(parents=True)
        for name, lines in tables.items():
            (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def test_libri2mix_is_read(libri2mix):
    (fold,), findings = read("libri2mix", libri2mix, "sd")
    assert findings.problems == [] and [len(manifest) for manifest in fold.manifests.values()] == [2, 2, 2]
    first = fold.manifests["train"][0]
    assert first.audio == "Libri2Mix/wav16k/max/train-100/mix_both/train0-1_b-2.wav"  # not mix_clean, of the same name
    assert first.labels == {"rttm": "data/train/rttm"} and first.duration_s == 1.5
    task = load_task("sd")
    assert task.label_problems(fold) == []
    (fold,), findings = read("libri2mix", libri2mix / "data", "sd", extras={"audio": libri2mix / "Libri2Mix"})
    assert findings.problems == [] and fold.manifests["test"][0].audio.startswith("Libri2Mix/")


def test_an_rttm_file_of_many_recordings_is_read_once_and_again_when_it_changed(libri2mix):
    rttm = libri2mix / "data/train/rttm"
    before = read_rttm(rttm)
    assert read_rttm(rttm) is before and len(before) == 2
    rttm.write_text(rttm.read_text(encoding="utf-8").replace("1.00", "1.25"), encoding="utf-8")
    os.utime(rttm, ns=(0, 0))  # of the same length: the time alone tells
    assert read_rttm(rttm) != before


def test_paths_of_this_machine_are_followed(libri2mix):
    for split in ("train", "dev", "test"):
        scp = libri2mix / "data" / split / "wav.scp"
        scp.write_text(scp.read_text(encoding="utf-8").replace("/elsewhere", str(libri2mix)), encoding="utf-8")
    (fold,), findings = read("libri2mix", libri2mix / "data", "sd")
    assert findings.problems == [] and len(fold.manifests["test"]) == 2


def test_what_is_wrong_with_libri2mix_is_named(libri2mix, write_speech):
    def change(name, old, new):
        file = libri2mix / "data" / name
        file.write_text(file.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")

    change("train/rttm", "SPEAKER train0", "SPEAKER trainx")
    change("train/reco2dur", "train1-1_b-2 1.5", "train1-1_b-2 1.2")
    change("dev/reco2dur", "dev0-1_b-2 1.5", "dev0-1_b-2 long")
    change("dev/wav.scp", "dev1-1_b-2 ", "dev1-1_b-2 flac -d ")
    change("dev/wav.scp", "dev1-1_b-2.wav", "dev1-1_b-2.flac |")
    change("test/utt2spk", "103_test0", "103_other")
    (libri2mix / "Libri2Mix/wav16k/max/test/mix_both/test1-1_b-2.wav").unlink()
    (libri2mix / "Libri2Mix/wav16k/max/test/mix_clean/test1-1_b-2.wav").unlink()
    _, findings = read("libri2mix", libri2mix, "sd", partial=False)
    for part in (
        "data/train: rttm and segments differ: 1 recording (train0-1_b-2)",
        "train1-1_b-2.wav): lasts 1.500 s, but the list says 1.200 s",
        "data/dev/reco2dur: no length of dev0-1_b-2",
        "dev1-1_b-2 is a command, which is not run",
        "data/test/utt2spk: no speaker: 1 segment (103_test0",
        "data/test: 1 of 2 listed utterances have no audio, first test1-1_b-2",
        "train: 2 utterances, 13900 published",
    ):
        assert part in said(findings), part


IOB = "BOS PLAY WESTBAM ALUMB ALLERGIC & MORE ? EOS\tO O artist artist album album album O PlayMusic"


@pytest.fixture
def snips(tmp_path: Path, write_speech: Write) -> Path:
    """Two voices a split, one of them of another split."""
    root = tmp_path / "SNIPS"
    lines, number = [], 0
    for folder, voices in (("train", ("Ivy", "Aditi")), ("valid", ("Amy", "Ivy")), ("test", ("Emma", "Joey"))):
        for voice in voices:
            write_speech(root / folder / f"{voice}-snips-{folder}-0.wav", number)
            lines.append(f"{voice}-snips-{folder}-0 {IOB}\n")
            number += 1
    (root / "all.iob.snips.txt").write_text("".join(lines), encoding="utf-8")
    (root / "slots.txt").write_text("O\nartist\nalbum\n", encoding="utf-8")
    return root


def test_audio_snips_is_read(snips):
    (fold,), findings = read("snips", snips, "sf")
    assert findings.problems == []
    assert [manifest.ids for manifest in fold.manifests.values()] == [
        ("Ivy-snips-train-0",),
        ("Amy-snips-valid-0",),
        ("Emma-snips-test-0",),
    ]
    assert fold.manifests["test"][0].labels == {
        "speaker": "Emma",
        "text": "PLAY WESTBAM ALUMB ALLERGIC AND MORE",
        "iob": "O B-artist I-artist B-album I-album I-album",
    }
    assert load_task("sf").label_problems(fold) == []


def test_what_is_wrong_with_audio_snips_is_named(snips, write_speech):
    table = snips / "all.iob.snips.txt"
    text = table.read_text(encoding="utf-8").replace(f"Amy-snips-valid-0 {IOB}", "Amy-snips-valid-0 BOS A EOS\tO O O X")
    table.write_text(text + f"Emma-snips-test-9 {IOB.replace('artist', 'singer')}\n", encoding="utf-8")
    write_speech(snips / "train" / "Joey-snips-train-5.wav", 3)
    _, findings = read("snips", snips, "sf", partial=False)
    for part in (
        "Amy-snips-valid-0: 1 words, 2 labels",
        "1 slot (singer) not in slots.txt",
        "audio without a transcript: 1 utterance (Joey-snips-train-5)",
        "test: 1 of 2 listed utterances have no audio, first Emma-snips-test-9",
    ):
        assert part in said(findings), part


@pytest.fixture
def quesst14(tmp_path: Path, write_speech: Write) -> Path:
    """English and other queries and documents, at 8 kHz as published."""
    root = tmp_path / "quesst14Database"
    (root / "scoring").mkdir(parents=True)
    number = 0

    def audio(listed: str) -> str:
        nonlocal number
        number += 1
        write_speech(root / listed.partition("/")[2], number, rate=8000)
        return listed

    documents = [
        f"{audio(f'quesst14Database/Audio/quesst14_{index:05d}.wav')} {language}\n"
        for index, language in ((1, "nnenglish"), (2, "nnenglish"), (3, "czech"))
    ]
    (root / "scoring/language_key_utterances.lst").write_text("".join(documents), encoding="utf-8")
    for part in ("dev", "eval"):
        names = [f"quesst14_{part}_{index:04d}" for index in (1, 2, 3)]
        lines = [
            f"{audio(f'quesst14Database/{part}_queries/{name}.wav')} {language}\n"
            for name, language in zip(names, ("nnenglish", "nnenglish", "basque"), strict=True)
        ]
        (root / f"scoring/language_key_{part}.lst").write_text("".join(lines), encoding="utf-8")
        truth = root / f"scoring/groundtruth_quesst14_{part}" / f"quesst14_{part}.rttm"
        truth.parent.mkdir()
        truth.write_text(
            f"SPKR-INFO quesst14_00001 1 <NA> <NA> <NA> unknown x <NA>\n"
            f"LEXEME quesst14_00002 1 0.5 1.0 {names[0]} lex x 0.5\nLEXEME quesst14_00002 1 0.9 1.0 {names[0]} lex x 0.5\n"
            f"LEXEME quesst14_00001 1 0.5 1.0 {names[0]} lex x 0.5\nLEXEME quesst14_00003 1 0.5 1.0 {names[2]} lex x 0.5\n"
            f"LEXEME quesst14_00003 1 0.5 1.0 {names[0]} lex x 0.5\n",
            encoding="utf-8",
        )
    return root


def test_quesst14_is_read(quesst14):
    (fold,), findings = read("quesst14", quesst14, "qbe")
    assert findings.problems == [] and set(fold.manifests) == {"dev", "test"}
    test = fold.manifests["test"]
    assert test.ids == ("quesst14_eval_0001", "quesst14_eval_0002", "quesst14_00001", "quesst14_00002")
    assert test["quesst14_eval_0001"].labels == {"role": "query", "occurrences": "quesst14_00002 quesst14_00001"}
    assert (
        test["quesst14_eval_0002"].labels["occurrences"] == "" and test["quesst14_00001"].labels["role"] == "document"
    )
    assert "dev: 4 utterances, 2576 published" in said(findings)
    task = load_task("qbe")
    assert task.label_problems(fold) == []
    paths = {}
    for split, manifest in fold.manifests.items():
        paths[split] = quesst14 / f"{split}.tsv"
        manifest.write(paths[split])
    (own,) = load_folds(task, manifests=paths, root=quesst14)
    assert any("4 files of another rate are converted to 16000 Hz" in note for note in own.notes)
    query = own.manifests["test"][0]
    assert read_waveform(query, quesst14, waveform=task.info.waveform).shape == (32000,)  # two seconds


def test_what_is_wrong_with_quesst14_is_named(quesst14):
    (quesst14 / "dev_queries/quesst14_dev_0002.wav").unlink()
    (quesst14 / "scoring/groundtruth_quesst14_eval/quesst14_eval.rttm").write_text("LEXEME a\n", encoding="utf-8")
    with (quesst14 / "scoring/language_key_utterances.lst").open("a", encoding="utf-8") as file:
        file.write("nonsense\n")
    _, findings = read("quesst14", quesst14, "qbe", partial=False)
    for part in (
        "language_key_dev.lst: 1 of 2 listed utterances have no audio, first quesst14_dev_0002",
        "quesst14_eval.rttm, line 1",
        "says of none of the 2 queries where it occurs",
        "language_key_utterances.lst, line 4: 'nonsense'",
    ):
        assert part in said(findings), part
