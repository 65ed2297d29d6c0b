"""Evaluation: sums by class against a loop over tokens, shares of processes, bits per byte."""

import math
import random

import pytest
import torch

from hf_tfast.models.configuration_tfast import TFastConfig
from hf_tfast.models.modeling_tfast import TFastForCausalLM, TFastForMaskedLM
from hf_tfast.training.evaluation import Evaluation, Sums
from hf_tfast.training.masking import MaskedRows
from hf_tfast.training.occurrences import CLASSES
from hf_tfast.training.packing import IGNORED, PackedRows, pack
from hf_tfast.training.tokens import byte_tokenizer, token_bytes

TOKENIZER = byte_tokenizer(64)


def make(two_way, seed=0, batch=1):
    draw = random.Random(seed)
    found = [[1, *(draw.randrange(4, 14) for _ in range(draw.randrange(1, 80))), 2] for _ in range(9)]
    packed = pack(found, 40, 0)
    rows = MaskedRows(packed, TOKENIZER, 0.3, seed) if two_way else PackedRows(packed)
    config = TFastConfig(vocab_size=260, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=16, attention={"mechanism": "window", "window": 8})  # fmt: skip
    torch.manual_seed(seed)
    model = (TFastForMaskedLM if two_way else TFastForCausalLM)(config)
    return model, Evaluation(rows, far=6, unit=1, sizes=token_bytes(TOKENIZER), batch=batch)


@pytest.mark.parametrize("two_way", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_sums_by_class(two_way, seed):
    model, evaluation = make(two_way, seed)
    got = evaluation.sums(model)
    nats, targets, right, size = (dict.fromkeys(CLASSES, 0.0) for _ in range(4))
    for n in range(len(evaluation.rows)):
        row = evaluation.rows[n]
        with torch.no_grad():
            logits = model(input_ids=row["input_ids"][None], position_ids=row["position_ids"][None]).logits[0]
        for t in range(len(row["labels"])):
            label = int(row["labels"][t])
            if label == IGNORED:
                continue
            scores = logits[t if two_way else t - 1].log_softmax(-1)
            name = CLASSES[evaluation.kinds[n, t]]
            nats[name] -= float(scores[label])
            targets[name] += 1
            right[name] += int(scores.argmax()) == label
            size[name] += label > 3
    for field, expected in (("nats", nats), ("targets", targets), ("right", right), ("bytes", size)):
        torch.testing.assert_close(
            getattr(got, field), torch.tensor(list(expected.values())).double(), rtol=1e-5, atol=0
        )
    metrics = got.metrics("eval", two_way)
    loss = sum(nats.values()) / sum(targets.values())
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert metrics["eval_loss_far"] == pytest.approx(nats["far"] / targets["far"], rel=1e-5)
    assert sum(metrics[f"eval_share_{name}"] for name in CLASSES) == pytest.approx(1)
    if two_way:
        assert metrics["eval_accuracy"] == pytest.approx(sum(right.values()) / sum(targets.values()))
    else:
        assert metrics["eval_bits_per_byte"] == pytest.approx(
            sum(nats.values()) / math.log(2) / sum(size.values()), rel=1e-5
        )


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 20])
def test_shares_of_processes_make_the_whole(batch, world):
    model, evaluation = make(False, batch=batch)
    whole = make(False)[1].sums(model)
    parts, calls = [], []
    model.register_forward_hook(lambda *_: calls.append(1))
    for rank in range(world):
        calls.clear()
        parts.append(evaluation.sums(model, rank=rank, world=world).tensor())
        most = math.ceil(len(evaluation.rows) / world)
        assert len(calls) == math.ceil(most / batch), "sharded models meet in every batch"
    torch.testing.assert_close(torch.stack(parts).sum(0), whole.tensor(), rtol=1e-6, atol=0)


def test_the_model_is_left_as_it_was():
    model, evaluation = make(False)
    model.train()
    evaluation.sums(model)
    assert model.training


def test_a_uniform_model_needs_eight_bits_a_byte():
    """Over bytes without special tokens, a model that knows nothing needs log2(vocabulary) bits for each."""
    model, _ = make(False)
    evaluation = Evaluation(PackedRows(pack([[5, 6, 7, 8, 9]], 5, 0)), 2, 1, token_bytes(TOKENIZER))
    torch.nn.init.zeros_(model.lm_head.weight)
    assert evaluation.sums(model).metrics()["eval_bits_per_byte"] == pytest.approx(math.log2(260))


def test_nothing_to_predict_is_told():
    with pytest.raises(ValueError, match="no targets"):
        Sums().metrics()
    with pytest.raises(ValueError, match="no held-out sequences"):
        Evaluation(PackedRows(pack([[1, 2]], 2, 0).first(0)), 1, 1)


def test_without_bytes_there_are_no_bits_per_byte():
    model, evaluation = make(False)
    evaluation.sizes = None
    assert "eval_bits_per_byte" not in evaluation.sums(model).metrics()
