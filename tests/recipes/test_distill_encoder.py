"""Two steps of the healing of an encoder, as a user starts it: offline, on texts of the test's own."""

import json
import os
import shlex
import signal

import pytest
import torch
from transformers import AutoModel

from hf_tfast import Window
from hf_tfast.distillation.encoder import EncoderTrainer
from hf_tfast.quickstart.healing import trainable
from hf_tfast.quickstart.healing_report import _scores
from hf_tfast.training.faults import Terminated
from tests.quickstart.tiny_encoder import WORDS, save_tiny_corpus, save_tiny_encoder
from tests.training.tiny import load

SMALL = shlex.split(
    "--length 128 --window 16 --train_length 100 --max_steps 2 --per_device_train_batch_size 2 --use_cpu true "
    "--report_to none --disable_tqdm true --eval_steps 1 --save_steps 1 --warmup_steps 0 --timed_documents 2 "
    "--int8 false"
)
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*:UserWarning"),
]


@pytest.fixture(scope="module")
def recipe():
    return load("distill_encoder").main


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """The model, pairs, a book of sentences, and corpora that are validated and evaluated."""
    folder = tmp_path_factory.mktemp("given")
    save_tiny_encoder(folder / "model", positions=64)
    for seed, name in enumerate(("pairs", "validation", "evaluated")):
        save_tiny_corpus(folder / f"{name}.jsonl", documents=6, seed=seed)
    lines = [" ".join([*WORDS[n : n + 14], "."]) for n in range(60)]
    (folder / "book.txt").write_text("\n\n".join(f"{a} {b}" for a, b in zip(lines[::2], lines[1::2], strict=True)))
    evaluated = f"mine={folder / 'evaluated.jsonl'}"
    return folder, ["--model", str(folder / "model"), "--pairs", str(folder / "pairs.jsonl"), "--documents",
                    str(folder / "book.txt"), "--validation", str(folder / "validation.jsonl"), "--evaluate",
                    evaluated, *SMALL]  # fmt: skip


@pytest.mark.parametrize("train", ["last:1", pytest.param("lora:2", marks=pytest.mark.slow)])
def test_two_steps(recipe, given, tmp_path, train):
    folder, options = given
    out, report = tmp_path / "out", tmp_path / "report"
    options = [*options, "--output_dir", str(out), "--train", train]
    recipe([*options, "--report", str(report)])
    model = AutoModel.from_pretrained(out / "model").eval()
    before = AutoModel.from_pretrained(folder / "model")
    changed = [
        n for n, p in model.named_parameters() if "position" not in n and not torch.equal(p, before.get_parameter(n))
    ]
    assert changed
    assert all("layer.1" in name if train == "last:1" else "encoder.layer" in name for name in changed)
    assert model.config.max_position_embeddings == 128
    assert model.config.quantization_config.attention == Window(window=16, sinks=4)
    results = json.loads((report / "results.json").read_text())
    rows = results["quality"]["quality"]["mine"]["documents"]
    assert [(r["key"], r["queries_by"]) for r in rows] == [
        ("truncated", "teacher"), ("chunked", "teacher"), ("dense", "teacher"), ("untrained", "teacher"),
        ("healed", "healed"), ("healed", "teacher"),
    ]  # fmt: skip
    assert {r["key"] for r in results["speed"]["speed"]} == {*(r["key"] for r in rows), "alone"}
    assert str(tmp_path) not in (report / "results.json").read_text() + (report / "table.md").read_text()
    assert (report / "healing.png").is_file()
    done = (out / "model" / "model.safetensors").stat().st_mtime_ns
    recipe([*options, "--resume_from_checkpoint", "last", "--stages", "train"])  # done: nothing is trained again
    assert (out / "model" / "model.safetensors").stat().st_mtime_ns == done
    with pytest.raises(FileExistsError, match="resume_from_checkpoint last"):
        recipe(options)
    with pytest.raises(ValueError, match="seed was 42 and is 7"):
        recipe([*options, "--resume_from_checkpoint", "last", "--seed", "7"])


def test_sigterm_saves_and_ends_well(recipe, given, tmp_path, monkeypatch):
    """In step 2 of 3, and again in the last one; then the same command ends as a training that was not stopped."""
    options = [*given[1], "--stages", "train", "--train", "last:1", "--max_steps", "3", "--logging_steps", "1"]
    recipe([*options, "--output_dir", str(tmp_path / "whole")])
    step = EncoderTrainer.training_step

    def signalled(self, *args, **more):
        loss = step(self, *args, **more)
        if self.state.global_step >= 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    monkeypatch.setattr(EncoderTrainer, "training_step", signalled)
    options = [*options, "--resume_from_checkpoint", "last"]
    for at in (2, 3):
        with pytest.raises(Terminated, match=f"after step {at}") as ended:
            recipe([*options, "--output_dir", str(tmp_path / "out")])
        assert ended.value.code == 0
        assert not (tmp_path / "out" / "model").exists()
    monkeypatch.undo()
    recipe([*options, "--output_dir", str(tmp_path / "out")])
    found = []
    for name in ("whole", "out"):
        history = json.loads((tmp_path / name / "training.json").read_text())["history"]
        found.append([(h["step"], h["loss"], h["loss_keep"]) for h in history if "loss" in h])
    assert found[0] == found[1]
    assert len(found[0]) == 3


def test_what_is_evaluated_is_not_learned_from(recipe, given, tmp_path):
    folder, options = given
    same = ["--pairs", str(folder / "pairs.jsonl"), str(folder / "evaluated.jsonl"), str(folder / "validation.jsonl")]
    recipe([*options, *same, "--output_dir", str(tmp_path / "out"), "--stages", "train", "--train", "last:1"])
    data = json.loads((tmp_path / "out" / "training.json").read_text())["data"]
    assert [data[f"{name}.jsonl"]["documents"] for name in ("pairs", "evaluated", "validation")] == [6, 0, 0]


@pytest.mark.parametrize(
    ("more", "words"),
    [(["--train", "lora"], "lora:RANK"), (["--train", "first:1"], "lora:RANK"), (["--stages", "heal"], "stages are")],
)
def test_arguments_that_mean_nothing(recipe, given, tmp_path, more, words):
    with pytest.raises(ValueError, match=words):
        recipe([*given[1], "--output_dir", str(tmp_path / "out"), *more])


def test_more_layers_than_there_are(given):
    with pytest.raises(ValueError, match="has 2 layers"):
        trainable(AutoModel.from_pretrained(given[0] / "model"), "last:3")


def test_an_evaluation_that_a_resumption_repeats_counts_once():
    again = [{"step": 0, "eval_mrr": 0.5}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_mrr": 0.6}]
    scores = _scores({"history": [*again, {"step": 2, "eval_mrr": 0.6}, {"step": 4, "eval_mrr": 0.4}]})
    assert [(one["step"], one["eval_mrr"]) for one in scores] == [(0, 0.5), (2, 0.6), (4, 0.4)]
