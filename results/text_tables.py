"""The leaderboard's tables as Markdown and as LaTeX (booktabs), and the BibTeX of what stands in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from string import ascii_lowercase

from superb_probe.results.boards import Board, Cell, Column, Line
from superb_probe.results.overlap import MARKS
from superb_probe.results.page import short_count

_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "×": r"$\times$", "↑": r"$\uparrow$", "↓": r"$\downarrow$",
    "†": r"$^{\dagger}$", "‡": r"$^{\ddagger}$", "–": "--", "·": r"$\cdot$", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


def markdown(boards: Sequence[Board], num_results: int, num_records: int) -> str:
    """All tables as GitHub's Markdown: bold is the best of a column, underlined the second; published rows are italic."""
    made = (
        f"{num_results} results from {num_records} records. What is not comparable stands in another table. The learning rate was "
        "chosen on dev; brackets are 95 % intervals. Made by `superb-probe leaderboard`; do not edit."
    )
    parts = ["# Leaderboard", made]
    for board in boards:
        parts.append(f"## {'Published: ' if board.published else ''}{_md(board.title)}")
        head, rows = _grid(board, _md, _md_cell)
        lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
        parts.append("\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]))
        notes = [*board.notes, *([f"Source: {board.source}"] if board.source else [])]
        parts.append("\n".join(f"- {_md(note)}" for note in notes))
    return "\n\n".join(part for part in parts if part) + "\n"


def latex(boards: Sequence[Board]) -> str:
    """All tables for a paper that loads booktabs: bold the best, underlined the second, arrows for the direction."""
    parts = ["% Made by superb-probe leaderboard --format latex. Needs \\usepackage{booktabs}."]
    for board in boards:
        head, rows = _grid(board, _tex, _tex_cell)
        marks = [note for note in board.notes[1:] if note[:1] in MARKS.values()]
        notes = " ".join(
            _tex(note) for note in (*board.notes[:1], *marks, *([f"Source: {board.source}."] if board.source else []))
        )
        lines = [
            r"\begin{table*}",
            r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
            rf"\caption{{{'Published: ' if board.published else ''}{_tex(board.title)}. {notes}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
            r"\toprule",
            " & ".join([head[0], *map(_tex_two_lines, head[1:])]) + r" \\",
            r"\midrule",
            *(" & ".join(row) + r" \\" for row in rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table*}",
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _grid(
    board: Board, escape: Callable[[str], str], cell_text: Callable[[Cell | None, Column, Board, int], str]
) -> tuple[list[str], list[list[str]]]:
    scores, printed = list(board.score_tasks), sorted({name for line in board.lines for name in line.printed})
    macs = any(line.macs is not None for line in board.lines)
    speed = any(line.times_real_time is not None for line in board.lines)
    head = ["upstream", *(name.replace("journal4", "journal4 (inferred)") for name in scores)]
    head += [{"superb_full": "FULL (printed)", "superb_s": "SUPERB_S (printed)"}[name] for name in printed]
    head += [column.heading for column in board.columns]
    head += ["params", *[board.macs_heading] * macs, *["× real time"] * speed]
    rows = []
    for line in board.lines:
        row = [_name(line, board, escape)]
        for name in scores:
            value = line.scores.get(name)
            row.append(escape("–") if value is None else f"{value:.{2 if name == 'superb_r' else 0}f}")
        row += [f"{line.printed[name]:.2f}" if name in line.printed else escape("–") for name in printed]
        row += [cell_text(cell, board.columns[i], board, i) for i, cell in enumerate(line.cells)]
        row += [escape(short_count(line.params) or "–"), *[escape(short_count(line.macs) or "–")] * macs]
        row += [escape(f"{line.times_real_time:.3g}" if line.times_real_time else "–")] * speed
        rows.append(row)
    return [escape(text) for text in head], rows


def _name(line: Line, board: Board, escape: Callable[[str], str]) -> str:
    note = {"random": " (random weights)", "none": " (no weights)"}.get(line.weights, "")
    text = escape(line.name + note)
    if not board.published:
        return text
    return rf"\textit{{{text}}}" if escape is _tex else f"*{text}*"


def _md(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", text)


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)


def _marked(cell: Cell, board: Board, index: int, best: str, second: str) -> str:
    shown, text = round(cell.value, 2), f"{cell.value:.2f}"
    first, next_best = board.best(index)
    if not board.published:
        text = best.format(text) if shown == first else second.format(text) if shown == next_best else text
    return text


def _md_cell(cell: Cell | None, column: Column, board: Board, index: int) -> str:
    if cell is None:
        return "–"
    text = _marked(cell, board, index, "**{}**", "<ins>{}</ins>")
    text += cell.mark.replace("*", r"\*")
    return text if cell.low is None else f"{text} \\[{cell.low:.2f}, {cell.high:.2f}\\]"


def _tex_cell(cell: Cell | None, column: Column, board: Board, index: int) -> str:
    if cell is None:
        return "--"
    text = _marked(cell, board, index, r"\textbf{{{}}}", r"\underline{{{}}}")
    text += "".join({"*": "$^{*}$"}.get(mark, _tex(mark)) for mark in cell.mark)
    if cell.low is None:
        return text
    return rf"\shortstack[r]{{{text}\\{{\tiny [{cell.low:.2f}, {cell.high:.2f}]}}}}"  # one below the other: ten tasks fit a page


def _tex_two_lines(head: str) -> str:
    r"""A heading, the task above its metric.

    >>> print(_tex_two_lines("ASV EER"))
    \shortstack[r]{ASV\\EER}
    """
    first, space, rest = head.partition(" ")
    return rf"\shortstack[r]{{{first}\\{rest}}}" if space else head


def bibtex(citations: Mapping[str, str]) -> str:
    """BibTeX entries of what a table names: an entry as its author gave it, or a @misc that holds the citation's words.

    Args:
        citations: by name (an upstream, a task), the citation it declares; "" where it declares none.

    >>> print(bibtex({"asv": "SUPERB, arXiv:2105.01051"}).strip())
    @misc{arxiv210501051,
      note = {SUPERB, arXiv:2105.01051},
      annote = {asv}
    }
    """
    users: dict[str, list[str]] = {}
    for name, text in sorted(citations.items()):
        if text.strip():
            users.setdefault(text.strip(), []).append(name)
    entries = []
    taken: set[str] = set()
    for text, names in sorted(users.items()):
        if text.startswith("@"):
            entries.append(f"% {', '.join(names)}\n{text}")
            continue
        number = re.search(r"arXiv[: ]*(\d{4}\.\d{4,5})", text, re.IGNORECASE)
        key = f"arxiv{number[1].replace('.', '')}" if number else re.sub(r"\W+", "", names[0])
        key = next(each for each in (key, *(f"{key}{letter}" for letter in ascii_lowercase)) if each not in taken)
        taken.add(key)
        entries.append(f"@misc{{{key},\n  note = {{{text}}},\n  annote = {{{', '.join(names)}}}\n}}")
    missing = sorted(name for name, text in citations.items() if not text.strip())
    if missing:
        entries.append(f"% no citation declared: {', '.join(missing)}")
    return "\n\n".join(entries) + "\n"
