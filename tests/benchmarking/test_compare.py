"""What got slower beyond noise, on records that are made up and on a real run."""

import json

import pytest

from hf_tfast.benchmarking.compare import compared, lines, read_records

ROW = {
    "kind": "timing", "label": "SDPA", "mechanism": None, "length": 64, "dtype": "fp32", "passes": "forward",
    "causal": True, "heads": 2, "kv_heads": 2, "width": 8, "batch": 1, "level": "kernel", "left_padding": 0,
    "device": "cpu", "content": "normal", "repeats": 1,
}  # fmt: skip


def row(label, *samples, **given):
    ordered = sorted(samples)
    return {**ROW, "label": label, "seconds": ordered[len(ordered) // 2], "samples": list(samples),
            "quartiles": [ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]], **given}  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ((1.0, 1.01, 1.02, 1.0), (1.2, 1.21, 1.22, 1.2), "slower"),
        ((1.2, 1.21, 1.22, 1.2), (1.0, 1.01, 1.02, 1.0), "faster"),
        ((1.0, 1.01, 1.02, 1.0), (1.03, 1.04, 1.04, 1.03), "noise"),  # apart, but less than LEAST
        ((1.0, 1.5, 0.7, 1.3), (1.4, 1.1, 1.6, 1.2), "noise"),  # larger, but they overlap
        ((1.0,), (1.2,), "noise"),  # one call each
        ((1.0,), (1.5,), "slower"),
    ],
)
def test_verdicts(old, new, verdict):
    (found,) = compared([row("SDPA", *old)], [row("SDPA", *new)])
    assert found["verdict"] == verdict


def test_only_equal_cases_are_compared():
    old = [row("SDPA", 1.0, length=64), row("Window", 1.0), row("gone", 1.0)]
    new = [row("SDPA", 9.0, length=128), row("Window", 9.0), {**row("gone", 1.0), "skipped": "why"}]
    del new[2]["seconds"]
    (found,) = compared(old, new)
    assert found["label"] == "Window"
    with pytest.raises(ValueError, match="no case in common"):
        compared(old[:1], new[:1])


def test_the_slowest_come_first_and_machines_are_named():
    old = [{"kind": "environment", "cpu": "a", "threads": 2}, row("x", 1.0), row("y", 1.0), row("z", 1.0)]
    new = [{"kind": "environment", "cpu": "b", "threads": 2}, row("x", 2.0), row("y", 3.0), row("z", 1.0)]
    found = compared(old, new)
    assert [r["label"] for r in found] == ["y", "x", "z"]
    text = lines(found, old, new)
    assert text.index("| y |") < text.index("| x |")
    assert "| z |" not in text
    assert "1 did not change" in text
    assert "cpu a and b" in text
    assert "threads" not in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ('{"a": 1}', "another version"),
        ('{"kind": "environment"}', "no timings"),
        ('{"kind": "timing", "label": "SDPA"}', "have no dtype, length, passes"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, text, words):
    (tmp_path / "results.jsonl").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_records(tmp_path)
    with pytest.raises(ValueError, match=r"no results\.jsonl"):
        read_records(tmp_path / "elsewhere")


def test_a_folder_or_its_file(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(row("SDPA", 1.0)) + "\n")
    assert read_records(path) == read_records(tmp_path) == [row("SDPA", 1.0)]
