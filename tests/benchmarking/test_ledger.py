"""A results file that grows: what was added is there, a cut line is dropped, and nothing foreign is continued."""

import json

import pytest

from hf_tfast.benchmarking.ledger import NAME, begin, read, resume

ABOUT = {"suite": "small", "rounds": 3}


def test_what_is_added_stays(tmp_path):
    ledger = begin(tmp_path / "out", ABOUT)
    ledger.add([{"kind": "timing", "length": 8, "samples": (1.0, 2.0)}])
    ledger.add([])
    again = resume(tmp_path / "out", ABOUT)
    assert again.records == ledger.records
    again.add([{"kind": "density"}])
    assert [r["kind"] for r in read(again.path)] == ["suite", "timing", "density"]
    assert again.of("timing") == [{"kind": "timing", "length": 8, "samples": [1.0, 2.0]}]


def test_a_cut_line_is_dropped_and_what_follows_is_whole(tmp_path):
    ledger = begin(tmp_path, ABOUT)
    ledger.add([{"kind": "timing", "length": 8}])
    with ledger.path.open("a") as file:
        file.write('{"kind": "timing", "leng')
    again = resume(tmp_path, ABOUT)
    again.add([{"kind": "timing", "length": 16}])
    assert [r["length"] for r in read(again.path) if r["kind"] == "timing"] == [8, 16]


def test_refusals(tmp_path):
    ledger = begin(tmp_path / "out", ABOUT)
    with pytest.raises(FileExistsError, match="--resume"):
        begin(tmp_path / "out", ABOUT)
    with pytest.raises(ValueError, match="made with rounds 3, now it is 5"):
        resume(tmp_path / "out", {"suite": "small", "rounds": 5})
    with pytest.raises(FileNotFoundError):
        resume(tmp_path / "nothing", ABOUT)
    ledger.path.write_text("not JSON\n" + ledger.path.read_text())
    with pytest.raises(ValueError, match="line 1, is not JSON"):
        resume(tmp_path / "out", ABOUT)
    (tmp_path / NAME).write_text(json.dumps({"kind": "suite", "format": 0}) + "\n")
    with pytest.raises(ValueError, match="no results file of a suite in format 1"):
        read(tmp_path / NAME)
    (tmp_path / NAME).write_text("")
    with pytest.raises(ValueError, match="no results file"):
        read(tmp_path / NAME)
