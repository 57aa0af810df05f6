"""HuBERT's pre-training from prepared clips: targets, training, checkpoints and what is exported, one iteration after the other."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from superb_probe.errors import RequestError
from superb_probe.upstreams.checkpoints import read_checkpoint, write_checkpoint
from superb_probe.upstreams.config import HubertConfig
from superb_probe.upstreams.hubert import HubertEncoder
from superb_probe.upstreams.pretrain_data import Clips, Sampler, Units
from superb_probe.upstreams.pretrain_evidence import layer_purities, unit_purity
from superb_probe.upstreams.pretrain_model import SPECIAL_SYMBOLS, HubertPretraining, new_encoder
from superb_probe.upstreams.pretrain_progress import Log, Window
from superb_probe.upstreams.pretrain_recipe import Iteration, Recipe
from superb_probe.upstreams.pretrain_targets import layer_states, make_units, mfcc_units
from superb_probe.upstreams.pretrain_train import Trainer, Update, World, measure

FORMAT = "superb-probe/pretraining/1"
CHECKPOINT, EVIDENCE = "checkpoint.pt", "evidence.json"
PURITY_CLUSTERS = 100


@dataclass(frozen=True, slots=True)
class Job:
    """One pre-training run.

    Attributes:
        name: registered name of the encoder.
        config: its shape; the number of classes follows from each iteration's clusters.
        recipe: how to train.
        clips: on what.
        units_folder: where units of cepstra are kept, to be shared by runs on the same clips.
        out: folder of the run.
        world: its processes.
        time_limit_s: seconds after which it stops with a checkpoint; infinity for none.
        graphs: record CUDA graphs on a GPU.
        description: for the exported files: "trained_on" (a list), "license", "metadata" (text by name).
        half: export float16 weights.
        quiet: say nothing.
    """

    name: str
    config: HubertConfig
    recipe: Recipe
    clips: Clips
    units_folder: Path
    out: Path
    world: World
    time_limit_s: float
    graphs: bool
    description: Mapping[str, Any]
    half: bool = False
    quiet: bool = False

    def shape(self, iteration: Iteration) -> HubertConfig:
        """The encoder's shape with the classes of an iteration."""
        return replace(self.config, num_classes=iteration.clusters + SPECIAL_SYMBOLS)

    def exported(self, number: int) -> Path:
        """The weights that iteration `number`, counted from 1, ends in."""
        last = number == len(self.recipe.iterations)
        return self.out / (f"{self.name}.safetensors" if last else f"iteration-{number}.safetensors")


def pretrain(job: Job) -> bool:
    """Run, or go on with, a job.

    What is there of it (exported iterations, units, a checkpoint) is taken up; `begin` says whether it may be.

    Returns:
        Whether it came to its end; False when the time limit stopped it, with a checkpoint.
    """
    begun = time.monotonic()
    job.out.mkdir(parents=True, exist_ok=True)
    for number in range(1, len(job.recipe.iterations) + 1):
        done = job.exported(number).with_suffix(".json").is_file()
        job.world.wait()
        if done:
            continue
        units = units_of(job, number)
        if not _train(job, number, units, begun):
            return False
    return True


def prepare_units(job: Job) -> None:
    """Make the first iteration's units, which runs on the same clips share."""
    units_of(job, 1)


def begin(out: Path, recipe: Recipe, clips: Clips, *, resume: bool) -> None:
    """Check that a run may start in a folder, or go on there.

    Raises:
        RequestError: if the folder holds a run and `resume` is not asked for, or holds one of another recipe or other clips.
    """
    file = out / "run.json"
    facts = {"format": FORMAT, "recipe": json.loads(recipe.text()), "clips": clips.facts["digest"]}
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        if not resume:
            raise RequestError(f"{out}: a run is there. Fix: --resume to go on with it, or another --out.")
        keys = [key for key in facts["recipe"] if found["recipe"].get(key) != facts["recipe"][key]]
        differing = [f"{key} was {found['recipe'].get(key)!r}, now {facts['recipe'][key]!r}" for key in keys]
        if found["clips"] != facts["clips"]:
            differing.append(f"clips were {found['clips']}, now {facts['clips']}")
        if found["format"] != FORMAT:
            differing.append(f"format was {found['format']}, now {FORMAT}")
        if differing:
            raise RequestError(f"{out}: the run there is another one: {'; '.join(differing)}. Fix: another --out.")
        return
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def units_of(job: Job, number: int) -> Units:
    """The targets of an iteration: made by the first process, read by all."""
    iteration, recipe = job.recipe.iterations[number - 1], job.recipe
    if iteration.targets == "mfcc":
        key = f"{iteration.clusters}-{iteration.kmeans_share:g}-{recipe.seed}"
        path = job.units_folder / f"units-mfcc-{key}-{job.clips.facts['digest'][7:19]}.npz"
    else:
        path = job.out / f"iteration-{number}-units.npz"
    if job.world.rank == 0 and not path.is_file():
        if iteration.targets == "mfcc":
            made = mfcc_units(job.clips, iteration.clusters, iteration.kmeans_share, recipe.seed, job.world.device)
        else:
            made = _layer_units(job, number)
        made.write(path)
    job.world.wait()
    return Units.read(path)


def _layer_units(job: Job, number: int) -> Units:
    iteration = job.recipe.iterations[number - 1]
    before = read_checkpoint(job.exported(number - 1))
    encoder = HubertEncoder(before.config)
    encoder.load_state_dict(dict(before.tensors))
    layer = iteration.layer or before.config.num_layers // 2
    return make_units(
        job.clips,
        layer_states(encoder.to(job.world.device), layer),
        hop_samples=encoder.hop_samples,
        clusters=iteration.clusters,
        share=iteration.kmeans_share,
        seed=job.recipe.seed,
        device=job.world.device,
        source=f"k-means {iteration.clusters} of layer {layer} of {before.config.num_layers} of iteration {number - 1}",
    )


def make_trainer(job: Job, number: int, units: Units) -> Trainer:
    """The trainer of an iteration, with new weights."""
    recipe, iteration = job.recipe, job.recipe.iterations[number - 1]
    model = HubertPretraining(new_encoder(job.shape(iteration), recipe), recipe)
    sampler = Sampler(job.clips, units, recipe, model.encoder.num_frames, model.encoder.hop_samples)
    return Trainer(model, sampler, recipe, iteration.steps, job.world, job.graphs)


@dataclass(slots=True)
class _Course:
    """How far an iteration has come.

    Attributes:
        step: updates done.
        seconds: spent on them, in all runs.
        audio_s: seconds of audio in them.
        window: since the last line of the log.
    """

    step: int = 0
    seconds: float = 0.0
    audio_s: float = 0.0
    window: Window = field(default_factory=Window)

    def add(self, update: Update, seconds: float) -> None:
        """One more update."""
        self.step += 1
        self.seconds += seconds
        self.audio_s += update.audio_s
        self.window.add(update, seconds)

    def facts(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"step": self.step, "seconds": self.seconds, "audio_s": self.audio_s, "window": self.window.sums}


def _train(job: Job, number: int, units: Units, begun: float) -> bool:
    """One iteration to its end or to the time limit; True at its end."""
    recipe, steps, world = job.recipe, job.recipe.iterations[number - 1].steps, job.world
    trainer = make_trainer(job, number, units)
    course = _taken_up(job, number, trainer)
    log = Log(job.out, number, course.step, quiet=job.quiet) if world.rank == 0 else None
    if log is not None:
        log.say(_first_words(number, trainer, course.step, steps))
    saved = ticked = time.monotonic()
    while course.step < steps:
        update = trainer.update(course.step)
        now = time.monotonic()
        course.add(update, now - ticked)
        ticked = now
        validate = course.step == steps or (recipe.validate_every > 0 and course.step % recipe.validate_every == 0)
        if validate or course.step % recipe.log_every == 0:
            if log is not None:
                log.line(course.step, steps, _numbers(job, trainer, course, validate))
            course.window, ticked = Window(), time.monotonic()
        over = now - begun > job.time_limit_s
        if world.size > 1:
            over = bool(world.add_up(torch.tensor(float(over), device=world.device)))
        if over and course.step < steps:
            _save(job, number, trainer, course)
            if log is not None:
                log.say(f"stopped by the time limit after update {course.step} of {steps}; --resume goes on")
                log.close()
            return False
        if now - saved > recipe.save_every_s:
            _save(job, number, trainer, course)
            saved = time.monotonic()
    _save(job, number, trainer, course)  # before the export: a run that stops between the two only exports again
    if log is not None:
        _export(job, number, trainer, units, course)
        log.close()
    world.wait()
    return True


def _taken_up(job: Job, number: int, trainer: Trainer) -> _Course:
    """How far the checkpoint, loaded into the trainer, had come; the start if there is none of this iteration."""
    if (job.out / CHECKPOINT).is_file():
        stored = torch.load(job.out / CHECKPOINT, map_location=job.world.device, weights_only=True)
        if stored["iteration"] == number:
            trainer.load(stored)
            return _Course(stored["step"], stored["seconds"], stored["audio_s"], Window(stored["window"]))
    return _Course()


def _first_words(number: int, trainer: Trainer, step: int, steps: int) -> str:
    sampler = trainer.sampler
    left_out = f", {sampler.left_out} too short" if sampler.left_out else ""
    return (
        f"iteration {number}: {sampler.units.source}; {sampler.clips_used} clips{left_out}, {sampler.batches} batches an epoch, "
        f"from update {step} of {steps}"
    )


def _numbers(job: Job, trainer: Trainer, course: _Course, validate: bool) -> dict[str, float]:
    """A line of the log."""
    values = {**course.window.means(), "learning_rate": trainer.learning_rate(course.step - 1)}
    values |= {"skipped": trainer.skipped, "seconds": course.seconds, "audio_hours": course.audio_s / 3600}
    return values | _measured(job, trainer) if validate else values


def _measured(job: Job, trainer: Trainer) -> dict[str, float]:
    found = measure(trainer.model, trainer.sampler, job.clips, job.world.device)
    values = {"held_out_loss": found["entropy"], "held_out_accuracy": found["accuracy"]} if found else {}
    pure = unit_purity(trainer.model, job.clips, job.world.device)
    return values if pure is None else {**values, "unit_purity": pure}


def _save(job: Job, number: int, trainer: Trainer, course: _Course) -> None:
    """A checkpoint, whole or not at all, by the first process."""
    if job.world.rank > 0:
        return
    path = job.out / CHECKPOINT
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    torch.save({"iteration": number, **course.facts(), **trainer.state()}, temporary)
    os.replace(temporary, path)


def _export(job: Job, number: int, trainer: Trainer, units: Units, course: _Course) -> None:
    """Weights of an iteration, and of the last one what it learned."""
    iteration, device = job.recipe.iterations[number - 1], job.world.device
    held_out = measure(trainer.model, trainer.sampler, job.clips, device)
    evidence: dict[str, Any] = {"iteration": number, "units": units.source, "inertia": units.inertia}
    evidence |= {
        "steps": iteration.steps,
        "seconds": round(course.seconds, 1),
        "audio_hours": round(course.audio_s / 3600, 2),
    }
    evidence |= {"held_out": held_out, "unit_purity": unit_purity(trainer.model, job.clips, device)}
    evidence |= {"skipped": trainer.skipped, "left_out": trainer.sampler.left_out}
    evidence["clips_used"] = trainer.sampler.clips_used
    encoder = HubertEncoder(job.shape(iteration))
    encoder.load_state_dict(trainer.weights())
    last = number == len(job.recipe.iterations)
    if last:
        evidence["layers"] = layer_purities(encoder.to(device), job.clips, PURITY_CLUSTERS, job.recipe.seed, device)
    path = job.out / EVIDENCE
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    kept = [each for each in before if each["iteration"] < number]
    path.write_text(json.dumps([*kept, evidence], indent=2) + "\n", encoding="utf-8")
    metadata = {**job.description["metadata"], "iteration": str(number), "updates": str(iteration.steps)}
    metadata |= {"training_seconds": f"{course.seconds:.0f}", "audio_hours_heard": f"{course.audio_s / 3600:.2f}"}
    if held_out:
        metadata["held_out_loss"] = f"{held_out['entropy']:.4f}"
    write_checkpoint(
        job.exported(number),
        job.shape(iteration),
        trainer.weights(),
        name=job.name,
        trained_on=tuple(job.description["trained_on"]),
        license=job.description["license"],
        metadata=metadata,
        dtype=torch.float16 if job.half and last else torch.float32,
    )
