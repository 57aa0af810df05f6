"""CCA similarity of every layer with phones, speakers, labels of utterances, or embeddings from elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from superb_probe.analysis_corpus import AnalysisCorpus, Frames, extract, read_embeddings, utterance_segments
from superb_probe.downstreams.audio import SAMPLE_RATE_HZ, read_waveform
from superb_probe.engine_progress import Stage
from superb_probe.errors import RequestError
from superb_probe.probes.alignments import Segment, segment_frames
from superb_probe.probes.cca import FLAVOURS, Similarity, one_hot, similarities
from superb_probe.results.analysis_record import Measurement
from superb_probe.upstreams.base import Upstream

Matrix = NDArray[np.float64]
CONTROLS = ("", "shuffled")


@dataclass(frozen=True, slots=True)
class CcaRequest:
    """What `analyze cca` was asked for.

    Attributes:
        targets: "phones" (means over phones against their labels), "resemblyzer" (speaker embeddings), NAME=FILE (embeddings by
            utterance), or the name of a label column (means over utterances against their labels).
        flavours: of CCA.
        max_segments: phones that are used, drawn at random.
        seed: of that draw, of the folds and of the shuffled floor.
        num_folds: of the cross-fitting.
    """

    targets: tuple[str, ...] = ("phones", "speaker")
    flavours: tuple[str, ...] = FLAVOURS
    max_segments: int = 10_000
    seed: int = 0
    num_folds: int = 5


@dataclass(frozen=True, slots=True)
class Target:
    """What layers are compared with.

    Attributes:
        name: as asked for.
        ids: of each row, its utterance.
        y: (N, E).
        groups: (N,) what never stands on two sides of a split.
        segments: of each row, its stretch; None for all frames with speech.
        grouped_by: in words.
    """

    name: str
    ids: tuple[str, ...]
    y: Matrix
    groups: tuple[str, ...]
    segments: tuple[Segment, ...] | None
    grouped_by: str


def load_targets(corpus: AnalysisCorpus, request: CcaRequest) -> list[Target]:
    """All targets, read or computed once for all encoders.

    Raises:
        RequestError: for a target that is neither known, a label column nor NAME=FILE.
    """
    return [_target(corpus, request, name) for name in request.targets]


def _target(corpus: AnalysisCorpus, request: CcaRequest, name: str) -> Target:
    utterances = [each for manifest in corpus.splits.values() for each in manifest]
    speaker_of = {each.id: each.labels.get("speaker", "") or each.id for each in utterances}
    if name == "phones":
        pairs = [(each.id, segment) for each in utterances for segment in utterance_segments(corpus.phones[each.id])]
        if len(pairs) > request.max_segments:
            order = np.random.default_rng([request.seed, 4]).permutation(len(pairs))[: request.max_segments]
            pairs = [pairs[at] for at in np.sort(order)]
        ids = tuple(each for each, _ in pairs)
        y = one_hot([segment.label for _, segment in pairs])
        return Target(
            name, ids, y, tuple(speaker_of[each] for each in ids), tuple(segment for _, segment in pairs), "speaker"
        )
    ids = tuple(each.id for each in utterances)
    groups, grouped_by = tuple(speaker_of[each] for each in ids), "speaker"
    key, _, file = name.partition("=")
    if file:
        vectors = read_embeddings(Path(file))
        lacking = [each for each in ids if each not in vectors]
        if lacking:
            raise RequestError(f"--target {name}: no embedding of {len(lacking)} utterances: {', '.join(lacking[:5])}.")
        y = np.stack([vectors[each] for each in ids])
    elif name == "resemblyzer":
        y = _resemblyzer(corpus)
    else:
        labels = [each.labels.get(name, "") for each in utterances]
        if not all(labels) or len(set(labels)) < 2:
            raise RequestError(
                f"--target {name}: not a label that every utterance has. Fix: phones, resemblyzer, a label column with two values "
                "or more, or NAME=FILE with an embedding of each utterance."
            )
        y = one_hot(labels)
        if name == "speaker":  # a class must be on both sides: here utterances are what is held out
            groups, grouped_by = ids, "utterance"
    return Target(key, ids, y, groups, None, grouped_by)


def _resemblyzer(corpus: AnalysisCorpus) -> Matrix:
    """GE2E speaker embeddings (U, 256) of the package resemblyzer, which ships its weights (Wan et al., arXiv:1710.10467)."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "pkg_resources is deprecated")  # in webrtcvad; the extra pins setuptools
            from resemblyzer import VoiceEncoder, preprocess_wav
    except ImportError as error:
        raise RequestError(
            f"--target resemblyzer: the package does not load ({error}). Fix: pip install 'superb-probe[speakers]', or compute the "
            "embeddings elsewhere and give --target speaker_embedding=FILE.npz."
        ) from error
    encoder = VoiceEncoder("cpu", verbose=False)
    found = []
    total = sum(each.total_s for each in corpus.splits.values())
    with Stage("speaker embeddings", total, "s of audio") as stage:
        for manifest in corpus.splits.values():
            for each in manifest:
                wav = preprocess_wav(read_waveform(each, manifest.root), SAMPLE_RATE_HZ)
                found.append(encoder.embed_utterance(wav).astype(np.float64))
                stage.advance(each.duration_s)
    return np.stack(found)


def analyze_cca(
    upstream: Upstream,
    name: str,
    corpus: AnalysisCorpus,
    targets: Sequence[Target],
    request: CcaRequest,
    store: Path | None,
    device: torch.device,
) -> list[Measurement]:
    """The similarity of every layer with every target, and with the target's rows shuffled."""  # fmt: skip
    stores = extract(upstream, name, corpus.splits, store, device)
    frames = {
        split: Frames(stores[split], manifest, upstream, corpus.phones, corpus.phone_names)
        for split, manifest in corpus.splits.items()
    }
    layers = upstream.info.num_layers
    rows: list[Measurement] = []
    with Stage(f"CCA of {name}", layers * len(targets), "layers") as stage:
        for target in targets:
            order = np.random.default_rng([request.seed, 5]).permutation(len(target.y))
            for layer in range(layers):
                x = _means(frames, target, layer)
                for control, y in zip(CONTROLS, (target.y, target.y[order]), strict=True):
                    found = similarities(
                        x, y, target.groups, request.flavours, num_folds=request.num_folds, seed=request.seed
                    )
                    rows += [_row(each, flavour, target, control, layer) for flavour, each in found.items()]
                stage.advance(1)
    return rows


def _row(found: Similarity, flavour: str, target: Target, control: str, layer: int) -> Measurement:
    ci95 = None if found.low is None or found.high is None else (found.low, found.high)
    where = {
        "target": target.name,
        "flavour": flavour,
        "components": found.num_components,
        "held_out": target.grouped_by,
    }
    where |= {"control": control} if control else {}
    return Measurement("cca", layer, "cross-fitted", found.value, ci95, 1, where)


def _means(frames: Mapping[str, Frames], target: Target, layer: int) -> Matrix:
    """(N, D) of each row of a target, the mean of its frames: those of its phone, or all with speech."""
    states: dict[str, NDArray[np.float32]] = {}
    speech: dict[str, NDArray[np.bool_]] = {}
    for each in frames.values():
        states.update(zip(each.manifest.ids, each.split(each.layer(layer)), strict=True))
        speech.update(zip(each.manifest.ids, each.split(each.speech), strict=True))
    hop_s = next(iter(frames.values())).hop_s
    found = []
    for at, name in enumerate(target.ids):
        own = states[name]
        if target.segments is None:
            if not speech[name].any():
                raise RequestError(f"utterance {name}: no frame with speech in its alignment. Fix: leave it out.")
            found.append(own[speech[name]].mean(0))
        else:
            start, end = segment_frames(target.segments[at], len(own), hop_s)
            found.append(own[start : max(end, start + 1)].mean(0))
    return np.stack(found).astype(np.float64)
