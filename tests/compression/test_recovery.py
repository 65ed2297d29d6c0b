"""Few-step recovery: less error than without on batches that nothing was made from, in every family."""

import pytest
import torch

from hf_tfast import Activation, FastPlan, Int8, LowRank, Pruned, TensorTrain, Window, apply_plan, convert, remove_plan
from hf_tfast.backends.int8 import uncompiled
from hf_tfast.compression import recovery
from tests.integration.tiny_models import inputs, output, tiny, tokens

STEPS = 40
WHITE = LowRank(ratio=0.6, method="activation")
PRUNED = Pruned(ratio=0.5, method="activation", recover=True)


def batches(name, seed):
    found = [{"input_ids": tokens("recovery", seed, n, batch=8)} for n in range(4)]
    return [{**b, "labels": b["input_ids"]} for b in found] if name in ("bart", "t5") else found


def errors(name, forms, steps, seed=0, attention=None):
    plan = FastPlan(attention=attention, feed_forward=forms)
    model, report = convert(tiny(name), plan, batches(name, seed), rounds=0, recovery_steps=steps)
    assert report.recovery_steps == steps
    return model, [row.error for row in report.layers if row.part == "feed_forward"]


@pytest.mark.parametrize(
    ("name", "forms"),
    [
        ("llama", PRUNED),
        ("llama", [PRUNED, WHITE]),
        ("llama", TensorTrain(ranks=3)),
        ("llama", [WHITE, Activation(bits=4)]),
        ("llama", [PRUNED, Activation(kind="binary", bits=3)]),
        ("bert", WHITE),
        ("gpt2", Pruned(ratio=0.5)),
        ("bart", LowRank(ratio=0.5)),
    ],
    ids=repr,
)
def test_held_out_error_falls_in_every_layer(name, forms):
    before, after = (errors(name, forms, steps)[1] for steps in (0, STEPS))
    assert len(before) == len(after) > 1
    assert all(now < was for was, now in zip(before, after, strict=True))


def test_int8_stores_what_was_fitted():
    pytest.importorskip("bitsandbytes")
    with uncompiled():
        plain = errors("llama", [PRUNED, Int8()], 0)[1]
        fitted = errors("llama", [PRUNED, Int8()], STEPS)[1]
        wide = errors("llama", PRUNED, STEPS)[1]
    assert all(now < was for was, now in zip(plain, fitted, strict=True))
    assert all(abs(a - b) < 0.02 for a, b in zip(fitted, wide, strict=True))


def test_what_is_lossless_stays_so():
    """Levels are fitted, the dense weights under them are not: taken off, the model is what it was."""
    dense = tiny("bert")
    model, _ = errors("bert", Activation(bits=2), STEPS)
    assert torch.equal(output(remove_plan(model), inputs("bert")), output(dense, inputs("bert")))


def test_fitted_models_reload_and_keep_dtype_and_modes(tmp_path):
    model = tiny("llama").to(torch.bfloat16)
    for parameter in model.model.layers[0].mlp.parameters():
        parameter.requires_grad_(False)
    convert(model, FastPlan(feed_forward=[PRUNED, WHITE]), batches("llama", 1), rounds=0, recovery_steps=5)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.model.layers[0].mlp.parameters())
    assert all(p.requires_grad and p.grad is None for p in model.model.layers[1].mlp.parameters())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in model.state_dict().items())


def test_rows_are_those_under_the_planned_attention(monkeypatch):
    seen = []
    real = recovery._read
    monkeypatch.setattr(recovery, "_read", lambda *given: (seen.append(real(*given)), dict(seen[-1]))[1])
    errors("llama", {"1": PRUNED}, 2, attention=Window(window=2))
    (rows,) = seen[0].values()
    dense = apply_plan(tiny("llama"), FastPlan(attention=Window(window=2)))
    caught = []
    dense.model.layers[1].mlp.register_forward_hook(lambda module, args, y: caught.append((args[0], y)))
    with torch.no_grad():
        dense(**batches("llama", 0)[0])
    x, y = (part.flatten(0, 1) for part in caught[0])
    torch.testing.assert_close(rows.x[: len(x)], x)
    torch.testing.assert_close(rows.y[: len(y)], y)


def test_no_state_is_worse_than_the_start(monkeypatch):
    """A rate that ruins everything: the start is kept."""
    monkeypatch.setattr(recovery, "RATE", 1e3)
    assert errors("llama", PRUNED, 8)[1] == errors("llama", PRUNED, 0)[1]


@pytest.mark.parametrize(
    ("forms", "given", "steps", "message"),
    [
        (Int8(), True, 3, "this plan leaves none"),
        (PRUNED, True, -1, "recovery_steps is a whole number"),
        (LowRank(rank=4), False, 3, "recovery is made from data"),
    ],
)
def test_wrong(forms, given, steps, message):
    model = tiny("llama")
    before = output(model, inputs("llama"))
    with pytest.raises(ValueError, match=message):
        convert(model, FastPlan(feed_forward=forms), batches("llama", 0) if given else None, recovery_steps=steps)
    assert torch.equal(output(model, inputs("llama")), before)


def test_an_owner_that_computes_something_else_is_refused(monkeypatch):
    model = tiny("llama")
    real = type(model.model.layers[0].mlp).forward
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", lambda self, x: real(self, x.sin()))
    monkeypatch.setattr(recovery, "ACTIVATIONS", ("nothing",))
    with pytest.raises(ValueError, match=r"between model.layers.0.mlp.gate_proj and model.layers.0.mlp.down_proj"):
        convert(model, FastPlan(feed_forward=PRUNED), batches("llama", 0), recovery_steps=3)
