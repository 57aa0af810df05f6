"""Task names as people type them: aliases, and suites that stand for several tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from superb_probe.errors import RequestError
from superb_probe.registry import Registry

ALIASES: Mapping[str, str] = {"sv": "asv", "phoneme": "pr", "intent": "ic"}
QUICK = ("pr", "sid", "er", "ic")
SUITES: Mapping[str, tuple[str, ...]] = {
    "superb10": ("pr", "asr", "ks", "qbe", "sid", "asv", "sd", "er", "ic", "sf"),
    "paper4": QUICK,  # the tasks of SUPERB_S in the Mamba-HuBERT paper (arXiv 2506.12606, appendix C)
}


def expand_tasks(names: Iterable[str]) -> list[str]:
    """The tasks that some names stand for, each once, in order: "all" is every registered task, `SUITES` the others.

    >>> expand_tasks(["sv", "paper4", "asv"])
    ['asv', 'pr', 'sid', 'er', 'ic']
    """
    found: dict[str, None] = {}
    for name in names:
        if name == "all":
            found.update(dict.fromkeys(each for each in Registry("task").names() if not each.startswith("synthetic")))
        else:
            found.update(dict.fromkeys(SUITES.get(name, (ALIASES.get(name, name),))))
    return list(found)


def quick_tasks(names: Iterable[str]) -> list[str]:
    """The tasks of the quick tier that are asked for: all four when none is named.

    Raises:
        RequestError: for a task that is not in it.
    """
    asked = expand_tasks(names) or list(QUICK)
    others = [name for name in asked if name not in QUICK]
    if others:
        raise RequestError(f"--tier quick has the tasks {' '.join(QUICK)}, not {' '.join(others)}. Fix: leave them out")
    return asked
