"""Question answering as a user starts it."""

import pytest

from tests.recipes.test_classify import PRETRAINED
from tests.training.tasks.tiny_tasks import questions_file, tiny_bert, write_jsonl
from tests.training.tiny import load


def test_dense_and_window(tmp_path):
    records = load("qa").main(
        ["--model", str(tiny_bert(tmp_path / "bert")), "--train_file", str(questions_file(tmp_path)),
         "--group_column", "title", "--validation_share", "0.25", "--compare", "dense",
         '{"mechanism": "window", "window": 3}', "--output_dir", str(tmp_path / "out"), *PRETRAINED]
    )  # fmt: skip
    assert [record["label"] for record in records] == ["dense", "window"]
    assert records[0]["examples"]["validation"] == 6  # three of twelve articles, two questions each
    for record in records:
        assert 0 <= record["test"]["test_exact_match"] <= record["test"]["test_f1"] <= 1


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "which?", "context": "the dog", "answers": []}, "answers.*empty in all"),
        ({"question": "which?", "context": "the dog", "answers": [{"text": "cat", "answer_start": 4}]}, "stand at"),
        ({"question": "which?", "context": "the dog", "answers": "dog"}, "answers|no answer"),
        ({"question": "red " * 30, "context": "a dog", "answers": [{"text": "dog", "answer_start": 2}]}, "leaves no"),
    ],
    ids=["none", "elsewhere", "form", "long-question"],
)  # fmt: skip
def test_rows_that_cannot_be_used(tmp_path, row, words):
    path = write_jsonl(tmp_path / "rows.jsonl", [{**row, "id": n} for n in range(8)])
    with pytest.raises(ValueError, match=words):
        load("qa").main(["--model", str(tiny_bert(tmp_path / "bert")), "--train_file", str(path),
                         "--validation_share", "0.3", "--output_dir", str(tmp_path / "out"), *PRETRAINED])  # fmt: skip
