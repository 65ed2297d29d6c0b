"""torch.compile and torch.export: dense runs as one graph; fast attention breaks it, and exports without padding."""

import pytest
import torch

from hf_tfast import TFastForCausalLM, TFastForMaskedLM, Window
from hf_tfast.testing import assert_near
from tests.models.tiny_tfast import logits, make, tokens

NARROW = Window(window=4, sinks=1)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize("positions", ["rotary", "sinusoidal"])
def test_compiled_in_pieces(positions):
    fields = {"attention": NARROW, "position_encoding": positions, "num_hidden_layers": 1}
    made, ids = make(TFastForCausalLM, **fields), tokens()
    assert_near(logits(torch.compile(made, backend="eager"), ids), logits(made, ids), "compiled")


@pytest.mark.parametrize("model", [TFastForCausalLM, TFastForMaskedLM])
def test_dense_compiles_to_one_graph(model):
    made, ids = make(model, attention=NARROW), tokens()
    made.set_attn_implementation("sdpa")
    assert_near(logits(torch.compile(made, backend="eager", fullgraph=True), ids), logits(made, ids), "compiled")


class _Plain(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def test_export():
    made, ids = make(TFastForCausalLM, attention=NARROW), tokens()
    length = torch.export.Dim("length", min=4, max=64)
    given = (ids, torch.ones_like(ids))
    with pytest.raises(ValueError, match="torch.export cannot trace fast attention over an attention_mask"):
        torch.export.export(_Plain(made), given)
    made.set_attn_implementation("sdpa")
    exported = torch.export.export(_Plain(made), given, dynamic_shapes=({1: length}, {1: length})).module()
    padded = tokens(2, 33)
    mask = torch.ones_like(padded)
    mask[0, :6] = 0
    expected = logits(made, padded, attention_mask=mask)
    found = exported(padded, mask)
    assert_near(found[0, 6:], expected[0, 6:], "exported, padded")
    assert_near(found[1], expected[1], "exported")
