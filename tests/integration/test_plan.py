"""FastPlan by itself: what it accepts, what it refuses, how it reads and prints; apply_plan's refusals."""

import copy
import json
import pickle

import pytest
import torch
from accelerate import cpu_offload, init_empty_weights
from transformers import AutoModel

from hf_tfast import Dense, FastPlan, LowRank, Pruned, TensorTrain, Window, apply_plan
from hf_tfast.integration._stamps import stamped_modules
from hf_tfast.integration.plan import SavedFastPlan
from tests.integration.tiny_models import tiny

REFUSED = [
    ({}, "changes nothing"),
    ({"attention": {}}, "changes nothing"),
    ({"attention": "window"}, "mechanism or a dict"),
    ({"attention": Window}, "the class itself"),
    ({"attention": {"mechanism": "windows"}}, "unknown attention mechanism 'windows'"),
    ({"attention": {"mechanism": "window", "windows": 3}}, "no field 'windows'"),
    ({"attention": {"one": Window()}}, "layer range"),
    ({"attention": {"-1": Window()}}, "layer range"),
    ({"attention": {True: Window()}}, "layer range"),
    ({"attention": {"4-2": Window()}}, "ends before it begins"),
    ({"attention": {"0-3": Window(), "3-": Dense()}}, "overlap"),
    ({"attention": {"0": None}}, "layers '0'"),
    ({"attention": Window(), "feed_forward": "int8"}, "form, a list of forms, or a dict"),
    ({"feed_forward": LowRank}, "expected a form such as LowRank"),
    ({"feed_forward": {"form": "lowrank"}}, "unknown feed-forward form 'lowrank'"),
    ({"feed_forward": {"0-3": LowRank(rank=2), "3": LowRank(rank=3)}}, "overlap"),
    ({"feed_forward": {"0": []}}, "layers '0': an empty list"),
    ({"feed_forward": [LowRank(rank=3), Pruned(ratio=0.5)]}, "Pruned cannot come after LowRank"),
    ({"feed_forward": [LowRank(rank=3), TensorTrain(ranks=2)]}, "TensorTrain cannot come after LowRank"),
    ({"attention": Window(), "base": object()}, "quantisation"),
    ({"attention": Window(), "heads": 3}, "no field 'heads'"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_a_plan_that_means_nothing_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        FastPlan(**given)


def test_window_of_zero_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        FastPlan(attention=Window(window=0))


PLANS = [
    FastPlan(attention=Window(window=7, sinks=2)),
    FastPlan(attention={"0": Dense(), "1-4": Window(window=8), "5-": Window(window=9)}),
    FastPlan(attention={"encoder.0-3": Window(window=8), "decoder.0-3": Window(window=9)}),
    FastPlan(attention={3: Window(window=8)}),
    FastPlan(attention={"mechanism": "window", "window": 8, "sinks": 0}),
    FastPlan(feed_forward=LowRank(rank=3)),
    FastPlan(feed_forward=[Pruned(ratio=0.5), LowRank(energy=0.9)], attention=Window(window=4)),
    FastPlan(feed_forward={"0": [Pruned(width=8), TensorTrain(ranks=(2, 3))], "1-": LowRank(ratio=0.5)}),
    FastPlan(feed_forward={"form": "tensor_train", "ranks": 2, "shape": [[2, 3], [4, 5]]}),
]


@pytest.mark.parametrize("plan", PLANS, ids=range(len(PLANS)))
def test_a_plan_is_its_dict(plan):
    stored = json.loads(json.dumps(plan.to_dict()))
    again = FastPlan.from_dict(stored)
    assert type(again) is SavedFastPlan
    assert again == plan
    assert hash(again) == hash(plan)
    assert again.to_dict() == stored
    assert copy.deepcopy(plan) == plan == pickle.loads(pickle.dumps(plan))
    assert eval(repr(plan), globals()) == plan


def test_layers_not_named_stay_dense():
    plan = FastPlan(attention={"1-2": Window(window=8), "5-": Window(window=9)})
    chosen = [plan.mechanism(layer) for layer in range(8)]
    eight, nine = Window(window=8), Window(window=9)
    assert chosen == [Dense(), eight, eight, Dense(), Dense(), nine, nine, nine]


@pytest.mark.parametrize("layers", ["2", "1-2", "2-", "7-9"])
def test_a_layer_that_does_not_exist_is_refused(layers):
    model = tiny("bert")
    with pytest.raises(ValueError, match=f"layers '{layers}'.*layers 0 to 1"):
        apply_plan(model, FastPlan(attention={layers: Window(window=8)}))
    assert not stamped_modules(model)


def test_a_stack_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="'decoder'.*has text"):
        apply_plan(tiny("bert"), FastPlan(attention={"decoder.0": Window(window=8)}))
    named = apply_plan(tiny("bert"), FastPlan(attention={"text.0": Window(window=8)}))
    assert [s.mechanism for _, s in stamped_modules(named)] == [Window(window=8), Dense()]


def test_only_whole_models_take_a_plan():
    plan = FastPlan(attention=Window(window=8))
    with init_empty_weights():
        empty = AutoModel.from_config(tiny("bert").config)
    with pytest.raises(ValueError, match="meta.*convert in one process"):
        apply_plan(empty, plan)
    with pytest.raises(ValueError, match="offloaded"):
        apply_plan(cpu_offload(tiny("bert"), execution_device="cpu"), plan)
    with pytest.raises(ValueError, match="expected a Transformers model"):
        apply_plan(torch.nn.DataParallel(tiny("bert")), plan)
    with pytest.raises(ValueError, match="expected a FastPlan"):
        apply_plan(tiny("bert"), Window(window=8))
