"""The command that pre-trains an encoder: `superb-probe pretrain`."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from superb_probe.commands_flags import add_device
from superb_probe.errors import RequestError
from superb_probe.settings import parse_duration

if TYPE_CHECKING:
    from superb_probe.upstreams.pretrain import Job
    from superb_probe.upstreams.pretrain_data import Clips
    from superb_probe.upstreams.pretrain_recipe import Recipe
    from superb_probe.upstreams.pretrain_train import World


def add_commands(subparsers: Any) -> None:
    """Add `pretrain`."""
    command = subparsers.add_parser(
        "pretrain",
        help="train an encoder as HuBERT: masked prediction of k-means units",
        description="Pre-train a registered encoder as HuBERT: units of cepstra, then of a layer of the model that these made.\n"
        "Whatever a dev or test split of the embedded corpus (and of --exclude) holds is refused. More: docs/pretrain.md.",
        epilog="examples:\n"
        "  superb-probe pretrain --encoder mamba_hubert_causal --size test --data mini --recipe test --out trained\n"
        "  superb-probe pretrain --encoder mamba_hubert --size base --data /corpora/mine --recipe paper --out runs/m --device cuda",
    )
    command.add_argument("--encoder", required=True, metavar="NAME", help="a HuBERT of `superb-probe list upstreams`")
    command.add_argument("--size", default="tiny", help="test, tiny, small or base (default: %(default)s)")
    command.add_argument(
        "--front-end", choices=("size", "causal", "published"), default="size",
        help="of causal encoders: one that sees no future either, or the published one (default: as the size has it)",
    )  # fmt: skip
    command.add_argument(
        "--data", required=True, nargs="+", metavar="DATA", help="folders of audio, manifests, or mini"
    )
    command.add_argument("--recipe", default="tiny", metavar="FILE", help="YAML, or a packaged one: paper, tiny, test")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the run")
    command.add_argument("--cache", type=Path, metavar="DIR", help="decoded audio, shared by runs (default: OUT/clips)")
    command.add_argument(
        "--exclude", nargs="+", type=Path, default=[], metavar="TSV", help="more dev and test manifests"
    )
    command.add_argument(
        "--held-out", type=Path, metavar="TSV", help="what is measured on (default: mini's dev sentences)"
    )
    command.add_argument("--alignments", type=Path, metavar="TSV", help="phones of --held-out: id, phones, starts_ms")
    command.add_argument(
        "--steps", type=int, nargs="+", metavar="N", help="updates of each iteration, over the recipe's"
    )
    command.add_argument("--seed", type=int, help="over the recipe's")
    command.add_argument("--time-limit", metavar="TIME", help="stop with a checkpoint after this long, as 90m or 8h")
    command.add_argument("--resume", action="store_true", help="go on with the run in --out")
    add_device(command)
    command.add_argument("--half", action="store_true", help="export float16 weights")
    command.add_argument("--license", default="unknown", metavar="TEXT", help="of the weights (default: %(default)s)")
    command.add_argument("--no-graphs", action="store_true", help="record no CUDA graphs")
    command.add_argument(
        "--prepare-only", action="store_true", help="decode the audio and make the first units, then stop"
    )
    command.add_argument("--profile", type=int, metavar="N", help="time and profile N updates instead of training")
    command.set_defaults(handler=run_pretraining)


def run_pretraining(args: argparse.Namespace) -> int:
    """Pre-train, or prepare or profile; 0 also when the time limit stopped it (its last line says so)."""
    from superb_probe.pretrain_card import read_evidence, write_card
    from superb_probe.pretrain_dashboard import draw_dashboard
    from superb_probe.upstreams.load import find_device
    from superb_probe.upstreams.pretrain import begin, prepare_units, pretrain
    from superb_probe.upstreams.pretrain_train import find_world

    recipe = _recipe(args)
    world = find_world(find_device(args.device))
    limit_s = parse_duration(args.time_limit) if args.time_limit else float("inf")
    clips = _clips(args, world)
    job = _job(args, recipe, clips, world, limit_s)
    if args.prepare_only:
        prepare_units(job)
        print(f"{args.cache or args.out / 'clips'}: {len(clips)} clips, {clips.facts['hours']:.2f} hours")
        return 0
    if args.profile:
        from superb_probe.pretrain_profile import profile

        print(profile(job, args.profile))
        return 0
    if world.rank == 0:
        begin(args.out, recipe, clips, resume=args.resume)
    world.wait()
    finished = pretrain(job)
    if finished and world.rank == 0:
        weights = job.exported(len(recipe.iterations))
        card = write_card(weights, read_evidence(args.out), clips.facts)
        print(f"{weights}\n{card}\n{draw_dashboard(args.out)}")
    return 0


def _recipe(args: argparse.Namespace) -> Recipe:
    """The recipe with the command line's own values.

    Raises:
        RequestError: if --steps has not one number an iteration.
    """
    from superb_probe.upstreams.pretrain_recipe import read_recipe

    recipe = read_recipe(args.recipe)
    if args.seed is not None:
        if args.seed < 0:
            raise RequestError(f"--seed {args.seed}: at least 0.")
        recipe = replace(recipe, seed=args.seed)
    if args.steps is not None:
        if len(args.steps) != len(recipe.iterations) or min(args.steps) < 1:
            raise RequestError(
                f"--steps {' '.join(map(str, args.steps))}: expected {len(recipe.iterations)} numbers above zero, one an iteration."
            )
        iterations = [replace(each, steps=steps) for each, steps in zip(recipe.iterations, args.steps, strict=True)]
        recipe = replace(recipe, iterations=tuple(iterations))
    return recipe


def _clips(args: argparse.Namespace, world: World) -> Clips:
    """The prepared clips: decoded by the first process, read by all."""
    from superb_probe.pretrain_corpus import build_exclusion, prepare_clips
    from superb_probe.upstreams.pretrain_data import Clips

    folder = args.cache or args.out / "clips"
    if world.rank == 0:
        exclusion = build_exclusion(args.exclude)
        clips = prepare_clips(folder, args.data, exclusion, held_out=args.held_out, alignments=args.alignments)
        print(
            f"{clips.facts['hours']:.2f} hours to train on, list of what is kept out: {exclusion.digest}",
            file=sys.stderr,
        )
        world.wait()
        return clips
    world.wait()
    return Clips.read(folder)


def _job(args: argparse.Namespace, recipe: Recipe, clips: Clips, world: World, limit_s: float) -> Job:
    import platform

    import torch

    from superb_probe import __version__
    from superb_probe.upstreams.pretrain import Job
    from superb_probe.upstreams.sizes import FAMILIES, size_config

    causal = {"size": None, "causal": True, "published": False}[args.front_end]
    config = size_config(args.encoder, args.size, causal)
    if FAMILIES[args.encoder].mask_at_probing:
        raise RequestError(
            f"{args.encoder} is transformer_hubert probed under a mask. Fix: --encoder transformer_hubert."
        )
    device = world.device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    metadata = {
        "version": __version__,
        "description": FAMILIES[args.encoder].description.removeprefix("a "),
        "size": args.size,
        "recipe": str(args.recipe),
        "recipe_digest": recipe.digest,
        "clips_digest": clips.facts["digest"],
        "hours": f"{clips.facts['hours']:.2f}",
        "exclusion_digest": clips.facts["exclusion_digest"],
        "machine": f"{world.size} x {machine}, torch {torch.__version__}",
        "command": shlex.join(["superb-probe", *sys.argv[1:]]),
    }
    trained_on = ["mini-train" if name == "mini" else name for name in clips.facts["corpora"]]
    description = {"trained_on": trained_on, "license": args.license, "metadata": metadata}
    folder = args.cache or args.out / "clips"
    return Job(
        args.encoder,
        config,
        recipe,
        clips,
        folder,
        args.out,
        world,
        limit_s,
        not args.no_graphs,
        description,
        args.half,
    )
