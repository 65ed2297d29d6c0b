"""Steps measured beside their estimates: what the committed table says, and a run of the command."""

import json
import socket
from pathlib import Path

import pytest

from hf_tfast.training import estimate_report
from hf_tfast.training.estimate_report import LAYOUTS, compare, loopback_bytes, table

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "docs" / "results" / "parallel_steps" / "results.json"


def test_the_page_says_what_was_measured():
    """Estimates are today's formulas on the measured figures: whoever changes a formula renews the page."""
    results = json.loads(KEPT.read_text(encoding="utf-8"))
    again = json.loads(json.dumps(compare(results)))
    assert [row["layout"] for row in again] == list(LAYOUTS)
    for row, kept in zip(again, results["compared"], strict=True):
        for name in ("memory", "sent", "step_s"):
            assert row["estimated"][name] == pytest.approx(kept["estimated"][name]), f"{name} of {row['layout']}"
    assert table(results) in (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


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


def test_one_process_is_needed():
    with pytest.raises(ValueError, match="measure it first"):
        compare({"rows": [], "machine": {}})


@pytest.mark.slow
def test_the_command(tmp_path, monkeypatch):
    given = ["--out", str(tmp_path / "out"), "--steps", "2"]
    for only in (["machine", "one process"], ["data parallel", "sequence parallel"]):
        monkeypatch.setattr("sys.argv", ["estimate_report", *given, "--only", *only])
        estimate_report.main()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    one, data, sequence = results["compared"]
    assert one["seconds"] == pytest.approx(one["estimated"]["compute_s"], rel=1e-6) or one["efficiency"] == 1.0
    gradients = 4 * results["rows"][0]["parameters"]
    assert data["sent"] == pytest.approx(gradients, rel=0.1)  # of two processes each sends as much as it has
    assert sequence["sent"] == pytest.approx(sequence["estimated"]["sent"], rel=0.2)
    assert one["held"] == pytest.approx(12 * results["rows"][0]["parameters"], rel=0.02)  # weights, two moments
    assert "data parallel" in (tmp_path / "out" / "table.md").read_text()
