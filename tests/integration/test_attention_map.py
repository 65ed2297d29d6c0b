"""attention_map against Transformers' own eager weights, and against what each layer really put out."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from hf_tfast.attention import mechanisms
from hf_tfast.attention.window import Window
from hf_tfast.integration._attention_map import attention_map
from hf_tfast.integration.apply import apply_plan
from hf_tfast.integration.plan import FastPlan

WORDS, HEADS = 40, 4
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 24}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**SMALL, **ENDS, "num_key_value_heads": 2, "head_dim": 8}
TWO = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
}  # fmt: skip
KINDS = {
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 6},
    "gemma2": {**GROUPED, "attn_logit_softcapping": 3.0, "sliding_window": 6},
    "gpt_oss": {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 6},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": HEADS, "bos_token_id": 1, "eos_token_id": 2},
    "bert": SMALL,
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": HEADS, "hidden_dim": 24},
}


def build(kind, implementation="sdpa", cls=AutoModel, **more):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=WORDS, **{**KINDS.get(kind, {}), **more})
    model = cls.from_config(config, attn_implementation=implementation).eval()
    model = model.double()
    for p in model.parameters():
        p.data = torch.randn_like(p) * 0.3
    return model


def batch(pads=(0, 7), length=20):
    """Left-padded rows."""
    words = torch.randint(3, WORDS, (len(pads), length))
    mask = torch.ones_like(words)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    return {"input_ids": words, "attention_mask": mask}


def check_equal(got, wanted, valid):
    """Equal in the rows of tokens, to float32, in which eager softmax runs; zeros in rows that read nothing."""
    torch.testing.assert_close(got[valid].double(), wanted[valid].double(), rtol=0.0, atol=5e-6)
    assert not got[~valid].any()


WITHOUT_SDPA = "gemma2", "gpt_oss"  # Transformers refuses softcaps and sink logits there
DENSE = [(kind, how) for kind in KINDS for how in ("sdpa", "eager") if how == "eager" or kind not in WITHOUT_SDPA]


@pytest.mark.parametrize(("kind", "implementation"), DENSE)
def test_a_dense_layer_s_weights_are_eager_s(kind, implementation):
    # float32: in float64, eager's softmax of rows without a key is NaN
    oracle, model = build(kind, "eager").float(), build(kind, implementation).float()
    inputs = batch()
    rows = inputs["attention_mask"].bool()
    if kind in ("bert", "distilbert"):  # encoders read for padding, too
        rows = torch.ones_like(rows)
    with torch.no_grad():
        wanted = oracle(**inputs, output_attentions=True).attentions
    for layer in (0, 1):
        for head in (0, 3):
            got = attention_map(model, inputs, layer, head)
            check_equal(got, wanted[layer][:, head], rows)
            total = got.sum(-1)[rows]
            assert (total < 1).all() if kind == "gpt_oss" else torch.allclose(total, torch.ones_like(total))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("window", [1, 5])
def test_a_window_s_weights_are_those_of_eager_under_its_mask(kind, window):
    oracle, model = build(kind, "eager"), apply_plan(build(kind), FastPlan(attention=Window(window=window)))
    words = batch((0,))["input_ids"]
    seen = torch.ones(20, 20, dtype=torch.bool).tril().triu(1 - window)
    bias = torch.zeros(1, 1, 20, 20).double().masked_fill(~seen, torch.finfo(torch.float64).min)
    with torch.no_grad():
        wanted = oracle(words, attention_mask=bias, output_attentions=True).attentions
    for layer in (0, 1):
        got = attention_map(model, {"input_ids": words}, layer, 2)
        torch.testing.assert_close(got, wanted[layer][:, 2], rtol=0.0, atol=1e-6)
        assert not got[:, ~seen].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_wide_window_s_weights_are_eager_s(kind):
    """With the model's own sliding window, softcap and sink logits taken in."""
    oracle = build(kind, "eager").float()
    model = apply_plan(build(kind, "eager").float(), FastPlan(attention=Window(window=64)))
    inputs = batch()
    with torch.no_grad():
        wanted = oracle(**inputs, output_attentions=True).attentions
    for layer in (0, 1):
        check_equal(attention_map(model, inputs, layer, 3), wanted[layer][:, 3], inputs["attention_mask"].bool())


CAUSAL = [name for name, cls in mechanisms().items() if cls.causal]


@pytest.mark.parametrize("pads", [(0,), (0, 7)], ids=str)
@pytest.mark.parametrize("name", CAUSAL)
def test_weights_times_values_are_the_layer_s_output(name, pads):
    """For every mechanism: what the layer passed on is what these weights make of its values."""
    cls = mechanisms()[name]
    model = apply_plan(build("llama"), FastPlan(attention=cls(**cls.small)))
    inputs = batch(pads, length=40)
    attention, caught = model.layers[1].self_attn, {}
    attention.v_proj.register_forward_hook(lambda m, a, o: caught.update(v=o))
    attention.o_proj.register_forward_pre_hook(lambda m, a: caught.update(o=a[0]))
    valid = inputs["attention_mask"].bool()
    for head in range(HEADS):
        got = attention_map(model, inputs, 1, head)
        v = caught["v"].unflatten(-1, (2, 8))[:, :, head // 2]
        o = caught["o"].unflatten(-1, (HEADS, 8))[:, :, head]
        rounding = 5e-2 * float(v.abs().max()) if name == "quantized" else 1e-9  # which rounds values, too
        torch.testing.assert_close((got @ v)[valid], o[valid], rtol=0.0, atol=rounding)
        assert (got.triu(1).abs().amax() <= (0.0 if name != "quantized" else 1e-2)).all()


def test_chosen_rows_and_heads():
    model = apply_plan(build("llama"), FastPlan(attention=Window(window=5, sinks=2)))
    inputs = batch()
    whole = attention_map(model, inputs, 1, 2)
    assert whole.shape == (2, 20, 20)
    assert torch.equal(attention_map(model, inputs, 1, 2, rows=[3, -1, 0]), whole[:, [3, 19, 0]])
    assert torch.equal(attention_map(model, inputs, "text.1", 2), whole)
    assert torch.equal(attention_map(model, inputs, "1", 2), whole)
    assert not torch.equal(attention_map(model, inputs, 1, 1), whole)


def test_low_precision_gives_float32():
    model = apply_plan(build("llama").bfloat16(), FastPlan(attention=Window(window=5)))
    got = attention_map(model, batch(), 0, 0)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got[0].sum(-1), torch.ones(20))


def test_packed_documents_do_not_meet():
    model = apply_plan(build("llama"), FastPlan(attention=Window(window=9, sinks=2)))
    words = batch((0,))["input_ids"]
    ids = torch.cat([torch.arange(8), torch.arange(12)])[None]
    got = attention_map(model, {"input_ids": words, "position_ids": ids}, 0, 0)[0]
    assert not got[8:, :8].any()
    alone = attention_map(model, {"input_ids": words[:, 8:]}, 0, 0)[0]
    torch.testing.assert_close(got[8:, 8:], alone, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("planned", [False, True])
def test_both_stacks_and_cross_attention(planned):
    make = lambda how: build("bart", how, AutoModelForSeq2SeqLM, **TWO)  # noqa: E731
    oracle, model = make("eager"), make("sdpa")
    if planned:  # a window that is never full changes nothing
        model = apply_plan(
            model, FastPlan(attention={"decoder.0-": Window(window=64), "encoder.0-": Window(window=64)})
        )
    inputs = {**batch((0, 0)), "decoder_input_ids": torch.randint(3, WORDS, (2, 9))}
    inputs["attention_mask"][1, 15:] = 0
    with torch.no_grad():
        out = oracle(**inputs, output_attentions=True, use_cache=False)
    got = attention_map(model, inputs, "encoder.0", 1)
    rows = inputs["attention_mask"].bool()
    check_equal(got, out.encoder_attentions[0][:, 1], rows if planned else torch.ones_like(rows))
    got = attention_map(model, inputs, "decoder.1", 3)
    torch.testing.assert_close(got, out.decoder_attentions[1][:, 3], rtol=0.0, atol=1e-9)
    got = attention_map(model, inputs, "decoder.1.cross", 3)
    torch.testing.assert_close(got, out.cross_attentions[1][:, 3], rtol=0.0, atol=1e-9)
    with pytest.raises(ValueError, match="stacks decoder, encoder: give layer as"):
        attention_map(model, inputs, 0, 0)


@pytest.mark.parametrize("implementation", ["sdpa", "tfast", "tfast_window"])
def test_the_model_is_as_it_was(implementation):
    model = build("llama", cls=AutoModelForCausalLM)
    if implementation == "tfast":
        apply_plan(model, FastPlan(attention=Window(window=5)))
    else:
        model.set_attn_implementation(implementation)
    inputs = batch()
    with torch.no_grad():
        before = model(**inputs).logits
    config = copy.deepcopy(model.config.to_dict())
    attention_map(model, inputs, 1, 0)
    with pytest.raises(ValueError, match="has heads 0 to 3"):
        attention_map(model, inputs, 1, HEADS)
    hook = model.model.layers[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attention_map(model, inputs, 1, 0)
    hook.remove()
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == implementation
    assert all(m.config._attn_implementation == implementation for m in model.modules() if hasattr(m, "config"))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)


def test_wrong_calls_are_refused():
    model = build("llama")
    inputs = batch()
    with pytest.raises(ValueError, match=r"no layer 2 .* it has text.0, text.1"):
        attention_map(model, inputs, 2, 0)
    with pytest.raises(ValueError, match="expected rows from -20 to 19, got 20"):
        attention_map(model, inputs, 0, 0, rows=[0, 20])
    with pytest.raises(ValueError, match="leave past_key_values out"):
        attention_map(model, {**inputs, "past_key_values": model(**inputs).past_key_values}, 0, 0)
    with pytest.raises(ValueError, match="expected a Transformers model"):
        attention_map(torch.nn.Linear(2, 2), inputs, 0, 0)
    with pytest.raises(ValueError, match="it has none"):
        attention_map(build("bloom", None, n_layer=1, n_head=2, hidden_size=16), inputs, 0, 0)
