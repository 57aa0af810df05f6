"""LibriSpeech, VoxCeleb1, Fluent Speech Commands and Speech Commands, read from miniature trees of the published form."""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from superb_probe.downstreams.corpora import CORPORA, choose_data, corpora_table, corpus_folds, find_corpus
from superb_probe.downstreams.corpus_base import Findings, read_tasks
from superb_probe.downstreams.corpus_speech_commands import split_of
from superb_probe.downstreams.load import load_folds, load_task
from superb_probe.errors import RequestError
from superb_probe.registry import Registry

Write = Callable[..., Path]
LEXICON = "AS\tAE1 Z\nAS\tEY1 Z\nIT  IH1 T\nIS IH1 Z\nSO S OW1\nGO G OW1\nON AA1 N\n"


def read(name, root, task, *, partial=True, **options):
    """The folds and the findings of a tree."""
    findings = Findings(partial=partial)
    folds = read_tasks(CORPORA[name], root, (task,), findings=findings, **options)[task]
    return folds, findings


def said(findings):
    return "\n".join([*map(str, findings.problems), *findings.notes])


def cut(path: Path) -> None:
    """Throw half of a file away."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.fixture
def librispeech(tmp_path: Path, write_speech: Write) -> Path:
    """Two chapters of train, one each of dev and test, and the lexicon."""
    root = tmp_path / "LibriSpeech"
    number = 0
    for folder, chapters in (("train-clean-100", ("103-1240", "1034-121119")), ("dev-clean", ("84-121123",))):
        for chapter in chapters:
            number = _chapter(root / folder, chapter, write_speech, number)
    _chapter(root / "test-clean", "61-70968", write_speech, number)
    (root / "librispeech-lexicon-200k-g2p.txt").write_text(LEXICON, encoding="utf-8")
    return root


def _chapter(folder: Path, chapter: str, write_speech: Write, number: int) -> int:
    place = folder / chapter.replace("-", "/")
    lines = []
    for index, text in enumerate(("AS IT IS", "SO GO ON")):
        write_speech(place / f"{chapter}-{index:04d}.flac", number + index)
        lines.append(f"{chapter}-{index:04d} {text}\n")
    (place / f"{chapter}.trans.txt").write_text("".join(lines), encoding="utf-8")
    return number + 2


def test_librispeech_is_read(librispeech):
    (fold,), findings = read("librispeech", librispeech, "pr")
    assert findings.problems == [] and [len(fold.manifests[split]) for split in ("train", "dev", "test")] == [4, 2, 2]
    first = fold.manifests["train"]["103-1240-0000"]
    assert first.audio == "train-clean-100/103/1240/103-1240-0000.flac" and first.duration_s == 1.0
    assert first.labels == {"speaker": "103", "text": "AS IT IS", "phones": "AE1 Z IH1 T IH1 Z"}
    assert load_task("pr").labels(fold.manifests["train"]).sizes() == {"tokens": 74}  # the published classes
    (fold,), findings = read("librispeech", librispeech.parent, "asr")  # the folder above it
    assert "phones" not in fold.manifests["train"].columns and "read from" in said(findings)


def test_librispeech_that_is_not_complete_is_no_librispeech(librispeech):
    with pytest.raises(RequestError, match=r"train: 4 utterances, 28539 published"):
        load_folds(load_task("asr"), dataset="librispeech", root=librispeech)
    (fold,) = corpus_folds("librispeech", librispeech, load_task("asr"), partial=True)
    assert any("PARTIAL corpus" in note and "4 utterances, 28539 published" in note for note in fold.notes)


def test_every_problem_of_librispeech_is_named_at_once(librispeech, write_speech):
    train = librispeech / "train-clean-100" / "103" / "1240"
    cut(train / "103-1240-0000.flac")  # truncated
    soundfile.write(train / "103-1240-0001.flac", np.zeros(399, np.float32), 16000)  # shorter than a frame
    write_speech(train / "103-1240-0002.flac", 0)  # no transcript
    dev = librispeech / "dev-clean" / "84" / "121123"
    write_speech(dev / "84-121123-0000.flac", 1, rate=8000)  # wrong rate
    write_speech(dev / "84-121123-0001.flac", 1, channels=2)
    lines = (dev / "84-121123.trans.txt").read_text(encoding="utf-8")
    (dev / "84-121123.trans.txt").write_bytes(
        (lines + "84-121123-0002 SO WEIRD\n84-121123-0003\n").replace("\n", "\r\n").encode()
    )
    (librispeech / "test-clean" / "61" / "70968" / "61-70968-0000.flac").write_bytes(b"not audio")
    _, findings = read("librispeech", librispeech, "asr", partial=False)
    text = said(findings)
    for part in (
        "103-1240-0000 (train-clean-100/103/1240/103-1240-0000.flac): truncated",
        "103-1240-0001 (train-clean-100/103/1240/103-1240-0001.flac): 0.0249 s, shorter than one frame",
        "audio without a transcript: 1 utterance (103-1240-0002)",
        "8000 Hz, expected 16000 Hz",
        "2 channels, expected one",
        "transcripts without audio: 2 utterances (84-121123-0002, 84-121123-0003)",
        "84-121123-0003 has no words",
        "121123.trans.txt: Windows line ends",
        "61-70968-0000.flac): cannot be read as audio",
        "dev: 2 utterances, 2703 published",
    ):
        assert part in text, part
    (fold,), _ = read("librispeech", librispeech, "asr", exclude=["103-1240-0000"])
    assert "103-1240-0000" not in fold.manifests.get("train", ())
    _, findings = read("librispeech", librispeech, "asr", exclude=["nobody"])
    assert "no utterance 'nobody' to leave out" in said(findings)


def test_windows_line_ends_do_not_change_the_words(librispeech):
    file = librispeech / "dev-clean/84/121123/84-121123.trans.txt"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    (fold,), findings = read("librispeech", librispeech, "asr")
    assert fold.manifests["dev"].labels("text") == ["AS IT IS", "SO GO ON"] and "Windows line ends" in said(findings)


def test_a_missing_lexicon_names_its_source_and_a_word_outside_it_is_a_problem(librispeech, tmp_path):
    lexicon = librispeech / "librispeech-lexicon-200k-g2p.txt"
    lexicon.rename(tmp_path / "mine.txt")
    _, findings = read("librispeech", librispeech, "pr")
    assert "datasets/s3prl/g2p" in said(findings) and "--extra lexicon=FILE" in said(findings)
    (fold,), findings = read("librispeech", librispeech, "pr", extras={"lexicon": tmp_path / "mine.txt"})
    assert not findings.problems and "phones" in fold.manifests["test"].columns
    (tmp_path / "mine.txt").write_text(LEXICON.replace("GO G OW1\n", ""), encoding="utf-8")
    _, findings = read("librispeech", librispeech, "pr", extras={"lexicon": tmp_path / "mine.txt"})
    assert "not in the lexicon: 1 word (GO)" in said(findings)
    _, findings = read("librispeech", librispeech, "pr", extras={"lexicom": tmp_path / "mine.txt"})
    assert "no extra file 'lexicom'" in said(findings)


@pytest.fixture(params=["two folders", "one folder"])
def voxceleb1(request: pytest.FixtureRequest, tmp_path: Path, write_speech: Write) -> Path:
    """Four speakers in either folder style, with the split file and the trials."""
    root = tmp_path / "vox1"
    split, number = [], 0
    for speaker, part in (("id10001", "dev"), ("id10002", "dev"), ("id10270", "test"), ("id10271", "test")):
        for index, video in enumerate(("1zcIwhmdeo4", "-x_y7gAzTnM", "5r0dWxy17C8")):
            place = "wav" if request.param == "one folder" else f"{part}/wav"
            write_speech(root / place / speaker / video / "00001.wav", number)
            split.append(f"{index + 1} {speaker}/{video}/00001.wav\n")
            number += 1
    (root / "iden_split.txt").write_text("".join(split), encoding="utf-8")
    names = [f"{speaker}/1zcIwhmdeo4/00001.wav" for speaker in ("id10270", "id10271")]
    trials = [f"1 {names[0]} id10270/-x_y7gAzTnM/00001.wav\n", f"0 {names[0]} {names[1]}\n"]
    (root / "veri_test.txt").write_text("".join(trials), encoding="utf-8")
    return root


def test_voxceleb1_is_read_in_both_folder_styles(voxceleb1):
    (fold,), findings = read("voxceleb1", voxceleb1, "sid")
    assert findings.problems == [] and [len(manifest) for manifest in fold.manifests.values()] == [4, 4, 4]
    assert fold.manifests["train"].ids[0] == "id10001-1zcIwhmdeo4-00001"
    assert set(fold.manifests["test"].labels("speaker")) == {"id10001", "id10002", "id10270", "id10271"}
    (fold,), findings = read("voxceleb1", voxceleb1, "asv")
    assert findings.problems == [] and set(fold.manifests) == {"train", "test"}
    assert set(fold.manifests["train"].labels("speaker")) == {"id10001", "id10002"}
    assert len(fold.manifests["train"]) == 6 and len(fold.manifests["test"]) == 3  # only what the trials name
    assert fold.trials["test"].labels.tolist() == [1, 0] and "2 pairs" in said(findings)
    assert fold.trials["test"].problems(fold.manifests["test"]) == []


def test_what_is_wrong_with_voxceleb1_is_named(voxceleb1, write_speech, tmp_path):
    (gone,) = voxceleb1.rglob("id10271/1zcIwhmdeo4/00001.wav")
    gone.unlink()
    (cut_file,) = voxceleb1.rglob("id10001/1zcIwhmdeo4/00001.wav")
    cut(cut_file)  # a WAV that libsndfile reads as a shorter one
    _, findings = read("voxceleb1", voxceleb1, "sid", partial=False)
    assert "1 of 12 listed utterances have no audio, first id10271/1zcIwhmdeo4/00001" in said(findings)
    assert "id10001-1zcIwhmdeo4-00001" in said(findings) and "truncated" in said(findings)
    _, findings = read("voxceleb1", voxceleb1, "asv")
    assert "trials: 1 of 2 have an utterance that is not there; dropped" in said(findings)
    (voxceleb1 / "veri_test.txt").unlink()
    (voxceleb1 / "iden_split.txt").write_text("4 id10001/x/00001.wav\n", encoding="utf-8")
    _, findings = read("voxceleb1", voxceleb1, "asv")
    assert "openslr.org/49" in said(findings) and "voxceleb1.trials=FILE" in said(findings)
    _, findings = read("voxceleb1", voxceleb1, "sid")
    assert "iden_split.txt, line 1" in said(findings)
    style = "wav" if (voxceleb1 / "dev").exists() else "dev/wav"
    write_speech(voxceleb1 / style / "id10002" / "1zcIwhmdeo4" / "00001.flac", 3)
    _, findings = read("voxceleb1", voxceleb1, "sid")
    assert "keep one of the two folder styles" in said(findings)


@pytest.fixture
def fluent(tmp_path: Path, write_speech: Write) -> Path:
    """Three speakers, one a split; one file is FLAC in a deeper folder, one name is not ASCII."""
    root = tmp_path / "fluent_speech_commands_dataset"
    (root / "data").mkdir(parents=True)
    number = 0
    for split, speaker in (("train", "2BqVo8kVB2Skwgyb"), ("valid", "4BrX8aDqK2cLZRYl"), ("test", "Zoë")):
        lines = [",path,speakerId,transcription,action,object,location"]
        for index, action in enumerate(("activate", "deactivate")):
            path = f"wavs/speakers/{speaker}/{speaker}-{index}.wav"
            write_speech(root / path, number)
            lines.append(f'{index},{path},{speaker},"Turn  the lights, {action}",{action},lights,none')
            number += 1
        (root / "data" / f"{split}_data.csv").write_bytes(("\r\n".join(lines) + "\r\n").encode())
    return root


def test_fluent_speech_commands_is_read(fluent):
    (fold,), findings = read("fluent_speech_commands", fluent, "ic")
    assert findings.problems == [] and [len(manifest) for manifest in fold.manifests.values()] == [2, 2, 2]
    assert fold.manifests["test"]["Zoë-1"].labels == {
        "speaker": "Zoë",
        "text": "Turn the lights, deactivate",
        "slot_action": "deactivate",
        "slot_object": "lights",
        "slot_location": "none",
    }
    assert load_task("ic").label_problems(fold) == []


def test_names_in_another_unicode_form_and_files_in_another_format_are_found(fluent, write_speech):
    folder = fluent / "wavs/speakers/Zoë"
    (folder / "Zoë-0.wav").rename(folder / (unicodedata.normalize("NFD", "Zoë-0") + ".wav"))
    (folder / "Zoë-1.wav").unlink()
    write_speech(folder / "Zoë-1.flac", 3)
    (fold,), findings = read("fluent_speech_commands", fluent, "ic")
    assert fold.manifests["test"].ids == ("Zoë-0", "Zoë-1") and fold.manifests["test"].problems(read_audio=True) == []
    assert "1 file names are stored in decomposed Unicode" in said(findings)
    write_speech(folder / "Zoë-1.wav", 3)
    _, findings = read("fluent_speech_commands", fluent, "ic")
    assert "two audio files" in said(findings)


def test_what_is_wrong_with_fluent_speech_commands_is_named(fluent):
    table = fluent / "data/test_data.csv"
    table.write_bytes(table.read_bytes().replace(b",lights,none", b",,none", 1))
    (fluent / "wavs/speakers/4BrX8aDqK2cLZRYl/4BrX8aDqK2cLZRYl-1.wav").unlink()
    (fluent / "data/train_data.csv").write_text("path,action\n", encoding="utf-8")
    _, findings = read("fluent_speech_commands", fluent, "ic", partial=False)
    assert "data/test_data.csv, line 2: empty object" in said(findings)
    assert "data/valid_data.csv: 1 of 2 listed utterances have no audio" in said(findings)
    assert "no column speakerId, transcription, object, location" in said(findings)
    (fluent / "data/valid_data.csv").write_bytes(b"\xff\xfe")
    _, findings = read("fluent_speech_commands", fluent, "ic", partial=False)
    assert "data/valid_data.csv: not UTF-8 (byte 0)" in said(findings)


def stems(split: str, count: int) -> list[str]:
    """Names whose speaker the corpus' rule puts into a split."""
    names = (f"{number:08x}_nohash_0" for number in range(1000))
    return [name for name in names if split_of(name) == split][:count]


@pytest.fixture
def speech_commands(tmp_path: Path, write_speech: Write) -> Path:
    """Both archives unpacked side by side."""
    words, test = tmp_path / "speech_commands_v0.01", tmp_path / "speech_commands_test_set_v0.01"
    number = 0
    for word in ("yes", "no", "bed"):
        for stem in (*stems("train", 2), *stems("dev", 1), *stems("left out", 1)):
            write_speech(words / word / f"{stem}.wav", number)
            number += 1
    for noise in range(6):
        write_speech(words / "_background_noise_" / f"noise_{noise}.wav", noise, seconds=2.0)
    (words / "validation_list.txt").write_text(f"yes/{stems('dev', 1)[0]}.wav\n", encoding="utf-8")
    (words / "testing_list.txt").write_text(f"yes/{stems('left out', 1)[0]}.wav\n", encoding="utf-8")
    for word in ("yes", "no", "_unknown_", "_silence_"):
        write_speech(test / word / f"{stems('left out', 1)[0]}.wav", number)
        number += 1
    return tmp_path


def test_speech_commands_are_read(speech_commands):
    for given in (speech_commands, speech_commands / "speech_commands_v0.01"):
        (fold,), findings = read("speech_commands", given, "ks")
        assert findings.problems == []
        words = [
            [each.labels["keyword"] for each in manifest if each.labels["keyword"] != "_silence_"]
            for manifest in fold.manifests.values()
        ]
        assert [len(each) for each in words] == [6, 3, 3]  # the eighth of the names is left out, as SUPERB does
        assert sorted(words[0]) == ["_unknown_", "_unknown_", "no", "no", "yes", "yes"]
        assert set(fold.manifests["test"].labels("keyword")) == {"yes", "no", "_unknown_", "_silence_"}
    silence = [
        [each for each in fold.manifests[split] if each.labels["keyword"] == "_silence_"] for split in ("train", "dev")
    ]
    assert [len(pieces) for pieces in silence] == [6, 6] and {each.duration_s for each in silence[0]} == {1.0}
    assert {(each.audio, each.start_s) for each in silence[0]}.isdisjoint(
        {(each.audio, each.start_s) for each in silence[1]}
    )
    assert "6 utterances, 51088 published" in said(findings) and "another split" not in said(findings)


def test_the_hash_rule_is_the_corpus_own():
    """It depends on the speaker only and puts a tenth into dev; the lists of the small real corpus were made by it too."""
    # SHA-1 modulo 2^27 as a share of 2^27 - 1: 9.6, 51.0 and 16.4 percent
    assert [split_of(name) for name in ("00000000", "00000001", "00000002")] == ["dev", "train", "left out"]
    assert split_of("0a7c2a8d_nohash_0") == split_of("0a7c2a8d_nohash_1") == split_of("0a7c2a8d")
    splits = [split_of(f"{number:08x}_nohash_0") for number in range(5000)]
    assert [round(splits.count(name) / 500) for name in ("train", "dev", "left out")] == [8, 1, 1]


def test_what_is_wrong_with_speech_commands_is_named(speech_commands, write_speech):
    words, test = speech_commands / "speech_commands_v0.01", speech_commands / "speech_commands_test_set_v0.01"
    (words / "validation_list.txt").write_text(f"yes/{stems('train', 1)[0]}.wav\r\n", encoding="utf-8")
    (words / "_background_noise_" / "noise_0.wav").unlink()
    write_speech(test / "bed" / "00000000_nohash_0.wav", 0)
    _, findings = read("speech_commands", speech_commands, "ks", partial=False)
    assert "validation_list.txt: 1 files are of another split by the corpus' rule" in said(findings)
    assert "5 noise files, 6 published" in said(findings) and "folders bed" in said(findings)
    elsewhere = speech_commands / "deep" / "er" / "test"
    elsewhere.parent.mkdir(parents=True)
    test.rename(elsewhere)
    with pytest.raises(
        RequestError, match=r"no test set with _silence_ .*speech_commands_test_set_v0.01.tar.gz.*--extra test="
    ):
        read("speech_commands", words, "ks")
    (fold,), _ = read("speech_commands", words, "ks", extras={"test": elsewhere})
    assert fold.manifests["test"][0].audio.startswith("deep/er/test/")


@pytest.mark.parametrize("name", sorted(CORPORA))
def test_a_folder_that_is_not_the_corpus_is_refused(name, tmp_path):
    info = CORPORA[name].info
    with pytest.raises(RequestError, match="no such folder"):
        read(name, tmp_path / "nowhere", info.tasks[0])
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match=f"is not {info.title}.*found nothing.*Fix: "):
        read(name, tmp_path / "empty", info.tasks[0])
    with pytest.raises(RequestError, match="does not serve synthetic_sid"):
        read(name, tmp_path, "synthetic_sid")


def test_the_registry_of_corpora_and_the_tasks_agree():
    assert {task for corpus in CORPORA.values() for task in corpus.info.tasks} <= set(Registry("task").names())
    names = [alias for corpus in CORPORA.values() for alias in (corpus.info.name, *corpus.info.aliases)]
    assert len(names) == len(set(names))
    for corpus in CORPORA.values():
        assert corpus.info.source.startswith("http") and corpus.info.license
        assert all(extra.source and set(extra.tasks) <= set(corpus.info.tasks) for extra in corpus.info.extras)


def test_a_task_finds_its_corpus_among_those_given():
    data = {"libri": Path("/l"), "vox1": Path("/v"), "vox1.trials": Path("/t"), "mini": Path("/m")}
    assert choose_data("asr", data) == ("librispeech", Path("/l"), {})
    assert choose_data("asv", data) == ("voxceleb1", Path("/v"), {"trials": Path("/t")})
    assert choose_data("ic", data) == ("mini", Path("/m"), {})
    with pytest.raises(RequestError, match=r"none serves ic. Fix: one of --data fluent_speech_commands=FOLDER"):
        choose_data("ic", {"libri": Path("/l")})
    with pytest.raises(RequestError, match="where is librispeech"):
        choose_data("pr", {"librispeech.lexicon": Path("/l")})
    with pytest.raises(RequestError, match="Did you mean librispeech"):
        find_corpus("librispech")


def test_the_hash_rule_gives_the_splits_of_the_real_words(shared):
    file = shared / "data" / "speech_commands_3w" / "manifest.csv"
    if not file.is_file():
        pytest.skip(f"no corpus at {file.parent}")
    with file.open(encoding="utf-8", newline="") as table:
        rows = list(csv.DictReader(table))
    names = {"train": "train", "dev": "dev", "left out": "test"}
    assert len(rows) == 701 and all(names[split_of(Path(row["path"]).stem)] == row["split"] for row in rows)


def test_the_page_shows_the_corpora_as_they_are():
    page = Path(__file__).resolve().parents[2] / "docs" / "corpora.md"
    assert corpora_table() in page.read_text(encoding="utf-8")
