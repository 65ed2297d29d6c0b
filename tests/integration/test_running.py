"""Models under a plan do what models do: threads, half precision, copies, training, checkpointing, compile, PEFT."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

from hf_tfast import Dense, FastPlan, Window, apply_plan, attention_report, remove_plan
from hf_tfast.integration._stamps import last_run, stamp_of, stamped_modules
from hf_tfast.integration.interface import first_head
from hf_tfast.testing import assert_near
from tests.integration.tiny_models import inputs, output, tiny, tokens

NARROW = FastPlan(attention=Window(window=5, sinks=1))


def test_two_models_with_different_plans_in_two_threads():
    plans = [FastPlan(attention=Window(window=window)) for window in (3, 9)]
    models = [apply_plan(tiny("llama"), plan) for plan in plans]
    given = inputs("llama")
    expected = [output(model, given) for model in models]
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(lambda n: output(models[n % 2], given), n) for n in range(12)]
        for n, future in enumerate(futures):
            assert torch.equal(future.result(), expected[n % 2])
    assert (expected[0] - expected[1]).abs().max() > 1e-3


def test_models_made_from_one_config_object_do_not_meet():
    config = tiny("llama").config
    one, two = (type(tiny("llama"))(config).eval() for _ in range(2))
    two.load_state_dict(one.state_dict())
    given = inputs("llama")
    expected = output(two, given)
    apply_plan(one, NARROW)
    assert torch.equal(output(two, given), expected)
    assert (output(one, given) - expected).abs().max() > 1e-3
    assert len({id(module.config) for module in one.modules() if hasattr(module, "config")}) == 1


def test_copies_keep_their_plan():
    model, given = apply_plan(tiny("bert"), NARROW), inputs("bert")
    expected = output(model, given)
    copied = copy.deepcopy(model)
    assert torch.equal(output(copied, given), expected)
    assert torch.equal(output(pickle.loads(pickle.dumps(model)), given), expected)
    assert [s for _, s in stamped_modules(copied)] == [s for _, s in stamped_modules(model)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model, given = apply_plan(tiny("llama"), NARROW), inputs("llama")
    expected = output(model, given)
    halved = model.half() if dtype == torch.float16 else model.to(dtype)
    got = output(halved, given)
    assert got.dtype == dtype
    assert (got.float() - expected).norm() < (0.02 if dtype == torch.float16 else 0.15) * expected.norm()


def test_device_map(tmp_path):
    apply_plan(tiny("llama"), NARROW).save_pretrained(tmp_path / "fast")
    plain, mapped = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "fast", device_map=where) for where in (None, "cpu")
    )
    assert torch.equal(output(plain, inputs("llama")), output(mapped, inputs("llama")))
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "fast", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    output(half, inputs("llama"))


def test_gradients_equal_the_dense_models_at_full_budget():
    given = {**inputs("llama"), "labels": inputs("llama")["input_ids"]}
    models = [tiny("llama"), apply_plan(tiny("llama"), FastPlan(attention=Window(window=99)))]
    for model in models:
        model(**given).loss.backward()
    for (name, dense), (_, fast) in zip(*(model.named_parameters() for model in models), strict=True):
        assert_near(fast.grad, dense.grad, name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_replays_the_same_dropout(reentrant):
    grads = []
    for checkpointing in (False, True):
        model = apply_plan(tiny("llama"), NARROW).train()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.3
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(3)
        ids = inputs("llama")["input_ids"]
        model(inputs_embeds=model.get_input_embeddings()(ids), labels=ids).loss.backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name in grads[0]:
        assert_near(grads[1][name], grads[0][name], name)


def test_dropout_is_drawn_anew_in_training_and_off_in_eval():
    model = apply_plan(tiny("bert"), NARROW)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for module, _ in stamped_modules(model):
        module.dropout.p = 0.5
    given = inputs("bert")
    still = output(model, given)
    model.train()
    assert not torch.equal(output(model, given), output(model, given))
    assert torch.equal(output(model.eval(), given), still)


class _Texts(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, n):
        ids = tokens("trainer", n, batch=1)[0]
        return {"input_ids": ids, "labels": ids}


def test_trainer_three_steps_and_reload(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=NARROW)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", learning_rate=1e-2, disable_tqdm=True,
    )  # fmt: skip
    before = copy.deepcopy(model.state_dict())
    trainer = Trainer(model=model, args=arguments, train_dataset=_Texts())
    trainer.train()
    assert any((before[name] != value).any() for name, value in model.state_dict().items())
    trainer.save_model(tmp_path / "trained")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    given = inputs("llama")
    assert torch.equal(output(again, given), output(model.eval(), given))
    assert last_run(again.model.layers[0].self_attn).mechanism == Window(window=5, sinks=1)


def test_compiled_gives_the_same_numbers():
    """One layer, padded: compiling takes nearly all of this file's time."""
    model = tiny("llama")
    model.model.layers = model.model.layers[:1]
    given = inputs("llama")
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    given["attention_mask"][0, :6] = 0
    expected = output(apply_plan(model, NARROW), given)
    torch._dynamo.reset()
    assert_near(output(torch.compile(model), given), expected, "compiled")
    assert (output(remove_plan(model), given) - expected).abs().max() > 1e-3
    torch._dynamo.reset()


def test_lora_trains_and_reloads_on_a_plan(tmp_path):
    peft = pytest.importorskip("peft")
    apply_plan(tiny("llama"), NARROW).save_pretrained(tmp_path / "fast")
    load = lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "fast")  # noqa: E731
    model = peft.get_peft_model(
        load(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    given = inputs("llama")
    model(**given, labels=given["input_ids"]).loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for n, p in model.named_parameters() if "lora_A" in n)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter")
    assert torch.equal(output(again.eval(), given), output(model.eval(), given))
    merged = model.merge_and_unload()
    assert_near(output(merged, given), output(again, given), "merged")


def test_check_compares_every_layer_on_the_fly(monkeypatch):
    model, given = apply_plan(tiny("llama"), NARROW), inputs("llama")
    monkeypatch.setenv("HF_TFAST_CHECK", "1")
    output(model, given)
    fast = Window.fast
    monkeypatch.setattr(Window, "fast", lambda self, *args, **kwargs: fast(self, *args, **kwargs) * 1.01)
    with pytest.raises(ValueError, match=r"HF_TFAST_CHECK: model.layers.0.self_attn .* differs from its reference by"):
        output(model, given)
    monkeypatch.setenv("HF_TFAST_CHECK", "0")
    output(model, given)


def test_a_module_that_never_asks_the_interface_is_caught():
    """Belt and braces beside reading the class: after the first forward the dispatcher must have run."""
    model = apply_plan(tiny("bert"), NARROW)
    attention = model.encoder.layer[0].attention.self
    attention.forward = lambda hidden_states, *args, **kwargs: (hidden_states, None)
    with pytest.raises(ValueError, match="without asking"):
        output(model, inputs("bert"))


def test_tensor_parallel_ranks_draw_by_global_head():
    """The stamp holds the rank; the first head follows from the heads that this rank has."""
    stamp = stamp_of(apply_plan(tiny("llama"), NARROW).model.layers[0].self_attn)
    assert stamp.heads == 4
    assert [first_head(stamp, heads) for heads in (4, 2)] == [0, 0]
    assert [first_head(replace(stamp, rank=1), heads) for heads in (4, 2)] == [0, 2]


def test_report_counts_pairs_and_prints():
    model = apply_plan(tiny("llama"), FastPlan(attention={"0": Window(window=8, sinks=2), "1": Dense()}))
    report = attention_report(model, length=100)
    i, j = torch.arange(100)[:, None], torch.arange(100)
    seen = ((j <= i) & ((i - j < 8) | (j < 2))).sum().item()
    first, second = report.layers
    assert first.density == pytest.approx(seen / 5050)
    assert second.density == 1.0
    assert first.dense_flops == second.flops == 2 * 4 * 16 * 5050
    assert first.flops == pytest.approx(first.density * first.dense_flops)
    assert first.backend is None
    output(model, inputs("llama"))
    after = attention_report(model)
    assert after.length == 30
    assert [row.backend for row in after.layers] == ["torch", "torch"]
    assert "Window(window=8, sinks=2)" in str(after)
    assert after.to_dict()["layers"][0]["path"] == "model.layers.0.self_attn"
    with pytest.raises(ValueError, match="at least 1"):
        attention_report(model, length=0)
    with pytest.raises(ValueError, match="Transformers model"):
        attention_report(torch.nn.Linear(2, 2))


def test_report_counts_a_long_pattern_on_evenly_spaced_rows():
    report = attention_report(apply_plan(tiny("llama"), FastPlan(attention=Window(window=64))), length=16384)
    pairs = 64 * 16384 - 64 * 63 / 2
    assert report.layers[0].density == pytest.approx(pairs / (16384 * 16385 / 2), rel=0.05)


def test_report_of_a_model_without_a_plan():
    model = AutoModel.from_config(tiny("bert").config)
    report = attention_report(model)
    assert report.plan is None
    assert {row.implementation for row in report.layers} == {"sdpa"}
    assert {row.density for row in report.layers} == {1.0}


def test_autocast_takes_what_sdpa_takes():
    """Qwen3 norms queries and keys in fp32 under autocast, while its values stay in the lower dtype."""
    model, ids = tiny("qwen3"), tokens(2, 40)
    exact = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sdpa = model(ids).logits
        logits = apply_plan(model, FastPlan(attention=Window(window=64)))(ids).logits
        logits.float().sum().backward()
    assert (logits - exact).abs().max() <= 2 * (sdpa - exact).abs().max()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_inference_mode_gives_what_no_grad_gives(name):
    """Inference tensors count no versions: what is remembered about a mask must not ask for one."""
    model, given = apply_plan(tiny(name), NARROW), inputs(name, "inference")
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    given["attention_mask"][0, -4:] = 0
    with torch.no_grad():
        expected = output(model, given)
    with torch.inference_mode():
        torch.testing.assert_close(output(model, given), expected, rtol=0, atol=0)
