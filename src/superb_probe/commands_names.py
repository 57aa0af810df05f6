"""The commands that say what there is: list, show."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

from superb_probe.commands_flags import add_json
from superb_probe.commands_output import print_json, table
from superb_probe.registry import Registry

_KINDS = ("upstreams", "tasks")


def add_commands(subparsers: Any) -> None:
    """Add `list` and `show`."""
    listing = subparsers.add_parser(
        "list",
        help="names of upstreams or tasks",
        description="Names of upstreams or tasks, without importing any of them.",
        epilog="examples:\n  superb-probe list upstreams 'mamba*'\n  superb-probe list tasks --json",
    )
    listing.add_argument("what", choices=_KINDS)
    listing.add_argument("pattern", nargs="?", default="*", help="shell pattern, e.g. 'mamba*'")
    add_json(listing)
    listing.set_defaults(handler=list_names)

    show = subparsers.add_parser(
        "show",
        help="everything known of one upstream or task",
        description="Everything known of one upstream or task: shapes and options, or protocols and learning rates.",
        epilog="examples:\n  superb-probe show task asv\n  superb-probe show upstream mamba_hubert --size base --json",
    )
    show.add_argument("what", choices=("upstream", "task"))
    show.add_argument("name")
    show.add_argument("--checkpoint", metavar="FILE", help="(upstream) weights to describe")
    show.add_argument("--size", help="(upstream) size to describe: test, tiny, small or base")
    add_json(show)
    show.set_defaults(handler=show_name)


def list_names(args: argparse.Namespace) -> int:
    """Print registered names; an empty answer to a pattern is not an error."""
    registry = Registry(args.what.removesuffix("s"))
    entries = registry.entries()
    rows = [entries[name] for name in registry.names(args.pattern)]
    if args.json:
        print_json([{"name": e.name, "provided_by": e.provided_by, "summary": e.summary} for e in rows])
    elif rows:
        print(table((args.what[:-1], "provided by", "summary"), [(e.name, e.provided_by, e.summary) for e in rows]))
    else:
        print(f"no {args.what} match {args.pattern!r}; `superb-probe list {args.what}` shows all")
    return 0


def show_name(args: argparse.Namespace) -> int:
    """Print what an upstream or a task declares."""
    facts = _task_facts(args.name) if args.what == "task" else _upstream_facts(args)
    if args.json:
        print_json(facts)
    else:
        print("\n".join(_lines(facts)))
    return 0


def _task_facts(name: str) -> dict[str, Any]:
    from superb_probe.downstreams.load import load_task

    facts: dict[str, Any] = _fields(load_task(name).info)
    return facts


def _upstream_facts(args: argparse.Namespace) -> dict[str, Any]:
    from superb_probe.upstreams.load import load_upstream

    upstream = load_upstream(args.name, checkpoint=args.checkpoint, size=args.size)
    facts: dict[str, Any] = _fields(upstream.info)
    facts["params"] = sum(parameter.numel() for parameter in upstream.parameters())
    facts["options"] = _builder_options(args.name)
    return facts


def _builder_options(name: str) -> dict[str, str]:
    """The options of a registered builder and their defaults; empty for names behind a prefix (hf:, s3prl:, features:)."""
    if name.startswith(("hf:", "s3prl:", "features:")):
        return {}
    parameters = inspect.signature(Registry("upstream").find(name).load()).parameters.values()
    return {p.name: "required" if p.default is p.empty else repr(p.default) for p in parameters}


def _fields(value: Any) -> Any:
    """A dataclass as nested dicts (mappings that are not dicts included)."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: _fields(getattr(value, name)) for name in value.__dataclass_fields__}
    if hasattr(value, "items"):
        return {str(key): _fields(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_fields(entry) for entry in value]
    return value


def _lines(values: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            lines.append(f"{indent}{key}")
            lines += _lines(value, indent + "  ")
        elif isinstance(value, list) and any(" " in str(entry) for entry in value):
            lines += [f"{indent}{key}", *(f"{indent}  - {entry}" for entry in value)]
        else:
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            shown = "none" if shown is None or shown in ("", {}) else shown
            lines.append(f"{indent}{key:<{max(1, 28 - len(indent))}}{shown}")
    return lines
