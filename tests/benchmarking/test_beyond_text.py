"""Vision and audio, dense beside fast: what is compared, and that a run leaves what it says."""

import json

import pytest
import torch

from hf_tfast.attention.window import Window
from hf_tfast.benchmarking import beyond_text
from hf_tfast.benchmarking.beyond_text import audio, error, measure, vision

SMALL = {"vit": lambda: vision(patches=6, width=64, layers=2), "whisper": lambda: audio(50, width=64, layers=2)}


@pytest.mark.parametrize("name", SMALL)
def test_plans_read_what_the_dense_model_reads(name):
    """A window over everything is the dense model; a narrow one is another, and its error says how far off."""
    example = SMALL[name]()
    plans = {"all": Window(window=64), "narrow": Window(window=2, sinks=1)}
    rows = measure(example, plans, rounds=1)["rows"]
    assert rows["dense"]["fp32"]["error"] == 0.0
    assert rows["all"]["fp32"]["error"] < 1e-5 < rows["dense"]["bf16"]["error"] < 0.05
    assert rows["narrow"]["fp32"]["error"] > 0.01
    made = beyond_text.states(example.model, example.inputs)
    assert made.shape == (1, example.positions, 64)


def test_error_is_relative():
    x = torch.randn(3, 5, dtype=torch.float64)
    assert error(1.25 * x, x) == pytest.approx(0.25)


def test_default_shapes():
    """4,096 patches and a class token; 30 seconds in 1,500 positions."""
    example = vision(width=64, layers=1)
    assert example.positions == 4097
    assert example.model.embeddings.patch_embeddings.num_patches == 4096
    example = audio(width=64, layers=1)
    assert example.positions == 1500
    assert example.inputs["input_features"].shape == (1, 80, 3000)


def test_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(beyond_text, "MODELS", SMALL)
    beyond_text.main(["--out", str(tmp_path / "out"), "--rounds", "2"])
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    for about in found["models"].values():
        assert set(about["rows"]) == {"dense", *beyond_text.PLANS}
        assert all(len(row["bf16"]["seconds"]) == 2 for row in about["rows"].values())
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| window (window=128, sinks=1) |" in text
    assert text.strip() == capsys.readouterr().out.strip()
    with pytest.raises(SystemExit):
        beyond_text.main(["--out", str(tmp_path / "out"), "--rounds", "0"])
