"""The walk of an analysis: encoders and speech resolved, each encoder analysed once, records, one CSV and one figure written."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from superb_probe.analysis_corpus import AnalysisCorpus, load_corpus
from superb_probe.downstreams.manifest import audio_digest
from superb_probe.engine_ask import LoadedUpstream, choose_device, resolve_upstream
from superb_probe.engine_progress import say
from superb_probe.engine_record import describe_upstream, environment, exact_arithmetic, now
from superb_probe.errors import RequestError
from superb_probe.probes.identity import source_digest, weights_digest
from superb_probe.probes.plan import digest_of
from superb_probe.results.analysis_record import (
    AnalysisRecord,
    DataPart,
    Measurement,
    analysis_path,
    read_analysis,
    write_analysis,
)
from superb_probe.upstreams.load import load_upstream
from superb_probe.upstreams.sizes import SIZES

VERSION = 2  # of the analyses: raised when a number can change
BESIDE = ("fbank", "random")
FULL_FROM_S = 36_000.0  # of train, from where k-means has the paper's settings unless asked otherwise
CI = {
    "units": "95 %: purity and PNMI by leaving speakers out in turn (jackknife, t), unit edit distance and ABX by resampling "
    "speakers (200 draws)",
    "cca": "95 %: resampling the held-out groups of each fold (200 draws), averaged over folds",
    "disentangle": "95 %: resampling speakers (accuracies and ABX 200 draws, EER 50); of random subspaces, the range of 20",
}


@dataclass(frozen=True, slots=True)
class AnalysisRequest:
    """What all analyses are asked: which encoders, on what speech, and where to write.

    Attributes:
        upstream: names.
        checkpoint: weights, for a single encoder.
        size: of encoders without a checkpoint.
        random: seed of random weights instead of trained ones.
        beside: "fbank", and "random" for each trained encoder again with random weights.
        manifest: TSVs by split; None for the embedded corpus.
        root: of their audio.
        alignment: phone times.
        limit: most utterances of a split.
        skip_unaligned: leave utterances without phone times out.
        out: folder of the records.
        store: folder of extracted states; None for memory.
        device: "auto", "cpu" or "cuda".
        overwrite: analyse again what has a record.
    """

    upstream: tuple[str, ...]
    checkpoint: Path | None = None
    size: str | None = None
    random: int | None = None
    beside: tuple[str, ...] = BESIDE
    manifest: Mapping[str, Path] | None = None
    root: Path | None = None
    alignment: tuple[Path, ...] = ()
    limit: int | None = None
    skip_unaligned: bool = False
    out: Path = Path("results/runs")
    store: Path | None = None
    device: str = "auto"
    overwrite: bool = False


@dataclass(slots=True)
class Found:
    """What one analysis of one encoder gives.

    Attributes:
        measurements: the numbers.
        chosen: what dev chose.
        write: writes further files beside the record, given its path without ending; None for none.
    """

    measurements: Sequence[Measurement]
    chosen: Mapping[str, Any] = field(default_factory=dict)
    write: Callable[[Path], dict[str, str]] | None = None


Analyse = Callable[[LoadedUpstream, AnalysisCorpus, torch.device], Found]


def analyze_units(request: AnalysisRequest, asked: Any) -> list[AnalysisRecord]:
    """`superb-probe analyze units`: units of every layer. `asked` is a `UnitsRequest`."""
    from superb_probe.analysis_units import ChangedAudio, write_units
    from superb_probe.analysis_units import analyze_units as analyse_one

    corpus = _corpus(request)
    if asked.budget is None:
        asked = replace(asked, budget="full" if corpus.splits["train"].total_s >= FULL_FROM_S else "small")
    changed = ChangedAudio(corpus, asked)

    def one(loaded: LoadedUpstream, corpus: AnalysisCorpus, device: torch.device) -> Found:
        result = analyse_one(loaded.upstream, loaded.name, corpus, asked, changed, request.store, device)
        return Found(
            result.measurements,
            {f"layer of {k}": v for k, v in result.chosen.items()},
            lambda stem: write_units(result, corpus, stem),
        )

    try:
        return _walk("units", request, corpus, {**asdict(asked), "kmeans": asdict(asked.kmeans)}, one)
    finally:
        changed.close()


def analyze_cca(request: AnalysisRequest, asked: Any) -> list[AnalysisRecord]:
    """`superb-probe analyze cca`: what layers have in common with phones, speakers, and embeddings. `asked` is a `CcaRequest`."""
    from superb_probe.analysis_cca import analyze_cca as analyse_one
    from superb_probe.analysis_cca import load_targets

    corpus = _corpus(request)
    targets = load_targets(corpus, asked)
    digests = {each.name: hashlib.sha256(each.y.tobytes()).hexdigest()[:16] for each in targets}

    def one(loaded: LoadedUpstream, corpus: AnalysisCorpus, device: torch.device) -> Found:
        return Found(analyse_one(loaded.upstream, loaded.name, corpus, targets, asked, request.store, device))

    return _walk("cca", request, corpus, {**asdict(asked), "target_digests": digests}, one)


def analyze_disentangle(request: AnalysisRequest, asked: Any) -> list[AnalysisRecord]:
    """`superb-probe analyze disentangle`: speakers and phones in every layer. `asked` is a `DisentangleRequest`."""
    from superb_probe.analysis_disentangle import analyze_disentangle as analyse_one

    def one(loaded: LoadedUpstream, corpus: AnalysisCorpus, device: torch.device) -> Found:
        return Found(analyse_one(loaded.upstream, loaded.name, corpus, asked, request.store, device))

    return _walk("disentangle", request, _corpus(request), asdict(asked), one)


def _corpus(request: AnalysisRequest) -> AnalysisCorpus:
    return load_corpus(
        request.manifest,
        root=request.root,
        alignment=request.alignment,
        limit=request.limit,
        skip_unaligned=request.skip_unaligned,
    )


def _upstreams(request: AnalysisRequest) -> list[LoadedUpstream]:
    """The encoders asked for, and those beside them.

    Raises:
        RequestError: for an unknown name, or a checkpoint for several.
    """
    unknown = sorted(set(request.beside) - {*BESIDE, "none"})
    if unknown:
        raise RequestError(f"--beside {' '.join(unknown)}: {', '.join(BESIDE)} or none.")
    if request.checkpoint is not None and len(request.upstream) != 1:
        raise RequestError(
            f"--checkpoint is for one encoder, {len(request.upstream)} are asked for. Fix: one --upstream."
        )
    found: list[LoadedUpstream] = []
    for name in request.upstream:
        analytic = name.partition(":")[0] in ("fbank", "fbank_no_cmvn", "mfcc")
        asked = {"size": None, "random": None} if analytic else {"size": request.size, "random": request.random}
        found.append(resolve_upstream(name, checkpoint=request.checkpoint, options={}, **asked))
    if "random" in request.beside:
        for loaded in list(found):
            twin = None if loaded.upstream.info.revision.startswith(("random:", "analytic:")) else _random_twin(loaded)
            if twin is not None:
                found.append(twin)
    if "fbank" in request.beside and "fbank" not in request.upstream:
        found.append(resolve_upstream("fbank", checkpoint=None, size=None, random=None, options={}))
    return found


def _random_twin(loaded: LoadedUpstream) -> LoadedUpstream | None:
    """The same encoder with random weights, where its name has a size of its shape."""
    info = loaded.upstream.info
    for size in SIZES:
        try:
            twin = load_upstream(loaded.name, size=size, random=0)
        except RequestError:
            return None  # a name that has no random weights: hf:, features:, a file
        if (twin.info.dim, twin.info.num_layers) == (info.dim, info.num_layers):
            return resolve_upstream(loaded.name, checkpoint=None, size=size, random=0, options={})
    return None


def _walk(
    kind: Any, request: AnalysisRequest, corpus: AnalysisCorpus, settings: dict[str, Any], analyse: Analyse
) -> list[AnalysisRecord]:
    device = choose_device(request.device)
    audio = {split: audio_digest(manifest) for split, manifest in corpus.splits.items()}
    records = []
    for loaded in _upstreams(request):
        causes = {
            "analysis": kind, "version": VERSION, "upstream": loaded.name, "weights": weights_digest(loaded.upstream),
            "source": source_digest(loaded.upstream), "settings": settings, "data": dict(corpus.digests), "audio": audio,
        }  # fmt: skip
        identity = digest_of(causes)[:12]
        path = analysis_path(request.out, kind, loaded.name, identity)
        if path.is_file() and not request.overwrite:
            say(f"{kind}, {loaded.name}: there is a record already")
            records.append(read_analysis(path))
            continue
        for text in (*loaded.warnings, *corpus.warnings):
            say(f"WARNING: {text}")
        started_at, clock = now(), time.perf_counter()
        with exact_arithmetic(device):
            found = analyse(loaded, corpus, device)
        stem = path.with_name(identity)
        record = AnalysisRecord(
            analysis_id=identity,
            analysis=kind,
            upstream=describe_upstream(loaded.name, loaded.upstream, count=False),
            data=_data_part(corpus, audio),
            settings=settings,
            chosen=found.chosen,
            measurements=tuple(found.measurements),
            ci=CI[kind],
            files=found.write(stem) if found.write else {},
            environment=environment(device),
            seconds=round(time.perf_counter() - clock, 3),
            started_at=started_at,
            finished_at=now(),
            warnings=(*loaded.warnings, *corpus.warnings),
        )
        write_analysis(record, request.out)
        records.append(read_analysis(path))
    return records


def _data_part(corpus: AnalysisCorpus, audio: Mapping[str, str]) -> DataPart:
    return DataPart(
        dataset=corpus.dataset,
        digests={**corpus.digests, **{f"audio.{split}": digest for split, digest in audio.items()}},
        num_utterances={split: len(each) for split, each in corpus.splits.items()},
        seconds={split: round(each.total_s, 3) for split, each in corpus.splits.items()},
    )
