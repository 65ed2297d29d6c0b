"""Tables, plots, suites and the record of the machine: nothing is rounded away, invented or left out."""

import json
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from hf_tfast import Window
from hf_tfast.benchmarking import environment as machine
from hf_tfast.benchmarking.memory import Peak
from hf_tfast.benchmarking.plot import plot
from hf_tfast.benchmarking.speed import Timing
from hf_tfast.benchmarking.suites import judge, targets, verdict_lines
from hf_tfast.benchmarking.table import groups, markdown, terminal_tables, wins_from
from hf_tfast.benchmarking.workload import Case

FORM = Window(window=256).to_dict()


def timing(length, seconds, label="Window", form=FORM, speedup=None, **fields):
    case = Case(length=length, **fields)
    if seconds is None:
        return Timing(label=label, mechanism=form, case=case, skipped="one call would take about 99 s")
    samples = (seconds * 0.9, seconds, seconds * 1.2)
    peak = Peak(3 * 2**20, "kernel")
    return Timing(label=label, mechanism=form, case=case, samples=samples, repeats=2, peak=peak, speedup=speedup)


def records(**fields):
    made = []
    for length, dense, fast in ((512, 0.001, 0.002), (1024, 0.004, 0.004), (2048, 0.016, 0.008), (4096, None, 0.016)):
        made.append(timing(length, dense, "SDPA", None, None if dense is None else 1.0, **fields).record())
        made.append(timing(length, fast, speedup=None if dense is None else dense / fast, **fields).record())
    return made


def test_groups_differ_in_more_than_length():
    both = [*records(dtype="fp32"), *records(dtype="bf16"), {"kind": "environment"}]
    found = groups(both)
    assert [title.split(",")[0] for title, _ in found] == ["fp32", "bf16"]
    assert [len(same) for _, same in found] == [8, 8]


def test_losses_and_skipped_cases_stay_in():
    text = markdown(records())
    assert "| 512 | Window | 2.00 | 1.90 - 2.20 | 0.50x | 3.0 |" in text
    assert "| 2048 | Window | 8.00 | 7.60 - 8.80 | 2.00x | 3.0 |" in text
    assert "| 4096 | SDPA | - |  |  | skipped: one call would take about 99 s |" in text
    assert "| 4096 | Window | 16.0 | 15.2 - 17.6 |  | 3.0 |" in text
    assert "Window wins from L=1024 on." in text


def test_the_terminal_shows_the_same():
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in terminal_tables(records()):
        console.print(table)
    console.file.close()
    text = console.export_text()
    assert all(
        word in text for word in ("0.50x", "2.00x", "skipped", "SDPA at L=4096: one call would take about 99 s")
    )


@pytest.mark.parametrize(
    ("speedups", "start"),
    [
        ((0.5, 1.0, 2.0), 1024),
        ((2.0, 0.9, 2.0), 2048),
        ((2.0, 2.0, 0.9), None),
        ((2.0, 3.0, 4.0), 512),
        ((2.0, None, 3.0), 512),
    ],
)
def test_wins_from_the_length_after_the_last_loss(speedups, start):
    made = [timing(512 * 2**n, 1.0, speedup=s).record() for n, s in enumerate(speedups)]
    assert wins_from(made) == {"Window": start}


@pytest.mark.parametrize("value", ["time", "memory"])
def test_plot(tmp_path, value):
    plot([*records(dtype="fp32"), *records(dtype="bf16")], tmp_path / "x.png", value, "a machine")
    data = (tmp_path / "x.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 20_000


def test_targets_are_those_of_the_engine():
    wanted = {(t.case.length, t.case.dtype, t.case.passes): t.least for t in targets()}
    assert wanted[16384, "fp32", "forward"] == 13
    assert wanted[16384, "bf16", "forward"] == 30
    assert (wanted[16384, "fp32", "both"], wanted[16384, "bf16", "both"]) == (14, 16)
    assert {least for (length, *_), least in wanted.items() if length == 1024} == {0.95}
    assert {least for (length, _, passes), least in wanted.items() if (length, passes) == (4096, "both")} == {4}
    assert wanted[16385, "bf16", "forward"] == 0.85 * 30
    hard = [t for t in targets() if t.case.length == 16385]
    assert len(hard) == 4
    assert all((t.case.heads, t.case.kv_heads, t.mechanism.sinks) == (8, 2, 4) and t.case.left_padding for t in hard)
    assert all(t.mechanism.window == 256 and t.case.causal for t in targets())


def test_judge():
    met, missed, skipped, *rest = targets()
    timings = [
        timing_of(met, met.least * 1.01),
        timing_of(missed, missed.least * 0.99),
        replace(timing_of(skipped, 1.0), samples=(), skipped="too long"),
    ]
    verdicts = judge([met, missed, skipped, rest[0]], timings)
    assert [v["met"] for v in verdicts] == [True, False, False, False]
    assert [v["note"] for v in verdicts] == [None, None, "too long", "not run"]
    lines = verdict_lines(json.loads(json.dumps(verdicts)))
    assert lines[2].endswith("| met |")
    assert lines[3].endswith("| missed |")
    assert lines[4].endswith("| too long |")


def timing_of(target, speedup):
    fields = asdict(target.case)
    return timing(fields.pop("length"), 1.0, form=target.mechanism.to_dict(), speedup=speedup, **fields)


def test_environment_is_a_record():
    record = json.loads(json.dumps(machine.environment()))
    assert record["versions"]["torch"]
    assert record["threads"] >= 1
    assert record["ram_gib"] > 0.1
    assert record["cores"] >= 1
    assert record["cpu"]
    text = machine.describe(record)
    assert record["versions"]["transformers"] in text
    assert record["cpu"] in text


def test_commit_is_that_of_this_checkout(monkeypatch):
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(machine.__file__).parent, capture_output=True, text=True
    )
    if head.returncode:
        pytest.skip("not a git checkout")
    assert head.stdout.startswith(machine.commit().rstrip("+"))
    monkeypatch.setattr(machine, "__file__", str(Path(__file__).parent / "somebody" / "else.py"))
    assert machine.commit() is None  # a package inside another repository has no commit of its own


@pytest.mark.parametrize(("share", "said"), [(0.05, False), (0.6, True)])
def test_a_busy_machine_is_said(share, said):
    assert bool(machine.busy({"cpu_in_use": share})) is said
