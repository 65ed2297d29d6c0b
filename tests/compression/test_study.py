"""A study: every case converted, judged, saved, loaded and timed; paused and resumed; its pages."""

import json

import pytest
import torch

from hf_tfast import Int8, LowRank, Pruned, Window
from hf_tfast.compression import study as studied
from hf_tfast.compression.study import STANDARD, Case, Paused, Request, parse, study
from hf_tfast.compression.study_pages import markdown
from tests.integration.tiny_models import tiny, tokens

CASES = ["dense", "low_rank:ratio=0.5", "pruned:ratio=0.5,method=activation,recover=true + recovery:steps=3"]
BATCHES = [{"input_ids": tokens("study", n, batch=4)} for n in range(3)]


def request(tmp_path, **changes):
    judged = []

    def judge(model):
        judged.append(model)
        return {"score": sum(p.numel() for p in model.parameters()) / 1e4}

    given = {
        "make": lambda: tiny("llama"), "judge": judge, "calibration": BATCHES[:2], "held_out": BATCHES[2],
        "about": {"model": "A tiny model."}, "cases": parse(CASES), "attention": Window(window=6), "rounds": 2,
        "out": tmp_path / "study",
    }  # fmt: skip
    return Request(**{**given, **changes}), judged


def test_what_a_row_holds(tmp_path):
    asked, judged = request(tmp_path)
    folder, results = study(asked)
    assert sorted(p.name for p in folder.iterdir()) == ["quality.png", "results.json", "table.md"]
    assert results == json.loads((folder / "results.json").read_text())
    assert [p.name for p in tmp_path.iterdir()] == ["study"]
    dense, low, pruned = results["rows"]
    assert [row["label"] for row in results["rows"]] == [
        "dense", "LowRank(ratio=0.5)", "Pruned(ratio=0.5, method='activation', recover=True) + 3 steps",
    ]  # fmt: skip
    assert dense["feed_forward_bytes"] == 2 * 3 * 32 * 48 * 4
    assert low["feed_forward_bytes"] == 2 * 3 * 9 * 80 * 4
    assert pruned["feed_forward_bytes"] == dense["feed_forward_bytes"] / 2
    for row in (low, pruned):
        assert dense["bytes"] - row["bytes"] == dense["feed_forward_bytes"] - row["feed_forward_bytes"]
        assert len(row["layer_errors"]) == 2
        assert row["error"] > 0
        assert 0 < row["feed_forward_error"] < 1
    assert dense["error"] == dense["feed_forward_error"] == 0
    assert all(0 < row["feed_forward_seconds"] < row["seconds"] < 5 for row in results["rows"])
    assert len(judged) == 3
    assert all(model.config.quantization_config.attention == Window(window=6) for model in judged)
    table = (folder / "table.md").read_text()
    assert table == markdown(results)
    assert "| `LowRank(ratio=0.5)` | 0.02 | 0.47x |" in table
    assert "| dense | 0.04 | 1.00x |" in table


def test_paused_then_resumed(tmp_path, monkeypatch):
    asked, judged = request(tmp_path, pause=True)
    with pytest.raises(Paused, match=r"--resume --out .*study"):
        study(asked)
    assert len(judged) == 3
    assert not (tmp_path / "study").exists()
    with pytest.raises(Paused, match="0 minutes are over"):
        study(request(tmp_path, resume=True, minutes=0.0)[0])
    asked, judged = request(tmp_path, resume=True)
    _, results = study(asked)
    assert not judged  # what was measured is not measured again
    assert results["rows"][1]["seconds"] > 0
    with pytest.raises(FileExistsError):
        study(request(tmp_path)[0])


def test_interrupted_then_resumed(tmp_path, monkeypatch):
    real, calls = studied.convert, []

    def stop(*given, **named):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given, **named)

    monkeypatch.setattr(studied, "convert", stop)
    with pytest.raises(KeyboardInterrupt):
        study(request(tmp_path, rounds=0)[0])
    asked, judged = request(tmp_path, rounds=0, resume=True)
    _, results = study(asked)
    assert len(judged) == 1
    assert "seconds" not in results["rows"][0]
    assert "ms" not in (tmp_path / "study" / "table.md").read_text().split("\n")[0]


def test_another_study_is_not_continued(tmp_path):
    with pytest.raises(Paused):
        study(request(tmp_path, pause=True)[0])
    with pytest.raises(ValueError, match="another model"):
        study(request(tmp_path, resume=True, about={"model": "another model"})[0])
    with pytest.raises(FileExistsError):
        study(request(tmp_path)[0])
    assert study(request(tmp_path, overwrite=True, cases=parse(CASES[:2]))[0])


def test_the_reference_runs_the_attention(tmp_path):
    """Dense has no error: the window is not what is measured."""
    asked, _ = request(tmp_path, cases=[Case((LowRank(rank=32),))], attention=Window(window=2), rounds=0, plots=False)
    dense, same = study(asked)[1]["rows"]
    assert dense["error"] == 0
    assert same["error"] < 1e-4


def test_parse():
    assert parse(["dense"]) == [Case()]
    assert parse(["pruned:ratio=0.5 + recovery:steps=20 + int8"]) == [Case((Pruned(ratio=0.5), Int8()), 20)]
    assert parse(["pruned:ratio=0.5 + recovery:steps=20 + int8"])[0].label == "Pruned(ratio=0.5) + 20 steps + Int8()"
    assert len({case.label for case in parse(STANDARD)}) == len(STANDARD)
    for wrong in ("recovery:steps=2", "low_rank:rank=2 + recovery:steps=0", "low_rank:rank=2 + recovery:rate=1"):
        with pytest.raises(ValueError, match="recover"):
            parse([wrong])
    with pytest.raises(ValueError, match="each once"):
        parse(["int8", "int8"])
    with pytest.raises(ValueError, match="unknown feed-forward form 'smaller'"):
        parse(["smaller"])


def test_a_form_that_does_not_fit_is_named(tmp_path):
    asked, _ = request(tmp_path, cases=parse(["low_rank:rank=99"]))
    with pytest.raises(ValueError, match="rank 99 is above its 32"), torch.no_grad():
        study(asked)
