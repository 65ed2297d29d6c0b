"""Recipes of tasks under every layout they take: scores and losses of one process; other layouts are refused."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from hf_tfast.training.faults import Terminated
from hf_tfast.training.tasks.arguments import TaskTrainingArguments
from hf_tfast.training.tasks.trainer import TaskTrainer
from tests.parallel.ranks import run
from tests.training.tasks.tiny_tasks import SMALL, classes_file, pairs_file, tiny_bert
from tests.training.tiny import load

LAYOUTS = {"data": ([], 2), "shard": (["--shard", "2"], 2), "tensor": (["--tensor_parallel", "2"], 4)}
SAME = ["--train_sampling_strategy", "sequential", "--learning_rate", "1e-2", "--warmup_steps", "0",
        "--validation_share", "0.25", "--max_steps", "4"]  # fmt: skip
WINDOW = '{"mechanism": "window", "window": 4}'
NO_DROPOUT = '{"attention_probs_dropout_prob": 0.0}'


def train(kind, folder, name, more=(), rows=4):
    """A recipe on the folder's files -> losses of steps, scores of the best checkpoint, weights."""
    recipes = {"classes": "classify", "bert": "classify", "translation": "finetune_seq2seq"}
    files = ["--train_file", str(folder / ("pairs.tsv" if kind == "translation" else "classes.jsonl"))]
    kinds = {"translation": ["--task", "translation", "--columns", "source=0", "target=1"],
             "bert": ["--model", str(folder / "bert"), "--dropout", "0", "--config", NO_DROPOUT]}  # fmt: skip
    out = folder / f"{kind}-{name}"
    load(recipes[kind]).main(
        [*SMALL, *SAME, *files, *kinds.get(kind, []), "--attention", WINDOW, "--per_device_train_batch_size",
         str(rows), "--output_dir", str(out), *more]
    )  # fmt: skip
    return result(out)


def result(out):
    record = json.loads((out / "window" / "metrics.json").read_text())
    losses = [h["loss"] for h in record["history"] if "loss" in h]
    scores = {name: x for name, x in record["test"].items() if isinstance(x, float) and "runtime" not in name}
    lines = (out / "window" / "predictions.jsonl").read_text().splitlines()
    scores = {name: x for name, x in scores.items() if "per_second" not in name}
    return losses, scores, [json.loads(line)["prediction"] for line in lines], weights(out)


def weights(out):
    found = load_file(out / "window" / "model" / "model.safetensors")
    found.pop("lm_head.weight", None)  # tied: saved under one name or both
    return found


@pytest.fixture
def files(tmp_path):
    pairs_file(tmp_path, 23)
    classes_file(tmp_path, 23)
    tiny_bert(tmp_path / "bert")
    return tmp_path


def assert_same(found, expected, name):
    losses, scores, made, ends = found
    assert len(losses) == 4
    assert losses[:2] == pytest.approx(expected[0][:2], rel=1e-6), name
    assert losses == pytest.approx(expected[0], rel=1e-4), name
    assert scores == pytest.approx(expected[1], rel=1e-4), name
    assert made == expected[2], name
    assert ends.keys() == expected[3].keys()
    for key, w in expected[3].items():
        assert torch.allclose(ends[key], w, rtol=0, atol=1e-4), f"{key} of {name}"


def on_rank(folder, wanted):
    found = {}
    for kind, names in wanted.items():
        for name in names:
            more, rows = LAYOUTS[name]
            found[kind, name] = train(kind, folder, name, more, rows)
    found["refused"] = [
        refusal(lambda: train("bert", folder, "tensor", *LAYOUTS["tensor"])),
        refusal(lambda: train("classes", folder, "thin-two", [*LAYOUTS["tensor"][0], "--heads", "1"])),
        refusal(lambda: evaluate(folder, "thin", LAYOUTS["tensor"][0])),
    ]
    return found


def refusal(call):
    with pytest.raises(ValueError, match="layout|divide") as raised:
        call()
    return str(raised.value)


def evaluate(folder, name, more):
    """The recipe that scores a trained model of `classes`."""
    given = ["--task", "sequence", "--model", str(folder / f"classes-{name}" / "window" / "model"), "--test_file",
             str(folder / "classes.jsonl"), "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true",
             "--output_dir", str(folder / f"scored-{name}")]  # fmt: skip
    return load("evaluate_model").main([*given, *more])["test"]


@pytest.mark.slow
def test_every_layout_trains_as_one_process(files):
    """Rows do not fill the last batch of an evaluation; the best checkpoint is loaded and scored at the end."""
    wanted = {"translation": list(LAYOUTS), "classes": list(LAYOUTS), "bert": ["data", "shard"]}
    alone = {kind: train(kind, files, "one") for kind in wanted}
    train("classes", files, "thin", ["--heads", "1"])  # of one head, which cannot be shared
    for answers in run(on_rank, 2, files, wanted, group=False, timeout=600):
        for kind, names in wanted.items():
            for name in names:
                assert_same(answers[kind, name], alone[kind], f"{kind} {name}")
        foreign, *heads = answers["refused"]
        assert "is no TFast model" in foreign
        assert all("attention heads, and 1 do not divide evenly" in words for words in heads)


def stopped(folder):
    """SIGTERM to the second process in its second step, then the same command again, as one process."""
    original = TaskTrainer.training_step

    def step(self, *given, **more):
        loss = original(self, *given, **more)
        if self.state.global_step == 1 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    TaskTrainer.training_step = step
    try:
        train("classes", folder, "stopped", *LAYOUTS["shard"])
    except Terminated as ended:
        code = ended.code
    TaskTrainer.training_step = original
    more, rows = LAYOUTS["shard"]
    found = train("classes", folder, "stopped", [*more, "--resume_from_checkpoint", "last"], rows)
    return code, found, train("classes", folder, "unbroken", more, rows)


@pytest.mark.slow
def test_sigterm_and_resuming_a_cut_model(files):
    for code, found, unbroken in run(stopped, 2, files, group=False, timeout=600):
        assert code == 0
        assert_same(found, unbroken, "resumed")


@pytest.mark.parametrize(
    ("options", "world", "words"),
    [
        ({"sequence_parallel": 2}, "2", "the layout is sequence 2; .* recipes/pretrain_clm.py"),
        ({"pipeline_parallel": 2}, "2", "the layout is pipeline 2"),
        ({"shard": 2, "l1": 0.1}, "2", "--l1 needs whole models in every process"),
        ({"tensor_parallel": 2, "search_trials": 3}, "2", "--search_trials needs whole models"),
        ({"average_every": 4}, "2", "leave --average_every out"),
        ({"shard": 3}, "2", "the launcher started 2"),
    ],
)
def test_what_tasks_do_not_share(options, world, words, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ValueError, match=words):
        TaskTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)
