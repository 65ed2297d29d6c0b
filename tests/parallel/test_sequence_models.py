"""Models whose sequence several ranks hold: loss and gradients of one process. Ranks are threads or processes."""

import copy

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from hf_tfast import FastPlan, Nystrom, Performer, TFastForCausalLM, TFastForMaskedLM, Window, apply_plan
from hf_tfast.models.modeling_tfast_heads import TFastForSequenceClassification
from hf_tfast.parallel.sequence import SequenceParallel, shard_sequence, token_loss
from hf_tfast.parallel.sequence_wire import simulate
from hf_tfast.testing import assert_near
from tests.models.tiny_tfast import make, tokens
from tests.parallel.ranks import run

LENGTH = 48
IDS = tokens(2, LENGTH)
LABELS = IDS.clone()
LABELS[:, :3] = -100
MASK = torch.ones(2, LENGTH, dtype=torch.int64)
MASK[0, :9] = MASK[1, -5:] = 0
POSITIONS = torch.cat([torch.arange(20), torch.arange(28)]).expand(2, -1)
PLAIN = {"input_ids": IDS, "labels": LABELS}
BATCHES = {"plain": {}, "padded": {"attention_mask": MASK}, "packed": {"position_ids": POSITIONS}}
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def foreign():
    torch.manual_seed(0)
    return apply_plan(
        LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)), FastPlan(attention=Window(window=7, sinks=1))
    )


def bert():
    torch.manual_seed(0)
    config = BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return apply_plan(BertForMaskedLM(config), FastPlan(attention=Window(window=4, sinks=1)))


MODELS = {
    "causal": lambda: make(TFastForCausalLM, 0, attention=Window(window=6, sinks=2)),
    "states": lambda: make(TFastForCausalLM, 0, attention=[Performer(features=16), Window(window=30)]),
    "encoder": lambda: make(TFastForMaskedLM, 0, attention=[Nystrom(landmarks=5), Window(window=6, sinks=2)]),
    "llama": foreign,
    "bert": bert,
}


def one_process(model, batch):
    model, batch = copy.deepcopy(model), dict(batch)
    labels = batch.pop("labels")
    if "ForCausalLM" in type(model).__name__:
        labels, batch["use_cache"] = F.pad(labels, (0, 1), value=-100)[:, 1:], False
    loss = token_loss(model(**batch).logits, labels) / (labels != -100).sum()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def shared(model, batch, wire=None, items=None):
    model = copy.deepcopy(model)
    with SequenceParallel(model, wire) as sequence:
        loss = sequence.loss(batch, items)
        loss.backward()
        sequence.reduce_gradients()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_same(found, expected, tolerance=None):
    assert_near(found[0], expected[0], "loss", tolerance)
    for name, gradient in expected[1].items():
        assert_near(found[1][name], gradient, name, tolerance)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_three_ranks_are_one_process(name, batch):
    if (name, batch) == ("bert", "packed"):
        pytest.skip("Transformers packs documents in causal models only")
    given, model = PLAIN | BATCHES[batch], MODELS[name]().double()
    expected = one_process(model, given)
    for found in simulate(3, lambda wire: shared(model, given, wire)):
        assert_same(found, expected)


def test_float32_and_a_whole_reference(monkeypatch):
    """1e-5 in fp32; HF_TFAST_CHECK=1 compares every layer with its reference over the whole sequence."""
    monkeypatch.setenv("HF_TFAST_CHECK", "1")
    for name in ("causal", "encoder"):
        model = MODELS[name]()
        expected = one_process(model, PLAIN)
        for found in simulate(2, lambda wire, model=model: shared(model, PLAIN, wire)):
            assert_same(found, expected, 1e-5)


def test_a_given_number_of_items_divides_the_loss():
    """As where gradients are accumulated over batches: twice the labels of this one, half its loss and gradients."""
    model = MODELS["causal"]().double()
    loss, gradients = one_process(model, PLAIN)
    items = 2 * int((LABELS[:, 1:] != -100).sum())
    half = loss / 2, {name: x / 2 for name, x in gradients.items()}
    for found in simulate(2, lambda wire: shared(model, PLAIN, wire, items)):
        assert_same(found, half)


def test_checkpointing_replays_the_exchange():
    model = make(TFastForCausalLM, 0, attention=Window(window=6, sinks=2), attention_dropout=0.2).double().train()
    torch.manual_seed(7)
    expected = one_process(model, PLAIN)
    model.gradient_checkpointing_enable({"use_reentrant": False})

    def rank(wire):
        return shared(model, PLAIN, wire)

    torch.manual_seed(7)  # threads share one generator: rank 0 must be first, so there is only one
    for found in simulate(1, rank):
        assert_same(found, expected)


def test_labels_cross_the_border():
    parts = [shard_sequence(PLAIN, rank, 3, causal=True) for rank in range(3)]
    joined = torch.cat([part["labels"] for part in parts], 1)
    assert torch.equal(joined[:, :-1], LABELS[:, 1:])
    assert bool((joined[:, -1] == -100).all())
    assert torch.equal(torch.cat([part["position_ids"] for part in parts], 1)[0], torch.arange(LENGTH))


@pytest.mark.parametrize(
    ("make_it", "words"),
    [
        (lambda: make(TFastForCausalLM, 0), "dense|Dense"),
        (lambda: make(TFastForCausalLM, 0, attention=[Window(window=4), {"mechanism": "hashed"}]), "layers.1"),
        (lambda: make(TFastForSequenceClassification, 0, attention=Window(window=4)), "pool"),
        (lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)), "attn_implementation='sdpa'"),
        (lambda: make(TFastForMaskedLM, 0, attention=Nystrom(landmarks=4), nystrom_kernel=3), "nystrom_kernel"),
    ],
    ids=["dense", "hashed", "pooling", "sdpa", "convolution"],
)
def test_models_that_cannot_be_cut(make_it, words):
    model = make_it()
    with pytest.raises(ValueError, match=words):
        simulate(2, lambda wire: SequenceParallel(model, wire))


def test_bad_batches():
    with pytest.raises(ValueError, match="pad the batch to 50 tokens"):
        shard_sequence({"input_ids": IDS}, 0, 5, causal=True)
    with pytest.raises(ValueError, match="next_sentence_label"):
        shard_sequence({"input_ids": IDS, "next_sentence_label": IDS[:, 0]}, 0, 2, causal=False)
    with pytest.raises(ValueError, match="torchrun"):
        SequenceParallel(MODELS["causal"]())
    model = MODELS["causal"]()
    with pytest.raises(ValueError, match="shard"):
        simulate(
            1, lambda wire: SequenceParallel(model, wire) and model(IDS, attention_mask=torch.ones(2, 1, 4, LENGTH))
        )


def test_a_closed_door_leaves_the_model_as_it_was():
    model = MODELS["causal"]()
    before = model(IDS).logits
    with SequenceParallel(model, simulate(1, lambda wire: wire)[0]):
        pass
    assert torch.equal(model(IDS).logits, before)


def on_rank(names):
    return {(name, batch): shared(MODELS[name]().double(), PLAIN | given)
            for name in names for batch, given in BATCHES.items() if (name, batch) != ("bert", "packed")}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_gloo_processes(ranks):
    for answer in run(on_rank, ranks, list(MODELS)):
        for (name, batch), found in answer.items():
            assert_same(found, one_process(MODELS[name]().double(), PLAIN | BATCHES[batch]))
