"""`superb-probe bench probing`: this project against s3prl, one encoder, one corpus, one machine, one run."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from superb_probe.bench_corpus import BenchCorpus, choose_corpus, corpus_summary
from superb_probe.bench_machine import describe_machine
from superb_probe.bench_ours import OursJob, run_ours
from superb_probe.bench_peer import DRIVER, LEAST_UPDATES, PeerRun, check_python, run_peer, why_not
from superb_probe.downstreams.load import load_task
from superb_probe.engine_record import now
from superb_probe.errors import CheckError, RequestError
from superb_probe.upstreams.fairseq_format import to_s3prl
from superb_probe.upstreams.load import load_upstream

CURVE = (200, 2000, 20_000)  # updates at which the ratio is stated besides SUPERB's own
STATES_TOLERANCE = 1e-3  # of the norm, between the two projects' layers
# Hours of audio and training utterances: Fluent Speech Commands (Lugosch et al., Interspeech 2019), LibriSpeech (Panayotov et al.,
# ICASSP 2015), VoxCeleb1 (Nagrani et al., Interspeech 2017; SID's splits by their share of utterances), Speech Commands
# (Warden 2018, arXiv 1804.03209; a second each), IEMOCAP's four classes (Busso et al. 2008; five folds train on the same audio).
SUPERB_SIZES: Mapping[str, Mapping[str, float]] = {
    "ic": {"classes": 24, "train": 23_132, "train_h": 14.7, "select_h": 1.9, "test_h": 2.4},
    "pr": {"train": 28_539, "train_h": 100.6, "select_h": 5.4, "test_h": 5.4},
    "asr": {"train": 28_539, "train_h": 100.6, "select_h": 5.4, "test_h": 5.4},
    "asv": {"train": 148_642, "train_h": 340.4, "select_h": 11.2, "test_h": 11.2},
    "ks": {"classes": 12, "train": 51_094, "train_h": 14.2, "select_h": 1.9, "test_h": 0.9},
    "sid": {"classes": 1251, "train": 138_361, "train_h": 316.9, "select_h": 15.8, "test_h": 18.9},
    "er": {"classes": 4, "train": 3_556, "train_h": 4.5, "select_h": 1.1, "test_h": 1.4, "folds": 5},
}


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of the bench.

    Attributes:
        tasks: names.
        updates: optimiser updates of both sides.
        peer_updates: updates of the peer that are measured; more are scaled from them.
        limit: training utterances; None takes the whole embedded corpus.
        device: where.
        size: of the encoder with random weights.
        checkpoint: an encoder to use instead, in any format.
        lr: learning rates; None takes SUPERB's five.
        seeds: of this project's side.
        peer_python: interpreter with s3prl; None leaves the peer out.
        driver: tools/s3prl_peer.py.
        threads: of torch on both sides; None leaves the default.
        folder: for everything that is written.
        timeout_s: for one run of one side.
    """

    tasks: Sequence[str]
    updates: int
    peer_updates: int
    limit: int | None
    device: torch.device
    size: str
    checkpoint: Path | None
    lr: Sequence[float] | None
    seeds: Sequence[int]
    peer_python: str | None
    folder: Path
    driver: Path = DRIVER
    threads: int | None = None
    timeout_s: float = 3600.0


def bench_probing(request: Request) -> dict[str, Any]:
    """Measure every task on both sides.

    Raises:
        RequestError: for an unknown task, or a peer environment that does not hold s3prl 0.4.18.
        CheckError: if this project's side fails, or the two encoders are not one.
    """
    tasks = [load_task(name) for name in request.tasks]
    if request.peer_python is not None:
        check_python(request.peer_python)
    request.folder.mkdir(parents=True, exist_ok=True)
    checkpoint, encoder = shared_checkpoint(request)
    result: dict[str, Any] = {
        "bench": "probing",
        "started_at": now(),
        "machine": describe_machine(request.device),
        "encoder": encoder,
        "peer": "s3prl 0.4.18" if request.peer_python else None,
        "tasks": {},
    }
    for task in tasks:
        corpus = choose_corpus(task, request.limit, request.folder / "manifests")
        result["tasks"][task.info.name] = bench_task(request, corpus, checkpoint)
    return result


def shared_checkpoint(request: Request) -> tuple[Path, dict[str, Any]]:
    """The one checkpoint both sides load: s3prl's converted form, and what is known of it."""
    if request.checkpoint is None:
        upstream = load_upstream("transformer_hubert", size=request.size, random=1)
    else:
        upstream = load_upstream("transformer_hubert", checkpoint=request.checkpoint)
    path = request.folder / "encoder.pt"
    encoder: Any = upstream.encoder
    torch.save(to_s3prl(encoder.config, encoder.state_dict(), ()), path)
    return path, {
        "family": "transformer_hubert",
        "size": request.size if request.checkpoint is None else None,
        "weights": upstream.info.revision if request.checkpoint is None else str(request.checkpoint),
        "parameters": sum(parameter.numel() for parameter in upstream.parameters()),
        "layers": upstream.info.num_layers,
        "dim": upstream.info.dim,
        "form": "s3prl's converted form, read by both sides",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def bench_task(request: Request, corpus: BenchCorpus, checkpoint: Path) -> dict[str, Any]:
    """Both sides of one task, and how they compare."""
    name, info = corpus.task.info.name, corpus.task.info
    settings, budget = info.protocols["superb"], info.budgets["full"]
    rates = list(request.lr or settings.lr_grid)
    folder = request.folder / name
    found: dict[str, Any] = {
        "data": corpus_summary(corpus),
        "updates": request.updates,
        "batch": f"{budget.batch} x {budget.accumulate}",
        "lr": rates,
        "seeds": list(request.seeds),
    }
    peer_lr = settings.default_lr if settings.default_lr in rates else rates[0]
    reason = why_not(name, request.device, request.peer_python, request.driver)
    peer: PeerRun | None = None
    if reason is None:
        assert request.peer_python is not None
        say_s = time.perf_counter()
        peer = run_peer(
            corpus,
            python=request.peer_python,
            driver=request.driver,
            checkpoint=checkpoint,
            device=request.device,
            updates=min(request.peer_updates, request.updates),
            lr=peer_lr,
            folder=folder / "s3prl",
            threads=request.threads,
            timeout_s=request.timeout_s,
            gone=True,
        )
        found["s3prl_took_s"] = time.perf_counter() - say_s
    ours = run_ours(_ours_job(request, corpus, checkpoint, rates, folder), folder / "superb_probe", request.timeout_s)
    found["superb_probe"] = {**ours, "passes_per_utterance": ours["encoder_passes"] / corpus.distinct}
    if peer is None:
        found["s3prl"] = None
        found["s3prl_not_run"] = reason
        return found
    found["encoder_difference"] = states_difference(folder)
    found["s3prl_lr"] = peer_lr
    measured = min(request.peer_updates, request.updates)
    evaluations = -(-request.updates // min(budget.evaluate_every, -(-request.updates // 10)))
    found["s3prl"] = peer_summary(peer, request.updates, measured, len(rates), evaluations, settings.select_on)
    found |= compare(found, peer, corpus, request.updates, evaluations)
    return found


def _ours_job(request: Request, corpus: BenchCorpus, checkpoint: Path, rates: Sequence[float], folder: Path) -> OursJob:
    states = folder / "s3prl" / "states.npy"
    audio = folder / "s3prl" / "states.wav"
    return OursJob(
        checkpoint=str(checkpoint),
        task=corpus.task.info.name,
        manifests={split: str(path) for split, path in corpus.manifests.items()},
        root=str(corpus.root),
        lr=list(rates),
        seed=list(request.seeds),
        steps=request.updates,
        out=str(folder / "records"),
        store=str(folder / "store"),
        device=str(request.device),
        threads=request.threads,
        states={"audio": str(audio), "out": str(folder / "states.npy")} if states.is_file() else None,
    )


def states_difference(folder: Path) -> float:
    """The two encoders' layers on one file: norm of the difference over the norm, the worst layer's.

    Raises:
        CheckError: if they are not one encoder: no ratio means anything then.
    """
    ours, theirs = np.load(folder / "states.npy"), np.load(folder / "s3prl" / "states.npy")
    if ours.shape != theirs.shape:
        raise CheckError(f"the two encoders' states differ in shape: {ours.shape} here, {theirs.shape} in s3prl")
    norms = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(ours, theirs, strict=True)]
    worst = float(max(norms))
    if not worst < STATES_TOLERANCE:
        raise CheckError(f"the two encoders' states differ by {worst:.2g} of their norm (bound {STATES_TOLERANCE:g})")
    return worst


def peer_summary(
    peer: PeerRun, updates: int, measured: int, rates: int, evaluations: int, select_on: str
) -> dict[str, Any]:
    """s3prl's side: what was measured, and the whole sweep scaled from it, with the arithmetic."""
    select_s = peer.evaluation_s.get(select_on, peer.evaluation_s["test"])
    one_s = updates * peer.update_s + evaluations * select_s + peer.evaluation_s["test"]
    select_passes = peer.evaluation_passes.get(select_on, peer.evaluation_passes["test"])
    passes = updates * peer.update_passes + evaluations * select_passes + peer.evaluation_passes["test"]
    scaled = (
        "measured on all updates of one learning rate"
        if measured >= updates
        else (f"measured on {peer.updates} updates and scaled to {updates}")
    )
    worked = None
    if peer.update_processor_s is not None and peer.processes_only_itself:
        select = peer.evaluation_processor_s.get(select_on, peer.evaluation_processor_s["test"])
        worked = updates * peer.update_processor_s + evaluations * select + peer.evaluation_processor_s["test"]
    note = "" if measured >= LEAST_UPDATES else f"; FEWER than {LEAST_UPDATES} updates: a dry run, no result"
    return {
        "measured_updates": peer.updates,
        "update_s": peer.update_s,
        "update_s_standard_error": peer.spread_s,
        "evaluation_s": dict(peer.evaluation_s),
        "passes_per_update": peer.update_passes,
        "wall_s": rates * one_s,
        "update_processor_s": peer.update_processor_s,
        "processor_s": None if worked is None else rates * worked,
        "encoder_passes": rates * passes,
        "how": scaled + note,
        "arithmetic": (
            f"{rates} learning rates x ({updates} updates x {peer.update_s:.4g} s + {evaluations} evaluations x {select_s:.4g} s "
            f"+ {peer.evaluation_s['test']:.4g} s on test) = {rates * one_s:.4g} s"
        ),
        "peak_rss_bytes": peer.peak_rss_bytes,
        "peak_gpu_bytes": peer.peak_gpu_bytes,
        "after_last_update": {"dev": peer.score("dev"), "test": peer.score("test")} if measured >= updates else None,
        "versions": peer.raw.get("versions"),
        "stand_ins": peer.raw.get("stand_ins"),
    }


def compare(
    found: Mapping[str, Any], peer: PeerRun, corpus: BenchCorpus, updates: int, evaluations: int
) -> dict[str, Any]:
    """Ratios: of the wall time measured here, along a curve of updates, and at SUPERB's sizes."""
    ours, theirs = found["superb_probe"], found["s3prl"]
    rates = len(found["lr"])
    trials = rates * len(found["seeds"])
    extract_s = min(ours["extract_s"], ours["wall_s"])
    fixed_s = max(ours["wall_s"] - ours["fit_s"], 0.0)  # extraction, records and what is between
    update_s = ours["fit_s"] / updates  # of all trials together, evaluations included
    per_rate = theirs["wall_s"] / updates
    curve = {
        str(count): {
            "s3prl_s": per_rate * count,
            "superb_probe_s": fixed_s + update_s * count,
            "ratio": per_rate * count / (fixed_s + update_s * count),
            "how": "measured"
            if count == updates
            else "scaled: s3prl by updates; here extraction once, training by updates",
        }
        for count in sorted({*CURVE, updates})
    }
    compared = {
        "ratio": theirs["wall_s"] / ours["wall_s"],
        "ratio_note": (
            f"{rates} learning rates on both sides; here {trials} trials in {ours['wall_s']:.4g} s, from the call to the last record"
        ),
        "processor_ratio": theirs["processor_s"] / ours["processor_s"] if theirs["processor_s"] else None,
        "passes_ratio": theirs["encoder_passes"] / ours["encoder_passes"],
        "s3prl_passes_per_utterance": theirs["encoder_passes"] / corpus.distinct,
        "superb_probe_update_s": update_s,
        "superb_probe_fixed_s": fixed_s,
        "s3prl_update_s_of_all_rates": rates * peer.update_s,
        "update_ratio": rates * peer.update_s / update_s if update_s else None,
        "curve": curve,
    }
    sizes = SUPERB_SIZES.get(corpus.task.info.name)
    if sizes is not None:
        compared["at_superb_sizes"] = at_superb_sizes(sizes, corpus, peer, rates, extract_s, update_s)
    return compared


def at_superb_sizes(
    sizes: Mapping[str, float], corpus: BenchCorpus, peer: PeerRun, rates: int, extract_s: float, update_s: float
) -> dict[str, Any]:
    """The ratio at SUPERB's own corpus and number of updates: encoder time goes with seconds of audio, the rest with updates."""
    budget, train = corpus.task.info.budgets["full"], corpus.fold.manifests["train"]
    steps, evaluations = budget.steps, budget.steps // budget.evaluate_every
    longer = (sizes["train_h"] * 3600 / sizes["train"]) / (train.total_s / len(train))
    test_s = sizes["test_h"] * 3600 / corpus.fold.manifests["test"].total_s * peer.evaluation_s["test"]
    select_s = test_s * sizes["select_h"] / sizes["test_h"]
    theirs = rates * (steps * peer.update_s * longer + evaluations * select_s + test_s)
    hours = sizes["train_h"] + sizes["select_h"] + sizes["test_h"]
    if sizes["select_h"] == sizes["test_h"] and corpus.task.info.protocols["superb"].select_on == "test":
        hours -= sizes["select_h"]
    extract_all_s = extract_s * hours * 3600 / corpus.audio_s
    per_update = update_s * (longer if corpus.task.info.view == "frames" else 1.0)
    ours = extract_all_s + steps * per_update
    return {
        "s3prl_s": theirs,
        "superb_probe_s": ours,
        "ratio": theirs / ours,
        "arithmetic": (
            f"s3prl: {rates} x ({steps} updates x {peer.update_s:.4g} s x {longer:.3g} (mean utterance {longer:.3g} times ours) + "
            f"{evaluations} x {select_s:.4g} s + {test_s:.4g} s) = {theirs:.4g} s; here: {hours:.4g} h of audio x "
            f"{extract_s / corpus.audio_s:.4g} s a second + {steps} updates x {per_update:.4g} s (all trials) = {ours:.4g} s"
        ),
        "how": "computed from the rates above, not run",
    }


def describe(result: Mapping[str, Any]) -> list[str]:
    """The result in lines for people."""
    machine, encoder = result["machine"], result["encoder"]
    where = machine["gpu"]["name"] if machine["gpu"] else f"{machine['processor']}, {machine['threads']} threads"
    lines = [
        f"{where}; torch {machine['versions']['torch']}; commit {machine['commit']}",
        f"encoder: {encoder['parameters'] / 1e6:.1f} M parameters, {encoder['layers']} layer states of {encoder['dim']}, "
        + str(encoder["weights"]),
    ]
    for name, found in result["tasks"].items():
        lines += ["", *_describe_ours(name, found)]
        if found["s3prl"] is None:
            lines.append(f"  s3prl         not run: {found['s3prl_not_run']}")
        else:
            lines += _describe_peer(found)
    return lines


def _describe_ours(name: str, found: Mapping[str, Any]) -> list[str]:
    ours, utterances = found["superb_probe"], found["data"]["utterances"]
    sizes = " / ".join(str(utterances[split]) for split in ("train", "dev", "test") if split in utterances)
    rows = [row for row in ours["scores"] if row["test"] is not None]
    scores = ", ".join(f"{row['lr']:g} {row['selected']:.1f}/{row['test']:.1f}" for row in rows[:5])
    return [
        f"{name}: {sizes} utterances, {found['updates']} updates of {found['batch']}, {len(found['lr'])} learning rates",
        f"  superb-probe  {ours['wall_s']:.1f} s in all (encoder and store {ours['extract_s']:.1f}, training "
        + f"{ours['fit_s']:.1f}), {ours['trials']} trials, {ours['passes_per_utterance']:.2f} encoder passes an utterance, "
        + f"{ours['peak_rss_bytes'] / 1e9:.2f} GB{_gpu(ours)}",
        f"                dev/test by rate: {scores}",
    ]


def _describe_peer(found: Mapping[str, Any]) -> list[str]:
    theirs = found["s3prl"]
    updates = (found["s3prl_update_s_of_all_rates"], found["superb_probe_update_s"])
    lines = [
        f"  s3prl         {theirs['wall_s']:.0f} s ({theirs['how']}), {found['s3prl_passes_per_utterance']:.0f} encoder passes "
        + f"an utterance, {theirs['peak_rss_bytes'] / 1e9:.2f} GB{_gpu(theirs)}",
        f"                {theirs['arithmetic']}",
        f"                {_peer_score(theirs)}",
        f"                {_paired(found)}",
        f"  ratio         {found['ratio']:.1f}; one update of all {len(found['lr'])} rates: {updates[0]:.4g} s there, "
        + f"{updates[1]:.4g} s here; the encoders' layers differ by {found['encoder_difference']:.1g} of their norm",
        "  by updates    " + ", ".join(f"{count}: {row['ratio']:.1f}" for count, row in found["curve"].items()),
    ]
    if found["processor_ratio"]:
        note = "in processor seconds, which other work on the machine does not stretch"
        lines.insert(-1, f"                {found['processor_ratio']:.1f} {note}")
    if "at_superb_sizes" in found:
        at = found["at_superb_sizes"]
        lines.append(f"  at SUPERB's sizes {at['ratio']:.0f} ({at['how']}): {at['arithmetic']}")
    return lines


def _paired(found: Mapping[str, Any]) -> str:
    """Both sides' scores on dev at one rate, after the same number of updates."""
    theirs, lr = found["s3prl"]["after_last_update"], found["s3prl_lr"]
    if theirs is None or theirs["dev"] is None:
        return "no scores side by side: s3prl has none on dev after as many updates"
    ours = [row for row in found["superb_probe"]["scores"] if row["lr"] == lr and row["after_last_update"] is not None]
    said = (
        ", ".join(f"{row['after_last_update']:.1f} (seed {row['seed']})" for row in ours) or "none: its trials failed"
    )
    return f"dev after update {found['updates']} at lr {lr:g}: {theirs['dev']:.1f} there; here {said}"


def _gpu(side: Mapping[str, Any]) -> str:
    return "" if side["peak_gpu_bytes"] is None else f" ({side['peak_gpu_bytes'] / 1e9:.2f} GB on the GPU)"


def _peer_score(theirs: Mapping[str, Any]) -> str:
    scores = theirs["after_last_update"]
    if scores is None:
        return "no score: not all updates were run"
    return "after the last update dev/test " + "/".join("-" if v is None else f"{v:.1f}" for v in scores.values())


def check_request(tasks: Sequence[str], updates: int, peer_updates: int, limit: int | None) -> None:
    """Refuse numbers that measure nothing.

    Raises:
        RequestError: with all of them.
    """
    wrong = [
        f"--{name} {value}: at least {least}"
        for name, value, least in (("updates", updates, 1), ("peer-updates", peer_updates, 2), ("limit", limit or 2, 2))
        if value < least
    ]
    if not tasks:
        wrong.append("name at least one --task")
    if wrong:
        raise RequestError("superb-probe bench probing: " + "; ".join(wrong))
