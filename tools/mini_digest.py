"""Print the digest of the corpus `mini`: SHA-256 over the sorted lines `<sha256>  <path>` of its audio, tables and RTTM files."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path


def corpus_digest(corpus: Path) -> str:
    """The digest of a corpus folder; its README and LICENSE do not count.

    Args:
        corpus: the folder.
    """
    files = sorted(path for pattern in ("*.tsv", "audio/**/*.opus", "rttm/*.rttm") for path in corpus.glob(pattern))
    lines = sorted(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(corpus).as_posix()}\n" for path in files
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def main() -> None:
    """Print the digest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=Path("downstreams/mini"))
    print(f"sha256:{corpus_digest(parser.parse_args().corpus)}")


if __name__ == "__main__":
    main()
