"""The command `store`: the extracted states on disk, listed, and the least recently used of them deleted."""

from __future__ import annotations

import argparse
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from superb_probe.commands_flags import add_json
from superb_probe.commands_output import print_json, table
from superb_probe.errors import RequestError
from superb_probe.settings import load_settings, parse_bytes

if TYPE_CHECKING:
    from superb_probe.probes.store_files import StoreFolder


def add_commands(subparsers: Any) -> None:
    """Add `store list` and `store clean`."""
    parser = subparsers.add_parser(
        "store",
        help="extracted states on disk: list, clean",
        description="List the stores of extracted states in a folder, or delete the least recently used ones. What is deleted "
        "is extracted again when it is needed.",
        epilog="examples:\n  superb-probe store list /fast/store\n  superb-probe store clean /fast/store --keep 50GB",
    )
    parser.add_argument("what", choices=("list", "clean"))
    parser.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="default: store in superb.yaml")
    parser.add_argument("--keep", metavar="SIZE", help="clean: most that the stores may take afterwards, e.g. 50GB")
    add_json(parser, ": the stores listed or deleted")
    parser.set_defaults(handler=show_stores)


def show_stores(args: argparse.Namespace) -> int:
    """List stores, or clean and say what was deleted."""
    folder = args.folder or load_settings().store
    if folder is None:
        raise RequestError(
            "superb-probe store: which folder? Fix: superb-probe store list DIR, or store: in superb.yaml"
        )
    if not Path(folder).is_dir():
        raise RequestError(f"no folder {folder}. Fix: the folder that --store named")
    if (args.what == "clean") != (args.keep is not None):
        raise RequestError(
            "--keep SIZE goes with `store clean`, which needs it: superb-probe store clean DIR --keep 50GB"
        )
    from superb_probe.probes.plan import readable_bytes
    from superb_probe.probes.store_files import clean_stores, list_stores

    stores = list_stores(folder) if args.what == "list" else clean_stores(folder, parse_bytes(args.keep))
    if args.json:
        print_json([_plain(each) for each in stores])
        return 0
    header = ("upstream", "first used for", "view", "dtype", "size", "last used", "folder")
    rows = []
    for each in stores:
        plain = _plain(each)
        rows.append((plain["upstream"], plain["manifest"], plain["view"], plain["dtype"], readable_bytes(each.num_bytes),
                     plain["last_used"], each.path.name))  # fmt: skip
    if rows:
        print(table(header, rows))
    verb = "deleted, " if args.what == "clean" else ""
    print(f"{len(stores)} stores, {verb}{readable_bytes(sum(each.num_bytes for each in stores))}")
    return 0


def _plain(store: StoreFolder) -> dict[str, Any]:
    used = datetime.fromtimestamp(store.last_used_s, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    causes = store.causes
    return {
        "folder": str(store.path),
        "upstream": causes.get("upstream", ""),
        "manifest": causes.get("first_manifest", ""),
        "view": causes.get("view", ""),
        "dtype": causes.get("dtype", ""),
        "num_bytes": store.num_bytes,
        "last_used": used,
    }
