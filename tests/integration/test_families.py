"""Plans on tiny models of every family: really called, equal to sdpa at full budget, right under padding."""

import pytest
import torch
from torch import Tensor

from hf_tfast import Dense, FastPlan, Random, Window, apply_plan, attention_report, remove_plan
from hf_tfast.integration._stamps import last_run, stamped_modules
from hf_tfast.testing import assert_near
from tests.integration.tiny_models import FAMILIES, REFUSED, inputs, output, tiny

FULL = FastPlan(attention=Window(window=4096))
NARROW = FastPlan(attention=Window(window=5, sinks=0))
TEXT = [name for name, family in FAMILIES.items() if family.inputs == "text"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_planned_module_is_really_called(name):
    model = apply_plan(tiny(name), NARROW)
    dense = output(tiny(name), inputs(name))
    fast = output(model, inputs(name))
    ran = [(stamp, last_run(module)) for module, stamp in stamped_modules(model)]
    planned = [run for stamp, run in ran if stamp.mechanism == Window(window=5)]
    assert len(planned) == FAMILIES[name].modules
    assert all(run is not None and run.backend == "torch" for run in planned)
    assert (fast - dense).abs().max() > 1e-3, "a window of 5 must change the numbers"
    crossed = [(stamp, run) for stamp, run in ran if stamp.kind == "cross"]
    assert len(crossed) == (2 if FAMILIES[name].inputs in ("pair", "audio") else 0)
    assert all(stamp.mechanism == Dense() and run.mechanism == Dense() for stamp, run in crossed)


@pytest.mark.parametrize("name", FAMILIES)
def test_full_window_equals_the_dense_model(name):
    model = tiny(name)
    model.set_attn_implementation("eager" if name in ("gemma2", "gpt_oss") else "sdpa")
    given = inputs(name)
    expected = output(model, given)
    assert_near(output(apply_plan(model, FULL), given), expected, name)
    assert_near(output(remove_plan(model), given), expected, f"{name} after remove_plan", tolerance=0.0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", TEXT)
def test_padded_equals_unpadded(name, side):
    model = apply_plan(tiny(name), FastPlan(attention=Window(window=6, sinks=2 if name not in WINDOWED else 0)))
    ids = inputs(name)["input_ids"][:1]
    alone = output(model, {"input_ids": ids})
    for padding in (1, 9):
        fill = torch.full((1, padding), 5)
        pieces = [fill, ids] if side == "left" else [ids, fill]
        valid = torch.cat([torch.zeros_like(x) if x is fill else torch.ones_like(x) for x in pieces], 1)
        positions = (valid.cumsum(1) - 1).clamp_min(0)
        given = {"input_ids": torch.cat(pieces, 1), "attention_mask": valid}
        if name == "roberta":
            positions = positions + 1  # behind the row of the padding token
        if name != "modernbert":  # counts its own positions from the slot; rotary, so that only distances matter
            given["position_ids"] = positions
        assert_near(output(model, given)[valid.bool()][None], alone, f"{name} {side} {padding}")


WINDOWED = ("modernbert", "mistral", "gemma2", "gpt_oss")


@pytest.mark.parametrize("name", WINDOWED)
def test_a_models_own_window_is_kept(name):
    """A plan wider than the model's window changes nothing in those layers; a narrower one takes the smaller."""
    model = tiny(name)
    model.set_attn_implementation("eager" if name in ("gemma2", "gpt_oss") else "sdpa")
    given = inputs(name, length=40)
    expected = output(model, given)
    apply_plan(model, FastPlan(attention=Window(window=30 if name != "modernbert" else 39)))
    windows = {last_run(module).mechanism for module, _ in _ran(model, given)}
    assert Window(window=4 if name == "modernbert" else 12) in windows
    dense = apply_plan(remove_plan(model), FastPlan(attention={"0-1": Dense()}))
    assert_near(output(dense, given), expected, f"{name} with dense layers")


def _ran(model, given):
    output(model, given)
    return stamped_modules(model)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss"])
def test_sinks_inside_a_models_own_window(name):
    """Window(w, sinks) within the model's window W reads the sinks only while they are nearer than W."""
    model = apply_plan(tiny(name), FastPlan(attention=Window(window=5, sinks=3)))
    given = inputs(name, length=40)
    fast = output(model, given)
    i, j = torch.arange(40)[:, None], torch.arange(40)
    seen = (j <= i) & ((i - j < 5) | (j < 3))
    remove_plan(model)
    model.set_attn_implementation("eager")
    near = seen & (i - j < 12)
    if name == "mistral":
        expected = output(model, {**given, "attention_mask": _bias(near)})
    else:
        masks = {"full_attention": _bias(seen), "sliding_attention": _bias(near)}
        expected = output(model, {**given, "attention_mask": masks})
    assert_near(fast, expected, name)


def test_a_pattern_without_an_exact_intersection_is_refused():
    model = apply_plan(tiny("gemma2"), FastPlan(attention=Random(window=4, sinks=1, blocks=1, block=4)))
    output(model, inputs("gemma2", length=12))  # inside the model's own window there is nothing to intersect
    with pytest.raises(ValueError, match="its own sliding window of 12"):
        output(model, inputs("gemma2", length=13))
    both = {"0": Window(window=4), "1": Random(window=4, sinks=1, blocks=1, block=4)}
    output(apply_plan(remove_plan(model), FastPlan(attention=both)), inputs("gemma2", length=40))


def _bias(seen: Tensor) -> Tensor:
    return torch.zeros(2, 1, *seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("name", REFUSED)
def test_attention_outside_the_interface_is_refused_by_name(name):
    model = tiny(name)
    where = {"t5": "position bias", "trocr": "TrOCRAttention"}.get(name, "Attention")
    with pytest.raises(ValueError, match=where):
        apply_plan(model, NARROW)
    assert not stamped_modules(model)
    assert not hasattr(model.config, "quantization_config")


def test_the_parts_of_a_composite_that_a_plan_names():
    text = apply_plan(tiny("llava"), NARROW)
    assert {stamp.stack for _, stamp in stamped_modules(text) if stamp.mechanism != Dense()} == {"text"}
    assert text.config.vision_config._attn_implementation == "sdpa"
    vision = apply_plan(tiny("llava"), FastPlan(attention={"vision.0-": Window(window=5)}))
    assert {stamp.stack for _, stamp in stamped_modules(vision) if stamp.mechanism != Dense()} == {"vision"}
    assert vision.config.text_config._attn_implementation == "sdpa"
    given = inputs("llava")
    outputs = [output(model, given) for model in (tiny("llava"), text, vision)]
    assert all((outputs[n] - outputs[n - 1]).abs().max() > 1e-3 for n in range(3))


def test_encoder_and_decoder_are_named_apart():
    plan = FastPlan(attention={"encoder.0": Window(window=3), "decoder.1-": Window(window=4)})
    for name in ("bart", "whisper", "encoder_decoder"):
        model = apply_plan(tiny(name), plan)
        chosen = {(s.stack, s.layer): s.mechanism for _, s in stamped_modules(model) if s.mechanism != Dense()}
        assert chosen == {("encoder", 0): Window(window=3), ("decoder", 1): Window(window=4)}
        output(model, inputs(name))
        report = attention_report(model)
        assert sum(row.mechanism.startswith("Window") for row in report.layers) == 2
    with pytest.raises(ValueError, match=r"encoder.0-1"):
        apply_plan(tiny("bart"), FastPlan(attention={"0-1": Window(window=3)}))
