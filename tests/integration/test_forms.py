"""Feed-forward forms in whole models: through from_pretrained and apply_plan, saved and reloaded bit for bit."""

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from hf_tfast import Activation, FastPlan, Int8, LowRank, Pruned, TensorTrain, Window, apply_plan, remove_plan
from hf_tfast.feed_forward.low_rank import LowRankLinear
from tests.integration.tiny_models import FAMILIES, inputs, output, tiny, tokens

FORMS = {
    "low_rank": LowRank(rank=5),
    "energy": LowRank(energy=0.7),
    "tensor_train": TensorTrain(ranks=6),
    "pruned": Pruned(ratio=0.5),
    "activation": Activation(bits=8, limit=4.0),
    "composed": [Pruned(ratio=0.5), LowRank(ratio=0.5), Activation(bits=4, limit=4.0, kind="piecewise")][:2],
}
NAMES = [name for name in FAMILIES if name != "gpt_oss"]


@pytest.mark.parametrize("name", NAMES)
def test_every_family_reloads_bit_for_bit(name, tmp_path):
    """Dense folder -> from_pretrained with a plan -> saved -> plain AutoModel -> saved again."""
    auto = FAMILIES[name].auto
    tiny(name).save_pretrained(tmp_path / "dense")
    prefix = {"bart": "encoder.", "encoder_decoder": "encoder.", "whisper": "encoder.", "llava": "text."}.get(name, "")
    plan = FastPlan(feed_forward={f"{prefix}0-": [Pruned(ratio=0.5), LowRank(ratio=0.6)]})
    model = auto.from_pretrained(tmp_path / "dense", quantization_config=plan).eval()
    given = inputs(name)
    first = output(model, given)
    assert not torch.allclose(first, output(tiny(name), given))
    model.save_pretrained(tmp_path / "one")
    again = auto.from_pretrained(tmp_path / "one").eval()
    assert torch.equal(output(again, given), first)
    again.save_pretrained(tmp_path / "two")
    assert torch.equal(output(auto.from_pretrained(tmp_path / "two").eval(), given), first)
    assert sum(isinstance(m, LowRankLinear) for m in again.modules()) >= 4
    assert again.is_quantized is False
    assert again.config._attn_implementation == tiny(name).config._attn_implementation


@pytest.mark.parametrize("form", FORMS)
def test_every_form_with_attention_reloads_bit_for_bit(form, tmp_path):
    plan = FastPlan(attention=Window(window=6), feed_forward=FORMS[form])
    model = apply_plan(tiny("llama"), plan)
    given = inputs("llama", form)
    first = output(model, given)
    model.save_pretrained(tmp_path / "fast", max_shard_size="20kB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "fast").eval()
    assert torch.equal(output(again, given), first)
    assert again.config.quantization_config == model.config.quantization_config
    out = again.generate(tokens(form), max_new_tokens=4, do_sample=False)
    assert torch.equal(out, model.generate(tokens(form), max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("name", ["bloom", "t5", "deberta", "mpnet"])
def test_models_outside_the_attention_interface(name, tmp_path):
    """A plan of feed-forwards alone works on them, and leaves attention as it is."""
    auto = type(tiny(name))
    tiny(name).save_pretrained(tmp_path / "dense")
    plan = FastPlan(feed_forward={"encoder.0-": LowRank(rank=4)} if name == "t5" else LowRank(rank=4))
    model = auto.from_pretrained(tmp_path / "dense", quantization_config=plan).eval()
    given = {"input_ids": tokens(name)}
    if name == "t5":
        given["decoder_input_ids"] = tokens(name, "decoder")
    first = output(model, given)
    model.save_pretrained(tmp_path / "fast")
    again = auto.from_pretrained(tmp_path / "fast").eval()
    assert torch.equal(output(again, given), first)
    assert again.config._attn_implementation == tiny(name).config._attn_implementation


@pytest.mark.parametrize("asked", ["eager", "sdpa", "tfast_window"])
def test_a_plan_without_attention_leaves_it_to_the_user(asked, tmp_path):
    apply_plan(tiny("llama"), FastPlan(feed_forward=LowRank(rank=5))).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["attn_implementation"] == "tfast"  # raises without us
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=asked)
    assert model.config._attn_implementation == asked
    output(model, inputs("llama"))


def test_from_pretrained_is_apply_plan(tmp_path):
    tiny("bert").save_pretrained(tmp_path)
    plan = FastPlan(attention=Window(window=6), feed_forward={"1": LowRank(rank=5)})
    loaded = AutoModel.from_pretrained(tmp_path, quantization_config=plan).eval()
    applied = apply_plan(tiny("bert"), plan)
    assert torch.equal(output(loaded, inputs("bert")), output(applied, inputs("bert")))
    for model in (loaded, applied):
        first, second = (layer.output.dense for layer in model.encoder.layer)
        assert type(first) is torch.nn.Linear
        assert type(second) is LowRankLinear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype, tmp_path):
    apply_plan(tiny("bert"), FastPlan(feed_forward=LowRank(rank=5))).save_pretrained(tmp_path / "fast")
    model = AutoModel.from_pretrained(tmp_path / "fast", dtype=dtype).eval()
    assert {p.dtype for p in model.parameters()} == {dtype}
    model.save_pretrained(tmp_path / "low")
    again = AutoModel.from_pretrained(tmp_path / "low", dtype="auto").eval()
    assert torch.equal(output(again, inputs("bert")), output(model, inputs("bert")))


def test_gradients_train_the_factors():
    model = apply_plan(tiny("llama"), FastPlan(attention=Window(window=6), feed_forward=LowRank(rank=5))).train()
    ids = tokens("train")
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert model.model.layers[0].mlp.up_proj.second.weight.grad.abs().sum() > 0


def test_remove_plan_says_what_is_lost_and_takes_off_the_attention_alone(tmp_path):
    plan = FastPlan(attention=Window(window=6), feed_forward=LowRank(rank=5))
    model = apply_plan(tiny("llama"), plan)
    before = output(model, inputs("llama"))
    with pytest.raises(ValueError, match="cannot be computed back"):
        remove_plan(model)
    assert torch.equal(output(model, inputs("llama")), before)
    remove_plan(model, attention_only=True)
    assert model.config.quantization_config.attention is None
    dense = output(model, inputs("llama"))
    assert not torch.equal(dense, before)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), inputs("llama")), dense)


def test_remove_plan_restores_what_is_lossless(tmp_path):
    model = apply_plan(tiny("llama"), FastPlan(feed_forward=Activation(bits=3, limit=2.0)))
    assert not torch.equal(output(model, inputs("llama")), output(tiny("llama"), inputs("llama")))
    remove_plan(model)
    assert torch.equal(output(model, inputs("llama")), output(tiny("llama"), inputs("llama")))
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (FastPlan(feed_forward=LowRank(rank=40)), "rank 40 is above its 32"),
        (FastPlan(feed_forward={"0": Pruned(ratio=0.5), "1": Pruned(width=99)}), "width 99 is above"),
        (FastPlan(feed_forward={"7": LowRank(rank=3)}), "a feed-forward in layers 0 to 1"),
        (FastPlan(feed_forward={"vision.0": LowRank(rank=3)}), "names the stack 'vision'"),
        (FastPlan(feed_forward=Activation(bits=8)), r"convert\(model, plan, calibration=batches\)"),
        (FastPlan(attention={"5": Window()}, feed_forward=LowRank(rank=3)), "self-attention in layers 0 to 1"),
    ],
)
def test_a_plan_that_does_not_fit_changes_nothing(plan, message, tmp_path):
    model = tiny("llama")
    before, modules = output(model, inputs("llama")), dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        apply_plan(model, plan)
    assert dict(model.named_modules()) == modules
    assert torch.equal(output(model, inputs("llama")), before)
    assert getattr(model.config, "quantization_config", None) is None
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=plan)


def test_no_feed_forward_known():
    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp = torch.nn.Identity()
    with pytest.raises(ValueError, match="no feed-forward that is known by its structure"):
        apply_plan(model, FastPlan(feed_forward=LowRank(rank=3)))


def test_offloaded_weights_are_refused():
    model = tiny("llama")
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(ValueError, match="meta device or offloaded"):
        apply_plan(model, FastPlan(feed_forward=LowRank(rank=3)))


@pytest.fixture
def folder(tmp_path):
    apply_plan(tiny("llama"), FastPlan(feed_forward=LowRank(rank=5))).save_pretrained(tmp_path)
    return tmp_path


def test_a_truncated_checkpoint(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.first.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"needs model.layers.1.mlp.up_proj.first.weight \(1 tensors"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_weights_of_another_shape(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.first.weight"] = torch.zeros(4, 32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((RuntimeError, ValueError), match="mismatch|size"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_file_cut_off(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(SafetensorError, match="incomplete|not fully covered"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("wrong", ["scales", "signs", "none"])
def test_tampered_integers(wrong, tmp_path):
    pytest.importorskip("bitsandbytes")
    apply_plan(tiny("llama"), FastPlan(feed_forward=Int8())).save_pretrained(tmp_path)
    file, path = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj"
    weights = load_file(file)
    if wrong == "none":
        del weights[f"{path}.SCB"]
    else:
        weights[f"{path}.SCB"][3] = torch.nan if wrong == "scales" else -1.0
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{path}.*(the checkpoint is corrupt|the folder is truncated)"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "tamper",
    [
        lambda sizes: sizes.popitem(),
        lambda sizes: sizes.update({"model.layers.0.mlp.down_proj": []}),
        lambda sizes: sizes.update({"model.layers.0.mlp.down_proj": [{}]}),
        lambda sizes: sizes.update({"model.layers.0.mlp.down_proj": [{"model.layers.0.mlp.down_proj": "x"}]}),
        lambda sizes: sizes.update({"model.layers.0.mlp.down_proj": [5]}),
        lambda sizes: sizes.update({"nowhere": [{}]}),
    ],
)
def test_tampered_sizes(folder, tamper):
    config = json.loads((folder / "config.json").read_text())
    tamper(config["quantization_config"]["sizes"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="corrupt|sizes"):
        AutoModelForCausalLM.from_pretrained(folder)
