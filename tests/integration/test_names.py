"""`attn_implementation="tfast_<mechanism>"` without a plan, what the dispatcher refuses, and imports."""

import copy
import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModel, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import hf_tfast
from hf_tfast import FastPlan, Window, apply_plan, attention_report
from hf_tfast.attention import Score, mechanisms
from hf_tfast.feed_forward import forms
from hf_tfast.integration import interface
from hf_tfast.testing import Shape, assert_near, naive_attention, qkv
from tests.integration.tiny_models import FAMILIES, GPT2, HALVES, SMALL, TEXT, inputs, output, tiny, tokens


@pytest.fixture
def narrow(monkeypatch):
    """`tfast_window` with a window narrower than the inputs."""
    monkeypatch.setattr(interface, "default_mechanism", lambda name: Window(window=5))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gpt_oss"])
def test_a_mechanisms_name_is_a_plan_for_the_whole_model(name, narrow):
    """Stamps or none: the same numbers, cross-attention dense in both."""
    model = tiny(name)
    model.set_attn_implementation({"text_config": "tfast_window"} if name == "llava" else "tfast_window")
    given = inputs(name)
    expected = output(apply_plan(tiny(name), FastPlan(attention=Window(window=5))), given)
    assert torch.equal(output(model, given), expected)
    assert (output(tiny(name), given) - expected).abs().max() > 1e-3


def test_cross_attention_of_bert_and_gpt2_is_recognised(narrow):
    for make in (
        lambda: BertModel(BertConfig(**SMALL, **TEXT, is_decoder=True, add_cross_attention=True)),
        lambda: GPT2LMHeadModel(GPT2Config(**GPT2, add_cross_attention=True)),
    ):
        torch.manual_seed(0)
        model = make().eval()
        given = {"input_ids": tokens("q"), "encoder_hidden_states": torch.randn(2, 30, 32)}
        expected = output(model, given)
        model.set_attn_implementation("tfast_window")
        assert (output(model, given) - expected).abs().max() > 1e-4
        wide = apply_plan(make_like(model), FastPlan(attention=Window(window=99)))
        assert_near(output(wide, given), expected, "self-attention full, cross-attention dense")
        kinds = {row.kind for row in attention_report(model).layers}
        assert kinds == {"self", "cross"}


@pytest.mark.parametrize("how", ["name", "plan"])
def test_a_decoder_whose_flag_says_not_causal_stays_causal(how, narrow):
    """NLLB-MoE runs eager attention only and leaves is_causal False: the mask knows better, padded or not."""
    config = hf.NllbMoeConfig(
        **HALVES, num_experts=2, encoder_sparse_step=0, decoder_sparse_step=0, max_position_embeddings=64
    )
    torch.manual_seed(0)
    model = hf.NllbMoeModel(config).eval()
    given = {"input_ids": tokens("nllb"), "decoder_input_ids": tokens("nllb", "out")}
    model.set_attn_implementation("eager")
    dense = output(model, given)
    wide = apply_plan(copy.deepcopy(model), FastPlan(attention=Window(window=99)))
    assert_near(output(wide, given), dense, "full window")
    if how == "name":
        model.set_attn_implementation("tfast_window")
    else:
        apply_plan(model, FastPlan(attention=Window(window=5)))
    before = output(model, given)
    assert (before - dense).abs().max() > 1e-4
    crossed = [row.mechanism for row in attention_report(model).layers if row.kind == "cross"]
    assert crossed == ["Dense()"] * 2
    later = {**given, "decoder_input_ids": given["decoder_input_ids"].clone()}
    later["decoder_input_ids"][:, 20:] = 7
    assert torch.equal(output(model, later)[:, :20], before[:, :20])


def make_like(model):
    model.set_attn_implementation("sdpa")
    return model


def test_the_default_of_every_name_is_its_mechanism(caplog):
    logger = logging.getLogger(interface.__name__)
    interface._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger=logger.name):
        for name, cls in mechanisms().items():
            try:
                default = cls()
            except (TypeError, ValueError):  # needs fields
                with pytest.raises(ValueError, match="give them in a plan"):
                    interface.default_mechanism(f"tfast_{name}")
                continue
            assert interface.default_mechanism(f"tfast_{name}") == default
        model = tiny("bert")
        model.set_attn_implementation("tfast_window")
        output(model, inputs("bert"))
        output(model, inputs("bert"))
    told = [record.message for record in caplog.records if "tfast_window" in record.message]
    assert told == [
        "attn_implementation='tfast_window': BertSelfAttention self-attention runs Window(window=512, sinks=0)"
    ]


def test_a_name_wins_over_the_plan(narrow):
    model = apply_plan(tiny("bert"), FastPlan(attention=Window(window=2)))
    model.set_attn_implementation("tfast_window")
    expected = output(apply_plan(tiny("bert"), FastPlan(attention=Window(window=5))), inputs("bert"))
    assert torch.equal(output(model, inputs("bert")), expected)
    assert attention_report(model).overruled == ("tfast_window",)


def test_a_module_that_may_be_crossed_and_does_not_say_is_refused():
    class Attention(torch.nn.Module):
        is_causal = False

        def forward(self, hidden_states, key_value_states=None):
            """Takes other states."""

    x = torch.randn(1, 2, 5, 4)
    with pytest.raises(ValueError, match="does not say which"):
        interface._dispatch("tfast_window", Attention(), (x, x, x), None, {})


def _call(**options):
    module = SimpleNamespace(is_causal=True)
    x = torch.randn(1, 2, 5, 4)
    return interface._dispatch(
        "tfast_window", torch.nn.Module(), (x, x, x), None, {"is_causal": True, **options}
    ), module


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"output_attentions": True}, "never formed"),
        ({"head_mask": torch.ones(2)}, "head_mask"),
        ({"position_bias": torch.zeros(1, 2, 5, 5)}, "dense"),
        ({"cache": object()}, "continuous batching"),
        ({"speed": 3}, "would be ignored"),
    ],
)
def test_arguments_that_would_be_ignored_are_refused(option, message):
    _call(output_attentions=False, head_mask=None, use_cache=True, dropout=0.0, scaling=0.5)
    with pytest.raises(ValueError, match=message):
        _call(**option)


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_that_only_the_argument_tells(causal):
    """Without a mask the model's window is known from `sliding_window`, which counts the query itself."""
    q, k, v = qkv(Shape(j=9), "argument", causal)
    options = {"is_causal": causal, "sliding_window": 3}
    got, _ = interface._dispatch("tfast_dense", torch.nn.Module(), (q, k, v), None, options)
    i, j = torch.arange(9)[:, None], torch.arange(9)
    seen = (i - j < 3) & (j <= i) if causal else (i - j).abs() < 3
    assert_near(got.transpose(1, 2), naive_attention(q, k, v, seen, Score()), f"causal {causal}")


@pytest.mark.parametrize("name", ["bert", "llama", "bart", "whisper", "vit"])
def test_output_attentions_is_refused(name, tmp_path):
    model = apply_plan(tiny(name), FastPlan(attention=Window(window=5)))
    with pytest.raises(ValueError, match="output_attentions"):
        output(model, {**inputs(name), "output_attentions": True})
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True
    tiny(name).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="output_attentions"):
        AutoModel.from_pretrained(
            tmp_path, output_attentions=True, quantization_config=FastPlan(attention=Window(window=5))
        )


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "bart"])
def test_an_input_longer_than_the_positions_is_refused(name):
    model = apply_plan(tiny(name), FastPlan(attention=Window(window=5)))
    longest = 127 if name == "roberta" else 128  # one row is the padding token's
    output(model, inputs(name, length=longest))
    with pytest.raises(ValueError, match=rf"{longest + 1} tokens.*extend_positions\(model, {longest + 1}\)"):
        output(model, inputs(name, length=longest + 1))


def test_context_parallel_is_refused(monkeypatch):
    from torch.distributed.tensor.experimental._context_parallel import _attention

    patched = lambda *args, **kwargs: None  # noqa: E731
    monkeypatch.setitem(_attention._replaced_functions, patched, ("scaled_dot_product_attention", patched))
    _call()
    monkeypatch.setattr(F, "scaled_dot_product_attention", patched)
    with pytest.raises(ValueError, match="context parallel"):
        _call()


IMPORT = """
import time
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, AutoConfig
from transformers.quantizers import auto
tables = [AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping,
          auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING]
before = [dict(table) for table in tables]
start = time.perf_counter()
import hf_tfast
seconds = time.perf_counter() - start
for old, table in zip(before, tables):
    assert all(table[name] is entry for name, entry in old.items())
    assert all(name.startswith("tfast") for name in set(table) - set(old)), set(table) - set(old)
    assert set(table) > set(old)
import sys
assert not [m for m in sys.modules if m.startswith("hf_tfast.attention.") and m.split(".")[-1] not in LOADED]
print(seconds)
"""


def test_importing_adds_names_only_and_is_cheap():
    owned = ["dense", "linformer", "nystrom", "window"]  # models own parts of them
    loaded = ["_backends", "_base", "_cached", "_rows", *owned]
    code = IMPORT.replace("LOADED", repr(loaded))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 3.0, "0.3 s on an idle machine; ten times that allows for a busy one"


def test_every_mechanism_and_form_is_a_public_name():
    for cls in (*mechanisms().values(), *forms().values()):
        assert getattr(hf_tfast, cls.__name__) is cls
