"""A whole benchmark run: what the command line says becomes cases, competitors and a new folder."""

import json
from dataclasses import replace

import pytest
import torch

from hf_tfast import Dense, Performer, TopK, Window
from hf_tfast.attention import mechanisms
from hf_tfast.benchmarking import bench as runs
from hf_tfast.benchmarking import floor, speed
from hf_tfast.benchmarking.bench import Output, bench, bench_suite, grid, parse_mechanisms
from hf_tfast.benchmarking.suites import SUITES, Target
from hf_tfast.benchmarking.workload import Case

TINY = Case(length=20, heads=2, kv_heads=1, width=8)


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    monkeypatch.setattr(speed, "SAMPLE", 1e-4)


def quiet(text):
    pass


def run(output, cases, who=None):
    return bench(cases, who or [Window(window=4)], output, rounds=2, seconds=5.0, report=quiet)


def test_a_run_writes_everything(tmp_path):
    cases = grid(TINY, [20, 40], ["fp32", "bf16"], ["both"])
    folder, records = run(Output(out=tmp_path / "out"), cases, [Window(window=4), Dense()])
    assert {path.name for path in folder.iterdir()} == {"results.jsonl", "table.md", "time.png", "memory.png"}
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert lines == json.loads(json.dumps(records))
    assert lines[0]["kind"] == "environment"
    seen = {(r["label"], r["length"], r["dtype"], r["passes"]) for r in lines[1:] if r["kind"] == "timing"}
    labels = ("SDPA", "Window(window=4)", "Dense")
    assert seen == {(name, c.length, c.dtype, c.passes) for name in labels for c in cases}
    table = (folder / "table.md").read_text()
    assert table.count("### ") == 2
    assert lines[0]["command"] in table


def test_left_padding_adds_the_sdpa_that_honours_it(tmp_path):
    _, records = run(Output(out=tmp_path / "out", plots=False), [replace(TINY, left_padding=5)])
    assert [r["label"] for r in records[1:] if r["kind"] == "timing"] == ["SDPA", "SDPA masked", "Window(window=4)"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_existing_folder_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "measure", lambda *a, **k: pytest.fail("measured in vain"))
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exists"):
        run(Output(out=tmp_path / "out"), [TINY])


def test_a_missing_plot_library_is_said_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "measure", lambda *a, **k: pytest.fail("measured in vain"))
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "hf_tfast\[plots\]"'):
        run(Output(out=tmp_path / "out"), [TINY])


def test_the_same_mechanism_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="given twice"):
        run(Output(out=tmp_path / "out"), [TINY], [Dense(), Dense()])


def test_a_suite_is_judged(tmp_path, monkeypatch):
    wanted = [Target(TINY, Window(window=4), 1e-9), Target(replace(TINY, passes="both"), Window(window=4), 1e9)]
    monkeypatch.setitem(SUITES, "small", lambda: wanted)
    folder, records = bench_suite("small", Output(out=tmp_path / "out"), rounds=1, seconds=5.0, report=quiet)
    verdicts = [r for r in records if r["kind"] == "target"]
    assert [v["met"] for v in verdicts] == [True, False]
    assert all(v["reached"] > 0 for v in verdicts)
    assert (folder / "table.md").read_text().startswith("| case | target | reached |")


def test_an_unknown_suite_is_named():
    with pytest.raises(ValueError, match="unknown suite 'fast'; there is targets"):
        bench_suite("fast", Output(), rounds=1, seconds=1.0, report=quiet)


def test_mechanisms_of_the_command_line():
    assert parse_mechanisms(["window"], ["window=256"], True) == [Window(window=256)]
    assert parse_mechanisms(["window:window=8,sinks=4", "dense"], [], True) == [Window(window=8, sinks=4), Dense()]
    assert parse_mechanisms(["window:window=8", "dense"], ["window=9", "sinks=1"], True)[0] == Window(
        window=8, sinks=1
    )


@pytest.mark.parametrize("causal", [False, True])
def test_none_said_means_all_that_can(causal):
    found = {m.name for m in parse_mechanisms([], [], causal)}
    assert {"dense", "window"} <= found <= set(mechanisms())
    assert all(mechanisms()[name].causal or not causal for name in found)


@pytest.mark.parametrize(
    ("said", "fields", "words"),
    [
        (["windows"], [], "unknown attention mechanism 'windows'"),
        (["window:size=3"], [], "Window has no field 'size'"),
        (["window"], ["size=3"], r"no chosen mechanism \(window\) has a field 'size'"),
        (["window"], ["window"], "name=value"),
        (["window"], ["window=0"], "window must be"),
        (["window"], ["window=wide"], "window must be"),
    ],
)
def test_bad_mechanisms(said, fields, words):
    with pytest.raises(ValueError, match=words):
        parse_mechanisms(said, fields, True)


def test_the_floor_counts_every_pair_once(monkeypatch):
    case = replace(TINY, length=30, passes="both")
    for causal, window, sinks in ((True, 4, 0), (True, 5, 3), (False, 4, 2)):
        mechanism = Window(window=window, sinks=sinks)
        i, j = torch.meshgrid(torch.arange(30), torch.arange(30), indexing="ij")
        near = (i - j < window) & (j <= i) if causal else (i - j).abs() <= window
        read = near | ((j < sinks) & (j <= i) if causal else (j < sinks) | (i < sinks))
        assert floor.operations(mechanism, replace(case, causal=causal)) == 2 * int(read.sum()) * 8 * 7 * case.heads
        forward = replace(case, causal=causal, passes="forward")
        assert floor.operations(mechanism, forward) == 2 * int(read.sum()) * 8 * 2 * case.heads
    assert floor.operations(TopK(k=4, block=4), case) is None  # which pairs, the content decides
    assert floor.operations(Performer(features=8), case) is None
    monkeypatch.setattr(floor, "QUERIES", 10)
    sampled = floor.operations(Dense(), replace(case, causal=False))
    assert sampled == 2 * 900 * 8 * 7 * case.heads


def test_the_floor_stands_in_the_records_the_table_and_the_plot(tmp_path, monkeypatch):
    monkeypatch.setattr(floor, "SIDE", 64)
    folder, records = run(Output(out=tmp_path / "out"), grid(TINY, [20, 40], ["fp32"], ["forward"]))
    found = [r for r in records if r["kind"] == "floor"]
    assert [r["length"] for r in found] == [20, 40]
    assert all(r["seconds"] == r["operations"] / r["peak"] and "samples" not in r for r in found)
    assert (folder / "table.md").read_text().count("times its matrix products") == 2
