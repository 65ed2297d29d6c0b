"""What training does beside the model: the loss of a step, regularisation, batches, resuming, search."""

import json
import math
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from hf_tfast.training.faults import Terminated
from hf_tfast.training.tasks.arguments import TaskDataArguments, TaskModelArguments, TaskTrainingArguments
from hf_tfast.training.tasks.models import find_tokenizer, make_config, make_model
from hf_tfast.training.tasks.names import named_task
from hf_tfast.training.tasks.run import finetune, read_parts
from hf_tfast.training.tasks.trainer import TaskTrainer
from hf_tfast.training.trainer import Diverged
from tests.training.tasks.tiny_tasks import classes_file, dialogues_file, pairs_file, tags_file

FILES = {
    "translation": (pairs_file, ["source=0", "target=1"]),
    "dialogue": (dialogues_file, []),
    "sequence": (classes_file, []),
    "token": (tags_file, []),
}
QUIET = {
    "use_cpu": True, "disable_tqdm": True, "report_to": "none", "max_steps": 2, "per_device_train_batch_size": 4,
    "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "warmup_steps": 0,
}  # fmt: skip


def training(folder, **options):
    return TaskTrainingArguments(**{"output_dir": str(folder / "out"), **QUIET, **options})


def parts(folder, name, **model):
    """(task, data, model arguments, rows)"""
    make, columns = FILES[name]
    task = named_task(name, name == "dialogue")
    data = TaskDataArguments(train_file=[str(make(folder))], columns=columns, source_length=24, target_length=12,
                             tokenizer="bytes", validation_share=0.2)  # fmt: skip
    sizes = TaskModelArguments(hidden_size=16, layers=1, heads=2, intermediate_size=32, **model)
    rows = read_parts(task, data, 0)
    task.learn_labels(rows["train"], data)
    return task, data, sizes, rows


def trainer(folder, name, *, model=None, **options):
    """A trainer of a model that is the same every time."""
    task, data, sizes, rows = parts(folder, name, **(model or {}))
    tokenizer = find_tokenizer(task, data, sizes, rows["train"])
    config = make_config(task, data, sizes, tokenizer, {})
    torch.manual_seed(1)
    made = make_model(task, sizes, config, {})
    examples = {part: task.examples(some, tokenizer, data, config) for part, some in rows.items()}
    return TaskTrainer(task=task, model=made, args=training(folder, **options), train=examples["train"],
                       validation=examples["validation"], tokenizer=tokenizer, new_tokens=4)  # fmt: skip


def batches(one, sizes):
    """The first examples in batches of these sizes."""
    found, start = [], 0
    for size in sizes:
        found.append(one.data_collator([one.train_dataset[n] for n in range(start, start + size)]))
        start += size
    return found


def gradient(one, given):
    """[parameters] of one step over these batches, as Trainer accumulates them."""
    one.model.zero_grad()
    one.current_gradient_accumulation_steps = len(given)
    counted = one._get_num_items_in_batch(given, torch.device("cpu"))
    total = sum(float(one.training_step(one.model, batch, counted)) for batch in given)
    return torch.cat([p.grad.flatten() for p in one.model.parameters()]), total


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.2, "l1": 0.01}], ids=["plain", "regularised"])
def test_gradients_do_not_depend_on_how_a_step_is_cut(tmp_path, name, options):
    one = trainer(tmp_path, name, **options)
    one.model.double()
    whole, loss = gradient(one, batches(one, [8]))
    for sizes in ([4, 4], [1, 2, 5]):
        cut, total = gradient(one, batches(one, sizes))
        torch.testing.assert_close(cut, whole, rtol=1e-10, atol=1e-12)
        assert total == pytest.approx(loss, abs=1e-9)
    if not options:  # and it is the mean over labels, as the model itself computes it
        (batch,) = batches(one, [8])
        assert one.model(**batch).loss.item() == pytest.approx(loss, abs=1e-5)  # in float32


def test_l1_is_what_it_says(tmp_path):
    plain, with_l1 = (trainer(tmp_path, "sequence", l1=weight) for weight in (0.0, 0.25))
    for one in (plain, with_l1):
        one.model.double()
    first, loss = gradient(plain, batches(plain, [4]))
    second, more = gradient(with_l1, batches(with_l1, [4]))
    weights = [p.detach() for p in with_l1.model.parameters()]
    sign = torch.cat([(0.25 * p.sign() if p.ndim > 1 else torch.zeros_like(p)).flatten() for p in weights])
    torch.testing.assert_close(second - first, sign, rtol=1e-9, atol=1e-12)
    assert more - loss == pytest.approx(0.25 * sum(float(p.abs().sum()) for p in weights if p.ndim > 1))


def test_r_drop_pulls_two_passes_together(tmp_path):
    """With its weight the divergence of two passes under dropout falls faster than without."""
    found = {}
    for weight in (0.0, 20.0):
        one = trainer(tmp_path, "sequence", model={"dropout": 0.3}, r_drop=weight, max_steps=12, learning_rate=1e-2)
        one.train()
        one.model.train()
        (batch,) = batches(one, [8])
        torch.manual_seed(5)
        with torch.no_grad():
            drawn = [one.model(**one._inputs(batch)).logits.log_softmax(-1) for _ in range(12)]
        found[weight] = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(drawn, drawn[1:], strict=False))
    assert found[20.0] < 0.5 * found[0.0]


def test_dropped_and_masked_tokens(tmp_path):
    one = trainer(tmp_path, "token", token_dropping=0.3, token_masking=0.3)
    rows, plain = one.train_dataset, one.examples
    first = [rows[n] for n in range(len(rows))]
    assert first == [rows[n] for n in range(len(rows))]
    rows.set_epoch(1)
    assert first != [rows[n] for n in range(len(rows))]
    begin, end, mask = one.tokenizer.bos_token_id, one.tokenizer.eos_token_id, one.tokenizer.mask_token_id
    tokens = dropped = masked = 0
    for n, changed in enumerate(first):
        assert len(changed["input_ids"]) == len(changed["labels"])
        assert changed["input_ids"][0] == begin
        assert changed["input_ids"][-1] == end
        tokens += len(plain[n]["input_ids"]) - 2
        dropped += len(plain[n]["input_ids"]) - len(changed["input_ids"])
        masked += changed["input_ids"].count(mask)
    assert dropped / tokens == pytest.approx(0.3, abs=0.12)
    assert masked / tokens == pytest.approx(0.3, abs=0.12)
    assert all(mask not in row["input_ids"] for row in one.eval_dataset.features)


def test_a_decoder_keeps_its_answers_whole(tmp_path):
    one = trainer(tmp_path, "dialogue", token_dropping=0.9)
    for n in range(len(one.train_dataset)):
        changed, plain = one.train_dataset[n], one.examples[n]
        assert [x for x in changed["labels"] if x >= 0] == [x for x in plain["labels"] if x >= 0]
        assert len(changed["input_ids"]) < len(plain["input_ids"])


def test_growing_batches_are_trained_on(tmp_path):
    one = trainer(tmp_path, "translation", grow_batch_to=8, per_device_train_batch_size=2, max_steps=9)
    sizes = []
    plain = one.training_step
    one.training_step = lambda model, given, *rest: sizes.append(len(given["input_ids"])) or plain(model, given, *rest)
    one.train()
    assert sizes == [2, 2, 2, 4, 4, 4, 8, 8, 8]
    assert one.state.global_step == 9


def test_a_batch_that_does_not_fit_is_halved(tmp_path):
    """auto_find_batch_size: the model says that memory is out above two rows."""
    one = trainer(tmp_path, "sequence", auto_find_batch_size=True, per_device_train_batch_size=8)
    forward, seen = one.model.forward, []

    def narrow(input_ids, **given):
        seen.append(len(input_ids))
        if len(input_ids) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(input_ids=input_ids, **given)

    one.model.forward = narrow
    one.train()
    assert seen[0] == 8
    assert max(seen[-2:]) <= 4
    assert one.state.global_step == 2


def test_evaluation_is_exact(tmp_path):
    """The loss is over labels, whatever the batches; texts are those of greedy decoding, row by row."""
    found = []
    for size in (1, 3):
        one = trainer(tmp_path, "translation", per_device_eval_batch_size=size, predict_with_generate=True)
        one.train()
        found.append(one.evaluate())
        total = labels = 0.0
        for feature in one.eval_dataset.features:
            batch = one.data_collator([feature])
            count = int((batch["labels"] >= 0).sum())
            with torch.no_grad():
                total, labels = total + float(one.model(**batch).loss) * count, labels + count
        assert found[-1]["eval_loss"] == pytest.approx(total / labels, abs=1e-5)
        feature = one.eval_dataset.features[0]
        one.model.config.use_cache = True
        made = one.model.generate(torch.tensor([feature["input_ids"]]), max_new_tokens=4, do_sample=False)
        assert one.made[0] == one.tokenizer.decode(made[0], skip_special_tokens=True).strip()
    for name in ("eval_loss", "eval_bleu"):
        assert found[0][name] == pytest.approx(found[1][name], abs=1e-5)


def test_it_stops_where_the_loss_is_no_number(tmp_path):
    one = trainer(tmp_path, "sequence", learning_rate=1e30, max_steps=5, max_grad_norm=0.0)
    with pytest.raises(Diverged, match=r"became (nan|inf) at step [2-5]"):
        one.train()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_the_last_good_checkpoint_is_left(tmp_path, what):
    """NaN in step 3: weights stay as they were, and the checkpoint of step 2 is the last."""
    one = trainer(tmp_path, "sequence", max_steps=5, save_strategy="steps", save_steps=1)
    step, before = one.compute_loss, {}

    def spoiled(model, inputs, *given, **more):
        loss = step(model, inputs, *given, **more)
        if one.state.global_step == 2:
            before.update({name: p.detach().clone() for name, p in model.named_parameters()})
            if what == "loss":
                return loss * math.nan
            loss.register_hook(lambda g: g * math.nan)
        return loss

    one.compute_loss = spoiled
    with pytest.raises(Diverged, match=f"the {what} became nan at step 3: .*checkpoint, .*is in {tmp_path}"):
        one.train()
    assert all(torch.equal(p, before[name]) for name, p in one.model.named_parameters())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint-1", "checkpoint-2"]
    saved = load_file(tmp_path / "out" / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(x, before[name]) for name, x in saved.items())


def test_examples_that_fill_no_step(tmp_path):
    options = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 3}
    with pytest.raises(ValueError, match="training examples, and one step takes 18"):
        trainer(tmp_path, "sequence", **options)


def test_resuming_goes_the_same_way(tmp_path):
    """A training that was stopped at its second checkpoint ends as one that was not."""
    task, data, sizes, _ = parts(tmp_path, "translation")
    options = {"max_steps": 4, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2,
               "load_best_model_at_end": True, "token_dropping": 0.2, "save_total_limit": None,
               "logging_steps": 1}  # fmt: skip
    (whole,) = finetune(task, data, sizes, training(tmp_path / "a", **options))
    (tmp_path / "b").mkdir()
    finetune(task, data, sizes, training(tmp_path / "b", **options))
    place = tmp_path / "b" / "out" / "dense"
    (place / "metrics.json").unlink()
    shutil.rmtree(place / "checkpoints" / "checkpoint-4")
    (again,) = finetune(task, data, sizes, training(tmp_path / "b", **options, resume_from_checkpoint="last"))
    assert again["test"]["test_loss"] == pytest.approx(whole["test"]["test_loss"], abs=1e-7)
    assert [h["loss"] for h in again["history"] if "loss" in h] == pytest.approx(
        [h["loss"] for h in whole["history"] if "loss" in h]
    )
    with pytest.raises(ValueError, match="training.learning_rate was .* cannot be resumed|cannot be resumed so"):
        finetune(
            task, data, sizes, training(tmp_path / "b", **options, resume_from_checkpoint="last", learning_rate=1.0)
        )
    with pytest.raises(FileExistsError, match="exists; name another folder"):
        finetune(task, data, sizes, training(tmp_path / "b", **options))


@pytest.mark.parametrize("at", [2, 4])
def test_sigterm_saves_and_ends_well(tmp_path, monkeypatch, at):
    """In the middle, and in the last step: then the rest is done without another step."""
    task, data, sizes, _ = parts(tmp_path, "sequence")
    options = {"max_steps": 4, "logging_steps": 1, "save_strategy": "steps", "save_steps": 3, "eval_steps": 2,
               "eval_strategy": "steps"}  # fmt: skip
    (tmp_path / "whole").mkdir()
    (whole,) = finetune(task, data, sizes, training(tmp_path / "whole", **options))
    step = TaskTrainer.training_step

    def signalled(self, *given, **more):
        loss = step(self, *given, **more)
        if self.state.global_step == at - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    monkeypatch.setattr(TaskTrainer, "training_step", signalled)
    with pytest.raises(Terminated, match=f"after step {at}") as ended:
        finetune(task, data, sizes, training(tmp_path, **options))
    assert ended.value.code == 0
    monkeypatch.undo()
    (again,) = finetune(task, data, sizes, training(tmp_path, **options, resume_from_checkpoint="last"))
    losses = [[(h["step"], h["loss"]) for h in record["history"] if "loss" in h] for record in (again, whole)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    assert again["test"]["test_loss"] == whole["test"]["test_loss"]


def test_early_stopping_keeps_the_best(tmp_path):
    """With a learning rate that ruins the model, the first checkpoint is kept and the training ends early."""
    task, data, sizes, _ = parts(tmp_path, "translation")
    args = training(tmp_path, max_steps=30, eval_strategy="steps", save_strategy="steps", eval_steps=1, save_steps=1,
                    load_best_model_at_end=True, early_stopping=2, learning_rate=3.0)  # fmt: skip
    (record,) = finetune(task, data, sizes, args)
    losses = {h["step"]: h["eval_loss"] for h in record["history"] if "eval_loss" in h}
    assert record["steps"] < 30
    assert record["best_step"] == min(losses, key=losses.get)
    assert record["test"]["test_loss"] == pytest.approx(min(losses.values()), abs=1e-5)


def test_search(tmp_path):
    pytest.importorskip("optuna")
    task, data, sizes, _ = parts(tmp_path, "sequence")
    space = {
        "learning_rate": [1e-4, 1e-2, "log"],
        "weight_decay": [0.0, 0.2],
        "label_smoothing_factor": ["choice", 0.1],
    }
    args = training(tmp_path, search_trials=2, search_space=json.dumps(space), eval_strategy="steps", eval_steps=1)
    (record,) = finetune(task, data, sizes, args)
    found = record["found"]
    assert set(found) == set(space)
    assert 1e-4 <= found["learning_rate"] <= 1e-2
    assert record["training"]["learning_rate"] == found["learning_rate"]
    kept = json.loads((tmp_path / "out" / "dense" / "search.json").read_text())
    assert kept["metric"] == "eval_accuracy"
