"""Fine-tuning a recogniser from a request: data, encoder and head, training with checkpoints, scores, and the folder it leaves."""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from superb_probe.bench_machine import describe_machine, synchronize
from superb_probe.downstreams.asr import SPECIALS, normalise, spell, unspell
from superb_probe.downstreams.manifest import Manifest
from superb_probe.downstreams.vocabulary import read_vocabulary
from superb_probe.engine_progress import say
from superb_probe.errors import RequestError, all_at_once
from superb_probe.probes.finetune import CHECKPOINT, FinetuneRecipe, Finetuning, evaluations, transcribe
from superb_probe.probes.finetune_data import LONGEST_S, Passage, passages, too_dense
from superb_probe.probes.finetune_heads import make_head
from superb_probe.probes.finetune_model import FinetuneModel, Regularisation
from superb_probe.probes.metrics import edit_distance
from superb_probe.probes.specaugment import DIM_MASK_WIDTH, SpecAugment
from superb_probe.probes.statistics import bootstrap
from superb_probe.streaming import Recogniser
from superb_probe.upstreams.base import Upstream
from superb_probe.upstreams.checkpoints import write_checkpoint
from superb_probe.upstreams.hubert_upstream import WEIGHTS, HubertUpstream
from superb_probe.upstreams.load import load_upstream

PUBLISHED_DIM = 768  # of the encoders that SpecAugment is meant for
FORMAT = "superb-probe/finetuned/1"
DESCRIPTION, ENCODER, HEAD, LOG = "finetuned.json", "encoder.safetensors", "head.safetensors", "log.csv"
END = "</s>"
COLUMNS = ("step", "loss", "gradient_norm", "lr", "frozen", "audio_s_per_s", "dev_wer", "seconds", "peak_gpu_bytes")


@dataclass(frozen=True, slots=True)
class HeadChoice:
    """Which head.

    Attributes:
        name: of `superb_probe.probes.finetune_heads.HEADS`.
        width: None for the head's own.
        num_layers: None for the head's own.
    """

    name: str = "lstm"
    width: int | None = None
    num_layers: int | None = None


@dataclass(frozen=True, slots=True)
class FinetuneRequest:
    """One fine-tuning run.

    Attributes:
        upstream: registered name of a HuBERT of this project.
        manifests: "train", "dev" and "test".
        out: folder of the run.
        checkpoint: the encoder's weights.
        size: of an encoder without a checkpoint.
        random: seed of random weights.
        upstream_options: its own.
        head: which.
        recipe: how.
        how: dropout, layer drop, recomputed activations.
        augment: SpecAugment of the states.
        context: "utterance" or "document".
        test_contexts: what the test split is scored by; the first is the run's score.
        test_manifests: by context, where the test split is another manifest in it (talks that are not their segments joined).
        document_column: see `superb_probe.probes.finetune_data.passages`.
        longest_s: longer passages are left out.
        device: where.
        resume: go on with the run in `out`.
        time_limit_s: stop with a checkpoint after so long.
    """

    upstream: str
    manifests: Mapping[str, Manifest]
    out: Path
    checkpoint: Path | None = None
    size: str | None = None
    random: int | None = None
    upstream_options: Mapping[str, Any] = field(default_factory=dict)
    head: HeadChoice = field(default_factory=HeadChoice)
    recipe: FinetuneRecipe = field(default_factory=FinetuneRecipe)
    how: Regularisation = field(default_factory=Regularisation)
    augment: bool = True
    context: str = "utterance"
    test_contexts: tuple[str, ...] = ()
    test_manifests: Mapping[str, Manifest] = field(default_factory=dict)
    document_column: str | None = None
    longest_s: float = LONGEST_S
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    resume: bool = False
    time_limit_s: float = float("inf")


def finetune(request: FinetuneRequest) -> dict[str, Any] | None:
    """Fine-tune, score the best update on test, and leave encoder, head, log and description in the folder.

    Returns:
        The description; None when the time limit came first (the run can be resumed).

    Raises:
        RequestError: for data that cannot be used, a folder that holds another run, or an encoder that is no HuBERT of this project.
    """
    splits = {split: _passages(request, split, request.context) for split in ("train", "dev")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.recipe.seed)
        upstream, model, tokens = _model(request)
    targets = _targets(upstream, splits, tokens)
    training = Finetuning(model, splits["train"], targets["train"], request.recipe, request.device)
    state = _begin(request, training, splits)
    end = time.monotonic() + request.time_limit_s
    for mark in evaluations(request.recipe):
        if mark <= training.step:
            continue
        updates = []
        for update in training.run(mark):
            updates.append(update)
            if time.monotonic() > end:
                break
        seconds = sum(update.seconds for update in updates)
        state["seconds"] += seconds
        if training.step < mark:
            training.save(request.out / CHECKPOINT, state)
            say(f"stopped after {training.step} of {request.recipe.steps} updates. Fix: --resume goes on")
            return None
        score = _wer(_scored(model, splits["dev"], tokens, request))
        row = _row(training, updates, score, seconds, request.device)
        _log(request.out / LOG, row)
        say(
            f"update {mark} of {request.recipe.steps}: loss {row['loss']}, dev wer {score:.2f} %, {row['audio_s_per_s']} s a second"
        )
        if state["best"] is None or score < state["best"]:
            state.update(best=score, best_step=mark)
            _write_weights(request, upstream, training, tokens)
        training.save(request.out / CHECKPOINT, state)
    return _finish(request, upstream, model, tokens, state)


def _passages(request: FinetuneRequest, split: str, context: str) -> list[Passage]:
    if split not in request.manifests:
        raise RequestError(f"superb-probe finetune: no {split} data. Fix: --manifest train=a.tsv dev=b.tsv test=c.tsv")
    manifest = request.test_manifests.get(context) if split == "test" else None
    return passages(manifest or request.manifests[split], context, request.document_column, request.longest_s)


def _model(request: FinetuneRequest) -> tuple[HubertUpstream, FinetuneModel, tuple[str, ...]]:
    upstream = load_upstream(
        request.upstream,
        checkpoint=request.checkpoint,
        size=request.size,
        random=request.random,
        **request.upstream_options,
    )
    if not isinstance(upstream, HubertUpstream):
        raise RequestError(f"{request.upstream} is no HuBERT of this project, and only those are fine-tuned.")
    seen = {character for text in request.manifests["train"].labels("text") for character in spell(text)}
    published = read_vocabulary("characters")
    tokens = SPECIALS + (published if seen.issubset(published) else tuple(sorted(seen)))
    choice = request.head
    head = make_head(
        choice.name, upstream.info.dim, tokens, width=choice.width, num_layers=choice.num_layers, drop=(END,)
    )
    masks = None
    if request.augment:  # in a narrow encoder the published widths would cover most of the states
        generator, share = torch.Generator().manual_seed(request.recipe.seed), upstream.info.dim / PUBLISHED_DIM
        masks = SpecAugment(generator, dim_mask_width=max(1, round(share * DIM_MASK_WIDTH)))
    return upstream, FinetuneModel(upstream.encoder, head, request.how, masks), tokens


def _targets(
    upstream: Upstream, splits: Mapping[str, Sequence[Passage]], tokens: tuple[str, ...]
) -> dict[str, list[Tensor]]:
    """Token ids of each passage; everything that cannot be trained on at once.

    Raises:
        RequestError: for characters outside the vocabulary of train, and passages too short for their text.
    """
    number = {token: index for index, token in enumerate(tokens)}
    found: dict[str, list[Tensor]] = {}
    problems = []
    for split, rows in splits.items():
        unknown = sorted({each for row in rows for each in spell(row.text) if each not in number})
        if unknown:
            problems.append(f"{split}: characters that train has not: {' '.join(unknown)}")
            continue
        found[split] = [torch.tensor([number[each] for each in (*spell(row.text), END)]) for row in rows]
        frames = [upstream.num_frames(round(row.duration_s * upstream.info.sample_rate_hz)) for row in rows]
        if split == "train":
            problems += too_dense(rows, frames, found[split])
    if problems:
        raise all_at_once("fine-tuning", problems, "rewrite these texts, or leave the passages out")
    return found


def _begin(request: FinetuneRequest, training: Finetuning, splits: Mapping[str, Sequence[Passage]]) -> dict[str, Any]:
    """What has been found so far: nothing, or what the checkpoint of the same run says."""
    causes = _causes(request)
    checkpoint = request.out / CHECKPOINT
    if checkpoint.exists() != request.resume:
        fix = "--resume goes on with it; or another --out" if checkpoint.exists() else "drop --resume"
        raise RequestError(f"{request.out}: {'holds a run' if checkpoint.exists() else 'holds no run'}. Fix: {fix}")
    request.out.mkdir(parents=True, exist_ok=True)
    hours = {split: sum(row.duration_s for row in rows) / 3600 for split, rows in splits.items()}
    say(
        f"{request.upstream}: "
        + ", ".join(f"{split} {len(splits[split])} passages, {hours[split]:.2f} h" for split in splits)
    )
    if not request.resume:
        (request.out / LOG).unlink(missing_ok=True)
        return {"best": None, "best_step": 0, "seconds": 0.0, "causes": causes}
    state = training.load(checkpoint)
    other = sorted(name for name in causes if state["causes"].get(name) != causes[name])
    if other:
        raise RequestError(
            f"{request.out}: the run there differs in {', '.join(other)}. Fix: the same options, or another --out"
        )
    return state


def _causes(request: FinetuneRequest) -> dict[str, Any]:
    """Everything that the result depends on, as plain values."""
    return json.loads(  # type: ignore[no-any-return]
        json.dumps(
            {
                "upstream": request.upstream,
                "checkpoint": None if request.checkpoint is None else str(request.checkpoint),
                "size": request.size,
                "random": request.random,
                "upstream_options": dict(request.upstream_options),
                "head": asdict(request.head),
                "recipe": asdict(request.recipe),
                "regularisation": asdict(request.how),
                "augment": request.augment,
                "context": request.context,
                "document_column": request.document_column,
                "longest_s": request.longest_s,
                "data": {split: manifest.digest for split, manifest in sorted(request.manifests.items())},
            }
        )
    )


def _scored(
    model: FinetuneModel, rows: Sequence[Passage], tokens: tuple[str, ...], request: FinetuneRequest
) -> list[dict[str, Any]]:
    """By passage: reference, hypothesis, edits and words."""
    items = []
    for row, ids in zip(rows, transcribe(model, rows, request.recipe.part_s, request.device), strict=True):
        reference = normalise(row.text)
        hypothesis = unspell([tokens[number] for number in ids if tokens[number] != END])
        edits = edit_distance(reference.split(), hypothesis.split())
        items.append(
            {
                "id": row.id,
                "cluster": row.cluster,
                "seconds": row.duration_s,
                "reference": reference,
                "hypothesis": hypothesis,
                "edits": edits,
                "words": len(reference.split()),
            }
        )
    return items


def by_length(items: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Word error rates of passages by their length, in steps of a factor of two.

    >>> by_length([{"seconds": 3.0, "edits": 1, "words": 4}, {"seconds": 9.0, "edits": 1, "words": 2}])
    [{'from_s': 2.0, 'to_s': 4.0, 'passages': 1, 'wer': 25.0}, {'from_s': 8.0, 'to_s': 16.0, 'passages': 1, 'wer': 50.0}]
    """
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for item in items:
        groups.setdefault(math.floor(math.log2(item["seconds"])), []).append(item)
    return [
        {"from_s": 2.0**power, "to_s": 2.0 ** (power + 1), "passages": len(group), "wer": _wer(group)}
        for power, group in sorted(groups.items())
    ]


def _wer(items: Sequence[Mapping[str, Any]]) -> float:
    """Word error rate in percent."""
    return 100.0 * float(sum(item["edits"] for item in items) / sum(item["words"] for item in items))


def _row(
    training: Finetuning, updates: Sequence[Any], score: float, seconds: float, device: torch.device
) -> dict[str, Any]:
    synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else ""
    return {
        "step": training.step,
        "loss": f"{sum(update.loss for update in updates) / len(updates):.4f}",
        "gradient_norm": f"{sum(update.gradient_norm for update in updates) / len(updates):.4f}",
        "lr": f"{training.recipe.rate(training.step - 1):.3g}",
        "frozen": int(training.model.frozen),
        "audio_s_per_s": f"{sum(update.audio_s for update in updates) / max(seconds, 1e-9):.1f}",
        "dev_wer": f"{score:.3f}",
        "seconds": f"{seconds:.1f}",
        "peak_gpu_bytes": peak,
    }


def _log(path: Path, row: Mapping[str, Any]) -> None:
    """Add a line; lines from this update on, which a run that was stopped had written, are dropped."""
    kept = []
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as stream:
            kept = [each for each in csv.DictReader(stream) if int(each["step"]) < int(row["step"])]
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, row])


def _write_weights(
    request: FinetuneRequest, upstream: HubertUpstream, training: Finetuning, tokens: tuple[str, ...]
) -> None:
    """The best encoder, as a checkpoint that any command takes, and the head beside it."""
    info, heard = upstream.info, request.manifests["train"]
    write_checkpoint(
        request.out / ENCODER,
        upstream.encoder.config,
        training.encoder_weights(),
        name=info.name,
        trained_on=(*info.trained_on, f"fine-tuned: {heard.root.resolve().name}.{heard.name}"),
        license=info.license,
        citation=info.citation,
        metadata={"fine_tuned_from": info.revision},
    )
    weights = {name: each.detach().cpu().contiguous() for name, each in training.model.head.state_dict().items()}
    (request.out / HEAD).write_bytes(safetensors.torch.save(weights))
    _describe(request, upstream, tokens, {})


def _describe(
    request: FinetuneRequest, upstream: Upstream, tokens: tuple[str, ...], found: Mapping[str, Any]
) -> dict[str, Any]:
    description = {
        "format": FORMAT,
        "upstream": request.upstream,
        "revision": upstream.info.revision,
        "tokens": list(tokens),
        **_causes(request),
        **found,
    }
    text = json.dumps(description, indent=1, ensure_ascii=False) + "\n"
    (request.out / DESCRIPTION).write_text(text, encoding="utf-8")
    return description


def _finish(
    request: FinetuneRequest,
    upstream: HubertUpstream,
    model: FinetuneModel,
    tokens: tuple[str, ...],
    state: Mapping[str, Any],
) -> dict[str, Any]:
    """Score the best update's weights on test, once, in every context asked for."""
    encoder = safetensors.torch.load_file(request.out / ENCODER)
    model.encoder.load_state_dict(encoder)
    model.head.load_state_dict(safetensors.torch.load_file(request.out / HEAD))
    scores = []
    for context in request.test_contexts or (request.context,):
        items = _scored(model, _passages(request, "test", context), tokens, request)
        columns = {name: [item[name] for item in items] for name in ("edits", "words")}
        clusters = [item["cluster"] for item in items]
        low = high = None
        if len(set(clusters)) > 1:
            low, high, _ = bootstrap(
                lambda drawn: 100.0 * float(drawn["edits"].sum() / drawn["words"].sum()), columns, clusters=clusters
            )
        score = {"context": context, "wer": _wer(items), "ci95": [low, high], "passages": len(items)}
        scores.append({**score, "by_length": by_length(items), "items": items})
    found = {
        "dev_wer": state["best"],
        "step": state["best_step"],
        "seconds": state["seconds"],
        "test": scores,
        "machine": describe_machine(request.device),
    }
    return _describe(request, upstream, tokens, found)


def shipped_recogniser() -> Path:
    """The folder of the streaming recogniser that ships."""
    return WEIGHTS / "recogniser"


def recogniser_of_folder(folder: Path) -> tuple[Upstream, Recogniser]:
    """The encoder and head that `finetune` left in a folder, for streaming.

    Raises:
        RequestError: if the folder holds none, or a head that cannot stream.
    """
    from superb_probe.probes.finetune_heads import HeadStream

    path = folder / DESCRIPTION
    if not path.is_file():
        raise RequestError(f"{folder}: no {DESCRIPTION}. Fix: a folder that `superb-probe finetune --out` wrote")
    description = json.loads(path.read_text(encoding="utf-8"))
    if description.get("format") != FORMAT:
        raise RequestError(f"{path}: format {description.get('format')!r}, expected {FORMAT!r}")
    upstream = load_upstream(description["upstream"], checkpoint=folder / ENCODER)
    choice, tokens = description["head"], tuple(description["tokens"])
    head = make_head(
        choice["name"], upstream.info.dim, tokens, width=choice["width"], num_layers=choice["num_layers"], drop=(END,)
    )
    head.load_state_dict(safetensors.torch.load_file(folder / HEAD))
    HeadStream(head)
    return upstream, Recogniser(
        lambda states: states[-1].float(), head.eval(), tokens, frozenset({END}), False, str(folder)
    )
