"""Steps measured beside their estimates: what the committed table says, and a run of the command."""

import json
import socket
from pathlib import Path

import pytest

from hf_tfast.parallel import estimate
from hf_tfast.parallel.estimate_hardware import Hardware
from hf_tfast.training import estimate_report
from hf_tfast.training.estimate_report import LAYOUTS, SHAPES, compare, loopback_bytes, table

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "docs" / "results" / "parallel_steps" / "results.json"


def test_the_page_says_what_was_measured():
    """Estimates are today's formulas on the measured figures: whoever changes a formula renews the page."""
    results = json.loads(KEPT.read_text(encoding="utf-8"))
    again = json.loads(json.dumps(compare(results)))
    assert [(row["shape"], row["layout"]) for row in again] == [(shape, name) for shape in SHAPES for name in LAYOUTS]
    for row, kept in zip(again, results["compared"], strict=True):
        for name in ("memory", "sent", "step_s"):
            told = f"{name} of {row['layout']}, {row['shape']}"
            assert row["estimated"][name] == pytest.approx(kept["estimated"][name]), told
    assert table(results) in (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


def test_estimates_meet_what_was_measured():
    results = json.loads(KEPT.read_text(encoding="utf-8"))
    for row in compare(results):
        told = f"{row['layout']}, {row['shape']}"
        assert row["estimated"]["memory"] == pytest.approx(row["memory"], rel=0.05), told
        assert row["estimated"]["sent"] == pytest.approx(row["sent"], rel=0.05), told
        assert row["resident"] > row["memory"]


@pytest.mark.parametrize("layout", ["data parallel", "FSDP2"])
def test_copies_that_are_dropped_are_seen(layout, monkeypatch):
    results = json.loads(KEPT.read_text(encoding="utf-8"))
    monkeypatch.setattr(estimate, "_copies", lambda *given: 0.0)
    row = next(row for row in compare(results) if row["layout"] == layout)
    assert row["memory"] - row["estimated"]["memory"] > 0.9 * 6e6


DROPPED = {  # one term of several that a layout sends: (layout, module, name, value)
    "scattered by an all-reduce": ("FSDP2", estimate_report, "Hardware",
                                   lambda **given: Hardware(**{**given, "reduces_whole": False})),
    "exchange": ("sequence parallel", estimate, "sent_per_layer", lambda *given: (0.0, 0.0)),
    "sum of gradients": ("sequence parallel", estimate, "_all_reduce", lambda *given: (0.0, 0.0)),
    "states are wide": ("pipeline", estimate, "WIDE", 2),
    # of sizes
    "tied embeddings": ("pipeline", None, "tied", False),
    "a sum for the gate": ("tensor parallel", None, "gated", False),
}  # fmt: skip


@pytest.mark.parametrize("term", DROPPED)
def test_a_dropped_term_is_seen(term, monkeypatch):
    """Without one of the terms that a layout sends the others do not meet what was counted."""
    layout, module, name, value = DROPPED[term]
    results = json.loads(KEPT.read_text(encoding="utf-8"))
    if module is None:
        for row in results["rows"]:
            row["sizes"][name] = value
    else:
        monkeypatch.setattr(module, name, value)
    row = next(row for row in compare(results) if row["layout"] == layout)
    assert row["estimated"]["sent"] > 0
    assert row["estimated"]["sent"] != pytest.approx(row["sent"], rel=0.05)


def test_what_does_not_count_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(estimate_report, "_COUNTERS", tmp_path / "none")
    with pytest.raises(OSError, match="by Linux alone"):
        loopback_bytes()


@pytest.mark.skipif(not Path("/proc/net/dev").is_file(), reason="the loopback is counted by Linux alone")
def test_the_loopback_is_counted():
    before = loopback_bytes()
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as one,
        server.accept()[0] as other,
    ):
        one.sendall(bytes(100_000))
        got = 0
        while got < 100_000:
            got += len(other.recv(65536))
    assert loopback_bytes() - before >= 100_000


@pytest.mark.slow
def test_the_command(tmp_path, monkeypatch):
    given = ["--out", str(tmp_path / "out"), "--steps", "2"]
    for only in (["machine", "one process"], ["data parallel", "sequence parallel"]):
        monkeypatch.setattr("sys.argv", ["estimate_report", *given, "--only", *only])
        estimate_report.main()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["layout"] for row in results["compared"]] == ["one process", "data parallel", "sequence parallel"] * 2
    rows = {(row["shape"], row["layout"]): row for row in results["rows"]}
    for row in results["compared"]:
        trained, estimated = rows[row["shape"], row["layout"]], row["estimated"]
        assert row["memory"] == pytest.approx(estimated["memory"], rel=0.1), row["layout"]
        # moments and weights, once more in every process
        assert trained["held"] == pytest.approx(12 * rows[row["shape"], "one process"]["parameters"], rel=0.02)
        if row["layout"] == "one process":
            assert row["sent"] == 0
        else:  # what else talks over the loopback meanwhile is counted, too
            assert row["sent"] == pytest.approx(estimated["sent"], rel=0.2)
    assert "data parallel" in (tmp_path / "out" / "table.md").read_text()
