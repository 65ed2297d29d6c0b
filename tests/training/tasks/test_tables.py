"""Rows from every kind of file, their columns, and splits."""

import gzip
import json

import pytest

from hf_tfast.training.tasks.arguments import TaskDataArguments, TaskModelArguments, TaskTrainingArguments, read_choice
from hf_tfast.training.tasks.batches import GrowingBatches
from hf_tfast.training.tasks.labels import labelled
from hf_tfast.training.tasks.names import named_task
from hf_tfast.training.tasks.run import read_parts
from hf_tfast.training.tasks.tables import read_rows, renamed, split_rows

ROWS = [{"text": 'naïve, "quoted"', "label": "a"}, {"text": "two\tparts", "label": "b"}]


def written(folder, name, text):
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return str(path)


@pytest.mark.parametrize("zipped", ["", ".gz"])
def test_every_kind_of_file(tmp_path, zipped):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    assert read_rows([written(tmp_path, f"a.jsonl{zipped}", lines)], []) == ROWS
    assert read_rows([written(tmp_path, f"a.json{zipped}", json.dumps(ROWS))], []) == ROWS
    comma = 'text,label\n"naïve, ""quoted""",a\n"two\tparts",b\n'
    assert read_rows([written(tmp_path, f"a.csv{zipped}", comma)], ["text"]) == ROWS
    tabs = 'text\tlabel\n"odd\tb\n'  # a quote is a letter like any other here
    assert read_rows([written(tmp_path, f"a.tsv{zipped}", tabs)], ["text"]) == [{"text": '"odd', "label": "b"}]
    assert read_rows([written(tmp_path, f"b.tsv{zipped}", "x\ty\n")], ["0", "1"]) == [{"0": "x", "1": "y"}]
    assert read_rows([written(tmp_path, f"a.txt{zipped}", "one\n\ntwo\n")], []) == [{"text": "one"}, {"text": "two"}]
    assert len(read_rows([str(tmp_path / f"a.*{zipped}")], ["text"])) == 9


def test_squad(tmp_path):
    questions = [{"id": "q", "question": "which?", "answers": [{"text": "a", "answer_start": 0}]}]
    given = {"data": [{"title": "t", "paragraphs": [{"context": "a b", "qas": questions}]}]}
    (row,) = read_rows([written(tmp_path, "s.json", json.dumps(given))], [])
    assert row == {"title": "t", "context": "a b", **questions[0]}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.xml", "<a/>", "ends with none of .jsonl"),
        ("a.jsonl", "{", "is no JSON"),
        ("a.jsonl", "3\n", "row 0 is int, not an object"),
        ("a.csv", "a,b\n1\n", "row 0 has 1 columns where 2 are expected"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, text, words):
    with pytest.raises(ValueError, match=words):
        read_rows([written(tmp_path, name, text)], ["a"])


def test_what_is_no_text_and_no_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    for name in ("a.jsonl", "a.jsonl.gz"):
        with pytest.raises(ValueError, match="cannot be read as text"):
            read_rows([str(tmp_path / name)], [])
    with pytest.raises(ValueError, match="is no file, and as a glob"):
        read_rows([str(tmp_path / "none*.csv")], [])


def test_columns():
    assert renamed(ROWS, {"source": "text"}, ["source"], "rows")[0]["source"] == ROWS[0]["text"]
    with pytest.raises(ValueError, match="no column 'body' for source; it has text, label"):
        renamed(ROWS, {"source": "body"}, ["source"], "rows")


def test_a_split_keeps_groups_together_and_does_not_depend_on_order():
    rows = [{"text": str(n), "group": str(n // 5)} for n in range(40)]
    kept, aside = split_rows(rows, 0.25, 0, "group")
    assert {row["group"] for row in kept} & {row["group"] for row in aside} == set()
    assert len(aside) == 10
    assert {row["text"] for row in split_rows(rows[::-1], 0.25, 0, "group")[1]} == {row["text"] for row in aside}
    assert any(split_rows(rows, 0.25, seed, "group")[1] != aside for seed in (1, 2, 3))
    for share, group, words in ((0.0, None, "between 0 and 1"), (0.5, "kind", "no column 'kind'")):
        with pytest.raises(ValueError, match=words):
            split_rows(rows, share, 0, group)


def test_dialogues_unroll_to_answers(tmp_path):
    path = written(tmp_path, "d.jsonl", json.dumps({"turns": ["a", "b", "c", "d", "e"]}) + "\n")
    data = TaskDataArguments(train_file=[path], validation_file=[path], turns=2)
    assert read_parts(named_task("dialogue"), data, 0)["train"] == [
        {"source": "a", "target": "b"}, {"source": "b\nc", "target": "d"},
    ]  # fmt: skip


def test_patterns_label_words():
    import re

    patterns = {"TIME": re.compile(r"\d+:\d\d ?pm"), "NUMBER": re.compile(r"\d+")}
    row = labelled("at 5:30 pm, 4 of us", patterns)
    assert row["tokens"] == ["at", "5", ":", "30", "pm", ",", "4", "of", "us"]
    assert row["tags"] == ["O", "B-TIME", "I-TIME", "I-TIME", "I-TIME", "O", "B-NUMBER", "O", "O"]


def test_growing_batches():
    """Every process gets its part of each step, all examples come before any comes again, sizes double."""
    ranks = [list(GrowingBatches(100, 2, 8, batches=9, seed=3, rank=r, world=2)) for r in range(2)]
    assert [len(batch) for batch in ranks[0]] == [2, 2, 2, 4, 4, 4, 8, 8, 8]
    together = [n for pair in zip(*ranks, strict=True) for batch in pair for n in batch]
    assert sorted(together[:84]) == sorted(set(together[:84]))
    assert list(GrowingBatches(100, 2, 8, batches=9, seed=3, rank=0, world=2)) == ranks[0]
    epochs = GrowingBatches(96, 4, 16, epochs=3)
    assert sum(epochs.sizes) == 3 * 96
    assert [epochs.sizes.count(size) for size in (4, 8, 16)] == [24, 12, 6]
    with pytest.raises(ValueError, match="up to 16 examples at once, and there are 10"):
        GrowingBatches(10, 2, 8, batches=3, world=2)


@pytest.mark.parametrize(
    ("cls", "given", "words"),
    [
        (TaskDataArguments, {"dataset": "x", "train_file": ["y"]}, "either --dataset or --train_file"),
        (TaskDataArguments, {"source_length": 1}, "source_length must be at least 4"),
        (TaskDataArguments, {"columns": ["source"]}, "takes name=value pairs"),
        (TaskModelArguments, {"compare": ["dense"], "attention": "window"}, "leave out --attention"),
        (TaskModelArguments, {"positions": 10}, "--positions extends a pretrained model"),
        (TaskModelArguments, {"feed_forward": '{"form": "low_rank", "ratio": 2}'}, "ratio is a share"),
        (TaskModelArguments, {"compare": ['{"attention": "window", "depth": 3}']}, "got 'depth' beside them"),
        (TaskTrainingArguments, {"optim": "adamm"}, "unknown optimiser"),
        (TaskTrainingArguments, {"r_drop": -1}, "r_drop must not be negative"),
        (TaskTrainingArguments, {"token_dropping": 1.0}, "token_dropping must lie in"),
        (TaskTrainingArguments, {"grow_batch_to": 8, "eval_strategy": "epoch"}, "evaluate and save by steps"),
        (TaskTrainingArguments, {"early_stopping": 2, "load_best_model_at_end": False}, "--early_stopping needs"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(cls, given, words):
    with pytest.raises(ValueError, match=words):
        cls(**given)


def test_choices():
    assert read_choice("dense") == {}
    assert read_choice("window")["attention"]["mechanism"] == "window"
    assert read_choice('{"attention": "window"}') == read_choice("window")
    several = TaskModelArguments(compare=["window", '{"mechanism": "window", "window": 8}', "dense"])
    assert list(several.choices()) == ["window-1", "window-2", "dense"]
