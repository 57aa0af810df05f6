"""A pre-training recipe: everything that shapes a run apart from the encoder and the data, read from a YAML file and checked.

Names are spelled out; the values that the paper used (arXiv 2506.12606, and HuBERT's, arXiv 2106.07447) are the defaults here and the
file `recipes/paper.yaml`. Other files in `recipes/` say what they change and why.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from superb_probe.errors import RequestError, all_at_once, nearest

RECIPES = Path(__file__).parent / "recipes"
TARGETS = ("mfcc", "layer")
PRECISIONS = ("bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class Iteration:
    """One iteration of HuBERT: what is predicted, and for how many updates.

    Attributes:
        targets: "mfcc" (39 cepstra and deltas) or "layer" (states of the model that the iteration before this one trained).
        clusters: units that k-means makes of them.
        layer: of "layer", counted from 1; 0 is the middle one (6 of 12, 3 of 6).
        kmeans_share: of the training clips that k-means is fitted on.
        steps: updates.
    """

    targets: str
    clusters: int
    layer: int
    kmeans_share: float
    steps: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an encoder is pre-trained.

    Attributes:
        iterations: what is predicted, one after the other; each starts from new weights.
        seed: of weights, order, crops, masks and dropout.
        clip_lengths_s: lengths that clips are cropped to: each to the longest it has, those under the shortest are left out.
        batch_s: seconds of audio in the batch of one process and one pass; rows are `batch_s` over the length.
        accumulate: batches in an update.
        learning_rate: the highest; it rises linearly and falls linearly to zero.
        warmup_share: of the updates that it rises for.
        adam_betas: of Adam with decoupled weight decay.
        adam_eps: its epsilon.
        weight_decay: on all parameters, as the official code does.
        clip_norm: the gradient is scaled down to this norm.
        mask_probability: masked spans x their length over the frames of a crop, before spans overlap.
        mask_frames: length of a span.
        least_spans: of a crop.
        logit_temperature: cosine similarities are divided by it.
        feature_penalty: weight of the mean square of the front end's features.
        feature_gradient: scale of the gradient that the front end gets.
        dropout: after the positional convolution, mixers, attention and feed-forward blocks.
        attention_dropout: of attention's weights.
        input_dropout: of what enters the encoder.
        layer_drop: share of layers skipped.
        redraw_mixer_projections: whether a Mamba mixer's linear layers start from N(0, 0.02) with a bias of zero like all others, as
            in the official code: its steps then start near softplus(0) = 0.69. Otherwise mixers start as mamba_ssm's, with steps in
            [0.001, 0.1].
        precision: "bfloat16" (master weights, optimiser, loss and the scan's state in float32) or "float32".
        recompute_activations: forget a layer's activations and compute them again for the gradient.
        log_every: updates between lines of the log.
        validate_every: updates between measurements on held-out clips; 0 for only at the end.
        save_every_s: seconds between checkpoints.
        most_skipped: updates with a gradient that is not finite; one more ends the run.
    """

    iterations: tuple[Iteration, ...] = (
        Iteration("mfcc", 100, 0, 1.0, 250_000),
        Iteration("layer", 500, 6, 0.1, 400_000),
    )
    seed: int = 1337
    clip_lengths_s: tuple[float, ...] = (2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 14.0, 15.625)
    batch_s: float = 175.0
    accumulate: int = 4
    learning_rate: float = 5e-4
    warmup_share: float = 0.08
    adam_betas: tuple[float, float] = (0.9, 0.98)
    adam_eps: float = 1e-6
    weight_decay: float = 0.01
    clip_norm: float = 10.0
    mask_probability: float = 0.8
    mask_frames: int = 10
    least_spans: int = 2
    logit_temperature: float = 0.1
    feature_penalty: float = 10.0
    feature_gradient: float = 0.1
    dropout: float = 0.1
    attention_dropout: float = 0.1
    input_dropout: float = 0.1
    layer_drop: float = 0.05
    redraw_mixer_projections: bool = True
    precision: str = "bfloat16"
    recompute_activations: bool = False
    log_every: int = 100
    validate_every: int = 10_000
    save_every_s: float = 600.0
    most_skipped: int = 100

    def text(self) -> str:
        """The recipe as JSON, keys sorted: what is compared and digested."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def digest(self) -> str:
        """Of `text`: sha256."""
        return "sha256:" + hashlib.sha256(self.text().encode()).hexdigest()


def read_recipe(file: str | Path) -> Recipe:
    """The recipe in a YAML file, or of that name among the packaged ones.

    What the file leaves out has the value of `Recipe`.

    Args:
        file: a path, or the name of a file in `recipes/` without its ending.

    Raises:
        RequestError: for a file that is missing or not YAML, and for every unknown key, wrong type or impossible value in it.

    >>> read_recipe("paper") == Recipe()
    True
    """
    path = Path(file)
    if path.suffix == "" and not path.is_file():
        path = RECIPES / f"{file}.yaml"
        if not path.is_file():
            known = sorted(each.stem for each in RECIPES.glob("*.yaml"))
            close = nearest(str(file), known, 1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise RequestError(f"no recipe {str(file)!r}.{hint} Fix: a YAML file, or one of {', '.join(known)}.")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise RequestError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise RequestError(f"{path}: expected `key: value` lines, found {type(found).__name__}.")
    return recipe_from_dict(found, str(path))


def recipe_from_dict(found: Mapping[str, Any], where: str) -> Recipe:
    """The recipe of a mapping.

    Raises:
        RequestError: naming every unknown key, wrong type or impossible value.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    defaults = {item.name: getattr(Recipe(), item.name) for item in fields(Recipe)}
    for key, value in found.items():
        if key not in defaults:
            problems.append(_unknown(key, defaults))
        elif key == "iterations":
            values[key] = _iterations(value, problems)
        else:
            values[key] = _value(key, value, defaults[key], problems)
    if not problems:
        problems += _impossible(Recipe(**values))
    if problems:
        raise all_at_once(where, problems, "docs/pretrain.md has the keys of a recipe")
    return Recipe(**values)


def _unknown(key: Any, known: Mapping[str, Any]) -> str:
    close = nearest(str(key), known, 1)
    return f"{key}: unknown" + (f", did you mean {close[0]}?" if close else "")


def _value(key: str, value: Any, default: Any, problems: list[str]) -> Any:
    """A value in the type of the default; YAML reads 5e-4 as text, which counts as the number it is."""
    if isinstance(default, bool) or isinstance(value, bool):
        fits = isinstance(default, bool) and isinstance(value, bool)
        made = value
    elif isinstance(default, tuple):
        numbers = [_number(each) for each in value] if isinstance(value, list) else []
        fits, made = bool(numbers) and None not in numbers, tuple(numbers)
    elif isinstance(default, str):
        fits, made = isinstance(value, str), value
    else:
        number = _number(value)
        fits = number is not None and (isinstance(default, float) or number == int(number))
        made = type(default)(number) if fits else None
    if not fits:
        kind = "a list of numbers" if isinstance(default, tuple) else type(default).__name__
        problems.append(f"{key}: expected {kind}, found {value!r}")
        return default
    return made


def _number(value: Any) -> float | None:
    """A finite number, or text that is one."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _iterations(value: Any, problems: list[str]) -> tuple[Iteration, ...]:
    defaults = {"targets": "mfcc", "clusters": 100, "layer": 0, "kmeans_share": 1.0, "steps": 1}
    if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
        problems.append(f"iterations: expected a list of mappings, found {value!r}")
        return ()
    made = []
    for number, each in enumerate(value, start=1):
        wrong = [_unknown(key, defaults) for key in each if key not in defaults]
        wrong += [f"{key}: missing" for key in ("targets", "clusters", "steps") if key not in each]
        given = {key: _value(key, item, defaults[key], wrong) for key, item in each.items() if key in defaults}
        problems += [f"iteration {number}: {text}" for text in wrong]
        made.append(Iteration(**{**defaults, **given}))
    return tuple(made)


def _impossible(recipe: Recipe) -> list[str]:
    """What no run could do with these values."""
    problems = []
    for number, each in enumerate(recipe.iterations, start=1):
        if each.targets not in TARGETS:
            problems.append(f"iteration {number}: targets {each.targets!r} are none of {', '.join(TARGETS)}")
        if each.targets == "layer" and number == 1:
            problems.append("iteration 1: targets layer need an iteration before it")
        if each.clusters < 2 or each.steps < 0 or each.layer < 0 or not 0 < each.kmeans_share <= 1:
            problems.append(
                f"iteration {number}: clusters at least 2, steps and layer at least 0, kmeans_share in (0, 1]"
            )
    if not recipe.iterations:
        problems.append("iterations: at least one")
    if recipe.precision not in PRECISIONS:
        problems.append(f"precision: {recipe.precision!r} is none of {', '.join(PRECISIONS)}")
    if list(recipe.clip_lengths_s) != sorted(set(recipe.clip_lengths_s)) or recipe.clip_lengths_s[0] <= 0:
        problems.append("clip_lengths_s: rising, above zero")
    elif recipe.batch_s < recipe.clip_lengths_s[-1]:
        problems.append(f"batch_s: {recipe.batch_s:g} does not hold a clip of {recipe.clip_lengths_s[-1]:g} s")
    if len(recipe.adam_betas) != 2 or not all(0 <= beta < 1 for beta in recipe.adam_betas):
        problems.append("adam_betas: two numbers in [0, 1)")
    for key in ("dropout", "attention_dropout", "input_dropout", "layer_drop", "warmup_share"):
        if not 0 <= getattr(recipe, key) < 1:
            problems.append(f"{key}: in [0, 1)")
    positive = ("accumulate", "mask_frames", "least_spans", "log_every", "learning_rate", "clip_norm", "adam_eps")
    for key in (*positive, "logit_temperature", "mask_probability", "save_every_s"):
        if getattr(recipe, key) <= 0:
            problems.append(f"{key}: above zero")
    for key in ("seed", "weight_decay", "feature_penalty", "feature_gradient", "validate_every", "most_skipped"):
        if getattr(recipe, key) < 0:
            problems.append(f"{key}: at least zero")
    return problems
