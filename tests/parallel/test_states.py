"""Weights that are cut, between an evaluation and the next step: FSDP2 has whole copies in their place then."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import BertConfig, BertForSequenceClassification

from hf_tfast.training.layout import Layout
from hf_tfast.training.scaled import cut_model
from hf_tfast.training.states import free_copies, gather_states, is_cut, read_weights, scatter_states
from tests.parallel.ranks import run


def after_an_evaluation(folder):
    """On one rank of one: a model that is one part, its optimiser after a step, then a pass without gradients."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2))
    whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    (folder / "model.safetensors").parent.mkdir(exist_ok=True)
    from safetensors.torch import save_file

    save_file(whole, folder / "model.safetensors")
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()

    def evaluated():
        with torch.no_grad():
            model(torch.randn(3, 4))
        assert not any(isinstance(p, DTensor) for p in model.parameters()), "this test needs copies"
        return model

    assert is_cut(evaluated())
    states = gather_states(optimizer, evaluated(), keep=True)
    assert states["names"] == list(whole)
    assert len(scatter_states(states, optimizer, evaluated())["state"]) == 4
    read_weights(folder, evaluated())
    free_copies(model)
    for name, p in model.named_parameters():
        assert torch.equal(p.full_tensor(), whole[name]), "what was read went into a copy"
    return is_cut(torch.nn.Linear(2, 2))


def test_after_an_evaluation(tmp_path):
    assert run(after_an_evaluation, 1, tmp_path) == [False]


def cut_bert(folder):
    """On a rank that is a machine: a model whose layers no plan of Transformers names, cut, evaluated and saved."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=2, **sizes)).eval()
    ids = torch.arange(12).view(2, 6)
    expected = model(ids).logits
    rank = dist.get_rank()
    cut = cut_model(model, Layout(shard=2, rank=rank), folder / f"start-{rank}", 0).eval()
    parts = [name for name, module in cut.named_modules() if hasattr(module, "unshard")]
    with torch.no_grad():
        found = cut(ids).logits
    cut.save_pretrained(folder / f"saved-{rank}", is_main_process=rank == 0)
    return parts, torch.allclose(found, expected, rtol=0, atol=1e-6), is_cut(cut)


@pytest.mark.slow
def test_layers_of_any_family_are_parts_of_their_own(tmp_path):
    for parts, same, known in run(cut_bert, 2, tmp_path):
        assert {"bert.encoder.layer.0", "bert.encoder.layer.1"} <= set(parts)
        assert same
        assert known
    saved = BertForSequenceClassification.from_pretrained(tmp_path / "saved-0")
    assert saved.config.num_hidden_layers == 2
