"""The embedded corpus `mini`: where it is, and its splits as every task reads them."""

from __future__ import annotations

from pathlib import Path

from superb_probe.downstreams.manifest import Manifest, Trials
from superb_probe.errors import RequestError

SPLITS = ("train", "dev", "test")
ROOT = Path(__file__).resolve().parent / "mini"


def mini_root() -> Path:
    """The folder of the embedded corpus, shipped with the package.

    >>> mini_root().name
    'mini'
    """
    return ROOT


def read_splits(root: Path, stem: str) -> dict[str, Manifest]:
    """The manifests `<stem>.train.tsv`, `<stem>.dev.tsv` and `<stem>.test.tsv` of a corpus folder, by split.

    Raises:
        RequestError: if the folder is not such a corpus.
    """
    expected = [f"{stem}.{split}.tsv" for split in SPLITS]
    check_folder(root, expected)
    return {split: Manifest.read(root / name, root) for split, name in zip(SPLITS, expected, strict=True)}


def read_trials(root: Path) -> dict[str, Trials]:
    """The trial lists `trials.dev.tsv` and `trials.test.tsv` of a corpus folder, by split."""
    check_folder(root, ["trials.dev.tsv", "trials.test.tsv"])
    return {split: Trials.read(root / f"trials.{split}.tsv") for split in ("dev", "test")}


def check_folder(root: Path, expected: list[str]) -> None:
    """Refuse a folder that lacks one of the expected files, saying what was expected and what is there."""
    if not root.is_dir():
        raise RequestError(
            f"{root}: no such folder. Fix: give the folder of a corpus, or --manifest train=... test=..."
        )
    missing = [name for name in expected if not (root / name).is_file()]
    if missing:
        there = sorted(path.name for path in root.iterdir())[:8]
        raise RequestError(
            f"{root}: not a corpus this task knows: expected {', '.join(expected)}; missing {', '.join(missing)}; "
            f"found {', '.join(there) or 'nothing'}. Fix: give the right folder, or your own data with "
            "--manifest train=a.tsv dev=b.tsv test=c.tsv (`superb-probe prepare csv` makes them)."
        )
