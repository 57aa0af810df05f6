"""The page, Markdown and LaTeX as text: safe, complete, the same bytes from the same records."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest

from superb_probe.results.boards import boards, published_boards
from superb_probe.results.leaderboard import leaderboard
from superb_probe.results.page import page, short_count
from superb_probe.results.record import RunRecord
from superb_probe.results.text_tables import bibtex, latex, markdown

Make = Callable[..., RunRecord]


def html(records: list[RunRecord]) -> str:
    table = leaderboard(records)
    return page(boards(table), published_boards(), table, len(records))


def all_texts(records: list[RunRecord]) -> tuple[str, str, str]:
    table = leaderboard(records)
    every = [*boards(table), *published_boards()]
    return page(every[:-3], every[-3:], table, len(records)), markdown(every, len(table), len(records)), latex(every)


class Balance(HTMLParser):
    """Whether tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "input", "br"):
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_asks_nobody(make_record: Make) -> None:
    text = html([make_record()])
    parser = Balance()
    parser.feed(text)
    assert parser.open == []
    assert parser.links == ["data:,"]
    assert "default-src 'none'" in text
    assert not re.search(r"https?://", re.sub(r"Source:.*", "", text))


def test_names_from_records_are_text_and_nothing_else(make_record: Make) -> None:
    name = "<img src=x onerror=alert(1)>\"'&|*_"
    record = make_record(**{"upstream.name": name, "warnings": ["<script>alert(2)</script>"]})
    page_text, md, tex = all_texts([record])
    assert "<img" not in page_text
    assert "<script>alert" not in page_text
    assert "&lt;img src=x onerror=alert(1)&gt;" in page_text
    assert "\\<img" in md
    assert r"\_" in md
    assert r"\textless{}img" in tex
    assert r"\&" in tex


def test_the_same_records_in_any_order_give_the_same_bytes(made_up: Any, base_record: RunRecord) -> None:
    records = made_up.made_up_records(base_record, upstreams=("a", "b", "c"), rates=(1e-2, 1e-3), seeds=(1, 2, 3))
    first = all_texts(records)
    for seed in range(2):
        random.Random(seed).shuffle(records)
        assert all_texts(records) == first
    assert all_texts(records[1:]) != first


def test_published_rows_stand_apart_with_their_source(make_record: Make) -> None:
    text = html([make_record()])
    sections = re.findall(r'<section class="(own|published)".*?</section>', text, re.DOTALL)
    assert sections == ["own", "published", "published", "published"]
    own = text[: text.index('<section class="published"')]
    assert "WavLM" not in own
    assert text.count("Source:") == 3
    assert "FULL (printed)" in re.sub(r"<[^>]+>", "", text)


def test_markdown_and_latex_mark_the_best(make_record: Make) -> None:
    other = {"upstream.name": "other_one", "upstream.revision": "sha256:2"}
    _, md, tex = all_texts([make_record(test=5.0), make_record(test=6.0, **other)])
    assert "**5.00**" in md
    assert "<ins>6.00</ins>" in md
    assert r"\textbf{5.00}" in tex
    assert r"\underline{6.00}" in tex
    assert r"other\_one" in tex
    assert r"\shortstack[r]{ASV\\EER \% $\downarrow$}" in tex
    assert r"\shortstack[r]{\textbf{5.00}\\{\tiny [4.70, 5.30]}}" in tex
    assert tex.count(r"\begin{tabular}") == tex.count(r"\bottomrule") == 4
    assert tex.count("{") == tex.count("}")


def test_every_row_of_a_table_has_every_column(make_record: Make) -> None:
    _, md, _ = all_texts([make_record()])
    for block in re.findall(r"(?:^\|.*\n)+", md, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block


def test_citations() -> None:
    text = bibtex(
        {"asv": "SUPERB, arXiv:2105.01051", "ic": "SUPERB, arXiv:2105.01051", "mine": "", "x": "@misc{x, note = {y}}"}
    )
    assert text.count("@misc{arxiv210501051") == 1
    twice = bibtex({"one": "A, arXiv:2105.01051, table 1", "two": "A, arXiv:2105.01051, table 2"})
    assert re.findall(r"@misc\{(\w+)", twice) == ["arxiv210501051", "arxiv210501051a"]  # no key stands twice
    assert "asv, ic" in text
    assert "% x\n@misc{x, note = {y}}" in text
    assert "% no citation declared: mine" in text


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (999, "999"), (1000, "1 k"), (94.6e6, "94.6 M"), (4.326e12, "4.33 T")]
)
def test_short_counts(value: float | None, text: str) -> None:
    assert short_count(value) == text
