"""The suite `h200`: its goals, its whole machinery at short lengths, and what it says without a device."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_tfast.attention import choose_backend
from hf_tfast.attention.window import Window
from hf_tfast.benchmarking import h200, h200_pages, h200_rivals, speed
from hf_tfast.benchmarking.h200 import Goal, Race, Run, conduct, races, verdicts
from hf_tfast.benchmarking.ledger import read
from hf_tfast.benchmarking.memory import Peak
from hf_tfast.benchmarking.pages import renewed
from hf_tfast.benchmarking.workload import SDPA, CannotRun, Case, Competitor, make_inputs
from hf_tfast.cli import main

DOCS = Path(__file__).parents[2] / "docs"
QUICK = Run(device="cpu", quick=True, rounds=1, plots=False)


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    monkeypatch.setattr(speed, "SAMPLE", 1e-4)
    monkeypatch.setattr(speed, "peak_memory", lambda call, device: (call(), Peak(0, "kernel"))[1])  # collects garbage


@pytest.fixture
def as_if_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def silent(text):
    pass


def of(records, kind):
    return [r for r in records if r["kind"] == kind]


def test_goals_are_those_of_an_h200(as_if_cuda):
    found = races(Run())
    assert {(r.case.heads, r.case.width, r.case.dtype, r.case.device) for r in found} == {(16, 128, "bf16", "cuda")}
    assert len({r.name for r in found}) == len(found)
    goals = {(g.mine, g.over, r.case.length, r.case.passes, r.case.level): g.least for r in found for g in r.goals}
    assert goals["Window", "FlexAttention, sliding window", 32768, "both", "kernel"] == 1.0
    assert goals["Window", "SDPA flash", 32768, "both", "kernel"] == 10.0
    assert goals["TopK", "SDPA flash", 32768, "forward", "kernel"] == 5.0
    assert goals["TopK", "SDPA flash", 4096, "forward", "kernel"] == 1.0
    assert {k[2] for k in goals if k[0] == "TopK" and k[4] == "module"} == {8192, 16384, 32768}
    assert goals["Nystrom", "SDPA flash", 16384, "both", "kernel"] == 5.0
    assert goals["Performer", "SDPA flash", 16384, "both", "kernel"] == 5.0
    assert goals["Quantized with queries", "SDPA flash", 16384, "forward", "kernel"] == 1.0
    for race in found:
        lines = {who.series or who.label for who in race.who}
        assert {name for goal in race.goals for name in (goal.mine, goal.over)} <= lines


def test_a_quick_run_is_whole(tmp_path):
    """Every race on a CPU: what needs a device is skipped with its reason, the rest has figures."""
    run = replace(QUICK, out=tmp_path / "r", plots=True)
    folder, records = conduct(run, silent)
    timings = of(records, "timing")
    assert {r["race"] for r in timings} == {race.name for race in races(run)}
    skipped = {r["series"]: r["skipped"] for r in timings if "skipped" in r}
    assert all("CUDA" in text or "flash-attn" in text for text in skipped.values()), skipped
    assert {r.get("series") or r["label"] for r in timings if "skipped" not in r} >= {
        "SDPA", "SDPA flash", "Window", "TopK", "Nystrom", "Performer", "Quantized", "Quantized with queries"
    }  # fmt: skip
    for r in of(records, "goal"):
        assert (r["reached"] is None) == (r["over"].startswith("Flex")), r
    errors = of(records, "codes")
    assert {r["series"] for r in errors} == {"Quantized", "Quantized with queries"}
    assert all(0 < r["error"] < 0.03 for r in errors)
    page = (folder / "table.md").read_text()
    assert page.startswith(h200_pages.QUICK)
    assert all(f"### {race.name}\n" in page for race in races(run))
    assert (folder / "h200.png").stat().st_size > 5000
    before = (folder / "results.jsonl").read_text()
    assert conduct(replace(run, resume=True), silent)[1] == json.loads(json.dumps(records))
    assert (folder / "results.jsonl").read_text() == before


def test_factors_and_verdicts():
    who = (SDPA, Competitor("fast", series="fast"), Competitor("slow", series="slow"))
    race = Race(Case(length=8), who, (Goal("fast", "slow", 4.0), Goal("slow", "fast", 1.0), Goal("fast", "gone", 1.0)))
    timings = [{"label": "SDPA", "seconds": 1.0}, {"label": "f", "series": "fast", "seconds": 0.5},
               {"label": "s", "series": "slow", "seconds": 2.0}]  # fmt: skip
    found = verdicts(race, timings)
    assert [(r["reached"], r["met"]) for r in found] == [(4.0, True), (0.25, False), (None, False)]
    assert "not run" in found[2]["note"]
    text = h200_pages.markdown([{"kind": "suite"}, *found])
    assert "| 4.00x | met |" in text
    assert "| 0.25x | missed |" in text
    timings[2] = {"label": "s", "series": "slow", "skipped": "no such kernel"}
    assert "no such kernel" in verdicts(race, timings)[0]["note"]


def test_a_failing_kernel_is_a_reason_and_memory_is_not():
    case = Case(length=4, passes="both")

    def build(error):
        def run():
            raise error

        return lambda case, inputs: (run, ())

    with pytest.raises(CannotRun, match="RuntimeError: no kernel"):
        h200_rivals.tried(case, make_inputs(case), build=build(RuntimeError("no kernel\nat all")))
    with pytest.raises(torch.OutOfMemoryError):
        h200_rivals.tried(case, make_inputs(case), build=build(torch.OutOfMemoryError("out of memory")))


def test_flash_computes_attention():
    case = Case(length=20, heads=2, kv_heads=1, width=8, passes="both")
    inputs = make_inputs(case)
    call, reached = h200_rivals.flash(case, inputs)
    expected = h200_rivals.mechanism(case, inputs, of=Window(window=64), backend="reference")[0]()
    assert reached == inputs.tensors
    assert torch.allclose(call(), expected, atol=1e-5)


def test_without_a_device(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = str(tmp_path / "out")
    for given, text in (
        ((), "add --device cuda"),
        (("--device", "cuda"), "torch sees no CUDA device"),
        (("--device", "cuda", "--quick"), "torch sees no CUDA device"),
        (("--device", "cuda", "--lengths", "8"), "leave out --lengths"),
    ):
        monkeypatch.setattr(sys, "argv", ["tfast", "bench", "--suite", "h200", "--out", out, *given])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        assert text in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()
    assert choose_backend(Window(), "auto") == "torch"


def test_the_page_says_what_was_measured():
    """Nothing, until there is a folder of results; then what its records say."""
    page, folder = (DOCS / "gpu.md").read_text(encoding="utf-8"), DOCS / "results" / h200.NAME
    text = h200_pages.markdown(read(folder / "results.jsonl")) if folder.exists() else "Not yet measured.\n"
    assert renewed(page, h200.NAME, text) == page
