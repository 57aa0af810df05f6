"""Manifests from a folder with a manifest.csv."""

from __future__ import annotations

import pytest

from superb_probe.downstreams.load import load_folds, load_task
from superb_probe.downstreams.manifest import Manifest, Trials
from superb_probe.downstreams.prepare import prepare_csv
from superb_probe.errors import RequestError


@pytest.fixture
def corpus(tmp_path, write_audio):
    """A folder as people have them: one CSV, phones of its own, a trial list."""
    rows = ["path,utt_id,speaker,transcript,duration_s,split,drink,gender"]
    trials = []
    for split, speakers in (("train", "ab"), ("dev", "c"), ("test", "de")):
        for speaker in speakers:
            for number in range(2):
                name = f"{speaker}{number}"
                write_audio(f"{name}.flac", 1.0)
                rows.append(f'{name}.flac,{name},{speaker},"Hello, it’s {name}!",1.000,{split},tea,F')
    trials = ["1 d0.flac d1.flac", "0 d0.flac e0.flac"]
    (tmp_path / "manifest.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (tmp_path / "trials.txt").write_text("\n".join(trials) + "\n", encoding="utf-8")
    phones = ["utt_id,start_s,end_s,phone"]
    phones += [f"{row.split(',')[1]},0,1,{phone}" for row in rows[1:] for phone in ("SIL", "HH", "IY1", "SIL")]
    (tmp_path / "phones_x.csv").write_text("\n".join(phones) + "\n", encoding="utf-8")
    return tmp_path


def test_manifests_are_written_and_the_corpus_is_left_alone(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "new"
    before = sorted(path.name for path in corpus.iterdir())
    said: list[str] = []
    written = prepare_csv(corpus, out, slot=["drink"], exclude=["e1"], say=said.append)
    assert sorted(path.name for path in corpus.iterdir()) == before
    assert set(written) == {"train", "dev", "test", "trials"}
    test = Manifest.read(written["test"], corpus)
    assert test.ids == ("d0", "d1", "e0") and test.problems(read_audio=True) == []
    assert test["d0"].labels == {"speaker": "d", "text": "HELLO IT'S D0", "slot_drink": "tea", "phones": "HH IY1"}
    assert len(Trials.read(written["trials"])) == 2
    for part in ("e1", "gender", "9 of 9 transcripts", "--root"):
        assert part in "\n".join(said)
    manifests = {split: path for split, path in written.items() if split != "trials"}
    assert load_folds(load_task("pr"), manifests=manifests, root=corpus)


def test_what_nobody_fills_in_is_left_out(corpus, tmp_path_factory):
    text = (corpus / "manifest.csv").read_text(encoding="utf-8")
    lines = [line.replace('"Hello, it’s ' + line.split(",")[1] + '!"', "") for line in text.splitlines()]
    (corpus / "manifest.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (corpus / "trials.txt").unlink()
    said: list[str] = []
    written = prepare_csv(corpus, tmp_path_factory.mktemp("out"), say=said.append)
    assert "text" not in Manifest.read(written["train"], corpus).columns and "trials" not in written
    assert "text: no utterance has one; left out" in said


def test_bad_folders_are_refused_before_anything_is_written(corpus, tmp_path, tmp_path_factory):
    out = tmp_path_factory.mktemp("parent") / "out"
    table = (corpus / "manifest.csv").read_text(encoding="utf-8")

    def refused(said: str, **options: object) -> None:
        with pytest.raises(RequestError, match=said):
            prepare_csv(corpus, out, **options)
        assert not out.exists()

    refused("did you mean drink", slot=["drinks"])
    refused("no utterance 'zz' to leave out", exclude=["zz"])
    (corpus / "manifest.csv").write_text(table.replace(",1.000,test", ",9.000,test"), encoding="utf-8")
    refused("4 problems")
    (corpus / "manifest.csv").write_text(table.replace("test,tea", "eval,tea"), encoding="utf-8")
    refused("splits 'eval', expected train, dev, test")
    (corpus / "manifest.csv").write_text(table.replace("utt_id", "name"), encoding="utf-8")
    refused("no column utt_id")
    (corpus / "manifest.csv").write_text(table + "d9.flac,d9,d,x,1.0,test,tea,F\n", encoding="utf-8")
    refused("no such audio file")
    (corpus / "manifest.csv").write_text(table, encoding="utf-8")
    (corpus / "trials.txt").write_text("1 d0.flac nobody.flac\n2 d0.flac d1.flac\n", encoding="utf-8")
    refused("2 problems")
    (corpus / "manifest.csv").unlink()
    refused("no such file; the folder has")
    with pytest.raises(RequestError, match="inside the corpus"):
        prepare_csv(corpus, corpus / "manifests")


def test_the_small_corpora_are_prepared(shared, tmp_path):
    root = shared / "data" / "librispeech_mini"
    if not root.is_dir():
        pytest.skip(f"no corpus at {root}")
    unaligned = ["6081-41997-0000", "7078-271888-0000", "3235-11599-0000"]
    written = prepare_csv(root, tmp_path / "libri", exclude=unaligned)
    assert [len(Manifest.read(written[split], root)) for split in ("train", "dev", "test")] == [227, 21, 100]
    assert len(Trials.read(written["trials"])) == 4950
    speech = {split: written[split] for split in ("train", "dev", "test")}
    for name in ("asr", "pr"):
        (fold,) = load_folds(load_task(name), manifests=speech, root=root)
        assert not fold.notes
    root = shared / "data" / "picovoice_intent"
    slots = ["coffeeDrink", "size", "roast", "numberOfShots"]
    (fold,) = load_folds(load_task("ic"), manifests=prepare_csv(root, tmp_path / "pico", slot=slots), root=root)
    assert fold.manifests["train"].columns == tuple(f"slot_{name}" for name in sorted(slots))
    assert len(fold.notes) == 3 and all("are not known" in note for note in fold.notes)
