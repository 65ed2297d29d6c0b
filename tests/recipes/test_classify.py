"""Classes of texts and tokens as a user starts them."""

import pytest
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from tests.training.tasks.tiny_tasks import SMALL, classes_file, tags_file, tiny_bert, write_jsonl
from tests.training.tiny import load

SIZES = ("--hidden_size", "--layers", "--heads", "--intermediate_size", "--vocab_size")
PRETRAINED = [word for pair in zip(SMALL[::2], SMALL[1::2], strict=True) for word in pair if pair[0] not in SIZES]


def run(folder, *given, small=SMALL):
    return load("classify").main([*small, *map(str, given), "--output_dir", str(folder / "out")])


def test_a_pretrained_encoder_made_longer_and_fast(tmp_path):
    """Both models begin with the same weights; the one with a plan reloads with it."""
    model = tiny_bert(tmp_path / "bert")
    window = '{"mechanism": "window", "window": 2}'
    records = run(tmp_path, "--model", model, "--positions", "64", "--train_file", classes_file(tmp_path),
                  "--validation_share", "0.3", "--compare", "dense", window, small=PRETRAINED)  # fmt: skip
    assert [record["attention"]["mechanism"] for record in records] == ["dense", "window"]
    assert all(0 <= record["test"]["test_accuracy"] <= 1 for record in records)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "window" / "model")
    assert again.config.id2label == {0: "no", 1: "yes"}
    assert again.config.max_position_embeddings == 64
    assert again.config.quantization_config.mechanism(0, (None,)).window == 2


def test_optimisers_on_the_same_run(tmp_path):
    pytest.importorskip("bitsandbytes")
    pairs = ["adamw=1e-3", "sgd=0.1", "adagrad=0.01", "adadelta=1.0", "adamw_8bit=1e-3"]
    records = run(tmp_path, "--train_file", classes_file(tmp_path), "--validation_share", "0.3", "--compare_optim",
                  *pairs, "--max_steps", "4", "--warmup_steps", "0")  # fmt: skip
    assert [r["optim"] for r in records] == ["adamw_torch", "sgd", "adagrad", "adadelta", "adamw_bnb_8bit"]
    losses = [[h["loss"] for h in r["history"] if "loss" in h] for r in records]
    assert len({first for first, *_ in losses}) == 1
    lasts = [last for *_, last in losses]
    assert len(set(lasts[:4])) == 4  # each went its own way
    assert lasts[4] == pytest.approx(lasts[0], abs=1e-4)  # tensors this small are kept in 32 bits
    assert [r["training"]["learning_rate"] for r in records] == [1e-3, 0.1, 0.01, 1.0, 1e-3]


def test_tokens(tmp_path):
    (record,) = run(tmp_path, "--kind", "token", "--train_file", tags_file(tmp_path), "--validation_share", "0.2",
                    "--attention", "window", "--token_dropping", "0.2")  # fmt: skip
    assert {"test_f1", "test_precision", "test_recall", "test_accuracy"} <= set(record["test"])
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "out" / "window" / "model")
    assert set(model.config.id2label.values()) == {"O", "B-ANIMAL", "I-ANIMAL"}


def test_tokens_labelled_by_patterns(tmp_path):
    rows = [{"turns": [f"come at {n}:30 pm", f"it costs ${n}0"]} for n in range(1, 9)]
    patterns = '{"TIME": "\\\\d+:\\\\d\\\\d ?[ap]m", "MONEY": "\\\\$\\\\d+"}'
    (record,) = run(tmp_path, "--kind", "token", "--train_file", write_jsonl(tmp_path / "t.jsonl", rows), "--columns",
                    "text=turns", "--label_patterns", patterns, "--validation_share", "0.25")  # fmt: skip
    assert record["examples"] == {"train": 12, "validation": 4}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "has no rows"),
        ([{"text": "a", "label": "x"}] * 8, "all the same or of one group"),
        ([{"text": f"a {n}", "label": "x"} for n in range(8)], "two classes at least; all labels are 'x'"),
        ([{"text": f"a {n}"} for n in range(8)], "no column 'label'"),
        ([{"text": f"a {n}", "label": None} for n in range(8)], "empty in all of its 8 rows"),
        ([{"text": f"a {n}", "label": n % 2 if n else None} for n in range(8)], "row 0 has no label"),
        ([{"text": n, "label": n % 2} for n in range(1, 9)], "text of sequence is not text but int"),
        ([{"text": "", "label": n % 2} for n in range(8)], "empty in all of its 8 rows"),
    ],
    ids=["none", "same", "one-class", "no-column", "no-labels", "a-label-missing", "not-text", "empty"],
)
def test_rows_that_cannot_be_used(tmp_path, rows, words):
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    validation = ["--validation_file", path] if "label is missing" in words or "row 0" in words else []
    with pytest.raises(ValueError, match=words):
        run(tmp_path, "--train_file", path, "--validation_share", "0.3", *validation)


def test_an_unknown_kind(tmp_path):
    with pytest.raises(ValueError, match="unknown kind 'span'; expected one of sequence, token"):
        run(tmp_path, "--kind", "span", "--train_file", classes_file(tmp_path))
