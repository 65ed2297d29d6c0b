"""The reference in docs/api/ is what the docstrings say."""

import importlib.util
import re
import subprocess
import sys
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

import pytest

import hf_tfast

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def make_api():
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs/make_api.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_pages_are_current(make_api):
    made, there = make_api.pages(), {path.name for path in make_api.PAGES.glob("*.md")}
    assert there == set(made), "run `python docs/make_api.py`"
    for name, text in made.items():
        assert (make_api.PAGES / name).read_text(encoding="utf-8") == text, f"{name}: run `python docs/make_api.py`"


def test_every_public_name_is_told(make_api):
    text = "\n".join(make_api.pages().values())
    for name in hf_tfast.__all__:
        assert f"\n## {name}\n" in text
        assert f"[`{name}`](" in text


def test_fields_are_those_of_the_classes(make_api):
    """Read from the source, and yet what Python makes of it."""
    compared = 0
    for name, module in make_api.homes().items():
        cls = getattr(hf_tfast, name)
        if not is_dataclass(cls):
            continue
        found = make_api.locate(module, name)
        told = {field: default for field, _, default in make_api.fields(found.node)}
        real = {f.name: f.default for f in fields(cls) if f.init}
        assert set(told) <= set(real), name
        assert make_api.is_contracted(found) <= (set(told) == set(real)), name
        for field, default in told.items():
            simple = isinstance(real[field], int | float | str) and re.fullmatch(r"[\d.\-e]+|'.*'|True|False", default)
            if simple:
                assert eval(default) == real[field], f"{name}.{field}"  # a literal of our own source
                compared += 1
            assert (default == "") == (real[field] is MISSING) or default.startswith("field("), f"{name}.{field}"
    assert compared > 40


def test_links_between_the_pages(make_api):
    made = make_api.pages()
    for name, text in made.items():
        for target, anchor in re.findall(r"\]\(([^)#\s]+)(?:#([^)]+))?\)", text):
            if target.startswith("http"):
                continue
            assert (make_api.PAGES / target).exists(), f"{name} -> {target}"
            assert not anchor or re.search(rf"^## {anchor}$", made[target], re.M | re.I), (
                f"{name} -> {target}#{anchor}"
            )


@pytest.mark.slow
def test_a_stale_page_is_named(make_api, monkeypatch, tmp_path):
    monkeypatch.setattr(make_api, "PAGES", tmp_path / "api")
    monkeypatch.setattr(sys, "argv", ["make_api.py"])
    make_api.main()
    (tmp_path / "api" / "hub.md").write_text("old")
    (tmp_path / "api" / "gone.md").write_text("of a room that is no more")
    monkeypatch.setattr(sys, "argv", ["make_api.py", "--check"])
    with pytest.raises(SystemExit, match=r"gone\.md, hub\.md"):
        make_api.main()
    monkeypatch.setattr(sys, "argv", ["make_api.py"])
    make_api.main()
    assert {path.name for path in (tmp_path / "api").iterdir()} == set(make_api.pages())
    assert (tmp_path / "api" / "hub.md").read_text(encoding="utf-8") == make_api.pages()["hub.md"]


def test_the_script_runs_without_the_package():
    """On its own, with nothing installed but Python."""
    command = [sys.executable, "-S", "-I", ROOT / "docs/make_api.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("doc", "markdown"),
    [
        ("One line\nand two.", "One line\nand two."),
        ("x   what it is\n    and more\ny   another", "- **x**: what it is and more\n- **y**: another"),
        ("Before.\n\n    o = v\n    p = q", "Before.|```text\no = v\np = q\n```"),
        ("i <= j, `a <= b`, 2 * 3", "i \\<= j, `a <= b`, 2 \\* 3"),
    ],
)
def test_docstrings_become_markdown(make_api, doc, markdown):
    assert "|".join(make_api.paragraphs(doc)) == markdown
