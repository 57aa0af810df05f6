"""`prepare CORPUS`: manifests from a published tree, and runs on the tree itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from superb_probe.cli import main
from superb_probe.downstreams.load import load_folds, load_task
from superb_probe.downstreams.manifest import Manifest
from superb_probe.downstreams.prepare_corpus import prepare_corpus
from superb_probe.errors import RequestError

SPEAKERS = {"train": ("ann", "bob"), "valid": ("cem",), "test": ("dee",)}


@pytest.fixture
def fluent(tmp_path, write_speech):
    """Fluent Speech Commands with four speakers."""
    root = tmp_path / "fluent"
    (root / "data").mkdir(parents=True)
    number = 0
    for split, speakers in SPEAKERS.items():
        lines = ["path,speakerId,transcription,action,object,location"]
        for speaker in speakers:
            for action in ("activate", "deactivate"):
                path = f"wavs/speakers/{speaker}/{speaker}-{action}.wav"
                write_speech(root / path, number)
                lines.append(f"{path},{speaker},Lights,{action},lights,none")
                number += 1
        (root / "data" / f"{split}_data.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_manifests_are_written_and_the_corpus_is_left_alone(fluent, tmp_path):
    before = files(fluent)
    told: list[str] = []
    out = tmp_path / "made" / "manifests"
    (prepared,) = prepare_corpus("fsc", fluent, out, partial=True, exclude=["bob-activate"], say=told.append)
    assert files(fluent) == before and prepared.root == fluent
    assert set(prepared.files) == {"train", "dev", "test"}
    assert Manifest.read(prepared.files["train"], fluent).ids == ("ann-activate", "ann-deactivate", "bob-deactivate")
    assert any("PARTIAL corpus" in line and "23132 published" in line for line in told)
    (fold,) = load_folds(load_task("ic"), manifests=prepared.files, root=prepared.root, read_audio=True)
    assert fold.manifests["dev"].labels("slot_action") == ["activate", "deactivate"]


def test_without_partial_nothing_is_written(fluent, tmp_path):
    out = tmp_path / "manifests"
    with pytest.raises(
        RequestError, match=r"train: 4 utterances, 23132 published(.|\n)*or `prepare --partial` if a part is meant"
    ):
        prepare_corpus("fluent_speech_commands", fluent, out)
    assert not out.exists()


def test_problems_between_splits_and_inside_files_are_told_with_the_others(fluent, tmp_path):
    table = fluent / "data" / "test_data.csv"
    text = table.read_text(encoding="utf-8").replace(",dee,", ",ann,").replace("deactivate,lights", "explode,lights")
    table.write_text(text, encoding="utf-8")
    with pytest.raises(RequestError) as caught:
        prepare_corpus("fsc", fluent, tmp_path / "out", partial=True)
    assert "share 1 speaker (ann), but ic needs speakers apart" in str(caught.value)
    table.write_text(text.replace(",ann,", ",dee,"), encoding="utf-8")
    with pytest.raises(RequestError, match=r"1 label \(explode\) not in train"):
        prepare_corpus("fsc", fluent, tmp_path / "out", partial=True)
    table.write_text(text.replace(",ann,", ",dee,").replace("explode", "deactivate"), encoding="utf-8")
    wav = fluent / "wavs/speakers/dee/dee-activate.wav"
    prepare_corpus("fsc", fluent, tmp_path / "out", partial=True, read_audio=True)
    import soundfile

    samples, rate = soundfile.read(wav)
    samples[5] = float("nan")
    soundfile.write(wav, samples, rate, subtype="FLOAT")
    with pytest.raises(RequestError, match="dee-activate: .*finite values"):
        prepare_corpus("fsc", fluent, tmp_path / "out2", partial=True, read_audio=True)
    assert not (tmp_path / "out2").exists()


def test_a_folder_inside_the_corpus_and_a_task_it_does_not_serve_are_refused(fluent, tmp_path):
    with pytest.raises(RequestError, match="inside the corpus"):
        prepare_corpus("fsc", fluent, fluent / "manifests")
    with pytest.raises(RequestError, match="does not serve asr"):
        prepare_corpus("fsc", fluent, tmp_path / "out", tasks=["asr"])


def test_the_command(fluent, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["prepare", "fsc", "fluent", "--out", "manifests"]
    assert main(argv) == 2
    assert "23132 published" in capsys.readouterr().err
    assert main([*argv, "--partial", "--json", "--task", "ic"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"ic": {name: f"manifests/ic.{name}.tsv" for name in ("train", "dev", "test")}}
    assert "manifests/ic.train.tsv: 4 utterances" in captured.err
    assert main([*argv, "--partial", "--read-audio", "--extra", "lexicon=x"]) == 2
    assert "no extra file 'lexicon'" in capsys.readouterr().err
    assert main([*argv, "--slot", "a"]) == 2
    assert "--slot is not for it" in capsys.readouterr().err
    assert main(["prepare", "csv", "fluent", "--out", "manifests", "--partial"]) == 2
    assert "--partial is not for it" in capsys.readouterr().err
    assert main(["prepare", "fluent_speech", "fluent", "--out", "manifests"]) == 2
    assert "Did you mean fluent_speech_commands" in capsys.readouterr().err


def test_a_run_reads_the_tree_itself(fluent, tmp_path, capsys, monkeypatch):
    from superb_probe.downstreams.corpora import CORPORA

    info = CORPORA["fluent_speech_commands"].info
    arguments = ["run", "--upstream", "fbank_no_cmvn", "--task", "ic", "--lr", "1e-2", "--steps", "4", "--json"]
    arguments += ["--data", f"fsc={fluent}", "--out", str(tmp_path / "runs")]
    assert main(arguments) == 2  # a part of a corpus is no corpus
    assert "23132 published" in capsys.readouterr().err
    counts = {"train": 4, "dev": 2, "test": 2}
    monkeypatch.setitem(info.published, "ic", counts)  # type: ignore[index]
    assert main(arguments) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert "fluent_speech_commands" in json.dumps(record["task"])
