"""Learned parts of mechanisms: they begin as the drawn ones, learn, keep to their documents, and are saved."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForMaskedLM

from hf_tfast import Dense, TFastForMaskedLM, attend
from hf_tfast.attention.linformer import Linformer
from hf_tfast.attention.nystrom import Nystrom
from hf_tfast.integration._stamps import stamp_of
from hf_tfast.models.modeling_tfast_learned import LearnedLinformer, TFastProjection
from hf_tfast.testing import Shape, assert_near, qkv
from tests.models.tiny_tfast import logits, make, tokens

PROJECTED = {"attention": Linformer(rank=6), "linformer_projection": "learned"}
CONVOLVED = {"attention": {"0": Nystrom(landmarks=6), "1": Dense()}, "nystrom_kernel": 5}
BOTH = {"attention": [Linformer(rank=6), Nystrom(landmarks=6)], "linformer_projection": "learned", "nystrom_kernel": 3}


def learned(rank=6, length=64):
    projection = TFastProjection(Linformer(rank=rank), length).double()
    with torch.no_grad():
        projection.weight.copy_(torch.randn(rank, length, generator=torch.Generator().manual_seed(1)))
    return LearnedLinformer(rank=rank, projection=projection)


@pytest.mark.parametrize("length", [1, 6, 7, 40])
def test_learned_linformer_fast_is_its_reference(length):
    mechanism = learned()
    inputs = qkv(Shape(j=length), length, grad=True)
    grads = []
    for backend in ("torch", "reference"):
        o = attend(*inputs, mechanism, backend=backend)
        wanted = (*inputs, mechanism.projection.weight)
        grads.append((o, *torch.autograd.grad(o.square().sum(), wanted, allow_unused=True)))
    for one, other in zip(*grads, strict=True):
        if other is None:
            assert one is None
            assert length <= 6
        else:
            assert_near(one, other, f"length {length}")


def test_learned_linformer_is_its_formula():
    mechanism, (q, k, v) = learned(), qkv(Shape(b=1, h=2, g=2, j=20), "formula")
    e = mechanism.projection.weight[:, :20].detach()
    e = e / e.abs().sum(-1, keepdim=True)
    weights = torch.softmax(q @ (e @ k).mT * q.shape[-1] ** -0.5, dim=-1)
    assert_near(attend(q, k, v, mechanism).detach(), weights @ (e @ v), "formula")


def test_learning_begins_at_the_drawn_projection():
    drawn = make(TFastForMaskedLM, attention=Linformer(rank=5))
    made = make(TFastForMaskedLM, attention=Linformer(rank=5), linformer_projection="learned")
    made.load_state_dict(drawn.state_dict(), strict=False)
    ids = tokens(2, 20)  # a multiple of the rank: all rows average as many keys
    assert_near(logits(made, ids), logits(drawn, ids), "as drawn")
    step = torch.optim.Adam(made.parameters(), lr=0.01)
    before = made.model.layers[0].self_attn.projection.weight.clone()
    made.train()(ids, labels=ids).loss.backward()
    step.step()
    assert (made.model.layers[0].self_attn.projection.weight - before).abs().max() > 1e-3


@pytest.mark.parametrize("fields", [PROJECTED, CONVOLVED, BOTH], ids=["projection", "convolution", "both"])
def test_they_are_saved_copied_and_checkpointed(fields, tmp_path):
    made, ids = make(TFastForMaskedLM, **fields), tokens(2, 40)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "projection" in name or "convolution" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    expected = logits(made, ids)
    made.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert loaded.config.attention == made.config.attention
    for way, model in {
        "loaded": loaded,
        "copy": copy.deepcopy(made),
        "pickle": pickle.loads(pickle.dumps(made)),
    }.items():
        assert torch.equal(logits(model, ids), expected), way
        for layer in model.model.layers:
            mechanism = stamp_of(layer.self_attn).mechanism
            if isinstance(mechanism, LearnedLinformer):
                assert mechanism.projection is layer.self_attn.projection, way
                with torch.no_grad():
                    layer.self_attn.projection.weight.mul_(torch.rand(64))
                assert not torch.equal(logits(model, ids), expected), way
    assert torch.equal(logits(made, ids), expected), "copies are their own"
    grads = []
    for checkpointing in (False, True):
        one = copy.deepcopy(made).train()
        if checkpointing:
            one.gradient_checkpointing_enable()
        one(ids, labels=ids).loss.backward()
        grads.append({name: parameter.grad for name, parameter in one.named_parameters()})
    for name in grads[0]:
        assert grads[0][name].abs().max() > 0, name
        assert_near(grads[1][name], grads[0][name], name)


@pytest.mark.parametrize("asked", ["tfast", "sdpa"])
@pytest.mark.parametrize("fields", [PROJECTED, CONVOLVED], ids=["projection", "convolution"])
def test_padding_and_documents_are_kept_apart(fields, asked):
    made, ids = make(TFastForMaskedLM, **fields).double(), tokens(1, 24)
    made.set_attn_implementation(asked)
    alone = [logits(made, part) for part in ids.split([15, 9], dim=1)]
    restarting = torch.cat([torch.arange(15), torch.arange(9)])[None]
    assert_near(logits(made, ids, position_ids=restarting), torch.cat(alone, 1), "packed")
    padded = torch.cat([tokens(1, 7, "other"), ids[:, :15], tokens(1, 3, "more")], 1)
    mask = torch.zeros_like(padded)
    mask[:, 7:22] = 1
    assert_near(logits(made, padded, attention_mask=mask)[:, 7:22], alone[0], "padded")


def test_the_convolution_is_added_whatever_runs():
    made, ids = make(TFastForMaskedLM, **CONVOLVED), tokens(2, 6)  # no more tokens than landmarks: dense by a branch
    exact = logits(made, ids)
    made.set_attn_implementation("sdpa")
    assert_near(logits(made, ids), exact, "sdpa")
    with torch.no_grad():
        made.model.layers[0].self_attn.convolution.weight.zero_()
    assert (logits(made, ids) - exact).abs().max() > 1e-3
    seen = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match="needs to know which tokens are padding"):
        made(ids, attention_mask=seen)


def test_a_document_longer_than_the_projection():
    made = make(TFastForMaskedLM, **PROJECTED)
    made(tokens(1, 64))
    with pytest.raises(ValueError, match="a document has 65 tokens.* made for 64.*max_position_embeddings"):
        made(tokens(1, 65))
