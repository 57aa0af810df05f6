"""The command line: `superb-probe COMMAND ...`. Exit status 0 done, 1 a check or a run failed, 2 the request was wrong."""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from superb_probe import (
    __version__,
    commands_align,
    commands_analyze,
    commands_bench,
    commands_check,
    commands_data,
    commands_exchange,
    commands_finetune,
    commands_names,
    commands_pretrain,
    commands_results,
    commands_run,
    commands_store,
    commands_stream,
    doctor,
)
from superb_probe.errors import RequestError, SuperbProbeError, nearest

_COMMAND_MODULES = (
    commands_run,
    commands_names,
    commands_check,
    commands_data,
    commands_results,
    commands_exchange,
    commands_pretrain,
    commands_finetune,
    commands_store,
    commands_bench,
    commands_stream,
    commands_analyze,
    commands_align,
    doctor,
)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `RequestError`s that name the nearest flag or command."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As `argparse.ArgumentParser`, without abbreviated flags and with help text kept as written."""
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        kwargs["allow_abbrev"] = False
        super().__init__(*args, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, but say first which flags do not exist: the misspelt one matters more than the one it leaves missing."""
        known = self._option_string_actions
        if args is not None and self._subparsers is None:  # else the words belong to a command
            for token in args:
                if token == "--":
                    break
                flag = token.partition("=")[0]
                if re.fullmatch(r"--?[A-Za-z][\w-]*", flag) and flag not in known:
                    close = nearest(flag, [name for name in known if name.startswith("--")])
                    hint = f" Did you mean {' or '.join(close)}?" if close else ""
                    raise RequestError(f"{self.prog}: unknown flag {flag}.{hint} `{self.prog} --help` lists all.")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Turn argparse's message into a `RequestError`."""
        wrong = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message, re.DOTALL)
        if wrong:
            choices = re.findall(r"[\w-]+", wrong[2])
            close = nearest(wrong[1], choices)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            what = message.partition(":")[0].removeprefix("argument ").lower()
            message = f"unknown {what} {wrong[1]!r}.{hint} Known: {', '.join(choices)}."
        raise RequestError(f"{self.prog}: {message.rstrip('.')}. `{self.prog} --help` shows how it is used.")


def build_parser() -> Parser:
    """The parser of every command."""
    parser = Parser(
        prog="superb-probe",
        description="Probe frozen speech encoders on SUPERB's tasks: extract once, train every probe in one pass, record all.",
        epilog="examples:\n"
        "  superb-probe run --upstream mamba_hubert_causal --task asv\n"
        "  superb-probe list upstreams 'mamba*'\n"
        "  superb-probe check upstream ./mine.py:mine",
    )
    parser.add_argument("--version", action="version", version=f"superb-probe {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in _COMMAND_MODULES:
        module.add_commands(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after `superb-probe`; the process's own when None.

    Returns:
        The exit status: 0 done, 1 a check or a run failed, 2 the request was wrong, 130 interrupted.
        An unexpected exception is not caught: its traceback is the report.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _plain_warnings()
            parsed = build_parser().parse_args(arguments)
            return int(parsed.handler(parsed))
    except SuperbProbeError as error:
        text = str(error)
        print(text if text.startswith("superb-probe") else f"superb-probe: {text}", file=sys.stderr)
        return error.exit_status
    except SystemExit as request:  # --help and --version end here
        return int(request.code or 0)
    except KeyboardInterrupt:
        print("superb-probe: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (`| head`) has gone: nothing is left to say
        sys.stderr.close()
        return 0


def run(argv: Sequence[str] | None = None) -> int:
    """The command `superb-probe run`, for `run_superb.py`."""
    return main(["run", *(sys.argv[1:] if argv is None else argv)])


def _plain_warnings() -> Any:
    """A `warnings.showwarning` that prints each of this package's warnings once, as one line; others as Python does."""
    shown: set[str] = set()
    standard = warnings.showwarning

    def show(message: Any, category: Any, filename: Any, lineno: Any, file: Any = None, line: Any = None) -> None:
        if not category.__module__.startswith("superb_probe."):
            standard(message, category, filename, lineno, file, line)
        elif str(message) not in shown:
            shown.add(str(message))
            print(f"superb-probe: WARNING: {message}", file=sys.stderr)

    return show


if __name__ == "__main__":
    sys.exit(main())
