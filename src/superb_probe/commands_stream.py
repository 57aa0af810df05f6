"""The command `stream`: audio in as it arrives, a transcript out as it is determined, and what that took."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from superb_probe.commands_flags import add_device, add_json, add_random, add_threads
from superb_probe.commands_output import print_json, stdout_to_stderr
from superb_probe.errors import CheckError, RequestError

if TYPE_CHECKING:
    from torch import Tensor

    from superb_probe.streaming import Recogniser, Report
    from superb_probe.upstreams.base import Upstream

ONE_PASS_BOUND = 1e-5


def add_commands(subparsers: Any) -> None:
    """Add `stream`."""
    parser = subparsers.add_parser(
        "stream",
        help="a transcript as audio arrives, with its delay, speed and memory",
        description="Encode audio chunk by chunk with an encoder that sees no future (or a little of it), print the transcript of a\n"
        "CTC head as it is determined, and say how fast and how late it was: with the small recogniser that ships, with one of\n"
        "yours, or with an encoder alone, whose states are only timed.",
        epilog="examples:\n"
        "  superb-probe stream talk.wav\n"
        "  superb-probe stream talk.wav --record results/runs/asr/mamba_hubert_causal/0314512804f0.json\n"
        "  superb-probe stream talk.wav --finetuned runs/finetuned --chunk-ms 320\n"
        "  ffmpeg -i talk.mp3 -f s16le -ac 1 -ar 16000 - | superb-probe stream - --finetuned runs/finetuned\n"
        "  superb-probe stream talk.wav --upstream mamba_hubert_causal --size tiny --random 0 --loop 3600 --check",
    )
    parser.add_argument("input", metavar="FILE|-", help="a 16 kHz mono file, or - for raw 16-bit samples on stdin")
    parser.add_argument("--record", type=Path, metavar="FILE", help="record of asr or pr: its encoder and probe")
    parser.add_argument("--finetuned", type=Path, metavar="DIR", help="folder that `superb-probe finetune` wrote")
    parser.add_argument("--upstream", metavar="NAME", help="an encoder alone, without a head")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="the encoder's weights")
    parser.add_argument("--size", help="of an encoder without a checkpoint: test, tiny, small or base")
    add_random(parser)
    parser.add_argument("--upstream-option", nargs="+", default=[], metavar="NAME=VALUE", help="the encoder's own")
    parser.add_argument("--root", type=Path, metavar="DIR", help="with --record: the corpus folder of its data")
    parser.add_argument("--manifest", nargs="+", default=[], metavar="SPLIT=TSV", help="with --record: as for run")
    parser.add_argument("--chunk-ms", type=float, default=80.0, metavar="MS", help="of a chunk (default: 80)")
    parser.add_argument("--window-frames", type=int, metavar="N", help="frames that attention sees (default: all)")
    parser.add_argument("--loop", type=float, metavar="S", help="repeat a file until so many seconds have come")
    parser.add_argument("--check", action="store_true", help="compare the states with one pass; 1 if they differ")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw memory and speed over time (PNG, SVG, CSV)")
    add_device(parser)
    add_threads(parser)
    add_json(parser, " instead of the transcript")
    parser.set_defaults(handler=stream_input)


def stream_input(args: argparse.Namespace) -> int:
    """Stream the input, print the transcript and, on stderr, what it took; 1 if --check finds a difference."""
    _check_request(args)
    import torch

    from superb_probe.streaming import stream_audio

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with stdout_to_stderr(args.json):
        upstream, recogniser = _model(args)
        rate = upstream.info.sample_rate_hz
        chunk_samples = round(args.chunk_ms * rate / 1000)
        if chunk_samples < 1:
            raise RequestError(f"--chunk-ms {args.chunk_ms:g} is less than a sample. Fix: e.g. --chunk-ms 80")
        with tempfile.TemporaryDirectory(prefix="superb-probe-stream-") as folder:
            kept = Path(folder) / "states" if args.check else None
            text: list[str] = []
            report = stream_audio(
                upstream,
                _chunks(args, chunk_samples, rate),
                chunk_s=chunk_samples / rate,
                recogniser=recogniser,
                window_frames=args.window_frames,
                show=text.append if args.json else _show,
                keep=None if kept is None else _keeper(kept),
            )
            error = None if kept is None else _one_pass(args, upstream, kept, report)
    if recogniser is not None and not args.json:
        print()
    _report(args, report, upstream, recogniser, "".join(text), error)
    return 0


def _check_request(args: argparse.Namespace) -> None:
    problems = []
    if sum(given is not None for given in (args.record, args.finetuned, args.upstream)) > 1:
        problems.append("give one of --record, --finetuned and --upstream, or none")
    if args.checkpoint is not None and args.record is None and args.upstream is None:
        problems.append("--checkpoint goes with --record and --upstream")
    if args.upstream is None and (args.size or args.random is not None or args.upstream_option):
        problems.append("--size, --random and --upstream-option go with --upstream")
    if args.record is None and (args.root or args.manifest):
        problems.append("--root and --manifest go with --record")
    if args.input == "-" and (args.loop is not None or args.check):
        problems.append("--loop and --check need a file")
    if args.check and args.window_frames is not None:
        problems.append("--check compares with one pass over everything, which --window-frames differs from")
    if problems:
        raise RequestError(f"superb-probe stream: {'; '.join(problems)}. `superb-probe stream --help` shows how.")


def _model(args: argparse.Namespace) -> tuple[Upstream, Recogniser | None]:
    from superb_probe.commands_run import option_values
    from superb_probe.settings import pairs
    from superb_probe.streaming import recogniser_of_record
    from superb_probe.upstreams.load import find_device, load_upstream

    if args.record is not None:
        manifest = {split: Path(file) for split, file in pairs(args.manifest, "--manifest").items()}
        upstream, recogniser = recogniser_of_record(args.record, args.checkpoint, args.root, manifest or None)
    elif args.upstream is None:
        from superb_probe.finetuning import recogniser_of_folder, shipped_recogniser

        upstream, recogniser = recogniser_of_folder(args.finetuned or shipped_recogniser())
    else:
        options = option_values(args.upstream_option)
        return load_upstream(
            args.upstream,
            checkpoint=args.checkpoint,
            size=args.size,
            random=args.random,
            device=args.device,
            **options,
        ), None
    device = find_device(args.device)
    upstream.to(device)
    recogniser.head.to(device)
    return upstream, recogniser


def _chunks(args: argparse.Namespace, chunk_samples: int, rate_hz: int) -> Iterator[Tensor]:
    from superb_probe.streaming import file_chunks, raw_chunks, stdin_source

    if args.input == "-":
        return raw_chunks(stdin_source(), chunk_samples)
    return file_chunks(Path(args.input), chunk_samples, rate_hz, args.loop)


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _keeper(path: Path) -> Callable[[Tensor], None]:
    """What appends states to a file, frame by frame, so that memory stays flat."""

    def keep(states: Tensor) -> None:
        with path.open("ab") as stream:
            stream.write(states.float().cpu().transpose(0, 1).contiguous().numpy().tobytes())

    return keep


def _one_pass(args: argparse.Namespace, upstream: Upstream, kept: Path, report: Report) -> float:
    """The streamed states' relative error against one pass over the whole input."""
    import numpy as np
    import torch

    from superb_probe.streaming import file_chunks, one_pass_error

    info = upstream.info
    streamed = np.memmap(kept, dtype=np.float32, mode="r", shape=(report.frames, info.num_layers, info.dim))
    wav = torch.cat(list(file_chunks(Path(args.input), 2**20, info.sample_rate_hz, args.loop)))
    return one_pass_error(upstream, wav, streamed.transpose(1, 0, 2))


def _report(
    args: argparse.Namespace,
    report: Report,
    upstream: Upstream,
    recogniser: Recogniser | None,
    text: str,
    error: float | None,
) -> None:
    from superb_probe.bench_machine import describe_machine

    summary = report.summary()
    if args.figure is not None:
        draw_report(report, upstream.info.name, args.figure)
    if args.json:
        import torch

        document = {
            "upstream": upstream.info.name,
            "revision": upstream.info.revision,
            "head": None if recogniser is None else recogniser.name,
            "transcript": None if recogniser is None else text,
            **summary,
            "one_pass_error": error,
            "emissions": [(each.token, each.frame_s, each.heard_s) for each in report.emissions],
            "trace": report.trace,
            "machine": describe_machine(torch.device(args.device)),
        }
        print_json(document)
    else:
        print("\n".join(describe(summary, error)), file=sys.stderr)
    if error is not None and not error <= ONE_PASS_BOUND:
        raise CheckError(f"streamed states differ from one pass by {error:.2e}, the bound is {ONE_PASS_BOUND:g}")


def describe(summary: dict[str, Any], error: float | None) -> list[str]:
    """Lines for a person."""
    growth = summary["resident_growth_bytes"]
    lines = [
        (
            f"{summary['audio_s']:.1f} s of audio, {summary['frames']} frames, in {summary['compute_s']:.2f} s: "
            f"real-time factor {summary['real_time_factor'] or 0:.3f}"
        ),
        (
            f"chunks of {1000 * summary['chunk_s']:.0f} ms take {1000 * summary['chunk_compute_median_s']:.1f} ms "
            f"(90 % within {1000 * summary['chunk_compute_p90_s']:.1f} ms)"
        ),
        (
            f"latency after a frame's window of {1000 * summary['window_s']:.0f} ms: "
            f"{1000 * summary['steady_latency_s']:.0f} ms steady, "
            f"{1000 * summary['worst_latency_s']:.0f} ms at worst; of it look-ahead {1000 * summary['lookahead_s']:.0f} ms"
        ),
        f"carried from chunk to chunk: {summary['state_bytes'] / 1e6:.2f} MB"
        + ("" if growth is None else f"; the process grew by {growth / 1e6:.1f} MB"),
    ]
    if summary["first_token_heard_s"] is not None:
        lines.append(
            f"first token (of {summary['tokens']}) after {summary['first_token_heard_s']:.2f} s of audio, "
            f"of a frame at {summary['first_token_frame_s']:.2f} s"
        )
    if error is not None:
        lines.append(f"against one pass: relative error {error:.1e} (bound {ONE_PASS_BOUND:g})")
    return lines


def draw_report(report: Report, name: str, out: Path) -> list[Path]:
    """Memory and speed over the input's time, as PNG, SVG and CSV."""
    import pandas as pd

    from superb_probe.results.lines import Panel, draw_panels

    columns = ["audio_s", "compute_s", "state_bytes", "resident_bytes"]
    numbers = pd.DataFrame(report.trace, columns=columns)
    minutes = (numbers["audio_s"] / 60).tolist()
    steps = numbers[["audio_s", "compute_s"]].diff()
    factor = (steps["compute_s"] / steps["audio_s"]).tolist()[1:]
    memory = {"carried state": (minutes, (numbers["state_bytes"] / 1e6).tolist())}
    if numbers["resident_bytes"].notna().all():
        memory["whole process"] = (minutes, (numbers["resident_bytes"] / 1e6).tolist())
    panels = [
        Panel("Memory", "audio streamed (min)", "memory (MB, lower is better)", memory, log_y=True),
        Panel(
            "Speed",
            "audio streamed (min)",
            "real-time factor (lower is better)",
            {"real-time factor": (minutes[1:], factor)},
        ),
    ]
    return draw_panels(panels, numbers, out, title=f"{name}, chunks of {1000 * report.chunk_s:.0f} ms")
