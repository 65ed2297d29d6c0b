"""evaluate_model, convert and push as a user starts them."""

import json

import pytest
from transformers import AutoModel

from tests.training.tasks.tiny_tasks import SMALL, pairs_file, tiny_bert
from tests.training.tiny import load

SCORE = ["--use_cpu", "true", "--disable_tqdm", "true", "--report_to", "none"]


def test_trained_evaluated_and_made_ready(tmp_path):
    """The figures of the saved model are those that the training wrote; its folder has a card with them."""
    data = pairs_file(tmp_path)
    columns = ["--columns", "source=0", "target=1", "--source_length", "24", "--target_length", "12"]
    given = ["--task", "translation", "--train_file", data, "--test_file", data, "--validation_share", "0.2", *columns,
             "--attention", "window", "--output_dir", tmp_path / "out"]  # fmt: skip
    (record,) = load("finetune_seq2seq").main([*map(str, given), *SMALL])
    model = tmp_path / "out" / "window" / "model"
    said, figures = tmp_path / "said.jsonl", tmp_path / "figures.json"
    scored = load("evaluate_model").main(
        [*map(str, ["--task", "translation", "--model", model, "--test_file", data, "--predictions", said,
                    "--metrics", figures, *columns, "--output_dir", tmp_path / "none"]), *SCORE]
    )  # fmt: skip
    for name in ("test_loss", "test_bleu", "test_chrf"):
        assert scored["test"][name] == pytest.approx(record["test"][name], abs=1e-6)
    assert json.loads(figures.read_text())["examples"] == 20
    predictions = tmp_path / "out" / "window" / "predictions.jsonl"
    assert said.read_text() == predictions.read_text()

    with pytest.raises(ValueError, match="either --name .* or --folder"):
        load("push").main(["--model", str(model), "--license", "mit"])
    made = load("push").main(["--model", str(model), "--license", "mit", "--folder", str(tmp_path / "ready"),
                              "--results", str(tmp_path / "out" / "results.json")])  # fmt: skip
    card = (tmp_path / "ready" / "README.md").read_text()
    assert made == str(tmp_path / "ready")
    assert "| **window(window=" in card
    assert "bleu" in card


def test_converted(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the red dog sees the big house. " * 40)
    load("convert").main(["--model", str(tiny_bert(tmp_path / "bert")), "--attention", "window:window=4",
                          "--calibration", str(text), "--length", "16", "--rounds", "0",
                          "--out", str(tmp_path / "fast")])  # fmt: skip
    assert AutoModel.from_pretrained(tmp_path / "fast").config.quantization_config.attention is not None
    assert (tmp_path / "fast" / "conversion" / "report.json").is_file()


@pytest.mark.parametrize(
    ("given", "words"),
    [(["--task", "poems", "--model", "x"], "unknown task 'poems'"), (["--task", "qa"], "name a trained model")],
)
def test_what_cannot_be_evaluated(given, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        load("evaluate_model").main([*given, "--output_dir", str(tmp_path), *SCORE])
