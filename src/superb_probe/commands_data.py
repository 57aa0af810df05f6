"""The commands about files: prepare (manifests), extract (states), convert (checkpoints)."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from superb_probe.commands_flags import add_device, add_json, add_weights
from superb_probe.commands_output import print_json
from superb_probe.errors import CheckError, RequestError, all_at_once

if TYPE_CHECKING:
    from superb_probe.upstreams.base import Upstream

_FORMATS = {".safetensors": "superb-probe", ".pt": "s3prl", "": "transformers"}


def add_commands(subparsers: Any) -> None:
    """Add `prepare`, `extract` and `convert`."""
    _add_prepare(subparsers)
    extract = subparsers.add_parser(
        "extract",
        help="layer states of audio files",
        description="Write the states of audio files, one .npy of shape (L, T, D) a file, and an info.json: what features:DIR reads.",
        epilog="examples:\n  superb-probe extract --upstream mamba_hubert_causal --out states a.wav b.flac",
    )
    extract.add_argument("file", nargs="+", type=Path, metavar="FILE", help="audio files")
    extract.add_argument("--upstream", metavar="NAME", help="the encoder (needed)")
    extract.add_argument("--out", type=Path, metavar="DIR", help="folder for the states (needed)")
    add_weights(extract)
    add_device(extract)
    extract.set_defaults(handler=extract_states)

    convert = subparsers.add_parser(
        "convert",
        help="a checkpoint in another format",
        description="Write a checkpoint in another format: .safetensors (this project's own), .pt (s3prl) or a transformers folder.",
        epilog="examples:\n  superb-probe convert hubert_fairseq.pt --out hubert.safetensors\n"
        "  superb-probe convert hubert.safetensors --out hubert_folder --format transformers",
    )
    convert.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    convert.add_argument("--out", type=Path, metavar="PATH", help="what to write (needed)")
    convert.add_argument("--format", choices=tuple(_FORMATS.values()), help="default: by the ending of --out")
    convert.set_defaults(handler=convert_checkpoint)


def _add_prepare(subparsers: Any) -> None:
    prepare = subparsers.add_parser(
        "prepare",
        help="manifests from a corpus folder",
        description="Write the manifests of a corpus from its published tree (librispeech, ...), or of any folder with a\n"
        "manifest.csv (csv). Every problem of the folder is reported at once, and nothing is written then.",
        epilog="examples:\n  superb-probe prepare csv /corpora/mine --out manifests\n"
        "  superb-probe prepare csv /corpora/coffee --out manifests --slot coffeeDrink size\n"
        "  superb-probe prepare librispeech /corpora/LibriSpeech --task asr --out manifests\n"
        "  superb-probe prepare voxceleb1 /corpora/vox1 --extra split=iden_split.txt trials=voxceleb1_test_v2.txt --out manifests",
    )
    prepare.add_argument("what", metavar="CORPUS", help="csv, or the name of a corpus (an unknown one lists all)")
    prepare.add_argument("folder", type=Path, metavar="DIR")
    prepare.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the manifests, outside the corpus (needed)"
    )
    prepare.add_argument("--exclude", nargs="+", default=(), metavar="ID", help="utterances to leave out")
    prepare.add_argument("--slot", nargs="+", default=(), metavar="COLUMN", help="csv: columns that become slots")
    prepare.add_argument("--task", nargs="+", default=(), metavar="TASK", help="a corpus: only for these tasks")
    prepare.add_argument(
        "--extra", nargs="+", default=(), metavar="NAME=PATH", help="a corpus: its lexicon=, trials=, split= or test="
    )
    prepare.add_argument("--partial", action="store_true", help="a corpus: accept fewer utterances than published")
    prepare.add_argument("--read-audio", action="store_true", help="a corpus: decode every file, not only its header")
    add_json(prepare, ": the files written")
    prepare.set_defaults(handler=prepare_manifests)


def _need(args: argparse.Namespace, command: str, *names: str) -> None:
    missing = [f"--{name}" for name in names if getattr(args, name) is None]
    if missing:
        raise RequestError(
            f"superb-probe {command}: {' and '.join(missing)} missing. `superb-probe {command} --help` shows how."
        )


def prepare_manifests(args: argparse.Namespace) -> int:
    """Write the manifests and print how to use them."""
    if args.what != "csv":
        from superb_probe.downstreams.corpora import find_corpus

        find_corpus(args.what)
    _need(args, "prepare", "out")
    only_csv, only_corpus = ("slot",), ("task", "extra", "partial", "read_audio")
    wrong = [name for name in (only_corpus if args.what == "csv" else only_csv) if getattr(args, name)]
    if wrong:
        flags = ", ".join("--" + name.replace("_", "-") for name in wrong)
        raise RequestError(
            f"superb-probe prepare {args.what}: {flags} is not for it. `superb-probe prepare --help` says what is."
        )
    if args.what != "csv":
        return _prepare_corpus(args)
    from superb_probe.downstreams.prepare import prepare_csv

    written = prepare_csv(args.folder, args.out, slot=args.slot, exclude=args.exclude, say=_say)
    if args.json:
        print_json({name: str(path) for name, path in written.items()})
    else:
        for path in written.values():
            print(path)
        splits = " ".join(f"{name}={path}" for name, path in written.items())
        print(f"use them: superb-probe run ... --root {args.folder} --manifest {splits}")
    return 0


def _prepare_corpus(args: argparse.Namespace) -> int:
    from superb_probe.downstreams.prepare_corpus import prepare_corpus
    from superb_probe.settings import pairs

    prepared = prepare_corpus(
        args.what,
        args.folder,
        args.out,
        tasks=args.task,
        extras={name: Path(path) for name, path in pairs(args.extra, "--extra").items()},
        exclude=args.exclude,
        partial=args.partial,
        read_audio=args.read_audio,
        say=_say,
    )
    if args.json:
        documents = {each.task: {name: str(path) for name, path in each.files.items()} for each in prepared}
        print_json(documents)
    else:
        for each in prepared:
            print(f"use them: superb-probe run --upstream NAME {each.arguments}")
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def extract_states(args: argparse.Namespace) -> int:
    """Encode every file by itself and write its states."""
    _need(args, "extract", "upstream", "out")
    import numpy as np
    import torch

    from superb_probe.upstreams.load import load_upstream

    upstream = load_upstream(
        args.upstream, checkpoint=args.checkpoint, size=args.size, random=args.random, device=args.device
    )
    waveforms = _read_audio(args.file, upstream.info.sample_rate_hz)
    short = [
        f"{name}: {len(wav)} samples give no frame" for name, wav in waveforms if upstream.num_frames(len(wav)) < 1
    ]
    if short:
        raise all_at_once(args.upstream, short, "leave them out")
    _write_info(args.out, upstream, [len(wav) for _, wav in waveforms])
    for name, wav in waveforms:
        np.save(args.out / f"{name}.npy", upstream.extract([torch.from_numpy(wav)]).states[:, 0].float().cpu().numpy())
        print(args.out / f"{name}.npy")
    return 0


def _write_info(out: Path, upstream: Upstream, lengths_samples: Sequence[int]) -> None:
    """Write the info.json of a folder of states; one that is there already must say the same.

    Raises:
        RequestError: if the folder holds other states or cannot be written.
        CheckError: if the encoder's frame counts are not those of a window and a hop, which is all that info.json can say.
    """
    from superb_probe.upstreams.lookahead import window_samples

    info, window = upstream.info, window_samples(upstream)
    for length in lengths_samples:
        regular = (length - window) // info.hop_samples + 1
        if upstream.num_frames(length) != regular:
            raise CheckError(
                f"{info.name}: {length} samples give {upstream.num_frames(length)} frames, a window of {window} and a hop of "
                f"{info.hop_samples} samples would give {regular}: features:DIR cannot describe this encoder."
            )
    values = {**dataclasses.asdict(info), "window_samples": window}
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    file = out / "info.json"
    try:
        if file.is_file() and file.read_text(encoding="utf-8") != text:
            raise RequestError(
                f"{file} describes other states than those of {info.name} {info.revision}. Fix: another --out"
            )
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RequestError(f"--out {out} cannot be written: {error.strerror or error}. Fix: another --out") from error


def _read_audio(files: Sequence[Path], sample_rate_hz: int) -> list[tuple[str, Any]]:
    """The waveform (S,) of each file under the name of its states; every problem is reported at once."""
    from superb_probe.downstreams.audio import read_header, read_waveform
    from superb_probe.downstreams.manifest import Utterance

    names = [file.stem for file in files]
    problems = [f"{file}: another file is named {file.stem} too" for file in files if names.count(file.stem) > 1]
    waveforms = []
    for file in files:
        try:
            utterance = Utterance(file.stem, file.name, 0.0, read_header(file).duration_s, {})
            waveforms.append((file.stem, read_waveform(utterance, file.parent, sample_rate_hz)))
        except RequestError as error:
            problems.append(str(error))
    if problems:
        raise all_at_once(
            "audio", problems, "give readable mono files of the upstream's rate, each with a name of its own"
        )
    return waveforms


def convert_checkpoint(args: argparse.Namespace) -> int:
    """Convert, and say what was written."""
    _need(args, "convert", "out")
    from superb_probe.upstreams import checkpoints

    target_format = args.format or _FORMATS.get(args.out.suffix)
    if target_format is None:
        raise RequestError(
            f"--out {args.out}: no format has that ending. Fix: .safetensors, .pt, a folder, or --format"
        )
    written = checkpoints.convert_checkpoint(args.checkpoint, args.out, target_format)
    print(f"{written} ({target_format})")
    return 0
