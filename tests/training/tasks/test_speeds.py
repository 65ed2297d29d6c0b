"""The models of a finished training, timed in turns."""

import json

import pytest

from hf_tfast.training.tasks import speeds
from tests.training.tasks.tiny_tasks import SMALL, classes_file, pairs_file
from tests.training.tiny import load


def trained(recipe, folder, *given):
    given = [*SMALL, *map(str, given), "--validation_share", "0.3", "--compare", "dense", '{"mechanism": "window"}']
    return load(recipe).main([*given, "--output_dir", str(folder / "out"), "--report", str(folder / "report")])


def test_classes(tmp_path, capsys):
    """Tokens that are padding do not count; records and table get the figures, and keep what they had."""
    before = trained("classify", tmp_path, "--kind", "sequence", "--train_file", classes_file(tmp_path))
    given = ["--rows", "3", "--batch", "2", "--rounds", "2"]
    records = speeds.main([str(tmp_path / "out"), "--report", str(tmp_path / "report"), *given])
    table = (tmp_path / "report" / "table.md").read_text()
    assert "| tokens/s | peak MiB |" in table
    assert table.strip() in capsys.readouterr().out
    for record, old in zip(records, before, strict=True):
        speed = record["speed"]
        assert len(speed["seconds"]) == 2
        middle = sum(speed["seconds"]) / 2
        assert speed["tokens_per_second"] == pytest.approx(speed["tokens"] / middle)
        assert 3 * 3 <= speed["tokens"] <= 3 * 24
        assert {**old, "speed": speed} == record
        kept = json.loads((tmp_path / "out" / record["label"] / "metrics.json").read_text())
        assert kept == json.loads(json.dumps(record))
    assert len({record["speed"]["tokens"] for record in records}) == 1


def test_translation(tmp_path):
    trained("finetune_seq2seq", tmp_path, "--task", "translation", "--train_file", pairs_file(tmp_path),
            "--columns", "source=0", "target=1")  # fmt: skip
    found = speeds.measure(tmp_path / "out", ["dense", "window"], 4, 4, 1)
    assert found["dense"]["tokens"] == found["window"]["tokens"] > 4 * 4


def test_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="the training comes first"):
        speeds.main([str(tmp_path)])
    (tmp_path / "results.json").write_text(json.dumps({"records": [{"label": "dense", "task": "qa"}]}))
    with pytest.raises(ValueError, match="has not finished dense"):
        speeds.main([str(tmp_path)])
