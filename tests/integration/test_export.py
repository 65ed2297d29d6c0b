"""Whole models with a plan through torch.export: what is traced computes the same, what cannot be traced says so."""

import pytest
import torch
from torch import nn

from hf_tfast import (
    FastPlan,
    Int8,
    LowRank,
    Nystrom,
    TFastConfig,
    TFastForCausalLM,
    Window,
    apply_plan,
    attention_report,
    dequantise,
    mechanisms,
)
from hf_tfast.integration.interface import _TRACED
from hf_tfast.testing import assert_near, generator
from tests.integration.tiny_models import FAMILIES

NEAR = Window(window=8, sinks=1)


class Outputs(nn.Module):
    """A model as a program: tokens in, one tensor out."""

    def __init__(self, model: nn.Module, *names: str) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, tokens, *more):
        return self.model(input_ids=tokens, use_cache=False, **dict(zip(self.names, more, strict=True)))[0]


class Encoder(Outputs):
    def forward(self, tokens, *more):
        return self.model(input_ids=tokens, **dict(zip(self.names, more, strict=True)))[0]


def draw(name: str, length: int = 100) -> torch.Tensor:
    return torch.randint(3, 90, (2, length), generator=generator(name))


def planned(family: str, **fields) -> nn.Module:
    torch.manual_seed(3)
    return apply_plan(FAMILIES[family].make().eval(), FastPlan(**fields))


def compare(program_of: nn.Module, name: str) -> None:
    """Exported on some tokens, run on others: numbers that were baked in would show."""
    with torch.no_grad():
        program = torch.export.export(program_of, (draw(name),)).module()
        for other in ("first", "second"):
            tokens = draw(name + other)
            assert_near(program(tokens), program_of(tokens), f"{name}, {other}", 1e-5)


@pytest.mark.parametrize("cls", mechanisms().values(), ids=mechanisms().keys())
def test_every_mechanism_exports_or_says_that_it_does_not(cls):
    program_of = Encoder(planned("bert", attention=cls(**cls.small)))
    if cls.name in _TRACED:
        compare(program_of, "encoder")
        return
    with pytest.raises(ValueError, match=rf"torch.export cannot trace {cls.__name__}\("):
        torch.export.export(program_of, (draw("refused"),))
    assert program_of(draw("refused")).isfinite().all()  # nothing of the trace is left behind


def test_a_mixed_plan():
    compare(Encoder(planned("bert", attention={"0": Nystrom(landmarks=8), "1": NEAR})), "mixed")


def test_a_decoder_of_another_family():
    compare(Outputs(planned("llama", attention=NEAR, feed_forward=LowRank(ratio=0.5))), "decoder")


def test_our_own_decoder():
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(3)
    config = TFastConfig(vocab_size=99, causal=True, attention=NEAR, **fields)
    compare(Outputs(TFastForCausalLM(config).eval()), "own")


def test_the_program_is_sparse():
    """No tensor of all pairs: what was exported is the fast path."""
    with torch.no_grad():
        program = torch.export.export(Encoder(planned("bert", attention=NEAR)), (draw("sparse", 120),))
        dense = torch.export.export(Encoder(FAMILIES["bert"].make().eval()), (draw("sparse", 120),))

    def nodes(one):
        graphs = [m.graph for m in one.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
        return [node for graph in graphs for node in graph.nodes]

    def queries(one):
        calls = [node for node in nodes(one) if "scaled_dot_product" in str(node.target)]
        return {node.args[0].meta["val"].shape[-2] for node in calls}

    assert queries(dense) == {120}
    assert queries(program) == {64, 1}  # a block, and the first token, which reads everything
    values = [node.meta.get("val") for node in nodes(program)]
    shapes = {tuple(x.shape[-2:]) for x in values if isinstance(x, torch.Tensor) and x.ndim > 3}
    assert (120, 120) not in shapes
    assert len(nodes(program)) > len(nodes(dense))


def test_padding_cannot_be_traced():
    model = planned("bert", attention=NEAR)
    with pytest.raises(ValueError, match="torch.export cannot trace fast attention over an attention_mask"):
        torch.export.export(Encoder(model, "attention_mask"), (draw("mask"), torch.ones(2, 100, dtype=torch.int64)))


def test_packed_documents_stop_the_program():
    program_of = Outputs(planned("llama", attention=NEAR), "position_ids")
    tokens, whole = draw("packed"), torch.arange(100).expand(2, -1)
    packed = torch.cat([torch.arange(60), torch.arange(40)]).expand(2, -1)
    with torch.no_grad():
        program = torch.export.export(program_of, (tokens, whole)).module()
        assert_near(program(tokens, whole), program_of(tokens, whole), "whole", 1e-5)
        with pytest.raises(RuntimeError, match="one document a row"):
            program(tokens, packed)


def test_a_cache_cannot_be_traced():
    model = planned("llama", attention=NEAR)

    class Step(Outputs):
        def forward(self, tokens, *more):
            return self.model(input_ids=tokens, use_cache=True).logits

    with pytest.raises(ValueError, match="torch.export cannot trace a cache of hf_tfast"):
        torch.export.export(Step(model), (draw("cache"),))


def test_int8_feed_forwards_are_taken_out_first():
    pytest.importorskip("bitsandbytes")
    model = planned("bert", attention=NEAR, feed_forward=Int8())
    with pytest.raises(ValueError, match="torch.export cannot trace int8 feed-forwards"):
        torch.export.export(Encoder(model), (draw("int8"),))
    compare(Encoder(dequantise(model)), "dequantised")


def test_one_program_for_every_batch_and_length():
    program_of = Encoder(planned("bert", attention=NEAR))
    batch, length = torch.export.Dim("batch", max=9), torch.export.Dim("length", min=4, max=128)
    open_to = {"dynamic_shapes": ({0: batch, 1: length},), "prefer_deferred_runtime_asserts_over_guards": True}
    with torch.no_grad():
        program = torch.export.export(program_of, (draw("open"),), **open_to).module()
        for b, n in ((1, 5), (2, 64), (3, 117)):
            tokens = torch.randint(3, 90, (b, n), generator=generator(b, n))
            assert_near(program(tokens), program_of(tokens), f"{b} x {n}", 1e-5)
    attention_report(program_of.model)  # nothing symbolic is left in its notes


@pytest.mark.filterwarnings("ignore")  # of the tracer
def test_the_old_tracer_is_refused():
    """It would keep what the first inputs decided, without a word."""
    with pytest.raises(ValueError, match="torch.jit.trace would keep what these inputs decide"):
        torch.jit.trace(Encoder(planned("bert", attention=NEAR)), (draw("traced"),))
