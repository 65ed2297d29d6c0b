"""DistillationTrainer: steps that do not depend on how they are cut, resumption to the bit, and what it refuses."""

import json
import math
from copy import deepcopy

import pytest
import torch
from transformers import EarlyStoppingCallback

from hf_tfast import FastPlan, Int8, apply_plan
from hf_tfast.distillation.cache import CachedTeacher, cache_logits
from hf_tfast.distillation.layerwise import LayerMatching
from hf_tfast.distillation.trainer import DistillationTrainer
from hf_tfast.distillation.whole import LogitMatching
from hf_tfast.testing import assert_near
from hf_tfast.training.packing import collate
from hf_tfast.training.trainer import Diverged
from tests.distillation.tiny_lm import Rows, arguments, llama, tfast, windowed

STAGES = {
    "layers": LayerMatching(),
    "blocks, one at a time": LayerMatching(match="block", one_at_a_time=True),
    "logits": LogitMatching(temperature=2.0, labels=0.5, hidden=0.3),
    "top": LogitMatching(divergence="jsd", top=5, chunk=7),
}
stages = pytest.mark.parametrize("objective", STAGES.values(), ids=STAGES)


def trainer(out, objective, student=None, teacher=None, rows=None, **given):
    teacher = llama() if teacher is None else teacher
    student = windowed(teacher) if student is None else student
    own = ("lora", "callbacks", "eval_dataset", "evaluation", "data_collator")
    extra = {"data_collator": collate} | {name: given.pop(name) for name in own if name in given}
    return DistillationTrainer(
        model=student, teacher=teacher, objective=objective, args=arguments(out, **given),
        train_dataset=Rows() if rows is None else rows, **extra,
    )  # fmt: skip


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(before, model):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


@stages
def test_a_step_does_not_depend_on_accumulation(objective, tmp_path):
    """Rows of very different lengths, 4 a step: together, two by two, one by one. Weights and losses agree."""
    found = {}
    for batch in (4, 2, 1):
        teacher = llama().double()
        done = trainer(
            tmp_path, objective, teacher=teacher, per_device_train_batch_size=batch, max_steps=2,
            gradient_accumulation_steps=4 // batch, optim="sgd", learning_rate=0.5,
        )  # fmt: skip
        start = weights(done.model)
        done.train()
        assert changed(start, done.model)
        found[batch] = weights(done.model), [h["loss"] for h in done.state.log_history if "loss" in h]
    for batch in (2, 1):
        for name, w in found[4][0].items():
            assert_near(found[batch][0][name], w, f"{name}, {batch} at a time", 1e-9)
        assert found[batch][1] == pytest.approx(found[4][1], rel=1e-6)


class Killed(BaseException):
    """As Ctrl-C."""


@stages
def test_resuming_repeats_an_unbroken_run(objective, tmp_path, monkeypatch):
    """Killed in step 5 of 8, which is in another epoch, resumed from step 4: losses and weights to the last bit."""
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    options |= {"lr_scheduler_type": "cosine", "warmup_steps": 2}
    dropped = llama(attention_dropout=0.2)

    def curve(done):
        keys = ("loss", "grad_norm", "learning_rate", "step")
        return [{k: v for k, v in h.items() if k.startswith(keys)} for h in done.state.log_history if "loss" in h]

    whole = trainer(tmp_path / "whole", objective, teacher=dropped, **options)
    whole.train()
    broken = trainer(tmp_path / "broken", objective, teacher=dropped, **options)
    step = DistillationTrainer.training_step

    def killed(self, *given, **more):
        if self.state.global_step == 5:
            raise Killed
        return step(self, *given, **more)

    monkeypatch.setattr(DistillationTrainer, "training_step", killed)
    with pytest.raises(Killed):
        broken.train()
    monkeypatch.undo()
    again = trainer(tmp_path / "broken", objective, teacher=dropped, **options)
    again.train(resume_from_checkpoint=True)
    assert curve(again) == curve(whole)
    assert len(curve(whole)) == 8
    assert not changed(weights(whole.model), again.model)


@pytest.mark.parametrize("make", [llama, tfast])
@pytest.mark.parametrize("match", ["attention", "block"])
def test_layers_learn(make, match, tmp_path):
    """The loss falls; of attention only what comes before the output projection changes; flags are as they were."""
    teacher = make()
    student = windowed(teacher) if make is llama else tfast(attention={"mechanism": "window", "window": 3})
    done = trainer(tmp_path, LayerMatching(match=match), student, teacher, max_steps=30, lr_scheduler_type="constant")
    start, theirs = weights(student), weights(teacher)
    done.train()
    losses = [h["loss"] for h in done.state.log_history if "loss" in h]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    names = changed(start, student)
    assert all("layers" in name for name in names)
    if match == "attention":
        assert {name.split(".")[-2] for name in names} == {"q_proj", "k_proj", "v_proj"}
    else:
        assert {name.split(".")[-2] for name in names} >= {"o_proj", "down_proj"}
    assert all(p.requires_grad for p in student.parameters())
    assert not changed(theirs, teacher)
    assert not teacher.training


def test_layers_one_at_a_time(tmp_path):
    """Each has its share of the steps, a whole schedule, and alone a gradient."""
    teacher, met, rates = llama(num_hidden_layers=3), [], []
    done = trainer(
        tmp_path, LayerMatching(layers={0: 0, 2: 1}, one_at_a_time=True), teacher=teacher, max_steps=6,
        lr_scheduler_type="linear",
    )  # fmt: skip
    step = done.training_step

    def watched(model, *given, **more):
        loss = step(model, *given, **more)
        met.append({name.split(".")[2] for name, p in model.named_parameters() if p.grad is not None})
        rates.append(done.lr_scheduler.get_last_lr()[0])
        return loss

    done.training_step = watched
    done.train()
    assert met == [{"0"}] * 3 + [{"2"}] * 3
    assert rates[:3] == rates[3:]
    assert rates[0] > rates[1] > rates[2]


def test_logits_reach_the_teacher(tmp_path):
    """A student that can be the teacher (dense, other weights) comes near it."""
    teacher, student = tfast(), tfast(seed=1)
    done = trainer(tmp_path, LogitMatching(), student, teacher, max_steps=60, lr_scheduler_type="constant")
    done.train()
    losses = [h["loss"] for h in done.state.log_history if "loss" in h]
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])


def test_a_smaller_student(tmp_path):
    """Fewer, narrower layers: projections learn beside it, resume with it, and are gone from what is saved."""
    teacher = llama(num_hidden_layers=4, hidden_size=32)
    student = tfast(hidden_size=8, num_hidden_layers=2)
    options = {"save_strategy": "steps", "save_steps": 2}
    done = trainer(tmp_path, LogitMatching(hidden=1.0), student, teacher, **options)
    before = weights(done.work.projections)
    done.train()
    assert changed(before, done.work.projections) == {"0.weight", "1.weight"}
    assert {"loss logits", "loss hidden"} <= done.state.log_history[0].keys()
    assert not any("projections" in name for name in student.state_dict())
    saved = (tmp_path / "checkpoint-4" / "model.safetensors").read_bytes()
    assert b"distillation_projections" in saved
    with pytest.raises(ValueError, match="8 wide and the teacher 32.*LogitMatching"):
        trainer(tmp_path, LayerMatching(), student, teacher)


@pytest.mark.parametrize("objective", [LayerMatching(), LogitMatching(labels=0.1)], ids=["layers", "logits"])
def test_lora(objective, tmp_path):
    """Adapters alone learn; merged they are the student, with its plan."""
    from peft import LoraConfig

    teacher = llama()
    student = windowed(teacher)
    lora = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    done = trainer(tmp_path, objective, student, teacher, lora=lora)
    start = weights(done.model)
    done.train()
    assert all("lora_" in name for name in changed(start, done.model))
    assert changed(start, done.model)
    batch = {name: x for name, x in collate([Rows()[0]]).items() if name != "labels"}
    with torch.no_grad():
        adapted = done.model.eval()(**batch).logits
        merged = done.merged().eval()
        assert_near(merged(**batch).logits, adapted, "logits")
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert isinstance(merged.config.quantization_config, FastPlan)
    with pytest.raises(ValueError, match="PEFT config"):
        trainer(tmp_path, objective, lora={"r": 2})


def test_an_int8_teacher(tmp_path):
    teacher = llama(hidden_size=32)
    student = windowed(teacher)
    apply_plan(teacher, FastPlan(feed_forward=Int8()))
    for objective in (LayerMatching(), LogitMatching()):
        done = trainer(tmp_path, objective, student, teacher)
        done.train()
        assert math.isfinite(done.state.log_history[0]["loss"])


def test_a_cached_teacher(tmp_path, monkeypatch):
    """The same training without the teacher: losses to the precision of the cache; other rows are refused."""
    teacher, rows = llama(), Rows()
    monkeypatch.setattr("hf_tfast.distillation.cache.SHARD", 20)
    monkeypatch.setattr("hf_tfast.distillation.cache.DTYPE", torch.float32)
    cached = cache_logits(teacher, rows, tmp_path / "cache", collate=collate, k=6, temperature=2.0, batch=3)
    assert len(list((tmp_path / "cache").glob("shard-*"))) > 1
    losses = []
    for their, objective in ((teacher, LogitMatching(top=6, temperature=2.0)), (cached, LogitMatching())):
        done = trainer(tmp_path / "out", objective, windowed(teacher), their, rows)
        done.train()
        losses.append([h["loss"] for h in done.state.log_history if "loss" in h])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    again = CachedTeacher(tmp_path / "cache")
    batch = collate([rows[2], rows[1]])
    for n in range(2):  # another order, and without padding
        mask = batch["attention_mask"][n].bool()
        alone = {name: x[n : n + 1, mask] for name, x in batch.items()}
        for name in ("indices", "logs", "rest"):
            together = getattr(again.logits(batch), name)[n][mask]
            assert torch.equal(getattr(again.logits(alone), name)[0], together)
    with pytest.raises(ValueError, match="row 0 of the batch is not among the 8 rows"):
        again.logits(collate([Rows(seed=1)[0]]))
    with pytest.raises(ValueError, match="teacher itself"):
        trainer(tmp_path, LayerMatching(), windowed(teacher), cached)
    for objective, words in (
        (LogitMatching(hidden=1.0), "hidden states need the teacher"),
        (LogitMatching(top=7), "top=7, but the cache was made with 6"),
        (LogitMatching(temperature=3.0), "made with 2.0"),
    ):
        with pytest.raises(ValueError, match=words):
            trainer(tmp_path, objective, windowed(teacher), cached)
    with pytest.raises(ValueError, match="no cache"):
        CachedTeacher(tmp_path)


def test_evaluation_and_early_stopping(tmp_path):
    """eval_loss is the loss of distillation; patience and the best checkpoint are Trainer's."""
    done = trainer(
        tmp_path, LogitMatching(), max_steps=20, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, save_total_limit=2, load_best_model_at_end=True, metric_for_best_model="eval_loss",
        learning_rate=0.0, eval_dataset=Rows(seed=2), callbacks=[EarlyStoppingCallback(2)],
    )  # fmt: skip
    done.train()
    assert done.state.global_step == 3
    first, *rest = [h["eval_loss"] for h in done.state.log_history if "eval_loss" in h]
    assert rest == [first, first]
    assert done.state.best_global_step == 1
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["best_metric"] == first


@pytest.mark.parametrize("where", ["teacher", "student", "weights", "gradient"])
@pytest.mark.parametrize("objective", [LayerMatching(), LogitMatching()], ids=["layers", "logits"])
def test_divergence_says_where_it_began(where, objective, tmp_path):
    """In step 3: the checkpoint of step 2 is the last, and holds numbers."""
    teacher = llama()
    done = trainer(tmp_path, objective, windowed(teacher), teacher, max_steps=5, save_strategy="steps", save_steps=1)
    step = done.training_step

    def spoil(module, args, out):
        return (out[0] * math.nan, *out[1:]) if isinstance(out, tuple) else out * math.nan

    def watched(model, *given, **more):
        if done.state.global_step == 2:
            if where == "weights":
                model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = math.nan
            elif where == "gradient":
                model.model.layers[0].self_attn.k_proj.weight.register_hook(lambda g: g * math.inf)
            else:
                net = teacher if where == "teacher" else model
                net.model.layers[0].self_attn.v_proj.register_forward_hook(spoil)
        return step(model, *given, **more)

    done.training_step = watched
    words = {
        "teacher": "in the teacher the first output that is not finite is that of model.layers.0.self_attn.v_proj",
        "student": "in the student the first output that is not finite is that of model.layers.0.self_attn.v_proj",
        "weights": "in the student the weights model.layers.1.self_attn.v_proj.weight are not finite",
        "gradient": "gradients are not finite, model.layers.0.self_attn.k_proj.weight",
    }[where]
    with pytest.raises(Diverged, match=f"at step 3: .*{words}.*checkpoint-2"):
        done.train()
    from safetensors.torch import load_file

    assert not (tmp_path / "checkpoint-3").exists()
    assert all(x.isfinite().all() for x in load_file(tmp_path / "checkpoint-2" / "model.safetensors").values())


class Plain(torch.utils.data.Dataset):
    def __init__(self, *rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, n):
        return self.rows[n]


def shared(teacher):
    student = windowed(teacher)
    student.model.embed_tokens.weight = teacher.model.embed_tokens.weight
    return student


WRONG = {
    "vocabularies": (lambda t: {"student": tfast(vocab_size=41)}, "41 tokens and the teacher 37.*Options:.*tokenizer"),
    "common": (
        lambda t: {"student": tfast(vocab_size=41), "objective": LogitMatching(vocabulary=38)},
        "has 41 tokens",
    ),
    "layers": (lambda t: {"objective": LayerMatching(layers={0: 5})}, "teacher layer 5, but there are 0 to 1"),
    "hidden": (lambda t: {"objective": LogitMatching(hidden=1, layers=[0, 2])}, "teacher layer 2"),
    "shared": (lambda t: {"student": shared(t)}, "share 1 parameters.*deepcopy"),
    "itself": (lambda t: {"student": t}, "share"),
    "few rows": (lambda t: {"rows": Rows(3), "gradient_accumulation_steps": 2}, "3 rows, and one step takes 4"),
    "no rows": (lambda t: {"rows": Rows(0)}, "no rows"),
    "text": (lambda t: {"rows": Plain({"text": "a"}), "data_collator": None}, r"columns of text \(text\).*tokenise"),
    "empty": (lambda t: {"rows": Plain({"input_ids": torch.zeros(0, dtype=torch.long)})}, "first row .* is empty"),
    "no model": (lambda t: {"student": "gpt2"}, "student"),
    "frozen": (lambda t: {"student": windowed(t).requires_grad_(False), "train": True}, "all are frozen"),
    "parameters": (lambda t: {"objective": LayerMatching(train=["no_such"]), "train": True}, "no parameter"),
    "unreached": (lambda t: {"objective": LayerMatching(train=["mlp"]), "train": True}, "never reach the loss"),
    "schedule": (
        lambda t: {"objective": LayerMatching(one_at_a_time=True), "lr_scheduler_type": "reduce_lr_on_plateau",
                   "train": True, "eval_strategy": "steps", "eval_dataset": Rows()},
        "function of the step",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("given", "words"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused(given, words, tmp_path):
    teacher = llama()
    options = given(teacher)
    objective, starts = options.pop("objective", LogitMatching()), options.pop("train", False)

    def attempt():
        made = trainer(tmp_path, objective, options.pop("student", None), teacher, **options)
        if starts:
            made.train()

    with pytest.raises(ValueError, match=words):
        attempt()


def test_common_tokens_can_be_compared(tmp_path):
    done = trainer(tmp_path, LogitMatching(vocabulary=30), tfast(vocab_size=41), llama())
    done.train()
    assert math.isfinite(done.state.log_history[0]["loss"])


def test_objectives_that_mean_nothing():
    for make, words in (
        (lambda: LayerMatching(match="head"), "attention or block"),
        (lambda: LayerMatching(kind="far"), "mse, relative, cosine"),
        (lambda: LogitMatching(logits=0.0), "one is above"),
        (lambda: LogitMatching(divergence="total"), "forward, reverse, jsd"),
        (lambda: LogitMatching(temperature=0.0), "above 0"),
        (lambda: LogitMatching(top=0), "at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            make()


def test_the_student_given_is_the_one_trained(tmp_path):
    teacher = llama()
    student = windowed(teacher)
    before = deepcopy(student)
    done = trainer(tmp_path, LogitMatching(), student, teacher)
    done.train()
    assert done.merged() is student
    assert changed(weights(before), student)
