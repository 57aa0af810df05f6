"""Errors a user can act on: each says what is wrong, where, and what mends it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SuperbProbeError(Exception):
    """The base of every error this package raises on purpose."""

    exit_status = 1


class RequestError(SuperbProbeError):
    """The request was wrong: a name, a flag, a file or a corpus. Exit status 2, nothing was changed."""

    exit_status = 2


class CheckError(SuperbProbeError):
    """A check or a run failed on a request that was right. Exit status 1."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names closest to a misspelt one, best first.

    >>> nearest("mamba_hubrt", ["mamba_hubert", "fbank"])
    ['mamba_hubert']
    """
    return difflib.get_close_matches(name, sorted(known), n=count, cutoff=0.5)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> RequestError:
    """The error for a name nobody provides, with the nearest ones and the command that lists them all.

    >>> print(unknown_name("task", "asw", ["asv", "asr", "ic"]))
    unknown task 'asw'. Did you mean asv or asr? `superb-probe list tasks` shows all.
    """
    close = nearest(name, known)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return RequestError(f"unknown {kind} {name!r}.{hint} `superb-probe list {kind}s` shows all.")


def all_at_once(what: str, problems: Iterable[str], fix: str, limit: int = 20) -> RequestError:
    """One error for many problems, so that a user mends them in one go.

    >>> print(all_at_once("train.tsv", ["line 2: no text", "line 9: no text"], "fill them in"))
    train.tsv: 2 problems
      line 2: no text
      line 9: no text
    Fix: fill them in
    """
    listed = list(problems)
    shown = "".join(f"\n  {problem}" for problem in listed[:limit])
    more = f"\n  (and {len(listed) - limit} more)" if len(listed) > limit else ""
    plural = "problem" if len(listed) == 1 else "problems"
    return RequestError(f"{what}: {len(listed)} {plural}{shown}{more}\nFix: {fix}")
