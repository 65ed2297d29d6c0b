"""Int8: what is stored and computed, in training and inference, fused and layer by layer, with PEFT, and reloaded."""

import copy
import json
import logging

import pytest
import torch
import transformers as hf
from torch import nn

from hf_tfast import FastPlan, Int8, LowRank, Pruned, Window, apply_plan
from hf_tfast.backends import int8 as backend
from hf_tfast.backends.int8 import ACTIVATIONS, Int8Product, int8_feed_forward, int8_linear
from hf_tfast.feed_forward._fused import FusedInt8
from hf_tfast.feed_forward.activation import Activation
from hf_tfast.feed_forward.int8 import int8_layer
from tests.feed_forward.blocks import KINDS, block, error, inputs, moments
from tests.feed_forward.int8_products import definition, product, random
from tests.integration.tiny_models import inputs as model_inputs
from tests.integration.tiny_models import output, tiny, tokens

pytest.importorskip("bitsandbytes", reason="int8 feed-forwards need bitsandbytes")


@pytest.fixture(autouse=True)
def _as_written():
    """Most tests run the steps as torch's operations; tests/backends/test_int8_steps.py compares the C."""
    with backend.uncompiled():
        yield


@pytest.fixture
def integers(monkeypatch):
    """Integer products also where the machine has no fast ones: what is tested are the numbers."""
    monkeypatch.setattr(backend, "way_of", lambda device: "eager")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 600])
def test_the_product_is_its_definition(integers, rows, bias):
    _, p = product(24, 40, rows, bias=bias)
    x = random(rows, size=(rows, 40))
    torch.testing.assert_close(int8_linear(x, p).double(), definition(x, p), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("threshold", [0.0, 2.5, 6.0])
def test_large_columns_are_not_rounded(integers, threshold):
    weight, p = product(24, 40, threshold, threshold=threshold, bias=False)
    x = random(threshold, size=(9, 40))
    x[3, 5], x[1, 17] = 80.0, -60.0
    torch.testing.assert_close(int8_linear(x, p).double(), definition(x, p), rtol=1e-4, atol=1e-3)
    off = (int8_linear(x, p) - x @ weight.T).norm() / (x @ weight.T).norm()
    assert off < (0.06 if threshold == 0 else 0.02)


def test_agrees_with_bitsandbytes_own_layer(integers):
    import bitsandbytes as bnb

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    dense = nn.Linear(64, 48)
    peer = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False, threshold=6.0)
    peer.load_state_dict(dense.state_dict())
    peer = peer.to("cpu").eval()
    mine = int8_layer()(dense.weight.detach(), dense.bias.detach(), 6.0)
    x = random("peer", size=(20, 64))
    x[2, 9] = 12.0
    with torch.no_grad():
        torch.testing.assert_close(mine(x), peer(x), rtol=0, atol=3e-2)  # theirs rounds x to fp16 first
    assert (mine.weight.data.int() - peer.weight.data.int()).abs().max() <= 1
    stock = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False, threshold=6.0).to("cpu")
    stock.load_state_dict(mine.state_dict())  # checkpoints are theirs too
    with torch.no_grad():
        torch.testing.assert_close(stock.eval()(x), mine(x), rtol=0, atol=3e-2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", ["plain", "gated", "fused gate"])
def test_the_whole_is_its_layers(integers, activation, form):
    """down(act(up(x))) in one go equals the three steps one after the other, in rows of several chunks."""
    parts = 2 if form == "fused gate" else 1
    ups = [product(40 * parts, 24, form, n)[1] for n in range(2 if form == "gated" else 1)]
    _, down = product(24, 40, form, "down")
    x = random(form, activation, size=(3, 400, 24)) * 2
    peers = {
        "gelu": nn.functional.gelu,
        "gelu_tanh": lambda y: nn.functional.gelu(y, approximate="tanh"),
        "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
        "relu": torch.relu,
        "silu": nn.functional.silu,
    }
    ys = [int8_linear(x, up) for up in ups]
    ys = list(ys[0].chunk(2, -1)) if parts == 2 else ys
    h = peers[activation](ys[0]) * (ys[1] if len(ys) == 2 else 1)
    exact = int8_linear(h, down)
    # a number on the edge of two codes may fall to either side
    assert (int8_feed_forward(x, ups, down, activation, parts) - exact).norm() < 3e-3 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(integers, dtype):
    weight, p = product(24, 40, dtype)
    x = random(dtype, size=(5, 40)).to(dtype)
    y = int8_linear(x, p._replace(bias=p.bias.to(dtype)))
    assert y.dtype == dtype
    assert (y.float() - (x.float() @ weight.T + p.bias)).norm() < 0.02 * y.float().norm()


def test_zeros_empty_and_wrong_shapes(integers):
    weight, p = product(24, 40)
    weight[3] = 0
    p = Int8Product(*Int8Product.quantise(weight), None, 6.0)
    y = int8_linear(torch.zeros(2, 3, 40), p)
    assert torch.equal(y, torch.zeros(2, 3, 24))
    assert torch.equal(int8_linear(torch.ones(1, 40), p)[:, 3], torch.zeros(1))
    assert int8_linear(torch.zeros(0, 40), p).shape == (0, 24)
    with pytest.raises(ValueError, match=r"expected inputs \[.. 40\], got \[2, 39\]"):
        int8_linear(torch.zeros(2, 39), p)


def test_training_computes_what_inference_does_and_gradients_are_those_of_the_stored_weight(integers):
    layer = int8_layer()(random("w", size=(24, 40)), random("b", size=(24,)), 6.0)
    x = random("x", size=(6, 40))
    leaf = x.clone().requires_grad_()
    y = layer.train()(leaf)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), y)
    grad = random("grad", size=y.shape)
    y.backward(grad)
    torch.testing.assert_close(leaf.grad, grad @ layer.dequantised())


def test_without_a_fast_integer_product_it_says_so_and_runs_bf16(monkeypatch, caplog):
    monkeypatch.setattr(backend.torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    backend._way_of.cache_clear()
    try:
        weight, p = product(24, 40)
        x = random(size=(5, 40))
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                y = int8_linear(x, p)
        assert (y - (x @ weight.T + p.bias)).norm() < 0.02 * y.norm()
        assert (
            sum("multiply in bf16: this CPU has no fast integer product (AVX2" in r.message for r in caplog.records)
            == 1
        )
    finally:
        monkeypatch.undo()
        backend._way_of.cache_clear()


def test_bitsandbytes_own_forward_computes_with_our_layer():
    """What a CUDA tensor takes; here on the CPU."""
    layer = int8_layer()(random("w", "stock", size=(24, 40)), random("b", "stock", size=(24,)), 6.0).eval()
    x = random("x", "stock", size=(6, 40))
    x[2, 3] = 20
    with torch.no_grad():
        torch.testing.assert_close(layer.stock(x), layer(x), rtol=0, atol=5e-2)
    leaf = x.clone().requires_grad_()
    layer.train().stock(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, torch.ones(6, 24) @ layer.dequantised(), rtol=1e-2, atol=1e-2)
    assert layer.state.CB is layer.weight.data or layer.state.CB.data_ptr() == layer.weight.data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_cuda_runs_bitsandbytes_kernels(name, monkeypatch):
    model = apply_plan(tiny(name), FastPlan(feed_forward=Int8()))
    cpu = output(model, model_inputs(name))
    calls = []
    stock = int8_layer().stock
    monkeypatch.setattr(int8_layer(), "stock", lambda self, x: calls.append(x.device.type) or stock(self, x))
    given = {key: value.cuda() for key, value in model_inputs(name).items()}
    gpu = output(model.cuda(), given)
    assert calls
    assert set(calls) == {"cuda"}
    assert (gpu.cpu() - cpu).norm() < 0.05 * cpu.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_stays_near(integers, kind):
    given, dense, x = (
        block(kind, dtype=torch.float32),
        block(kind, dtype=torch.float32),
        inputs(kind, dtype=torch.float32),
    )
    Int8().apply(given)
    assert error(given, dense, x) < 0.02
    held = sum(p.numel() * p.element_size() for p in given.model.state_dict().values())
    half = sum(p.numel() * 2 for p in dense.model.state_dict().values())
    assert held < 0.75 * half  # biases and scales weigh much in so small a layer


def test_bytes_are_half_of_fp16():
    layer = int8_layer()(torch.zeros(768, 3072), torch.zeros(768), 6.0)
    assert sum(p.numel() * p.element_size() for p in layer.state_dict().values()) <= 0.51 * 2 * (768 * 3072 + 768)


def test_learned_levels_are_multiplied_as_they_are(integers):
    """Activation(learned) then Int8: the codes of x are whole multiples of the step, so no row is looked through."""
    given, fake = (block("plain", dtype=torch.float32) for _ in range(2))
    x = inputs("levels", dtype=torch.float32)
    form = Activation(bits=8)
    for each in (given, fake):
        form.apply(each, moments=moments(block("plain", dtype=torch.float32), x))
    Int8(threshold=0).apply(given)
    assert given.get("up").integers
    assert error(given, fake, x) < 0.02
    leaf = x[:5].clone().requires_grad_()
    given.model(leaf).square().sum().backward()
    assert given.get("up").levels.step.grad.abs() > 0


FUSED = {"bert": 2, "llama": 2, "gpt2": 2, "vit": 2, "modernbert": 2, "bart": 0, "whisper": 0, "roberta": 2}


@pytest.mark.parametrize("name", FUSED)
def test_models_reload_bit_for_bit(integers, name, tmp_path):
    prefix = {"bart": "encoder.", "whisper": "encoder."}.get(name, "")
    model = apply_plan(tiny(name), FastPlan(feed_forward={f"{prefix}0-": Int8()}))
    given = model_inputs(name)
    first = output(model, given)
    assert (first - output(tiny(name), given)).norm() < 0.1 * first.norm()
    assert sum(isinstance(m, FusedInt8) for m in model.modules()) == FUSED[name]
    model.save_pretrained(tmp_path / "int8")
    again = type(model).from_pretrained(tmp_path / "int8").eval()
    assert sum(isinstance(m, FusedInt8) for m in again.modules()) == FUSED[name]
    assert torch.equal(output(again, given), first)
    assert again.is_loaded_in_8bit
    assert again.is_quantized is False
    again.save_pretrained(tmp_path / "again")
    for file in ("model.safetensors",):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "int8" / file).read_bytes()


@pytest.mark.parametrize("name", ["bert", "llama", "modernbert"])
def test_fused_and_layer_by_layer_agree(integers, name, monkeypatch):
    model = apply_plan(tiny(name), FastPlan(feed_forward=Int8()))
    fused = output(model, model_inputs(name))
    monkeypatch.setattr(FusedInt8, "is_whole", lambda self, x: False)
    apart = output(model, model_inputs(name))
    assert 0 <= (fused - apart).norm() < 0.01 * apart.norm()


def test_only_feed_forwards_are_touched():
    model = apply_plan(tiny("llama"), FastPlan(attention=Window(window=6), feed_forward=Int8()))
    made = {path for path, m in model.named_modules() if isinstance(m, int8_layer())}
    assert made == {f"model.layers.{n}.mlp.{name}_proj" for n in (0, 1) for name in ("gate", "up", "down")}
    assert type(model.lm_head) is nn.Linear


def test_composed(integers, tmp_path):
    plan = FastPlan(feed_forward=[Pruned(ratio=0.75), LowRank(ratio=0.9), Int8()])
    model = apply_plan(tiny("llama"), plan)
    assert isinstance(model.model.layers[0].mlp.up_proj.first, int8_layer())
    first = output(model, model_inputs("llama"))
    model.save_pretrained(tmp_path)
    assert torch.equal(output(hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval(), model_inputs("llama")), first)


def test_casts_and_copies_keep_the_scales(integers):
    model = apply_plan(tiny("bert"), FastPlan(feed_forward=Int8()))
    layer = model.encoder.layer[0].output.dense
    scale = layer.SCB.clone()
    other = copy.deepcopy(model)
    model.to(torch.bfloat16)
    assert layer.SCB.dtype == torch.float32
    assert torch.equal(layer.SCB, scale)
    assert layer.weight.dtype == torch.int8
    assert output(model, model_inputs("bert")).dtype == torch.bfloat16
    with torch.no_grad():
        other.encoder.layer[0].output.dense.SCB.zero_()
    assert torch.equal(layer.SCB, scale)
    output(other, model_inputs("bert"))


def test_from_pretrained_converts_and_low_precision_reloads(integers, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "dense")
    auto = hf.AutoModelForCausalLM
    model = auto.from_pretrained(
        tmp_path / "dense", quantization_config=FastPlan(feed_forward=Int8()), dtype="bfloat16"
    )
    first = output(model.eval(), model_inputs("llama"))
    model.save_pretrained(tmp_path / "int8")
    again = auto.from_pretrained(tmp_path / "int8", dtype="auto").eval()
    assert torch.equal(output(again, model_inputs("llama")), first)


@pytest.mark.filterwarnings("ignore:Merge lora module to 8-bit linear")
def test_lora_trains_saves_and_merges(integers, tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")
    from peft.tuners.lora.bnb import Linear8bitLt

    model = apply_plan(tiny("llama"), FastPlan(attention=Window(window=6), feed_forward=Int8()))
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj", "down_proj"], init_lora_weights=True)
    lora = peft.get_peft_model(model, config)
    assert sum(isinstance(m, Linear8bitLt) for m in lora.modules()) == 4
    ids = tokens("lora")
    optimiser = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(8):
        loss = lora(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = output(lora.eval(), {"input_ids": ids})
    lora.save_pretrained(tmp_path / "adapter")
    base = apply_plan(tiny("llama"), FastPlan(attention=Window(window=6), feed_forward=Int8()))
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(output(again, {"input_ids": ids}), trained)
    merged = again.merge_and_unload()
    assert isinstance(merged.model.layers[0].mlp.up_proj, int8_layer())
    near = output(merged, {"input_ids": ids})
    assert (near - trained).norm() < 0.1 * trained.norm()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(
        output(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), {"input_ids": ids}), near
    )


def test_a_stock_checkpoint_name_is_kept(tmp_path):
    apply_plan(tiny("bert"), FastPlan(feed_forward=Int8(threshold=4.0))).save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if "layer.0.output" in name]  # noqa: SIM118 not a dict
        assert file.get_tensor("encoder.layer.0.output.dense.weight").dtype == torch.int8
        assert file.get_tensor("encoder.layer.0.output.dense.SCB").dtype == torch.float32
    assert "encoder.layer.0.output.dense.bias" in names
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["feed_forward"] == {
        "form": "int8",
        "threshold": 4.0,
    }


def test_missing_bitsandbytes_names_the_extra(monkeypatch):
    import sys

    int8_layer.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    try:
        with pytest.raises(ImportError, match=r"hf_tfast\[int8\]"):
            apply_plan(tiny("bert"), FastPlan(feed_forward=Int8()))
    finally:
        monkeypatch.undo()
        int8_layer.cache_clear()


@pytest.mark.parametrize("threshold", [-1.0, float("nan"), "6", float("inf")])
def test_bad_threshold(threshold):
    with pytest.raises(ValueError, match="threshold must be a number of at least 0"):
        Int8(threshold=threshold)
