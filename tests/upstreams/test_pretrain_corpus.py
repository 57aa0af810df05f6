"""The data of pre-training: what is kept out, what is refused, phones of frames, and the command from end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from superb_probe.cli import main
from superb_probe.downstreams.manifest import Utterance
from superb_probe.downstreams.mini import ROOT as MINI
from superb_probe.errors import RequestError
from superb_probe.pretrain_corpus import (
    Exclusion,
    Item,
    aligned_phones,
    build_exclusion,
    find_items,
    manifest_items,
    mini_items,
    normal_text,
    prepare_clips,
)
from superb_probe.upstreams.load import load_upstream

NOTHING = Exclusion(frozenset(), frozenset(), frozenset())


@pytest.fixture(scope="module")
def exclusion() -> Exclusion:
    return build_exclusion()


def speech(folder: Path, count: int = 8, seconds: float = 1.3) -> Path:
    """A folder of noise in which something changes."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for index in range(count):
        wav = generator.standard_normal(round(16000 * seconds) + 500 * index) * 0.05
        wav[4000:9000] = np.convolve(wav[4000:9000], np.ones(8), "same")
        soundfile.write(folder / f"c{index}.flac", wav, 16000)
    return folder


def manifest(
    folder: Path, lines: list[tuple[str, ...]], header: str = "id\taudio\tstart_s\tduration_s\tvoice\ttext"
) -> Path:
    path = folder / "mine.tsv"
    path.write_text("\n".join([header, *("\t".join(line) for line in lines)]) + "\n")
    return path


def test_the_list_has_dev_and_test_and_nothing_that_is_only_trains(exclusion: Exclusion) -> None:
    speakers = [line.split("\t") for line in (MINI / "speakers.tsv").read_text().splitlines()[1:]]
    for _, split, _, voice, _ in speakers:
        assert (f"kokoro:{voice}" in exclusion.voices) == (split != "train")
    for split in ("dev", "test"):
        for item in mini_items(MINI / f"read.{split}.tsv"):
            assert len(exclusion.reasons(item)) == 3  # its voice, its text, its file
    assert build_exclusion().digest == exclusion.digest
    assert build_exclusion(mini=False) == NOTHING


def test_what_closed_set_identification_tests_on_is_kept_out_with_its_file(exclusion: Exclusion) -> None:
    tested = {
        item.utterance.audio for split in ("dev", "test") for item in mini_items(MINI / f"speakers_id.{split}.tsv")
    }
    trained = {item.utterance.audio for item in find_items(["mini"], exclusion)}
    assert tested and trained and not tested & trained
    read = {item.utterance.audio for item in mini_items(MINI / "read.train.tsv")}
    assert tested < read  # without the list they would be trained on


def test_mini_is_trained_on_less_what_the_list_has(exclusion: Exclusion) -> None:
    items = find_items(["mini"], exclusion)
    assert not [item for item in items if exclusion.reasons(item)]
    everything = find_items(["mini"], NOTHING)
    assert 0.5 * len(everything) < len(items) < len(everything)


def test_overlaps_are_refused_by_file_text_and_voice(tmp_path: Path, exclusion: Exclusion) -> None:
    folder = speech(tmp_path / "data", 3)
    dev = mini_items(MINI / "read.dev.tsv")[0]
    assert len(find_items([folder], exclusion)) == 3
    shutil.copy(dev.path, folder / "another-name.opus")
    with pytest.raises(RequestError, match="file another-name.opus"):
        find_items([folder], exclusion)
    (folder / "another-name.opus").unlink()
    said = normal_text(dev.text).capitalize() + "!"
    for voice, text, reason in (
        ("", said, "text"),
        ("kokoro:af_bella+kokoro:af_jessica", "", "voice kokoro:af_jessica"),
        ("kokoro:af_bella", "words nobody says in the corpus", ""),
    ):
        path = manifest(folder, [("a", "c0.flac", "0", "", voice, text)])
        if reason:
            with pytest.raises(RequestError, match=reason):
                find_items([path], exclusion)
        else:
            assert len(find_items([path], exclusion)) == 1
        assert len(find_items([path], NOTHING)) == 1  # only the list refuses


def test_manifests_to_keep_out_and_their_list_are_one(tmp_path: Path) -> None:
    folder = speech(tmp_path / "data", 2)
    path = manifest(folder, [("a", "c0.flac", "0", "", "me", "hello there")])
    kept = build_exclusion([path], mini=False)
    assert kept.voices == {"mine:me"} and kept.texts == {"hello there"} and len(kept.files) == 1
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(kept.lines()) + "\n")
    assert build_exclusion([listed], mini=False).digest == kept.digest
    listed.write_text("speaker\tme\n")
    with pytest.raises(RequestError, match="line 1: expected file, text or voice"):
        build_exclusion([listed], mini=False)


def test_phones_are_those_at_the_middle_of_frames(tmp_path: Path) -> None:
    alignments = tmp_path / "alignments.tsv"
    alignments.write_text("id\tphones\tstarts_ms\na\tSIL AA1 T\t0 50 100\n")
    item = Item("x", Utterance("a", "a.wav", 0.0, 0.2, {}), tmp_path)
    phones = aligned_phones([item], 7, alignments)
    assert phones.names == ("AA", "SIL", "T") and phones.clips.tolist() == [7]
    # Frames of 25 ms every 20 ms: middles at 12.5, 32.5, 52.5, ...
    assert [phones.names[each] for each in phones.of(7)] == ["SIL"] * 2 + ["AA"] * 3 + ["T"] * 4
    with pytest.raises(RequestError, match="no utterance of the held-out clips"):
        aligned_phones([Item("x", Utterance("b", "b.wav", 0.0, 0.2, {}), tmp_path)], 0, alignments)


def test_clips_are_decoded_once_and_not_mixed_up(tmp_path: Path) -> None:
    folder, held = speech(tmp_path / "data", 3), speech(tmp_path / "held", 2)
    held_out = manifest(held, [("h", "c0.flac", "0", "", "", "")])
    clips = prepare_clips(tmp_path / "clips", [folder], NOTHING, held_out=held_out)
    assert clips.ids == ["data/c0.flac", "data/c1.flac", "data/c2.flac", "mine/h"]
    assert clips.held_out.tolist() == [False, False, False, True]
    wav, _ = soundfile.read(folder / "c1.flac", dtype="float32")
    assert np.array_equal(clips.waveform(1), wav)
    assert prepare_clips(tmp_path / "clips", [folder], NOTHING, held_out=held_out).facts == clips.facts
    (folder / "c2.flac").unlink()
    with pytest.raises(RequestError, match="clips of other data"):
        prepare_clips(tmp_path / "clips", [folder], NOTHING, held_out=held_out)
    with pytest.raises(RequestError, match="both trained on and held out"):
        prepare_clips(tmp_path / "new", [held], NOTHING, held_out=held_out)
    with pytest.raises(RequestError, match="is there twice"):
        find_items([folder, folder], NOTHING)
    with pytest.raises(RequestError, match="no audio files"):
        find_items([tmp_path / "clips"], NOTHING)
    assert manifest_items(held_out)[0].voices == ()


def test_the_command_trains_and_describes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, held = speech(tmp_path / "data"), speech(tmp_path / "held", 2)
    held_out = manifest(held, [("h", "c0.flac", "0", "", "", ""), ("i", "c1.flac", "0", "", "", "")])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "iterations: [{targets: mfcc, clusters: 6, steps: 9}, {targets: layer, clusters: 6, steps: 9}]\n"
        "clip_lengths_s: [1.2]\nbatch_s: 5\naccumulate: 1\nprecision: float32\nlearning_rate: 1e-3\nlog_every: 1\n"
    )
    out = tmp_path / "run"
    command = ["pretrain", "--encoder", "transformer_hubert_causal", "--size", "test", "--data", str(folder)]
    command += ["--recipe", str(recipe), "--out", str(out), "--held-out", str(held_out), "--steps", "2", "3"]
    command += ["--front-end", "published", "--half", "--license", "MIT"]
    assert main([*command, "--time-limit", "0.001"]) == 0
    assert not (out / "transformer_hubert_causal.md").exists()
    assert main(command) == 2  # a run is there
    assert "--resume" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    card = (out / "transformer_hubert_causal.md").read_text()
    digest = json.loads((out / "clips/clips.json").read_text())["exclusion_digest"]
    for fact in (
        digest,
        "MIT",
        "| 2 | k-means 6 of layer 1 of 2 of iteration 1 | 3 |",
        "front end 'default'",
        "74,992",
    ):
        assert fact in card, fact
    assert (out / "dashboard.png").read_bytes().startswith(b"\x89PNG")
    upstream = load_upstream("transformer_hubert_causal", checkpoint=out / "transformer_hubert_causal.safetensors")
    assert upstream.info.trained_on == ("data",)
    capsys.readouterr()
    assert main([*command, "--profile", "1"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[0])
    assert said["frames_per_s"] > 0 and "share_of_peak" not in said


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--steps", "2"], "expected 2 numbers"),
        (["--seed", "-1"], "--seed -1"),
        (["--recipe", "tyni"], "Did you mean tiny"),
        (["--front-end", "causal"], "causal_front_end is for causal encoders"),
        (["--encoder", "transformer_hubert_causal_mask"], "--encoder transformer_hubert"),
        (["--encoder", "fbank"], "unknown upstream"),
    ],
)
def test_wrong_requests_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], said: str
) -> None:
    folder = speech(tmp_path / "data", 2)
    command = ["pretrain", "--encoder", "mamba_hubert", "--size", "test", "--data", str(folder), "--recipe", "test"]
    assert main([*command, "--out", str(tmp_path / "run"), *extra]) == 2
    assert said in capsys.readouterr().err
