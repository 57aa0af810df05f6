"""The page in a real Chromium, from file://: sorting, filtering, keys, names for screen readers, both themes, a phone's width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from superb_probe.results.boards import boards, published_boards
from superb_probe.results.leaderboard import leaderboard
from superb_probe.results.page import page
from superb_probe.results.record import RunRecord

FIRST = "document.querySelector('section.own table')"
NAMES = f"[...{FIRST}.tBodies[0].rows].filter(r => !r.hidden).map(r => r.cells[0].firstChild.textContent)"
CELLS = f"[...{FIRST}.tBodies[0].rows].map(r => r.cells[%d].dataset.v)"
SHOWN = "[...document.querySelectorAll('section:not([data-detail])')].filter(s => !s.hidden).length"
TAB, ENTER, SPACE = ("Tab", 9), ("Enter", 13, "\r"), (" ", 32, " ")
# the least contrast of any text with what is behind it (WCAG 2.2, relative luminance)
CONTRAST = """(() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] > 0) return c; } return [255, 255, 255]; };
  let least = [99, ''];
  for (const e of document.querySelectorAll('body *')) {
    const text = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!text || !e.getClientRects().length || e.closest('script')) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < least[0]) least = [ratio, e.outerHTML.slice(0, 80)];
  }
  return least;
})()"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, made_up: Any, base_record: RunRecord) -> Path:
    records = made_up.made_up_records(base_record, upstreams=("up_a", "up_b", "up_c"), rates=(1e-3,), seeds=(1, 2, 3))
    records = [record for record in records if (record.upstream.name, record.task.name) != ("up_b", "asv")]
    control = [
        made_up.changed(record, probe=made_up.replace(record.probe, control="shuffle"))
        for record in records
        if record.upstream.name == "up_a" and record.task.name == "pr"
    ]
    heard = {"up_b": ("librispeech_asr",), "up_c": ("unknown",)}  # the test set of some tasks, marked at the scores
    records = [
        made_up.replace(
            record, upstream=made_up.replace(record.upstream, trained_on=heard.get(record.upstream.name, ()))
        )
        for record in records
    ]
    table = leaderboard([*records, *control])
    path = tmp_path_factory.mktemp("page") / "leaderboard.html"
    path.write_text(page(boards(table), published_boards(), table, len(records)), encoding="utf-8")
    return path


def test_nothing_is_said_on_the_console_and_no_network_is_asked(tab: Any, file: Path) -> None:
    for dark in (False, True):
        tab.open(file, dark=dark)
        assert tab.complaints() == []
    assert tab.run("document.title") == "superb-probe leaderboard"


def test_an_error_or_a_request_would_be_seen(tab: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text(
        "<script>console.error('x'); nothing.here()</script><img src=http://127.0.0.1:9/x.png>"
    )
    tab.open(tmp_path / "bad.html")
    said = " ".join(tab.complaints())
    assert "ReferenceError" in said
    assert "network: http://127.0.0.1:9/x.png" in said


def column(tab: Any, task: str) -> int:
    return int(tab.run(f"{FIRST}.querySelector('th[data-column={task}]').cellIndex"))


def test_a_click_on_a_heading_sorts_the_best_first_and_then_turns(tab: Any, file: Path) -> None:
    tab.open(file)
    for task, best_first in (("pr", "ascending"), ("sid", "descending")):
        index = column(tab, task)
        button = f"section.own th[data-column={task}] button"
        tab.click(button)
        values = [float(value) for value in tab.run(CELLS % index)]
        assert values == sorted(values, reverse=best_first == "descending")
        assert tab.run(f"{FIRST}.querySelector('th[data-column={task}]').getAttribute('aria-sort')") == best_first
        tab.click(button)
        assert [float(value) for value in tab.run(CELLS % index)] == values[::-1]
        assert tab.run(f"{FIRST}.querySelectorAll('[aria-sort]').length") == 1
    assert "Sorted by" in tab.run("document.getElementById('status').textContent")


def test_rows_without_a_value_stay_last(tab: Any, file: Path) -> None:
    tab.open(file)
    index = column(tab, "asv")
    for _ in range(2):
        tab.click("section.own th[data-column=asv] button")
        assert tab.run(CELLS % index)[-1] == ""


def test_names_sort_as_text(tab: Any, file: Path) -> None:
    tab.open(file)
    tab.click("section.own thead th:first-child button")
    assert tab.run(NAMES) == ["up_a", "up_b", "up_c"]


def test_filters(tab: Any, file: Path) -> None:
    tab.open(file)
    everything = tab.run(SHOWN)
    assert everything == 5  # ours, our control, three published
    tab.run("document.querySelector('[name=name]').focus()")
    for character in "UP_B":
        tab.press(character, ord(character), character)
    assert tab.run(NAMES) == ["up_b"]
    assert tab.run(SHOWN) == 1
    assert tab.run("document.getElementById('status').textContent") == "1 row in 1 table shown."
    tab.click("form button[type=reset]")
    tab.run("new Promise((done) => setTimeout(done, 50))")
    assert tab.run(SHOWN) == everything
    tab.click("[name=published]")
    assert tab.run(SHOWN) == 2
    choose = "s.value = 'shuffle'; s.dispatchEvent(new Event('input', {bubbles: true}));"
    tab.run(f"(s => {{ {choose} }})(document.querySelector('[name=control]'))")
    assert tab.run(SHOWN) == 1
    tab.open(file)
    shown = "[...document.querySelectorAll('[data-column=sd]')].filter(e => e.getClientRects().length).length"
    assert tab.run(shown) > 0
    tab.click("[name=task][value=sd]")
    assert tab.run(shown) == 0


def test_a_keyboard_reaches_and_works_everything(tab: Any, file: Path) -> None:
    tab.open(file)
    seen = []
    for _ in range(60):
        tab.press(*TAB)
        seen.append(
            tab.run(
                "(e => [e.tagName, e.name || e.textContent.trim() || e.className].join(' '))(document.activeElement)"
            )
        )
        if seen[-1].startswith("BUTTON superb_s"):
            break
    assert seen[0] == "INPUT name"
    assert any(entry.startswith("SELECT control") for entry in seen)
    assert any(entry.startswith("DIV") for entry in seen)  # the table's box, so that arrow keys scroll it
    assert tab.run(NAMES) == ["up_c", "up_a", "up_b"]
    assert tab.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    tab.press(*ENTER)
    tab.press(*SPACE)
    assert tab.run(f"{FIRST}.querySelector('[aria-sort]').getAttribute('aria-sort')") == "ascending"
    assert tab.run(NAMES) == ["up_a", "up_c", "up_b"]  # the one without a score stays last


def test_a_screen_reader_finds_names_for_everything(tab: Any, file: Path) -> None:
    tab.open(file)
    tab.run("document.querySelector('details').open = true")
    tab.call("Accessibility.enable")
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    roles: dict[str, list[str]] = {}
    for node in nodes:
        if not node.get("ignored"):
            roles.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    for role in ("table", "region", "button", "checkbox", "combobox", "searchbox", "columnheader", "rowheader"):
        assert roles.get(role), role
        assert all(roles[role]), f"{role} without a name: {roles[role]}"
    assert len(set(roles["table"])) == len(roles["table"])
    assert roles["status"] is not None
    assert tab.run("document.documentElement.lang") == "en"


MARKED = f"[...{FIRST}.tBodies[0].rows].map(r => [r.cells[0].firstChild.textContent, r.cells[%d].textContent])"


def names_of_cells(tab: Any) -> list[str]:
    """What a screen reader reads out, cell by cell."""
    tab.call("Accessibility.enable")
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    cells = [node for node in nodes if node.get("role", {}).get("value") == "cell"]
    return [node.get("name", {}).get("value", "") for node in cells]


def test_what_an_encoder_heard_of_a_test_set_is_told_at_its_score(tab: Any, file: Path) -> None:
    tab.open(file)
    told = dict(tab.run(MARKED % column(tab, "pr")))
    assert "† (the encoder's training data may hold this test set: librispeech_asr)" in told["up_b"]
    assert "‡ (what the encoder was trained on is not known well enough: unknown)" in told["up_c"]
    assert "†" not in dict(tab.run(MARKED % column(tab, "sid")))["up_b"]
    heard = "may hold this test set: librispeech_asr"
    assert any(heard in name and "†" not in name for name in names_of_cells(tab))
    tab.run("document.querySelectorAll('td .vh').forEach((each) => each.remove())")  # mutant: a mark and no words
    assert not any(heard in name for name in names_of_cells(tab))
    assert "† the encoder was trained on data" in tab.run("document.querySelector('section.own .notes').textContent")


@pytest.mark.parametrize("dark", [False, True])
def test_contrast(tab: Any, file: Path, dark: bool) -> None:
    tab.open(file, dark=dark)
    tab.run("document.querySelector('details').open = true")
    ratio, where = tab.run(CONTRAST)
    assert ratio >= 4.5, where
    white = tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert white is not dark


def test_faint_text_would_be_seen(tab: Any, file: Path) -> None:
    tab.open(file)
    tab.run("document.documentElement.style.setProperty('--quiet', '#999999')")
    assert tab.run(CONTRAST)[0] < 4.5


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_scrolls_tables_and_not_the_page(tab: Any, file: Path, width: int) -> None:
    tab.open(file, width=width, height=800, phone=True)
    assert tab.run("document.documentElement.scrollWidth") <= width
    assert tab.run("(e => e.scrollWidth > e.clientWidth)(document.querySelector('.scroll'))")
    heights = "[...document.querySelectorAll('button, select, [type=search], label.box')].map(e => e.getBoundingClientRect().height)"
    assert tab.run(f"{heights}.filter(h => h && h < 40)") == []
    name = f"{FIRST}.tBodies[0].rows[0].cells[0]"
    tab.run("document.querySelector('.scroll').scrollLeft = 300")
    assert tab.run(f"{name}.getBoundingClientRect().left") <= 20  # the upstream's name stays in sight


def test_without_scripts_all_rows_are_there(tab: Any, file: Path) -> None:
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(file)
        assert tab.run("getComputedStyle(document.querySelector('form')).display") == "none"
        assert tab.run("document.querySelectorAll('section.own')[0].querySelectorAll('tbody tr').length") == 3
    finally:
        tab.call("Emulation.setScriptExecutionDisabled", value=False)
