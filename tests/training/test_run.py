"""A training's folder: what it holds, when it is refused, resumed, kept; and the comparison of several."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, pipeline

from hf_tfast.training.compare import compare
from hf_tfast.training.run import pretrain
from tests.training.tiny import arguments, write_texts

WINDOW = '{"mechanism": "window", "window": 8}'


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "texts")


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "out"
    records = pretrain(*arguments(texts, out, model={"attention": WINDOW}, plot=True, max_steps=4))
    return out, records


def test_what_a_training_leaves(trained):
    out, (record,) = trained
    names = {path.name for path in out.iterdir()}
    assert names == {"arguments.json", "tokenizer", "checkpoints", "model", "metrics.json", "curve.png"}
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(record))
    assert record["attention"] == {"mechanism": "window", "window": 8, "sinks": 0}
    assert {"cpu", "versions", "commit", "command"} <= set(record["environment"])
    assert record["data"]["train"]["tokens"] > record["data"]["validation"]["tokens"] > 0
    assert record["data"]["validation"]["evaluated_sequences"] == 2
    assert (out / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_the_saved_model_generates(trained):
    out, (record,) = trained
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(out / "model"),
        AutoTokenizer.from_pretrained(out / "model"),
    )
    assert model.config.use_cache, "Trainer switches the cache off while it trains"
    assert (model.config.vocab_size, model.config.eos_token_id) == (len(tokenizer), tokenizer.eos_token_id)
    tokens = tokenizer("window", return_tensors="pt")
    cached = model.generate(**tokens, max_new_tokens=12, do_sample=False)
    assert torch.equal(cached, model.generate(**tokens, max_new_tokens=12, do_sample=False, use_cache=False))
    assert record["sample"]["continuation"] is not None
    said = pipeline("text-generation", model=str(out / "model"), device="cpu")(
        "key", max_new_tokens=3, do_sample=False
    )
    assert said[0]["generated_text"].startswith("key")


def test_the_saved_masked_model_fills(texts, tmp_path):
    (record,) = pretrain(
        *arguments(texts, tmp_path / "out", data={"tokenizer": "learned", "vocab_size": 300}), two_way=True
    )
    assert len(record["sample"]["guesses"]) == 5
    assert "eval_accuracy" in record["final"]
    AutoModelForMaskedLM.from_pretrained(tmp_path / "out" / "model")
    fill = pipeline("fill-mask", model=str(tmp_path / "out" / "model"), device="cpu")
    assert len(fill("a window of <|mask|> keys")) == 5


def test_nothing_is_overwritten_unasked(trained, texts):
    out, _ = trained
    before = (out / "metrics.json").read_bytes()
    with pytest.raises(FileExistsError, match="--overwrite"):
        pretrain(*arguments(texts, out))
    assert (out / "metrics.json").read_bytes() == before


def test_only_trainings_are_replaced(texts, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for option in ({"overwrite": True}, {"resume_from_checkpoint": "last"}):
        with pytest.raises(FileExistsError, match="holds no arguments.json"):
            pretrain(*arguments(texts, tmp_path / "mine", **option))
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_overwriting_begins_anew(texts, tmp_path):
    first = pretrain(*arguments(texts, tmp_path / "out", max_steps=1))[0]
    second = pretrain(*arguments(texts, tmp_path / "out", max_steps=2, overwrite=True))[0]
    assert (first["steps"], second["steps"]) == (1, 2)
    assert sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir()) == [
        "checkpoint-1",
        "checkpoint-2",
    ]


def test_another_training_is_not_resumed(trained, texts):
    out, _ = trained
    with pytest.raises(ValueError, match=r"attention.window was 8 and is 9; .*learning_rate was 0.0025 and is 0.5"):
        pretrain(
            *arguments(texts, out, model={"attention": WINDOW.replace("8", "9")}, learning_rate=0.5,
                       max_steps=4, resume_from_checkpoint="last")
        )  # fmt: skip


def test_a_finished_training_is_kept_while_its_texts_are(trained, texts, tmp_path, capsys):
    out, (record,) = trained
    again = {"model": {"attention": WINDOW}, "max_steps": 4, "resume_from_checkpoint": "last"}
    (kept,) = pretrain(*arguments(texts, out, **again))
    assert kept == json.loads(json.dumps(record))
    assert "already trained" in capsys.readouterr().out
    extra = texts / "new.txt"
    extra.write_text("another text altogether, longer than a few words")
    try:
        with pytest.raises(ValueError, match="other texts"):
            pretrain(*arguments(texts, out, **again))
    finally:
        extra.unlink()


@pytest.mark.slow
def test_comparison(texts, tmp_path):
    choices = {"compare": ["dense", WINDOW, "window"]}
    report = tmp_path / "report"
    options = {"model": choices, "plot": True, "report": str(report)}
    records = pretrain(*arguments(texts, tmp_path / "out", **options))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "arguments.json",
        "tokenizer",
        "dense",
        "window-1",
        "window-2",
    }
    assert {p.name for p in report.iterdir()} == {"results.json", "table.md", "curves.png"}
    table = (report / "table.md").read_text()
    assert [line.split(" | ")[0] for line in table.splitlines()[2:5]] == [
        "| dense", "| window (window=8, sinks=0)", "| window (window=512, sinks=0)"
    ]  # fmt: skip
    first, *others = records
    for record in others:
        assert record["data"] == first["data"]
        assert record["parameters"] == first["parameters"]
    dense, narrow, wide = ([h["loss"] for h in record["history"] if "loss" in h] for record in records)
    assert wide == pytest.approx(dense, rel=1e-5), "a window over everything: equal weights, equal batches"
    assert narrow != pytest.approx(dense, rel=1e-5)
    with pytest.raises(FileExistsError, match="holds results"):
        pretrain(*arguments(texts, tmp_path / "another", **options))
    # a model more, the others kept
    choices["compare"].append("hashed")
    (tmp_path / "out" / "window-1" / "metrics.json").touch()
    again = pretrain(*arguments(texts, tmp_path / "out", resume_from_checkpoint="last", **options))
    assert again[:3] == json.loads(json.dumps(records))
    assert len((report / "table.md").read_text().splitlines()) == len(table.splitlines()) + 1


def test_different_data_is_not_compared(trained, tmp_path):
    _, (record,) = trained
    other = {**record, "data": {**record["data"], "digest": "another"}}
    with pytest.raises(ValueError, match="different data"):
        compare([record, other], tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": {"attention": "windows"}}, ValueError, "unknown attention 'windows'; expected one of dense"),
        ({"model": {"attention": '{"mechanism": "window", "size": 3}'}}, ValueError, "no field 'size'"),
        ({"model": {"attention": "{window"}}, ValueError, "no JSON"),
        ({"model": {"attention": "nystrom"}}, ValueError, "no causal form"),
        ({"model": {"model": "[]"}}, ValueError, "must be a JSON object"),
        ({"model": {"model": '{"max_position_embeddings": 16}'}}, ValueError, "beyond the model's 16 positions"),
        ({"model": {"heads": 3}}, ValueError, "not a multiple"),
        ({"data": {"text": ["nowhere/*.txt"]}}, ValueError, "matches no file"),
        ({"data": {"length": 1}}, ValueError, "length must be at least 2"),
        ({"data": {"far": 0}}, ValueError, "far must be at least 1"),
        ({"data": {"dataset": "wikitext"}}, ValueError, "either a data set or texts"),
        ({"data": {"validation_share": 1.5}}, ValueError, "between 0 and 1"),
        ({"data": {"length": 4096}}, ValueError, "one step takes 2: give more text"),
        ({"report": "somewhere"}, ValueError, "--report is the folder of a comparison"),
        ({"masked_share": 0.0}, ValueError, "masked_share"),
        ({"resume_from_checkpoint": "nowhere"}, ValueError, "no checkpoint"),
        ({"fp16": True}, ValueError, "fp16 on a CPU"),
    ],
)
def test_bad_input_is_told(texts, tmp_path, change, error, words):
    with pytest.raises(error, match=words):
        pretrain(*arguments(texts, tmp_path / "out", **change))


def test_held_out_texts_can_be_named(texts, tmp_path):
    held = write_texts(tmp_path / "held", count=3, seed=9)
    data = {"validation_text": [str(held), str(texts / "0.txt")]}
    (record,) = pretrain(*arguments(texts, tmp_path / "out", data=data))
    assert (record["data"]["train"]["documents"], record["data"]["validation"]["documents"]) == (7, 4)
    with pytest.raises(ValueError, match="--text holds no text that the other"):
        pretrain(*arguments(texts, tmp_path / "out2", data={"validation_text": [str(texts)]}))
