"""Phone and word times of transcribed speech, by the trained CTC head of a record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from superb_probe.downstreams.audio import read_waveform
from superb_probe.downstreams.base import LabelSet
from superb_probe.downstreams.load import load_task
from superb_probe.downstreams.manifest import Manifest, Utterance
from superb_probe.engine_ask import choose_device
from superb_probe.engine_progress import Stage
from superb_probe.errors import RequestError, all_at_once
from superb_probe.probes.alignments import Segments
from superb_probe.probes.ctc import BLANK, FrameLogits
from superb_probe.probes.forced_alignment import alignment_problem, best_paths, token_segments, word_segments
from superb_probe.results.record import read_record
from superb_probe.verification import Data, load_encoder, load_probe, read_states

WORD_END = "|"
COLUMNS = {"pr": "phones", "asr": "text"}
BATCH_S = 60.0


@dataclass(frozen=True, slots=True)
class AlignRequest:
    """What `align` was asked for.

    Attributes:
        record: a finished record of pr or asr.
        manifest: what to align.
        root: of its audio; None for the manifest's folder.
        checkpoint: the encoder's weights, where the record does not name them.
        record_manifest: the record's own data; None for the embedded corpus.
        record_root: their folder.
        backend: of the search.
        reach_s: how far a token reaches into blanks.
        device: "auto", "cpu" or "cuda".
    """

    record: Path
    manifest: Path
    root: Path | None = None
    checkpoint: Path | None = None
    record_manifest: Mapping[str, Path] | None = None
    record_root: Path | None = None
    backend: str = "auto"
    reach_s: float = 0.06
    device: str = "auto"


@dataclass(frozen=True, slots=True)
class Aligned:
    """What was found.

    Attributes:
        phones: by utterance; empty for a record of asr.
        words: by utterance; empty for a record of pr.
        durations_s: of all utterances.
        problems: utterances that cannot be aligned, and why.
        mean_log_probability: of a frame along its path: how well the model bears the transcripts.
        backend: what searched.
    """

    phones: Mapping[str, Segments]
    words: Mapping[str, Segments]
    durations_s: Mapping[str, float]
    problems: tuple[str, ...]
    mean_log_probability: float
    backend: str


def align(request: AlignRequest) -> Aligned:
    """Align a manifest with a record's model.

    Raises:
        RequestError: for a record of another task, a manifest without the column, or tokens the model does not know.
    """
    record = read_record(request.record)
    task_name = record.task.name
    if task_name not in COLUMNS or record.status != "finished":
        raise RequestError(
            f"{request.record}: a {record.status} run of {task_name}. Fix: a finished one of pr (phones) or asr (words)."
        )
    probe = load_probe(request.record, Data(request.record_root, request.record_manifest))
    encoder = load_encoder(record, None, request.checkpoint)
    device = choose_device(request.device)
    manifest = Manifest.read(request.manifest, request.root)
    labels = LabelSet({"tokens": tuple(probe.head.tokens)})  # type: ignore[arg-type]
    ids = _token_ids(manifest, task_name, labels)
    probe.to(device)
    encoder.to(device)
    kind = getattr(torch, record.probe.feature_dtype, torch.float32)
    hop_s = encoder.info.hop_samples / encoder.info.sample_rate_hz
    phones: dict[str, Segments] = {}
    words: dict[str, Segments] = {}
    problems: list[str] = []
    total, frames_done = 0.0, 0
    with Stage("align", manifest.total_s, "s of audio") as stage, torch.inference_mode():
        for batch in _batches(manifest):
            logits: list[Tensor] = []
            for each in batch:  # one at a time, as the record's scores are made: a result never depends on its batch
                wave = read_waveform(each, manifest.root, encoder.info.sample_rate_hz)
                encoded = encoder.extract([torch.from_numpy(wave)])
                outputs: FrameLogits = probe(read_states(encoded.states, record, kind), encoded.num_frames)
                logits.append(outputs.logits[0, : int(outputs.num_frames[0])].float().log_softmax(-1))
                stage.advance(each.duration_s)
            wrong = [alignment_problem(ids[each.id], len(one), BLANK) for each, one in zip(batch, logits, strict=True)]
            problems += [f"{each.id}: {why}" for each, why in zip(batch, wrong, strict=True) if why]
            kept = [(each, one) for each, one, why in zip(batch, logits, wrong, strict=True) if not why]
            if not kept:
                continue
            counts = torch.tensor([len(one) for _, one in kept])
            padded = torch.nn.utils.rnn.pad_sequence([one for _, one in kept], batch_first=True)
            paths = best_paths(padded, counts, [ids[each.id] for each, _ in kept], blank=BLANK, backend=request.backend)
            for (each, one), path in zip(kept, paths, strict=True):
                tokens = [labels.classes["tokens"][number] for number in ids[each.id]]
                found = token_segments(path, tokens, hop_s, request.reach_s)
                (phones if task_name == "pr" else words)[each.id] = found if task_name == "pr" else _words(found)
                chosen = torch.tensor(
                    [ids[each.id][at] if at >= 0 else BLANK for at in path.tolist()], device=one.device
                )
                total += float(one.gather(1, chosen[:, None]).sum())
                frames_done += len(one)
    durations = {each.id: each.duration_s for each in manifest}
    used = (
        "own search"
        if request.backend == "own" or (request.backend == "auto" and device.type == "cpu")
        else request.backend
    )
    return Aligned(phones, words, durations, tuple(problems), total / max(1, frames_done), used)


def _token_ids(manifest: Manifest, task_name: str, labels: LabelSet) -> dict[str, list[int]]:
    """The tokens of every transcript, as the task writes them, without its end token.

    Raises:
        RequestError: with every utterance whose transcript the vocabulary cannot write.
    """
    column, task = COLUMNS[task_name], load_task(task_name)
    if column not in manifest.columns:
        raise RequestError(
            f"{manifest.name}: no column {column!r}, which a model of {task_name} aligns. Fix: add it, or another record."
        )
    found, problems = {}, []
    for each in manifest:
        try:
            found[each.id] = task.target(each, labels)["tokens"].tolist()[:-1]
        except KeyError as error:
            problems.append(f"{each.id}: the model has no token {error}")
    if problems:
        raise all_at_once(
            manifest.name, problems, "write transcripts as the record's corpus does, or leave these utterances out"
        )
    return found


def _words(tokens: Segments) -> Segments:
    """Words from characters: what stands between two word ends."""
    kept, words, lengths = [], [], []
    word = ""
    for each in tokens:
        if each.label != WORD_END:
            word += each.label
            kept.append(each)
        elif word:
            words.append(word)
            lengths.append(len(word))
            word = ""
    if word:
        words.append(word)
        lengths.append(len(word))
    return word_segments(kept, words, lengths)


def _batches(manifest: Manifest) -> list[list[Utterance]]:
    batches: list[list[Utterance]] = []
    seconds = 0.0
    for each in manifest:
        if not batches or seconds + each.duration_s > BATCH_S:
            batches.append([])
            seconds = 0.0
        batches[-1].append(each)
        seconds += each.duration_s
    return batches
