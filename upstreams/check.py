"""The contract check of an upstream: ten properties, each measured by running it, none taken on trust.

`superb-probe check upstream NAME` prints the table. What a property needs and cannot have (a look-ahead cannot be measured on an
encoder that answers differently each time) is reported as not measured, so that the failures that are left are the causes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from superb_probe.errors import RequestError
from superb_probe.upstreams.base import LayerStates, Upstream, frame_mask
from superb_probe.upstreams.lookahead import encode, frame_changes, measure_lookahead, window_samples

BATCH_BOUND = 1e-5  # relative error of a layer, float32: the same utterance alone and in a batch
HALF_BATCH_BOUND = 2e-2  # the same for bfloat16 and float16
DETERMINISM_BOUND = 1e-6  # relative change of a frame between two runs
PADDING_BOUND = 0.0  # states past an utterance's end are exactly zero
LOOKAHEAD_SLACK_HOPS = 1  # a declaration may exceed what is measured by less than this
FRAME_PROBES = 6  # lengths at which the states themselves are counted
COUNT_SPAN_S = 30.0  # lengths up to here are asked of `num_frames`
DOCS = "docs/add-an-upstream.md"
ANCHORS = {"width": "shape"}  # the section of the page, where it is not the check's name
NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What one check found.

    Attributes:
        name: shape, width, frames, zero_padding, batch, deterministic, lookahead, shortest, finite or frozen.
        passed: whether the property holds.
        measured: the number or words measured; "not measured" where another failure stands in the way.
        expected: what it should have been.
        detail: where and how, for a failure also the line of the documentation.
    """

    name: str
    passed: bool
    measured: float | int | str
    expected: str
    detail: str = ""


class _Bench:
    """The upstream under check and the waveforms it is given."""

    def __init__(self, upstream: Upstream, seed: int) -> None:
        self.upstream = upstream
        self.info = upstream.info
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)
        self.window = window_samples(upstream)

    def noise(self, num_samples: int) -> Tensor:
        """(S,) noise and a tone, at the level of speech."""
        time_s = torch.arange(num_samples) / self.info.sample_rate_hz
        tone = 0.1 * torch.sin(2 * torch.pi * 220.0 * time_s)
        return tone + 0.05 * torch.randn(num_samples, generator=self.generator)

    def length(self, frames: int, extra_samples: int = 0) -> int:
        """Samples that should give so many frames."""
        return max(self.window, 1) + (frames - 1) * self.info.hop_samples + extra_samples

    def encode(self, *wavs: Tensor, extra_samples: int = 0) -> LayerStates:
        return encode(self.upstream, list(wavs), extra_samples=extra_samples)

    def ragged(self) -> list[Tensor]:
        """Four waveforms of unequal lengths."""
        extra = self.info.hop_samples // 3
        return [
            self.noise(self.length(frames, more)) for frames, more in ((40, 0), (17, extra), (31, 1), (8, 2 * extra))
        ]


def _relative_error(got: Tensor, reference: Tensor) -> float:
    """Worst layer's ||got - reference|| / ||reference||, of (L, T, D) tensors."""
    got, reference = got.double().flatten(1), reference.double().flatten(1)
    return float(((got - reference).norm(dim=1) / reference.norm(dim=1).clamp(min=1e-12)).max())


def _check_shape(bench: _Bench) -> CheckResult:
    result = bench.encode(*bench.ragged()[:2])
    states, counts = result.states, result.num_frames
    shape = tuple(states.shape)
    expected = f"({bench.info.num_layers}, 2, T, D) floating"
    measured = f"{shape} {states.dtype}".replace("torch.", "")
    detail = f"L is info.num_layers, B the rows given; num_frames {tuple(counts.shape)} {counts.dtype}, expected (2,) torch.int64"
    passed = (
        states.ndim == 4
        and shape[:2] == (bench.info.num_layers, 2)
        and states.is_floating_point()
        and tuple(counts.shape) == (2,)
        and counts.dtype == torch.int64
    )
    return CheckResult("shape", passed, measured, expected, detail)


def _check_width(bench: _Bench) -> CheckResult:
    width = bench.encode(bench.noise(bench.length(12))).states.shape[-1]
    return CheckResult("width", width == bench.info.dim, width, str(bench.info.dim), "D is info.dim")


def _check_frames(bench: _Bench) -> CheckResult:
    upstream, hop = bench.upstream, bench.info.hop_samples
    if bench.window < 1:
        return CheckResult(
            "frames", False, "no frame in a minute of audio", "num_frames above 0", "num_frames(S) is 0 throughout"
        )
    wrong, looked = [], 0
    for extra in (0, 1, hop - 1, hop // 2):
        for frames in range(2, int(COUNT_SPAN_S * bench.info.sample_rate_hz / hop), 97):
            num_samples = bench.length(frames, extra)
            looked += 1
            if upstream.num_frames(num_samples + hop) != upstream.num_frames(num_samples) + 1:
                wrong.append(
                    f"num_frames({num_samples + hop}) is not num_frames({num_samples}) + 1 (hop_samples {hop})"
                )
    for frames in torch.randint(10, 60, (FRAME_PROBES,), generator=bench.generator).tolist():
        num_samples = bench.length(frames, int(torch.randint(-1, hop, (1,), generator=bench.generator)))
        result = bench.encode(bench.noise(num_samples))
        looked += 1
        said, told, given = upstream.num_frames(num_samples), int(result.num_frames[0]), result.states.shape[2]
        if not said == told == given:
            wrong.append(
                f"{num_samples} samples: num_frames() says {said}, LayerStates.num_frames {told}, states have {given}"
            )
    measured = f"{len(wrong)} of {looked} lengths wrong"
    return CheckResult("frames", not wrong, measured, f"0 of {looked} lengths wrong", "; ".join(wrong[:2]))


def _check_zero_padding(bench: _Bench) -> CheckResult:
    result = bench.encode(*bench.ragged(), extra_samples=3 * bench.info.hop_samples)
    mask = frame_mask(result.num_frames, result.states.shape[2])
    past = result.states.double().masked_fill(mask[None, :, :, None], 0.0).abs()
    worst = float(past.max()) if past.numel() else 0.0
    rows = past.amax(dim=(0, 2, 3)).nonzero().flatten().tolist() if past.numel() else []
    detail = f"rows {rows} of a padded batch are not zero past num_frames" if rows else "a padded batch of four lengths"
    return CheckResult("zero_padding", worst <= PADDING_BOUND, worst, "0", detail)


def _check_batch(bench: _Bench) -> CheckResult:
    wavs, hop = bench.ragged(), bench.info.hop_samples
    equal = [bench.noise(wavs[0].numel()), 3.0 * bench.noise(wavs[0].numel())]
    alone = {id(wav): bench.encode(wav) for wav in [*wavs, *equal]}
    errors: dict[str, float] = {}
    beyond: dict[str, str] = {}  # what no error can be given of

    def compare(setting: str, batch: Sequence[Tensor], extra_samples: int = 0) -> None:
        together = bench.encode(*batch, extra_samples=extra_samples)
        for row, wav in enumerate(batch):
            reference = alone[id(wav)]
            frames = int(reference.num_frames[0])
            expected, got = reference.states[:, 0, :frames], together.states[:, row, :frames]
            if got.shape != expected.shape or int(together.num_frames[row]) != frames:
                beyond[setting] = "another number of frames"
            elif not bool(got.isfinite().all()):
                beyond[setting] = "values that are not finite"
            else:
                errors[setting] = max(errors.get(setting, 0.0), _relative_error(got, expected))

    compare("with another of equal length", equal)
    compare("with three of other lengths", wavs)
    compare("with three of other lengths, last first", wavs[::-1])
    for wav in wavs[:2]:
        compare("alone, more zeros after it", [wav], extra_samples=5 * hop + 7)
    half = alone[id(wavs[0])].states.dtype in (torch.bfloat16, torch.float16)
    bound = HALF_BATCH_BOUND if half else BATCH_BOUND
    if beyond:
        setting, problem = next(iter(beyond.items()))
        return CheckResult("batch", False, problem, f"<= {bound:g}", f"worst: {setting}")
    worst = max(errors, key=lambda setting: errors[setting])
    return CheckResult("batch", errors[worst] <= bound, errors[worst], f"<= {bound:g}", f"worst: {worst}")


def _check_deterministic(bench: _Bench) -> CheckResult:
    wavs = bench.ragged()[:2]
    first, second = bench.encode(*wavs), bench.encode(*wavs)
    # NaN twice is deterministic; that it is no number is for the other checks to say
    before, after = (result.states.nan_to_num() for result in (first, second))
    worst = max(float(frame_changes(before[:, row], after[:, row]).max()) for row in range(len(wavs)))
    return CheckResult(
        "deterministic", worst <= DETERMINISM_BOUND, worst, f"<= {DETERMINISM_BOUND:g}", "the same batch twice"
    )


def _check_lookahead(bench: _Bench) -> CheckResult:
    declared, hop = bench.info.lookahead_samples, bench.info.hop_samples
    found = measure_lookahead(bench.upstream, seed=bench.seed)
    expected = "whole utterance" if declared is None else f"{declared} samples"
    if found.samples is not None:
        passed = declared is not None and 0 <= declared - found.samples < LOOKAHEAD_SLACK_HOPS * hop
        detail = (
            f"{found.samples / hop:.4g} frames of {hop} samples; frames before are the same when the utterance is cut"
        )
        return CheckResult("lookahead", passed, found.samples, expected, detail)
    if found.length_effect > 0.0:
        cause = f"cutting the end changes frames out of its reach by {found.length_effect:.2g}: the length of the utterance matters"
    else:
        cause = f"changing the last {hop} samples changes frame 0 by {found.end_effect:.2g}"
    if found.order_frames is None:
        order = "the order of all that follows matters"
    else:
        order = (
            f"order matters up to {found.order_frames} frames ahead ({found.order_frames * hop} samples); beyond that only "
            "statistics of the whole utterance are felt (a normalisation over time, attention without a mask)"
        )
    return CheckResult("lookahead", declared is None, "whole utterance", expected, f"{cause}; {order}")


def _check_shortest(bench: _Bench) -> CheckResult:
    upstream, window = bench.upstream, bench.window
    expected = f"no frame below {window} samples, 1 at it"
    if window < 1:
        return CheckResult("shortest", False, "no shortest input", expected, "num_frames(S) is 0 for up to a minute")
    problems = [f"num_frames({n}) is {upstream.num_frames(n)}" for n in {0, window - 1} if upstream.num_frames(n) != 0]
    short = bench.noise(window)
    for setting, wavs in (("alone", [short]), ("beside a longer row", [short, bench.noise(bench.length(9))])):
        result = bench.encode(*wavs)
        frames = int(result.num_frames[0])
        if frames != 1 or result.states.shape[2] < 1:
            problems.append(f"{setting}: {frames} frames")
        elif not bool(result.states[:, 0, 0].isfinite().all()):
            problems.append(f"{setting}: states not finite")
    measured = "; ".join(problems) if problems else "no frame below, 1 at it"
    return CheckResult("shortest", not problems, measured, expected, f"{window} samples, alone and beside a longer row")


def _check_finite(bench: _Bench) -> CheckResult:
    num_samples = bench.length(20)
    noise = bench.noise(num_samples)
    signals = {
        "noise": noise,
        "silence": torch.zeros(num_samples),
        "constant": torch.full((num_samples,), 0.5),
        "full scale": noise.sign(),
        "very quiet": 1e-4 * noise,
    }
    wrong = {}
    for name, wav in signals.items():
        count = int((~bench.encode(wav).states.isfinite()).sum())
        if count:
            wrong[name] = count
    detail = ", ".join(f"{name}: {count} values" for name, count in wrong.items()) or ", ".join(signals)
    return CheckResult("finite", not wrong, sum(wrong.values()), "0 values not finite", detail)


def _check_frozen(bench: _Bench) -> CheckResult:
    upstream = bench.upstream
    wanting = [name for name, parameter in upstream.named_parameters() if parameter.requires_grad]
    training = [name or "the upstream" for name, module in upstream.named_modules() if module.training]
    problems = []
    if wanting:
        problems.append(f"{len(wanting)} parameters require gradients ({wanting[0]} first)")
    if training:
        problems.append(f"{len(training)} modules are in training mode ({training[0]} first)")
    measured = "; ".join(problems) if problems else "no gradients, eval mode"
    return CheckResult(
        "frozen", not problems, measured, "no gradients, eval mode", "upstream.requires_grad_(False).eval()"
    )


# name -> (what has to hold before it can be measured, how); in the order of the table
_CHECKS: dict[str, tuple[tuple[str, ...], Callable[[_Bench], CheckResult]]] = {
    "shape": ((), _check_shape),
    "width": (("shape",), _check_width),
    "frames": (("shape",), _check_frames),
    "zero_padding": (("shape", "frames", "finite"), _check_zero_padding),
    "batch": (("shape", "frames", "finite", "deterministic"), _check_batch),
    "deterministic": (("shape", "finite"), _check_deterministic),
    "lookahead": (("shape", "frames", "finite", "deterministic"), _check_lookahead),
    "shortest": (("shape", "frames", "finite", "deterministic"), _check_shortest),
    "finite": (("shape",), _check_finite),
    "frozen": ((), _check_frozen),
}


def check_upstream(upstream: Upstream, *, seed: int = 0) -> list[CheckResult]:
    """Ten properties of an upstream, measured: what `superb-probe check upstream NAME` prints.

    Takes some eighty runs on waveforms of a few seconds at most: under a second for a small model, a minute for a Base one on a CPU.

    Args:
        upstream: built and on its device.
        seed: of the waveforms.

    Raises:
        RequestError: if the upstream holds stored states, which no waveform can reach.

    >>> from superb_probe.upstreams.fbank import fbank
    >>> all(result.passed for result in check_upstream(fbank()))
    True
    """
    if hasattr(upstream, "states_for"):
        raise RequestError(
            f"{upstream.info.name}: states computed elsewhere cannot be checked by changing a waveform. "
            "Fix: check the encoder that made them; reading the folder checks its shapes."
        )
    bench = _Bench(upstream, seed)
    results: dict[str, CheckResult] = {}
    while len(results) < len(_CHECKS):
        for name, (needs, measure) in _CHECKS.items():
            if name not in results and all(need in results for need in needs):
                results[name] = _run_check(bench, name, [need for need in needs if not results[need].passed], measure)
    return [results[name] for name in _CHECKS]


def _run_check(bench: _Bench, name: str, missing: list[str], measure: Callable[[_Bench], CheckResult]) -> CheckResult:
    if missing:
        return CheckResult(name, False, NOT_MEASURED, "measurable", f"needs {' and '.join(missing)} to pass first")
    try:
        result = measure(bench)
    except Exception as error:  # noqa: BLE001 - a stranger's encoder may raise anything: what it raised is the finding
        result = CheckResult(name, False, f"raised {type(error).__name__}", "no error", str(error).strip()[:500])
    if result.passed:
        return result
    return dataclasses.replace(result, detail=f"{result.detail}. See {DOCS}#{ANCHORS.get(name, name)}".lstrip(". "))


def causes(results: Sequence[CheckResult]) -> list[str]:
    """The names of the checks that failed by themselves, without those that could not be measured because of them.

    >>> causes([CheckResult("width", False, 7, "8"), CheckResult("batch", False, "not measured", "measurable")])
    ['width']
    """
    return [result.name for result in results if not result.passed and result.measured != NOT_MEASURED]


def to_dicts(results: Sequence[CheckResult]) -> list[dict[str, object]]:
    """The results as plain dictionaries, for `--json`.

    >>> to_dicts([CheckResult("width", True, 8, "8")])[0]["passed"]
    True
    """
    return [dataclasses.asdict(result) for result in results]


def format_checks(results: Sequence[CheckResult]) -> str:
    """The results as a table, a line a check, and a line more under each failure.

    >>> print(format_checks([CheckResult("width", False, 7, "8", "D is info.dim")]))
    check         result  measured                    expected
    width         FAILED  7                           8
                          D is info.dim
    0 of 1 checks passed
    """
    lines = [f"{'check':<13} {'result':<7} {'measured':<27} expected"]
    for result in results:
        measured = f"{result.measured:.3g}" if isinstance(result.measured, float) else str(result.measured)
        verdict = "ok" if result.passed else "skipped" if result.measured == NOT_MEASURED else "FAILED"
        lines.append(f"{result.name:<13} {verdict:<7} {measured:<27} {result.expected}".rstrip())
        if result.detail and (not result.passed or result.name == "lookahead"):
            lines.append(f"{'':<21} {result.detail}")
    lines.append(f"{sum(result.passed for result in results)} of {len(results)} checks passed")
    return "\n".join(lines)
