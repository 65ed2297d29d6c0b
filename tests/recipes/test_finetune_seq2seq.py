"""Translation, summarisation and dialogue as a user starts them: two steps on a handful of rows."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import hf_tfast
from tests.training.tasks.tiny_tasks import SMALL, dialogues_file, pairs_file, write_jsonl
from tests.training.tiny import load

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")


def run(folder, *given):
    return load("finetune_seq2seq").main([*map(str, given), "--output_dir", str(folder / "out"), *SMALL])


def test_translation_of_several_choices_and_a_student(tmp_path):
    """Two choices on the same rows; the second command goes on where the first ended; a student learns from one."""
    window = '{"mechanism": "window", "window": 2}'
    low = '{"attention": {"encoder": {"mechanism": "nystrom", "landmarks": 2}}, "feed_forward": {"form": "low_rank", "rank": 4}}'  # noqa: E501  # fmt: skip
    given = ["--task", "translation", "--train_file", pairs_file(tmp_path), "--columns", "source=0", "target=1",
             "--validation_share", "0.2", "--compare", window, low]  # fmt: skip
    records = run(tmp_path, *given)
    assert [record["label"] for record in records] == ["window", "layers+low_rank"]
    for record in records:
        assert record["steps"] == 2
        assert 0 <= record["test"]["test_bleu"] <= 100
        assert record["test"]["test_perplexity"] > 1
    out = tmp_path / "out"
    table = (out / "table.md").read_text()
    assert "| window (window=2, sinks=0) |" in table
    assert "rank=4" in table
    said = [json.loads(line) for line in (out / "window" / "predictions.jsonl").read_text().splitlines()]
    assert len(said) == 4
    assert set(said[0]) == {"source", "target", "prediction"}
    model = AutoModelForSeq2SeqLM.from_pretrained(out / "layers+low_rank" / "model")
    assert model.config.attention == {"encoder": {"mechanism": "nystrom", "landmarks": 2, "iterations": 6}}
    assert model.config.mechanism(0, "decoder").name == "dense"

    kept = run(tmp_path, *given, "--resume_from_checkpoint", "last")
    assert kept == json.loads(json.dumps(records))

    student = [*given[:6], given[6], "--validation_share", "0.2", "--teacher", out / "window" / "model",
               "--tokenizer", out / "tokenizer", "--output_dir", tmp_path / "student"]  # fmt: skip
    (record,) = load("finetune_seq2seq").main([*map(str, student), *SMALL])
    targets = json.loads((tmp_path / "student" / "targets.json").read_text())
    assert len(targets) == 16
    assert record["examples"]["train"] == sum(bool(text.strip()) for text in targets)


def test_dialogue_with_a_decoder(tmp_path):
    (record,) = run(tmp_path, "--task", "dialogue", "--decoder_only", "true", "--train_file",
                    dialogues_file(tmp_path), "--turns", "2", "--validation_share", "0.2")  # fmt: skip
    assert record["examples"] == {"train": 13, "validation": 3}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "dense" / "model")
    assert model.config.causal
    assert isinstance(model, hf_tfast.TFastForCausalLM)


def test_summaries_with_several_references(tmp_path):
    rows = [{"text": ["a red dog.", f"it sees {n} cats."], "short": ["dog sees cats", f"{n} cats"]} for n in range(12)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    (record,) = run(tmp_path, "--task", "summarization", "--train_file", path, "--columns", "source=text",
                    "target=short", "--validation_share", "0.2")  # fmt: skip
    assert {"test_rouge1", "test_rouge2", "test_rougeL"} <= set(record["test"])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--task", "poetry"], "unknown task 'poetry'"),
        (["--task", "translation", "--decoder_only", "true"], "is for dialogue"),
        (["--task", "translation", "--columns", "from=0", "target=1"], "no column 'from'"),
        (["--task", "translation", "--columns", "source=0", "target=7"], "no column '7' for target"),
        (["--task", "translation", "--per_device_train_batch_size", "64"], "do not fill one step of 64"),
        (["--task", "translation", "--optim", "adamm"], "unknown optimiser 'adamm'; common ones are adamw"),
        (["--task", "translation", "--attention", "windoww"], "unknown attention 'windoww'"),
        (["--task", "translation", "--r_drop", "1.0"], "this model has none: --dropout"),
        (["--task", "translation", "--search_trials", "1"], "--search_trials needs --search_space"),
        (["--task", "translation", "--compare", "dense", "--compare_optim", "sgd"], "takes name=value pairs"),
        (["--task", "translation", "--grow_batch_to", "2"], "less than the first batch"),
    ],
)
def test_what_cannot_be_is_said(tmp_path, more, words):
    columns = [] if "--columns" in more else ["--columns", "source=0", "target=1"]
    given = ["--train_file", str(pairs_file(tmp_path)), "--output_dir", str(tmp_path / "out"), *columns, *SMALL, *more]
    with pytest.raises(ValueError, match=words):
        load("finetune_seq2seq").main(given)
