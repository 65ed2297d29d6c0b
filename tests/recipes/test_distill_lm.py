"""The recipe as a user starts it: two steps of each stage on small texts, resumed, and what it leaves."""

import json
import math
import re
import shlex

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_tfast.training.tokens import learned_tokenizer
from hf_tfast.training.trainer import Diverged
from tests.training.tiny import arguments, load, write_texts

SMALL = shlex.split(
    "--length 32 --max_steps 2 --layer_steps 2 --validation_sequences 2 --far 8 --plot false --disable_tqdm true "
    "--use_cpu true --logging_steps 1 --save_steps 1 --speed_rounds 1 --report_to none"
)
WINDOW = '{"mechanism": "window", "window": 4}'


@pytest.fixture(scope="module")
def recipe():
    return load("distill_lm")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "texts")


@pytest.fixture(scope="module")
def teacher(texts, tmp_path_factory):
    from hf_tfast.training.run import pretrain

    out = tmp_path_factory.mktemp("teacher") / "out"
    pretrain(*arguments(texts, out, max_steps=8, learning_rate=1e-2))
    return out / "model"


def given(texts, teacher, out, *more):
    return ["--text", str(texts), "--teacher", str(teacher), "--output_dir", str(out), *SMALL, *more]


def test_two_stages_two_students(recipe, texts, teacher, tmp_path, capsys):
    out = tmp_path / "out"
    more = ["--students", WINDOW, '{"mechanism": "performer", "features": 8}', "--report", str(tmp_path / "report")]
    records = recipe.main(given(texts, teacher, out, *more))
    for record, name in zip(records, ("window", "performer"), strict=True):
        assert record["attention"]["mechanism"] == name
        assert [record["stages"][stage].get("steps") for stage in ("swapped", "layers", "logits")] == [None, 2, 2]
        assert record["tokens_per_second"] > 0
        student = AutoModelForCausalLM.from_pretrained(out / name / "model")
        assert student.config.attention["mechanism"] == name
        ids = AutoTokenizer.from_pretrained(out / name / "model")("window key", return_tensors="pt")
        assert torch.isfinite(student(**ids).logits).all()
    table = (tmp_path / "report" / "table.md").read_text()
    assert table in capsys.readouterr().out + "\n"
    assert [table.count(words) for words in ("swapped", "after stage 1", "after stage 2")] == [2, 2, 2]
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert (
        results["teacher"]["final"]["eval_targets"]
        == results["students"][0]["stages"]["swapped"]["final"]["eval_targets"]
    )
    again = recipe.main(given(texts, teacher, out, *more, "--resume_from_checkpoint", "last"))
    assert [r["stages"] for r in again] == [json.loads(json.dumps(r["stages"])) for r in records]
    assert "already distilled, kept" in capsys.readouterr().out
    with pytest.raises(ValueError, match="another distillation: training.layer_steps was 2 and is 3"):
        recipe.main(given(texts, teacher, out, *more, "--resume_from_checkpoint", "last", "--layer_steps", "3"))


class Killed(BaseException):
    """As Ctrl-C."""


@pytest.mark.slow
def test_killed_between_and_within_stages(recipe, texts, teacher, tmp_path, monkeypatch):
    """In stage 2, then again in stage 1 of the next student: the figures are those of an unbroken run."""
    from hf_tfast.distillation.trainer import DistillationTrainer

    more = ["--students", WINDOW, "hashed"]
    whole = recipe.main(given(texts, teacher, tmp_path / "whole", *more))
    step, count, at = DistillationTrainer.training_step, [0], [3, 5]

    def killed(self, *args, **options):
        count[0] += 1
        if count[0] in at:
            raise Killed
        return step(self, *args, **options)

    monkeypatch.setattr(DistillationTrainer, "training_step", killed)
    broken = given(texts, teacher, tmp_path / "broken", *more, "--resume_from_checkpoint", "last")
    for _ in at:
        with pytest.raises(Killed):
            recipe.main(broken)
    again = recipe.main(broken)
    for mine, other in zip(again, whole, strict=True):
        for name in ("swapped", "layers", "logits"):
            losses = [r["stages"][name]["final"] for r in (mine, other)]
            assert losses[0] == losses[1]


def test_lora_cache_int8_and_smaller_students(recipe, texts, teacher, tmp_path):
    (record,) = recipe.main(
        given(
            texts,
            teacher,
            tmp_path / "a",
            "--students",
            WINDOW,
            "--lora_rank",
            "2",
            "--cache",
            "5",
            "--layer_steps",
            "0",
        )
    )
    assert list(record["stages"]) == ["swapped", "logits"]
    assert (tmp_path / "a" / "logits" / "index.json").is_file()
    sizes = '{"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}'
    (record,) = recipe.main(
        given(texts, teacher, tmp_path / "b", "--students", WINDOW, "--smaller", sizes, "--hidden_weight", "1",
              "--teacher_int8", "true", "--patience", "1")
    )  # fmt: skip
    assert list(record["stages"]) == ["swapped", "logits"]
    assert record["parameters"] < 5000


def test_arguments_that_do_not_fit(recipe, texts, teacher, tmp_path):
    for more, words in (
        (["--teacher", ""], "name the teacher"),
        (["--students", "no_such"], "unknown attention"),
        (["--length", "64"], "beyond the teacher's 32 positions"),
        (["--layer_steps", "0", "--max_steps", "0"], "no steps"),
        (["--divergence", "total"], "forward, reverse, jsd"),
        (["--per_device_train_batch_size", "500"], "one step takes"),
    ):
        with pytest.raises(ValueError, match=words):
            recipe.main(given(texts, teacher, tmp_path / "out", *more))


def test_tokens_that_mean_something_else_to_the_teacher(recipe, texts, teacher, tmp_path):
    """Of another number, and of the same; the teacher's own under another path are fine."""
    out = tmp_path / "out"
    made = learned_tokenizer(["window key value"] * 9, 270, 32, False)
    made.save_pretrained(tmp_path / "longer")
    own = AutoTokenizer.from_pretrained(teacher)
    words = json.loads(own.backend_tokenizer.to_str())
    vocabulary = words["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    type(own)(
        tokenizer_object=Tokenizer.from_str(json.dumps(words)), bos_token=own.bos_token, eos_token=own.eos_token,
        pad_token=own.pad_token,
    ).save_pretrained(tmp_path / "other")  # fmt: skip
    for name in ("longer", "other"):
        with pytest.raises(ValueError, match="for the student and .* for the teacher .*Options|has a token"):
            recipe.main(given(texts, teacher, out, "--students", WINDOW, "--tokenizer", str(tmp_path / name)))
        assert not out.exists()
    own.save_pretrained(tmp_path / "same")
    more = ["--layer_steps", "0", "--tokenizer", str(tmp_path / "same")]
    (record,) = recipe.main(given(texts, teacher, out, "--students", WINDOW, *more))
    assert record["stages"]["logits"]["steps"] == 2


def test_a_loss_that_is_no_number(recipe, texts, teacher, tmp_path, monkeypatch):
    """In step 2 of stage 2: the checkpoint before it is kept, and the same command goes on from there."""
    from hf_tfast.distillation.trainer import DistillationTrainer

    step, out = DistillationTrainer.training_step, tmp_path / "out"

    def spoiled(self, model, *more, **options):
        if self.work.stage == "logits" and self.state.global_step == 1:
            model.get_output_embeddings().register_forward_hook(lambda module, args, z: z * math.nan)
        return step(self, model, *more, **options)

    monkeypatch.setattr(DistillationTrainer, "training_step", spoiled)
    command = given(texts, teacher, out, "--students", WINDOW, "--resume_from_checkpoint", "last")
    with pytest.raises(
        Diverged, match="at step 2: in the student the first .* lm_head .*logits.checkpoints.checkpoint-1"
    ):
        recipe.main(command)
    monkeypatch.undo()
    (record,) = recipe.main(command)
    assert record["stages"]["logits"]["resumed_at"] == 1
    assert math.isfinite(record["stages"]["logits"]["final"]["eval_loss"])


def test_the_documented_command_parses(recipe):
    text = recipe.__doc__.replace("\\\n", " ") + "\n\n"
    (command,) = re.findall(r"accelerate launch ([^`]*?)\n\n", text, re.S)
    words = shlex.split(command.replace("\n", " "))
    parser = HfArgumentParser((recipe.DataArguments, recipe.StudentArguments, recipe.DistillationArguments))
    parser.parse_args_into_dataclasses([*words[words.index("recipes/distill_lm.py") + 1 :], "--use_cpu", "true"])
