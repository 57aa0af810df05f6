"""`superb-probe stream`: chunks of files and pipes, transcripts equal to one pass, reports, and what is refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from superb_probe import cli, streaming
from superb_probe.downstreams.mini import mini_root, read_splits
from superb_probe.errors import RequestError
from superb_probe.finetuning import recogniser_of_folder, shipped_recogniser
from superb_probe.latency import measure_latency, read_word_ends
from superb_probe.probes.ctc import BlstmCtc, FrameCtc, FrameLogits, greedy_ids
from superb_probe.probes.finetune_heads import GreedyStream, HeadStream, LstmCtc
from superb_probe.probes.metrics import edit_distance
from superb_probe.upstreams.load import load_upstream

TOKENS = ("<s>", "|", "A", "B", "C", "</s>")
ENCODER = ("--upstream", "mamba_hubert_causal", "--size", "test", "--random", "0")


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    samples = 0.1 * np.random.default_rng(0).standard_normal(24_321)
    soundfile.write(tmp_path / "a.wav", samples.astype(np.float32), 16_000, subtype="FLOAT")
    return tmp_path / "a.wav"


def run(*words: str | Path) -> int:
    return cli.main(["stream", *(str(word) for word in words)])


def recogniser(head: torch.nn.Module) -> streaming.Recogniser:
    return streaming.Recogniser(lambda states: states[-1], head.eval(), TOKENS, frozenset({"</s>"}), False, "test")


def make_head(kind: Callable[..., Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = kind(48, TOKENS, width=16, drop=("</s>",))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(4.0)  # so that tokens change often
    return head.eval()


@pytest.mark.parametrize("kind", [FrameCtc, LstmCtc])
@pytest.mark.parametrize("chunk_samples", [37, 1280, 16_000])
def test_a_transcript_is_that_of_one_pass(kind: Callable[..., Any], chunk_samples: int, audio: Path) -> None:
    upstream, head = load_upstream("mamba_hubert_causal", size="test", random=0), make_head(kind)
    wav = torch.from_numpy(soundfile.read(audio, dtype="float32")[0])[: 3000 if chunk_samples < 100 else None]
    with torch.inference_mode():
        states = upstream.extract([wav])
        head.linear.bias -= head(states.states[-1], states.num_frames).logits[0].mean(0)  # so that no token always wins
        (expected,) = greedy_ids(head(states.states[-1], states.num_frames))
    chunks = iter(torch.split(wav, chunk_samples))
    report = streaming.stream_audio(upstream, chunks, chunk_s=chunk_samples / 16_000, recogniser=recogniser(head))
    assert [each.token for each in report.emissions] == [TOKENS[number] for number in expected]
    assert len(expected) >= 2
    assert report.frames == upstream.num_frames(len(wav))
    for each in report.emissions:  # a frame is there with the chunk its window ends in
        window_end = round(each.frame_s * 16_000) + 400
        assert round(each.heard_s * 16_000) == min(len(wav), -(-window_end // chunk_samples) * chunk_samples)


def test_an_lstm_head_keeps_its_state_and_a_forgetful_one_is_seen() -> None:
    head = make_head(LstmCtc)
    frames = torch.randn(50, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = head(frames[None], torch.tensor([50])).logits[0]
    stream = HeadStream(head)
    pieces = torch.cat([stream.push(piece) for piece in frames.split([1, 0, 9, 40])])
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)
    forgetful = torch.cat([HeadStream(head).push(piece) for piece in frames.split(10)])
    assert (forgetful - whole).abs().max() > 1e-3


def test_greedy_decoding_across_chunks() -> None:
    ids = torch.tensor([1, 1, 0, 1, 2, 2, 2, 0, 0, 2])
    logits = torch.eye(3)[ids]
    stream = GreedyStream()
    found = [token for piece in logits.split(3) for _, token in stream.push(piece)]
    assert found == greedy_ids(FrameLogits(logits[None], torch.tensor([len(ids)])))[0].tolist() == [1, 1, 2, 2]


def test_heads_that_see_the_future_are_refused() -> None:
    with pytest.raises(RequestError, match="--head lstm or linear"):
        HeadStream(BlstmCtc(48, TOKENS, width=4))


def test_files_are_read_in_chunks_and_repeated(audio: Path) -> None:
    samples = soundfile.read(audio, dtype="float32")[0]
    once = list(streaming.file_chunks(audio, 1000, 16_000))
    assert [len(chunk) for chunk in once] == [1000] * 24 + [321]
    assert np.array_equal(torch.cat(once).numpy(), samples)
    looped = torch.cat(list(streaming.file_chunks(audio, 1000, 16_000, 4.0))).numpy()
    assert np.array_equal(looped, np.tile(samples, 3)[: 4 * 16_000])
    assert np.array_equal(torch.cat(list(streaming.file_chunks(audio, 1000, 16_000, 1.0))).numpy(), samples[:16_000])


def test_wrong_files(audio: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "low.wav", np.zeros(100), 8000)
    for path, what in ((tmp_path / "low.wav", "8000 Hz"), (tmp_path / "none.wav", "no such audio file")):
        with pytest.raises(RequestError, match=what):
            list(streaming.file_chunks(path, 100, 16_000))


def test_raw_samples_come_in_whole_chunks() -> None:
    values = np.arange(-500, 500, dtype="<i2")
    chunks = list(streaming.raw_chunks(io.BytesIO(values.tobytes()), 300))
    assert [len(chunk) for chunk in chunks] == [300, 300, 300, 100]
    assert np.array_equal(torch.cat(chunks).numpy() * 32768, values.astype(np.float32))
    with pytest.raises(RequestError, match="within a sample"):
        list(streaming.raw_chunks(io.BytesIO(b"\0\0\0"), 300))


def test_the_command_checks_itself_against_one_pass(
    audio: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(audio, *ENCODER, "--loop", "25", "--check", "--json", "--figure", tmp_path / "f.png") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["one_pass_error"] <= 1e-5
    assert document["audio_s"] == 25.0 and document["transcript"] is None
    assert document["real_time_factor"] > 0 and document["state_bytes"] > 0
    assert len(document["trace"]) == 3
    assert {path.name for path in tmp_path.glob("f.*")} == {"f.png", "f.svg", "f.csv"}
    push = load_upstream("mamba_hubert_causal", size="test", random=0).stream().__class__.push

    def wrong(self: Any, wav: Tensor) -> Tensor:
        return push(self, wav) * (1 + 1e-4)

    monkeypatch.setattr("superb_probe.upstreams.stream.HubertStream.push", wrong)
    assert run(audio, *ENCODER, "--check") == 1
    assert "differ from one pass" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("a.wav", "--checkpoint", "c.pt"), "goes with --record and --upstream"),
        (("a.wav", *ENCODER, "--record", "r.json"), "one of --record"),
        (("a.wav", "--record", "r.json", "--size", "tiny"), "go with --upstream"),
        (("a.wav", *ENCODER, "--root", "x"), "go with --record"),
        (("-", *ENCODER, "--check"), "need a file"),
        (("a.wav", *ENCODER, "--check", "--window-frames", "5"), "window-frames"),
        (("a.wav", *ENCODER, "--chunk-ms", "0.01"), "less than a sample"),
        (("a.wav", "--upstream", "mamba_hubert", "--size", "test", "--random", "0"), "mamba_hubert_causal"),
    ],
)
def test_wrong_requests(words: tuple[str, ...], what: str, audio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*(str(audio) if word == "a.wav" else word for word in words)) == 2
    assert what in capsys.readouterr().err


def test_a_recogniser_ships(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a recogniser of one's own; most of its letters are right, which a scrambled head's are not."""
    manifest = read_splits(mini_root(), "read")["test"]
    (row, *_) = manifest
    assert run(manifest.root / row.audio, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    said = row.labels["text"]
    assert edit_distance(list(said), list(document["transcript"])) < 0.6 * len(said)
    upstream, recogniser = recogniser_of_folder(shipped_recogniser())
    description = json.loads((shipped_recogniser() / "finetuned.json").read_text(encoding="utf-8"))
    assert upstream.info.trained_on == load_upstream("mamba_hubert_causal").info.trained_on, "it has heard no more"
    assert "/" not in str(description["checkpoint"])
    ends = read_word_ends(mini_root() / "alignments.test.tsv")
    rates = []
    for scrambled in (False, True):
        if scrambled:
            with torch.no_grad():
                weight = recogniser.head.linear.weight
                weight.copy_(weight[torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))])
        rates.append(measure_latency(upstream, recogniser, manifest, ends, 0.64, None, limit=24)["wer"])
    assert rates[0] < 95.0 < rates[1]


def test_a_record_of_asr_is_streamed_from_a_pipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A probe trained for two updates says something, the same in the pipe as in one pass."""
    import superb_probe
    from superb_probe.downstreams.mini import mini_root, read_splits

    files = {}
    for split, manifest in read_splits(mini_root(), "read").items():
        files[split] = tmp_path / f"{split}.tsv"
        manifest[:4].write(files[split])
    superb_probe.run(
        upstream="mamba_hubert_causal", task="asr", head="linear", size="test", random=0, steps=2, lr=[1e-2], manifest=files,
        root=mini_root(), device="cpu", out=tmp_path / "runs",
    )  # fmt: skip
    path = next((tmp_path / "runs").rglob("*.json"))
    places = ["--root", str(mini_root()), "--manifest", *(f"{split}={file}" for split, file in files.items())]
    samples = (3000 * np.random.default_rng(0).standard_normal(20_000)).astype("<i2")
    monkeypatch.setattr(streaming, "stdin_source", lambda: io.BytesIO(samples.tobytes()))
    capsys.readouterr()
    assert run("-", "--record", path, "--json", *places) == 0
    document = json.loads(capsys.readouterr().out)
    upstream, found = streaming.recogniser_of_record(path, None, mini_root(), files)
    with torch.inference_mode():
        states = upstream.extract([torch.from_numpy(samples.astype(np.float32) / 32768.0)])
        frames = found.read(states.states[:, 0])
        (expected,) = greedy_ids(found.head(frames[None], states.num_frames))
    assert [token for token, *_ in document["emissions"]] == [found.tokens[number] for number in expected]
    assert len(expected)
