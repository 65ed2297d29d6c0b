"""Stage 1 over foreign architectures: what is matched is what the teacher's own modules compute on its own inputs."""

from copy import deepcopy

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_tfast import FastPlan, Window, apply_plan
from hf_tfast.distillation.layerwise import LayerMatching, Layerwise, blocks_of
from hf_tfast.testing import assert_near, generator
from hf_tfast.training.packing import collate
from tests.distillation.tiny_lm import VOCABULARY, Rows, llama, tfast

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=3, n_head=2, n_positions=32,
                                      bos_token_id=0, eos_token_id=0))  # fmt: skip


def bert():
    return BertForMaskedLM(BertConfig(**SIZES, intermediate_size=24, max_position_embeddings=32))


def modern():
    special = {f"{role}_token_id": 0 for role in ("pad", "bos", "eos", "cls", "sep")}
    return ModernBertForMaskedLM(
        ModernBertConfig(**SIZES, intermediate_size=24, global_attn_every_n_layers=1, **special)
    )


def opt():
    return OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32))


MODELS = {"llama": lambda: llama(num_hidden_layers=3), "gpt2": gpt2, "bert": bert, "modernbert": modern, "opt": opt}
models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def made(make):
    torch.manual_seed(0)
    model = make().double().eval()
    for p in model.parameters():
        p.data.normal_(std=0.3)
    return model


def batch(model):
    given = collate([Rows()[n] for n in range(3)])
    return (
        given
        if "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__
        else {name: x for name, x in given.items() if name != "labels"}
    )


@models
@pytest.mark.parametrize("match", ["attention", "block"])
def test_a_student_that_is_the_teacher_has_no_loss(make, match):
    """And one whose layer is spoilt has a loss in that layer alone: errors do not reach the layers above."""
    teacher = made(make)
    student = deepcopy(teacher)
    work = Layerwise(LayerMatching(match=match), student, teacher)
    rows = batch(teacher)
    count = work.kept(rows).sum()
    for layers in ([0, 1, 2], [1], [0, 2]):
        terms = work.terms(student, rows, count, layers)
        assert list(terms) == [f"layer {n}" for n in layers]
        assert all(term.item() < 1e-20 for term in terms.values())
    spoilt = work.trained([1])[0]
    weight = student.get_parameter(spoilt)
    weight.data.add_(torch.randn(weight.shape, generator=generator(match), dtype=weight.dtype))
    terms = {name: term.item() for name, term in work.terms(student, rows, count, [0, 1, 2]).items()}
    assert terms["layer 1"] > 1e-12
    assert max(terms["layer 0"], terms["layer 2"]) < 1e-20
    assert "forward" not in work.blocks[0].module.__dict__


@models
def test_what_is_matched(make):
    """The student's outputs, its blocks and their attention called by hand on the teacher's inputs."""
    teacher = made(make)
    student = apply_plan(deepcopy(teacher), FastPlan(attention=Window(window=2)))
    rows = batch(teacher)
    inputs = {}
    blocks = blocks_of(teacher)
    handles = [
        block.module.register_forward_pre_hook(
            lambda m, args, kwargs, n=n: inputs.update({n: args[0] if args else kwargs["hidden_states"]}),
            with_kwargs=True,
        )
        for n, block in enumerate(blocks)
    ]
    names = {k: v for k, v in rows.items() if k != "labels"}
    with torch.no_grad():
        teacher(**names)
        for handle in handles:
            handle.remove()
        outputs = {}
        for n, block in enumerate(blocks_of(student)):  # the student's forward, one layer replaced at a time
            handle = block.module.register_forward_pre_hook(
                lambda m, args, kwargs, n=n: (
                    ((inputs[n], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": inputs[n]})
                ),
                with_kwargs=True,
            )
            out = block.module.register_forward_hook(
                lambda m, args, out, n=n: outputs.update({n: out[0] if isinstance(out, tuple) else out})
            )
            student(**names)
            handle.remove()
            out.remove()
    work = Layerwise(LayerMatching(match="block"), student, teacher)
    got = work._student_outputs(student, rows, inputs)
    for n in range(3):
        assert_near(got[n], outputs[n], f"layer {n}")
    lone = Layerwise(LayerMatching(), student, teacher)
    seen = lone._student_outputs(student, rows, {2: inputs[2]})
    whole = lone._student_outputs(student, rows, inputs)
    assert_near(seen[2], whole[2], "a layer alone")
    assert seen.keys() == {2}


@models
def test_what_trains(make):
    """By default queries, keys and values: what the attention output depends on and gradients reach, no more."""
    teacher = made(make)
    student = apply_plan(deepcopy(teacher), FastPlan(attention=Window(window=2)))
    work = Layerwise(LayerMatching(), student, teacher)
    names = set(work.trained())
    rows = batch(teacher)
    sum(work.terms(student, rows, None, [0, 1, 2]).values()).backward()
    reached = {name for name, p in student.named_parameters() if p.grad is not None}
    assert names <= reached
    assert all("norm" in name or "ln_" in name for name in reached - names)


def test_memory_of_one_layer(monkeypatch):
    """One at a time: the other layers are not even called."""
    teacher = llama(num_hidden_layers=4)
    student = apply_plan(deepcopy(teacher), FastPlan(attention=Window(window=2)))
    work = Layerwise(LayerMatching(one_at_a_time=True), student, teacher)
    rows = batch(teacher)
    work.terms(student, rows, None, [0])
    called = []
    for who, model in (("teacher", teacher), ("student", student)):
        for n, layer in enumerate(model.model.layers):
            for part in (layer.self_attn.q_proj, layer.mlp):
                part.register_forward_hook(lambda m, a, o, who=who, n=n: called.append((who, n, type(m).__name__)))
    work.terms(student, rows, None, [2])
    assert [what for what in called if what[0] == "student"] == [("student", 2, "Linear")]
    assert max(n for who, n, _ in called if who == "teacher") == 2


def test_models_that_cannot_be_matched_so():
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match="LogitMatching"):
        Layerwise(LayerMatching(), deepcopy(t5), t5)
    checkpointing = llama()
    checkpointing.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="student checkpoints gradients"):
        Layerwise(LayerMatching(), checkpointing, llama())
    heads = tfast(num_attention_heads=2, head_dim=4)
    work = Layerwise(LayerMatching(), heads, tfast())
    with pytest.raises(ValueError, match='match="block"'):
        work.terms(heads, batch(heads), None, [0])
