"""The command line: exit codes, one-line errors, JSON and nothing else on standard output."""

import json
import subprocess
import sys

import pytest

from hf_tfast import cli, quickstart
from hf_tfast.attention import mechanisms
from hf_tfast.benchmarking import speed
from hf_tfast.benchmarking.catalogue import BEGIN, END, markdown_table

BENCH = ["bench", "--lengths", "20,40", "--dtypes", "fp32", "--passes", "forward", "--heads", "2", "--width", "8"]


@pytest.fixture
def tfast(monkeypatch, capsys, tmp_path):
    """Call the command in a folder of its own; returns (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speed, "SAMPLE", 1e-4)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["tfast", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = 0 if stop.code is None else stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_help_names_the_verbs(tfast):
    code, out, _ = tfast("--help")
    assert code == 0
    assert all(verb in out for verb in ("list", "bench", "quickstart"))


def test_the_console_script_runs():
    done = subprocess.run([sys.executable, "-c", "from hf_tfast.cli import main; main()", "list", "--json"],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [entry["mechanism"] for entry in json.loads(done.stdout)] == list(mechanisms())


def test_help_loads_nothing_of_its_own():
    """What --help costs is the import of the package: the verbs load their needs when they run."""
    code = (
        "import sys, hf_tfast; before = set(sys.modules); sys.argv = ['tfast', '--help']\n"
        "from hf_tfast.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = ('matplotlib', 'scipy', 'sentence_transformers', 'hf_tfast.benchmarking', 'hf_tfast.quickstart')\n"
        "print([m for m in set(sys.modules) - before if m.startswith(heavy)], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"


def test_list(tfast):
    code, out, _ = tfast("list")
    assert code == 0
    assert "tfast_window" in out.replace("\n", "")
    assert tfast("list", "--markdown")[1] == markdown_table()
    entry = next(e for e in json.loads(tfast("list", "--json")[1]) if e["mechanism"] == "window")
    assert entry["fields"] == {"window": 512, "sinks": 0}
    assert "arxiv" in entry["source"]


def test_list_renews_a_readme(tfast, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"above\n{BEGIN}\nstale row\n{END}\nbelow\n")
    assert tfast("list", "--update", page)[0] == 0
    text = page.read_text()
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert markdown_table() in text
    assert "stale row" not in text
    page.write_text("no markers")
    code, _, err = tfast("list", "--update", page)
    assert code == 2
    assert "expected one line" in err
    assert page.read_text() == "no markers"


def test_bench(tfast, tmp_path):
    code, out, err = tfast(*BENCH, "--mechanism", "window:window=4", "--rounds", 1, "--out", "results")
    assert code == 0, err
    assert "against SDPA" in out
    assert "Written to results" in out
    assert (tmp_path / "results" / "results.jsonl").exists()
    code, _, err = tfast(*BENCH, "--out", "results")
    assert code == 2
    assert err.startswith("tfast: results exists; ")
    assert err.count("\n") == 1
    assert tfast(*BENCH, "--mechanism", "dense", "--rounds", 1, "--out", "results", "--overwrite")[0] == 0


def test_bench_prints_json_alone(tfast, tmp_path):
    code, out, err = tfast(*BENCH, "--mechanism", "dense", "--rounds", 1, "--no-plot", "--json")
    assert code == 0
    assert err == ""
    said = json.loads(out)
    assert [r["kind"] for r in said["records"]] == ["environment"] + ["timing"] * 4 + ["floor"] * 2
    assert (tmp_path / said["folder"] / "table.md").exists()
    assert said["folder"].startswith("runs/bench-")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "--mechanism", "windows"], "unknown attention mechanism 'windows'; expected one of"),
        (["bench", "--mechanism", "window", "--field", "window=0"], "window must be"),
        (["bench", "--lengths", "12,x"], "expected whole numbers separated by commas"),
        (["bench", "--dtypes", "int8"], "dtype must be one of"),
        (["bench", "--heads", "6", "--kv-heads", "4"], "6 query heads cannot share 4"),
        (["bench", "--suite", "targets", "--lengths", "512"], "leave out --lengths"),
        (["bench", "--suite", "nothing"], "unknown suite"),
        (["bench", "--seconds", "0"], "seconds above 0"),
        (["list", "--update", "missing.md"], "missing.md"),
    ],
)
def test_bad_input_is_one_line(tfast, tmp_path, arguments, words):
    code, out, err = tfast(*arguments)
    assert code == 2
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("tfast: ")
    assert words in last
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_unknown_options_are_usage(tfast):
    code, _, err = tfast("bench", "--fast")
    assert code == 2
    assert "--fast" in err


def test_the_traceback_can_be_had(tfast, monkeypatch):
    monkeypatch.setenv("HF_TFAST_DEBUG", "1")
    with pytest.raises(ValueError, match="windows"):
        tfast("bench", "--mechanism", "windows")


def test_quickstart_hands_on_its_options(tfast, monkeypatch, tmp_path):
    given = {}

    def run(out, **options):
        given.update(options, out=out)
        print("a table")
        return {"folder": tmp_path / "x"}

    monkeypatch.setattr(quickstart, "run", run)
    options = ("--length", 1024, "--seconds", 0, "--out", "there", "--dtype", "bfloat16", "--no-int8")
    code, out, _ = tfast("quickstart", *options)
    assert (code, out) == (0, "a table\n")
    assert (str(given.pop("out")), given.pop("length"), given.pop("seconds"), given.pop("dtype")) == (
        "there", 1024, 0.0, "bfloat16",
    )  # fmt: skip
    assert given == {"model": None, "corpus": None, "plan": "window", "window": None, "sinks": None,
                     "max_error": None, "int8": False}  # fmt: skip
    code, out, err = tfast("quickstart", "--json")
    assert given["int8"]
    assert json.loads(out) == {"folder": str(tmp_path / "x")}
    assert "a table" in err


def test_an_interruption_is_no_traceback(tfast, monkeypatch):
    def run(out, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "run", run)
    code, _, err = tfast("quickstart")
    assert code == 130
    assert "Traceback" not in err


def test_bench_says_what_got_slower(tfast, tmp_path):
    common = [*BENCH, "--mechanism", "window", "--rounds", "3", "--no-plot"]
    assert tfast(*common, "--out", "a")[0] == 0
    path = tmp_path / "a" / "results.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        if record["kind"] == "timing":
            record |= {name: [x / 1e3 for x in record[name]] for name in ("samples", "quartiles")}
            record["seconds"] /= 1e3
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    code, out, _ = tfast(*common, "--out", "b", "--compare", path, "--json")
    found = json.loads(out)["compared"]
    assert code == 0
    assert len(found) == 4
    assert {r["verdict"] for r in found} == {"slower"}
    assert "| slower |" in tfast(*common, "--out", "c", "--compare", "a")[1]
    code, _, err = tfast(*common, "--out", "d", "--compare", tmp_path)
    assert code == 2
    assert "no results.jsonl" in err
    assert not (tmp_path / "d").exists()
