"""The registry: three doors, and listing that imports nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from superb_probe.errors import RequestError
from superb_probe.registry import Registry, read_provides

WORKS = '"""A toy."""\n\nPROVIDES = ("toy", "other_toy")\n\n\ndef toy():\n    return "built"\n\n\nother_toy = 3\n'
BROKEN = '"""A broken toy."""\n\nimport no_such_module_at_all\n\nPROVIDES: tuple[str, ...] = ("broken_toy",)\n'


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry whose tree is a folder with a toy and a broken toy."""
    package = tmp_path / "toy_upstreams"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "toy.py").write_text(WORKS)
    (package / "broken.py").write_text(BROKEN)
    (package / "helper.py").write_text("raise RuntimeError('imported while listing')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry("upstream")
    registry.package = "toy_upstreams"
    yield registry  # type: ignore[misc]
    for name in [name for name in sys.modules if name.startswith("toy_upstreams")]:
        del sys.modules[name]


def install(folder: Path, *lines: str) -> None:
    """A fake installed distribution with entry points."""
    info = folder / "toy_dist-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-dist\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[superb_probe.upstreams]\n" + "\n".join(lines) + "\n")


def test_names_in_the_tree() -> None:
    assert {"fbank", "mamba_hubert", "mamba_hubert_causal", "transformer_hubert"} <= set(Registry("upstream").names())
    assert {"asr", "asv", "ic", "pr"} <= set(Registry("task").names())
    assert Registry("upstream").names("mamba*causal") == ["mamba_hubert_causal", "mamba_mlp_hubert_causal"]


def test_every_name_in_the_tree_has_a_builder() -> None:
    for kind in ("upstream", "task"):
        for entry in Registry(kind).entries().values():
            assert callable(entry.load())
            assert entry.summary


def test_listing_imports_nothing(tree: Registry) -> None:
    assert tree.names() == ["broken_toy", "other_toy", "toy"]
    assert not [name for name in sys.modules if name.startswith("toy_upstreams.")]
    assert tree.entries()["toy"].summary == "A toy."


def test_a_file_in_the_tree(tree: Registry) -> None:
    assert tree.find("toy").load()() == "built"


def test_a_broken_adapter_lists_and_fails_only_when_loaded(tree: Registry) -> None:
    entry = tree.find("broken_toy")
    with pytest.raises(RequestError, match=r"broken_toy.*no_such_module_at_all.*doctor"):
        entry.load()


def test_a_name_without_a_function_of_that_name(tree: Registry) -> None:
    with pytest.raises(RequestError, match="no function 'other_toy'"):
        tree.find("other_toy").load()


def test_unknown_names_get_the_nearest(tree: Registry) -> None:
    with pytest.raises(RequestError, match="Did you mean other_toy"):
        tree.find("othr_toy")
    with pytest.raises(RequestError, match=r"unknown task 'asw'\. Did you mean asv or asr"):
        Registry("task").find("asw")
    with pytest.raises(RequestError, match="list upstreams") as caught:
        tree.find("zzzzzz")
    assert "Did you mean" not in str(caught.value)


def test_a_file_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(WORKS)
    monkeypatch.chdir(tmp_path)
    assert Registry("upstream").find("./mine.py:toy").load()() == "built"
    assert Registry("upstream").find(f"{tmp_path}/mine.py:toy").load()() == "built"
    with pytest.raises(RequestError, match="no function 'toi'"):
        Registry("upstream").find("./mine.py:toi").load()
    with pytest.raises(RequestError, match=r"no file \./none\.py"):
        Registry("upstream").find("./none.py:toy")
    (tmp_path / "wrong.py").write_text("def toy(:\n")
    with pytest.raises(RequestError, match="SyntaxError"):
        Registry("upstream").find("./wrong.py:toy").load()


def test_an_installed_entry_point(tree: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    install(site, "their_toy = their_package:make")
    (site / "their_package.py").write_text("def make():\n    return 'theirs'\n")
    monkeypatch.syspath_prepend(str(site))
    entry = tree.find("their_toy")
    assert entry.provided_by == "toy-dist 1.2"
    assert "their_package" not in sys.modules
    assert entry.load()() == "theirs"
    del sys.modules["their_package"]


def test_a_broken_entry_point_lists(tree: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", "their_toy = not_there_at_all:make")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert "their_toy" in tree.names()
    with pytest.raises(RequestError, match="not_there_at_all"):
        tree.find("their_toy").load()


def test_one_name_from_two_sides_is_an_error(tree: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", "toy = their_package:make")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with pytest.raises(RequestError, match=r"'toy' is provided twice.*toy-dist"):
        tree.entries()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("PROVIDES = ('a', 'b')", (("a", "b"), "")),
        ('"""First line.\n\nMore.\n"""\nPROVIDES = ["a"]', (("a",), "First line.")),
        ("x = 1", ((), "")),
        ("def f():\n    PROVIDES = ('a',)", ((), "")),
    ],
)
def test_read_provides(tmp_path: Path, source: str, expected: tuple[tuple[str, ...], str]) -> None:
    file = tmp_path / "module.py"
    file.write_text(source)
    assert read_provides(file) == expected


def test_provides_must_be_a_literal(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("PROVIDES = tuple(print('run'))")
    with pytest.raises(ValueError, match="malformed"):
        read_provides(file)
