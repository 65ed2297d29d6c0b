"""Pipelines of TFast models on gloo processes: losses, norms, weights and outputs of one process."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from hf_tfast import Nystrom, TFastForCausalLM, TFastForMaskedLM, TFastForSequenceClassification, Window
from hf_tfast.parallel.pipeline import Pipeline
from hf_tfast.parallel.pipeline_stage import Stage, cut_layers
from hf_tfast.parallel.sequence import token_loss
from hf_tfast.testing import assert_near
from tests.models.tiny_tfast import make, tokens
from tests.parallel.ranks import run

IDS = tokens(4, 24)
LABELS = IDS.clone()
LABELS[:, :2] = -100
MASK = torch.ones(4, 24, dtype=torch.int64)
MASK[0, :5] = 0
RUNS = {  # name: stages per process, fields of the model, more of the batch
    "1f1b": (1, {}, {}),
    "padded": (1, {"tie_word_embeddings": False}, {"attention_mask": MASK}),
    "interleaved": (2, {}, {}),
}


def make_model(kind, fields):
    if kind == "causal":
        return make(TFastForCausalLM, 0, num_hidden_layers=4, attention=Window(window=6, sinks=2), **fields).double()
    return make(TFastForMaskedLM, 0, num_hidden_layers=4, attention=Nystrom(landmarks=6), **fields).double()


def on_rank(kind, names):
    found = {}
    for name in names:
        stages, fields, more = RUNS[name]
        pipeline = Pipeline(make_model(kind, fields), stages=stages, microbatches=4)
        optimizer, steps = torch.optim.SGD(pipeline.parameters(), lr=0.1), []
        for _ in range(2):
            loss = pipeline.step({"input_ids": IDS, "labels": LABELS, **more})
            steps.append((loss, pipeline.clip(1.0)))
            optimizer.step()
            optimizer.zero_grad()
        made = pipeline.generate(IDS[:1, :5], 3) if kind == "causal" else None
        size = sum(p.numel() for p in pipeline.parameters())
        found[name] = steps, pipeline.state_dict(), pipeline.logits({"input_ids": IDS, **more}), made, size
    return found


def one_process(kind, name):
    _, fields, more = RUNS[name]
    model, steps = make_model(kind, fields), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    labels = F.pad(LABELS, (0, 1), value=-100)[:, 1:] if kind == "causal" else LABELS
    for _ in range(2):
        loss = token_loss(model(IDS, **more).logits, labels) / (labels != -100).sum()
        loss.backward()
        steps.append((loss.detach(), torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
    made = model.generate(IDS[:1, :5], max_new_tokens=3, do_sample=False) if kind == "causal" else None
    return steps, model.state_dict(), model(IDS, **more).logits.detach(), made, model.num_parameters()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_two_processes_are_one(kind):
    answers = run(on_rank, 2, kind, list(RUNS), timeout=250)
    for name in RUNS:
        steps, weights, logits, made, size = one_process(kind, name)
        for rank, answer in enumerate(answers):
            mine = answer[name]
            for here, there in zip(mine[0], steps, strict=True):
                assert_near(here[0], there[0], f"loss of {name} on rank {rank}")
                assert_near(here[1], there[1], f"norm of {name} on rank {rank}", 1e-8)
            assert_near(mine[2], logits, f"logits of {name}", 1e-8)
            assert made is None or torch.equal(mine[3], made)
            assert mine[4] < size
        gathered = answers[0][name][1]
        assert set(gathered) == set(weights)
        for key, x in weights.items():
            assert_near(gathered[key], x, f"{key} of {name}", 1e-8)


def uneven():
    """On a rank: what is said of too many stages, too few micro-batches, and rows that micro-batches do not divide."""
    model, found = make_model("causal", {}), []
    for options in ({"stages": 3}, {"microbatches": 1}, {"microbatches": 3}):
        with pytest.raises(ValueError, match="stages|micro-batches") as raised:
            Pipeline(model, **options).step({"input_ids": IDS, "labels": LABELS})
        found.append(str(raised.value))
    return found


@pytest.mark.slow
def test_sizes_that_do_not_divide():
    for stages, few, rows in run(uneven, 2):
        assert "6 stages need as many layers, and the model has 4" in stages
        assert "2 processes need at least as many micro-batches, got 1" in few
        assert "4 rows" in rows


@pytest.mark.parametrize("count", [1, 2, 3])
def test_stages_in_turn_are_the_model(count):
    """In one process: what one stage returns the next one takes, and the last one's are the model's logits."""
    for kind in ("causal", "encoder"):
        model = make_model(kind, {})
        x, cuts = IDS, cut_layers(4, count)
        with torch.no_grad():
            expected = model(IDS, attention_mask=MASK).logits
            for n, cut in enumerate(cuts):
                x = Stage(model, cut, first=n == 0, last=n == count - 1)(x, attention_mask=MASK)
        assert torch.equal(x, expected)


def test_layers_are_cut_evenly():
    assert cut_layers(7, 3) == [range(0, 3), range(3, 5), range(5, 7)]
    with pytest.raises(ValueError, match="5 stages need as many layers"):
        cut_layers(4, 5)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="TFastForCausalLM or TFastForMaskedLM"):
        Pipeline(make(TFastForSequenceClassification, 0))
    with pytest.raises(ValueError, match="torchrun"):
        Pipeline(make_model("causal", {}))
