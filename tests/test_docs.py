"""What is written is true: the README's table is current, and every code block of README and CONTRIBUTING runs."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from hf_tfast.attention import mechanisms
from hf_tfast.benchmarking.catalogue import BEGIN, catalogue, describe, markdown_table, renew, sections
from tests.attention import contract, contract_calls

ROOT = Path(__file__).parents[1]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"


def blocks(path: Path) -> list[tuple[int, str]]:
    """(line of the first statement, code) of every Python block."""
    text = path.read_text(encoding="utf-8")
    return [(text[: m.start(1)].count("\n") + 1, m[1]) for m in re.finditer(r"```python\n(.*?)```", text, re.S)]


@pytest.fixture
def tiny_hub(tmp_path, monkeypatch):
    """A working folder in which the names that the README loads are tiny random models."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    qwen = transformers.Qwen3Config(**small, vocab_size=64, num_key_value_heads=2, head_dim=8)
    bert = transformers.BertConfig(**small, vocab_size=64, max_position_embeddings=512)
    transformers.Qwen3ForCausalLM(qwen).save_pretrained(tmp_path / "Qwen" / "Qwen3-0.6B")
    transformers.BertModel(bert).save_pretrained(tmp_path / "sentence-transformers" / "all-MiniLM-L6-v2")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("tiny_hub")
def test_readme_runs(capsys):
    scope: dict[str, object] = {}
    for line, code in blocks(README):
        exec(compile("\n" * line + code, str(README), "exec"), scope)  # the blocks of one page go on from each other
    assert "window" in capsys.readouterr().out  # the printed report
    again = transformers.AutoModelForCausalLM.from_pretrained("fast")
    tokens = torch.arange(40)[None] % 64
    plan = scope["plan"]
    fresh = transformers.AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B", quantization_config=plan)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, fresh(tokens).logits)
        assert scope["o"].shape == (1, 8, 4096, 64)
        assert scope["encoder"](torch.ones(1, 600, dtype=torch.int64)).last_hidden_state.shape == (1, 600, 32)


PAGES = [path for path in sorted((ROOT / "docs").glob("*.md")) if "```python" in path.read_text(encoding="utf-8")]


@pytest.mark.usefixtures("tiny_hub")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_pages_run(path):
    scope: dict[str, object] = {}
    for line, code in blocks(path):
        exec(compile("\n" * line + code, str(path), "exec"), scope)


PAGES = [README, CONTRIBUTING, ROOT / "docs/results/README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(path):
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)", path.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        there = path.parent / name if name else path
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link


def test_every_result_is_in_the_index():
    page = (ROOT / "docs/results/README.md").read_text(encoding="utf-8")
    for path in (ROOT / "docs/results").rglob("table.md"):
        assert f"({path.relative_to(ROOT / 'docs/results').as_posix()})" in page, path


def test_errors_are_quoted_as_they_are():
    page = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    code = "".join(
        re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8")) for path in (ROOT / "hf_tfast").rglob("*.py")
    )
    code = re.sub(r"\{[^{}]*\}", "{}", code)
    quoted = [words for row in re.findall(r"^\| (`.*?) \|", page, re.M) for words in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 10
    for words in quoted:
        said = words.replace("'tfast'", "'{}'").replace("nystrom", "{}")
        assert words in code or said in code, words


def test_the_command_line_page_names_every_verb():
    page = (ROOT / "docs/command_line.md").read_text(encoding="utf-8")
    files = {path.stem for path in (ROOT / "hf_tfast/cli").glob("*.py") if not path.name.startswith("_")}
    assert set(re.findall(r"^\| `tfast (\w+)`", page, re.M)) == files
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "hf_tfast").rglob("*.py"))
    for variable in re.findall(r"`(HF_TFAST_\w+)=", page):
        assert f'"{variable}"' in source, variable
    assert set(re.findall(r'"(HF_TFAST_\w+)"', source)) == set(re.findall(r"`(HF_TFAST_\w+)=", page))


def test_every_page_is_in_the_index():
    page = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    for path in (ROOT / "docs").glob("*.md"):
        assert path.name == "README.md" or f"({path.name})" in page, path.name


def test_completion_is_what_the_page_says():
    from typer.testing import CliRunner

    from hf_tfast.cli import app

    shown = CliRunner().invoke(app, ["--help"]).output
    assert "--install-completion" in shown
    assert "--show-completion" in shown


def test_readme_runs_early():
    line, code = blocks(README)[0]
    assert line <= 20 - code.count("\n") + 1, "the first running Python has to stand by line 20"
    assert sum(bool(statement.strip()) for statement in code.splitlines()) <= 6


def test_readme_table_is_current():
    text = README.read_text(encoding="utf-8")
    assert renew(text) == text, "run `tfast list --update README.md`, or `make style`"


def test_table_names_every_mechanism():
    rows = markdown_table().splitlines()[2:]
    assert len(rows) == len(mechanisms())
    for row, cls in zip(rows, mechanisms().values(), strict=True):
        assert row.startswith(f"| `{cls.__name__}(")
        assert len(re.split(r"(?<!\\)\|", row)) == 7, row


@pytest.mark.parametrize("cls", mechanisms().values(), ids=mechanisms().keys())
def test_docstring_has_its_sections(cls):
    entry = describe(cls)
    assert all(entry[key] for key in ("does", "cost", "exact", "source", "formula", "padding", "differs"))
    assert entry["class"] == sections(sys.modules[cls.__module__].__doc__)["name"]
    word = entry["causal_text"].split()[0].strip(",.;:").lower()
    assert word == ("yes" if cls.causal else "no"), "Causal has to begin with what the class says, yes or no"


@pytest.mark.parametrize(
    ("doc", "words"),
    [
        ("Window", "first line"),
        (
            "Window: reads.\n\n    o = v\n\nShapes  q\nCost  O(i)",
            "Window has no Exact, Source, Padding, Causal, Differs",
        ),
    ],
)
def test_a_bad_docstring_is_named(doc, words):
    with pytest.raises(ValueError, match=words):
        sections(doc)


def test_renew_needs_its_markers():
    with pytest.raises(ValueError, match="expected one line"):
        renew(f"{BEGIN}\nno end")


def test_the_skeleton_for_contributors_keeps_the_contract(tmp_path, monkeypatch):
    """The mechanism of CONTRIBUTING.md, saved under its name and asked what the contract tests ask."""
    ((_, code),) = blocks(CONTRIBUTING)
    path = tmp_path / "dilated.py"
    path.write_text(code, encoding="utf-8")
    name = "hf_tfast.attention.dilated"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    mechanism = module.Dilated(**module.Dilated.small)
    contract_calls.check_docstring(module.Dilated)
    for case in contract.grid():
        contract.check_fast_is_reference(mechanism, case)
    for path_of in ("torch", "reference"):
        for causal in (False, True):
            contract.check_full_budget(mechanism, causal, 40, path_of)
            contract_calls.check_padding(mechanism, causal, path_of)
        contract.check_decoding(mechanism, contract.Mask(causal=True), path_of)
        contract.check_future(mechanism, contract.Shape(j=70), (1, 33, 64), path_of)
    assert "dilated" not in [entry["mechanism"] for entry in catalogue()]  # it lives in this test alone


def test_no_path_of_one_machine():
    """No tracked file names a folder that exists on one machine only."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    if not any(files):
        pytest.skip("not a git checkout")
    homes = re.compile(r"/(?:home|Users)/\w+/|/root/|/work/|[^\w]/tmp/\w")
    found = []
    for file in filter(None, files):
        path = ROOT / file
        if path.suffix in {".png", ".safetensors"} or not path.is_file() or path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if homes.search(line):
                found.append(f"{file}:{number}: {line.strip()[:80]}")
    assert found == []
