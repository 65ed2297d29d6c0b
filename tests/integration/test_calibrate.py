"""calibrate: the basis is the best for what a layer meets, is stored with the model, and is never missed silently."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from hf_tfast import SVD, Dense, FastPlan, Window, apply_plan, attention_map, calibrate, remove_plan
from hf_tfast.attention.svd import best_basis
from hf_tfast.integration import interface
from hf_tfast.integration._basis import basis_of
from hf_tfast.integration._stamps import stamped_modules
from hf_tfast.testing import assert_near
from tests.integration.tiny_models import FAMILIES, inputs, output, tiny, tokens

KEYS, SCORES = FastPlan(attention=SVD(rank=3, keys=9)), FastPlan(attention=SVD(rank=3))
NAMES = ("tfast_basis_q", "tfast_basis_k")


def batches(*seed, count=2):
    return [tokens("calibrate", n, *seed) for n in range(count)]


def calibrated(name="llama", plan=KEYS):
    return calibrate(apply_plan(tiny(name), plan), batches())


def held(model):
    return {name: x for name, x in model.state_dict().items() if name.endswith(NAMES)}


def products(model):
    """B C^T of every layer and key head: singular vectors have no sign."""
    return [m.tfast_basis_q.double() @ m.tfast_basis_k.double().mT for m, _ in stamped_modules(model)]


# --- the basis -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_calibrated_and_exact_at_every_key(name, tmp_path):
    """With all keys chosen the numbers are dense attention's; loading knows the shapes that calibration made."""
    length = {"modernbert": 5, "llava": 30}.get(name, 11)  # inside the window of those that have one
    model, given = apply_plan(tiny(name), FastPlan(attention=SVD(rank=3, keys=100))), inputs(name, length=length)
    dense = output(apply_plan(tiny(name), FastPlan(attention=Window(window=4096))), given)
    assert calibrate(model, [given, inputs(name, "more", length=length)]) is model
    assert len(held(model)) == 2 * FAMILIES[name].modules
    assert_near(output(model, given), dense, name)
    model.save_pretrained(tmp_path)
    again = FAMILIES[name].auto.from_pretrained(tmp_path)
    assert held(again).keys() == held(model).keys()
    assert torch.equal(output(again, given), output(model, given))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_basis_is_the_best_for_all_queries_and_keys_of_valid_tokens(name, monkeypatch):
    """Against one factorisation of everything the layer meets, caught where attention is called, padding cut off."""
    attend, seen = interface.attend, []

    def catch(q, k, v, mechanism, mask, score, **options):
        there = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool) if mask.valid is None else mask.valid
        for b, row in enumerate(there):
            seen.append((q[b][:, row].double(), k[b][:, row].double()))
        return attend(q, k, v, mechanism, mask, score, **options)

    valid = torch.ones(2, 30, dtype=torch.long)
    valid[0, :13], valid[1, 25:] = 0, 0
    given = [{"input_ids": tokens(1)}, {"input_ids": tokens(2), "attention_mask": valid}]
    dense = apply_plan(tiny(name), FastPlan(attention={"0": Dense(), "1": Window(window=500)}))
    monkeypatch.setattr(interface, "attend", catch)
    for batch in given:
        output(dense, {**batch, "use_cache": False})
    monkeypatch.undo()
    model = calibrate(apply_plan(tiny(name), SCORES), (batch for batch in given))
    for layer, product in enumerate(products(model)):
        rows = [pair for n, pair in enumerate(seen) if n // 2 % 2 == layer]  # two rows per call, layers in turn
        k = torch.cat([k for _, k in rows], dim=1)
        q = torch.cat([q.reshape(k.shape[0], -1, q.shape[-1]) for q, _ in rows], dim=1)
        b, c = best_basis(q, k, 3)
        assert k.shape[1] == 60 + 17 + 25
        assert_near(product, b @ c.mT, f"layer {layer}", tolerance=1e-4)


def test_order_padding_and_cutting_into_batches_do_not_matter():
    ids, valid = tokens("rows", batch=4), torch.ones(4, 40, dtype=torch.long)
    valid[:2, :10], valid[2:, 30:] = 0, 0
    fill = torch.full((2, 10), 5)
    padded = torch.cat([torch.cat([fill, ids[:2]], 1), torch.cat([ids[2:], fill], 1)])
    positions = (valid.cumsum(1) - 1).clamp_min(0)
    whole = products(calibrate(apply_plan(tiny("llama"), SCORES), [ids]))
    for given in (
        ids.split(1),
        [{"input_ids": ids[3:]}, ids[:3]],
        [{"input_ids": padded, "attention_mask": valid, "position_ids": positions}],
    ):
        for one, other in zip(products(calibrate(apply_plan(tiny("llama"), SCORES), given)), whole, strict=True):
            assert_near(one, other, "the same tokens otherwise", tolerance=1e-4)


def test_other_layers_run_their_plan_meanwhile_and_get_no_basis():
    model = apply_plan(tiny("llama"), FastPlan(attention={"0": Window(window=3), "1": SVD(rank=3)}))
    calibrate(model, batches())
    assert [name.split(".")[2] for name in held(model)] == ["1", "1"]
    dense = calibrate(apply_plan(tiny("llama"), FastPlan(attention={"1": SVD(rank=3)})), batches())
    one, other = (m.model.layers[1].self_attn for m in (model, dense))
    assert (one.tfast_basis_q @ one.tfast_basis_k.mT - other.tfast_basis_q @ other.tfast_basis_k.mT).abs().max() > 1e-3


def test_again_replaces_the_basis_and_listens_densely():
    model, other = calibrated(), batches("other")
    calibrate(model, other)
    fresh = calibrate(apply_plan(tiny("llama"), KEYS), other)
    assert all(torch.equal(x, held(fresh)[name]) for name, x in held(model).items())


def test_rank_of_the_width_needs_no_basis(tmp_path):
    model = apply_plan(tiny("llama"), FastPlan(attention=SVD(rank=8)))
    given = inputs("llama")
    assert_near(output(model, given), output(tiny("llama"), given), "exact")
    with pytest.raises(ValueError, match="no layer to calibrate"):
        calibrate(model, batches())
    model.save_pretrained(tmp_path)
    assert torch.equal(output(AutoModelForCausalLM.from_pretrained(tmp_path), given), output(model, given))


def test_a_bidirectional_model_uses_the_basis_once_it_has_one(tmp_path):
    given = inputs("bert")
    model = apply_plan(tiny("bert"), SCORES)
    own = output(model, given)
    calibrate(model, batches())
    after = output(model, given)
    assert (after - own).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    assert torch.equal(output(AutoModel.from_pretrained(tmp_path), given), after)


# --- causal use ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [KEYS, SCORES], ids=["keys", "scores"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_cached_generation_equals_uncached(name, plan):
    model, ids = calibrated(name, plan), tokens("generate", name, length=20)
    valid = torch.ones(2, 20, dtype=torch.long)
    valid[0, :8] = 0
    wanted = {"attention_mask": valid, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
    cached, uncached = (model.generate(ids, use_cache=use, do_sample=False, **wanted) for use in (True, False))
    assert torch.equal(cached, uncached)


def test_the_future_is_not_read_and_padding_does_not_matter():
    model, ids = calibrated(), tokens("future")
    logits = output(model, {"input_ids": ids})
    for t in (0, 8, 9, 20):
        other = torch.cat([ids[:, : t + 1], tokens("another", t)[:, t + 1 :]], 1)
        assert torch.equal(output(model, {"input_ids": other})[:, : t + 1], logits[:, : t + 1])
    valid = (torch.arange(36) >= 6).long().expand(2, -1)
    given = {"input_ids": torch.cat([torch.full((2, 6), 5), ids], 1), "attention_mask": valid}
    given["position_ids"] = (valid.cumsum(1) - 1).clamp_min(0)
    assert_near(output(model, given)[:, 6:], logits, "left padding")
    assert (logits - output(tiny("llama"), {"input_ids": ids}))[:, :9].abs().max() < 1e-3, "9 keys are all there are"
    assert (logits - output(tiny("llama"), {"input_ids": ids}))[:, 9:].abs().max() > 1e-3


def test_packed_documents_equal_separate_ones():
    model, ids = calibrated(), tokens("packed", batch=1)
    positions = torch.cat([torch.arange(18), torch.arange(12)])[None]
    packed = output(model, {"input_ids": ids, "position_ids": positions, "use_cache": False})
    alone = [output(model, {"input_ids": part}) for part in ids.split([18, 12], 1)]
    assert_near(packed, torch.cat(alone, 1), "packed")


def test_training_reaches_every_weight_and_leaves_the_basis():
    model = calibrated().train()
    before = {name: x.clone() for name, x in held(model).items()}
    model(tokens("train"), labels=tokens("train")).loss.backward()
    for path, parameter in model.named_parameters():
        assert "tfast" not in path
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path
        assert parameter.grad.abs().max() > 0, path
    assert all(torch.equal(x, before[name]) for name, x in held(model).items())


def test_the_reference_on_the_fly_and_the_map_use_the_basis(monkeypatch):
    monkeypatch.setenv("HF_TFAST_CHECK", "1")
    model, ids = calibrated(), tokens("map")
    output(model, {"input_ids": ids})
    for head in (0, 3):
        weights = attention_map(model, ids, layer=1, head=head)
        assert (weights > 0).sum(-1).tolist() == [[min(n + 1, 9) for n in range(30)]] * 2
        assert_near(weights.sum(-1), torch.ones(2, 30), "sums")


def test_a_tensor_parallel_rank_takes_the_part_of_its_heads():
    module, stamp = stamped_modules(calibrated())[0]
    for rank in (0, 1):
        b, c = basis_of(module, replace(stamp, rank=rank), 1)
        assert torch.equal(b, module.tfast_basis_q[rank : rank + 1])
        assert torch.equal(c, module.tfast_basis_k[rank : rank + 1])
    for rank, heads in ((2, 1), (0, 3)):
        with pytest.raises(ValueError, match=f"computes {heads} key heads on rank {rank}"):
            basis_of(module, replace(stamp, rank=rank), heads)


# --- stored with the model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["5GB", "20KB"], ids=["one file", "sharded"])
def test_from_a_dense_checkpoint_to_a_calibrated_one_and_back(shard, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "dense")
    given = {"input_ids": tokens("saved")}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=KEYS)
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.*hf_tfast.calibrate\(model, batches\)"):
        model(**given)
    with pytest.raises(ValueError, match=r"no calibrated basis.*hf_tfast.calibrate\(model, batches\)"):
        model.save_pretrained(tmp_path / "early")
    assert not list((tmp_path / "early").iterdir())
    expected = output(calibrate(model, batches()), given)
    assert torch.equal(expected, output(calibrated(), given)), "loading with a plan and apply_plan are one"
    for trip in ("once", "twice"):
        model.save_pretrained(tmp_path / trip, max_shard_size=shard)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / trip)
        assert torch.equal(output(model, given), expected)
        assert len(held(model)) == 4
    assert (len(list((tmp_path / "twice").glob("*.safetensors"))) > 1) == (shard == "20KB")
    stored = json.loads((tmp_path / "twice/config.json").read_text())["quantization_config"]
    assert stored == {"quant_method": "tfast", "plan_version": 1, **KEYS.to_dict()}
    remove_plan(model).save_pretrained(tmp_path / "removed")
    dense = (tmp_path / "dense/model.safetensors").read_bytes()
    assert (tmp_path / "removed/model.safetensors").read_bytes() == dense
    apply_plan(model, SCORES)
    with pytest.raises(ValueError, match="calibrate"):
        model(**given)


def test_an_explicit_implementation_keeps_the_basis_for_the_next_time(tmp_path):
    model, given = calibrated(), {"input_ids": tokens("explicit")}
    model.save_pretrained(tmp_path / "fast")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "fast", attn_implementation="sdpa")
    assert_near(output(plain, given), output(tiny("llama"), given), "sdpa")
    with pytest.raises(ValueError, match="'sdpa' instead of its plan"):
        calibrate(plain, batches())
    plain.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(output(again, given), output(model, given))


def test_the_base_model_of_a_checkpoint_has_its_basis(tmp_path):
    model, given = calibrated(), {"input_ids": tokens("base")}
    model.save_pretrained(tmp_path)
    assert torch.equal(output(AutoModel.from_pretrained(tmp_path), given), output(model.model, given))


def test_cast_and_copied_with_the_model():
    model = calibrated()
    one, other = deepcopy(model), deepcopy(model)
    calibrate(one, batches("other"))
    remove_plan(other)
    assert not held(other)
    assert len(held(model)) == 4
    assert all((x - held(one)[name]).abs().max() > 1e-3 for name, x in held(model).items())
    given, low = {"input_ids": tokens("cast")}, deepcopy(model).to(torch.bfloat16)
    assert all(x.dtype == torch.bfloat16 for x in held(low).values())
    assert output(low, given).isfinite().all()
    assert all(x.dtype == torch.bfloat16 for x in held(calibrate(low, batches())).values())


def _without(name):
    return lambda weights: {key: x for key, x in weights.items() if not key.endswith(name)}


DAMAGE = {
    "no basis": (_without(NAMES), "lacks the calibrated basis.*model.layers.0.self_attn.*calibrate"),
    "one layer without": (_without(f"layers.1.self_attn.{NAMES[1]}"), "lacks the calibrated basis.*3 tensors of 4"),
    "renamed": (
        lambda weights: {key.replace("1.self_attn.tfast", "7.self_attn.tfast"): x for key, x in weights.items()},
        "lacks the calibrated basis .model.layers.1",
    ),
    "another shape": (
        lambda weights: {k: x[..., :2].contiguous() if k.endswith(NAMES) else x for k, x in weights.items()},
        "tfast_basis|size mismatch|shape|mismatch",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused(damage, tmp_path):
    calibrated().save_pretrained(tmp_path)
    change, words = DAMAGE[damage]
    file = tmp_path / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=words):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_rank_changed_in_config_json_is_refused(tmp_path):
    calibrated().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["attention"]["rank"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, RuntimeError), match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# --- refused, with nothing changed -----------------------------------------------------------------------------------


def _padding():
    return [{"input_ids": tokens("pad"), "attention_mask": torch.zeros(2, 30, dtype=torch.long)}]


def _breaks():
    yield tokens("good")
    raise RuntimeError("the source of batches broke")


BAD = {
    "empty": (lambda: [], ValueError, "batches is empty"),
    "padding alone": (_padding, ValueError, "met no valid token"),
    "fewer tokens than the rank": (lambda: [tokens(1, batch=1, length=2)], ValueError, "2 valid tokens.*rank 3"),
    "a string": (lambda: ["a text"], ValueError, "batch 0: expected a dict.*got str"),
    "a list": (lambda: [tokens(1), [1, 2]], ValueError, "batch 1: expected a dict.*got list"),
    "a cache": (lambda: [{"input_ids": tokens(1), "past_key_values": ()}], ValueError, "leave past_key_values out"),
    "a broken source": (_breaks, RuntimeError, "the source of batches broke"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("before", ["fresh", "calibrated"])
def test_bad_batches_change_nothing(case, before):
    model = calibrated() if before == "calibrated" else apply_plan(tiny("llama"), KEYS)
    model.train()
    model.model.layers[0].eval()
    modes, stamps = [m.training for m in model.modules()], [stamp for _, stamp in stamped_modules(model)]
    state = {name: x.clone() for name, x in model.state_dict().items()}
    given, error, words = BAD[case]
    with pytest.raises(error, match=words):
        calibrate(model, given())
    assert [m.training for m in model.modules()] == modes
    assert [stamp for _, stamp in stamped_modules(model)] == stamps
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_queries_that_are_not_finite_are_refused(value):
    model = apply_plan(tiny("llama"), KEYS)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = value
    with pytest.raises(ValueError, match="model.layers.1.self_attn: queries are not finite"):
        calibrate(model, batches())
    assert not held(model)


def test_training_mode_and_generator_are_left_alone():
    model = apply_plan(tiny("llama"), KEYS).train()
    model.model.layers[1].eval()
    modes, drawn = [m.training for m in model.modules()], torch.random.get_rng_state()
    calibrate(model, batches())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_is_off_meanwhile():
    model = apply_plan(tiny("gpt2"), KEYS).train()
    assert model.transformer.drop.p == 0.1
    fresh = calibrated("gpt2")
    assert all(torch.equal(x, held(fresh)[name]) for name, x in held(calibrate(model, batches())).items())


def test_what_has_no_basis_to_calibrate_is_refused():
    with pytest.raises(ValueError, match="expected a Transformers model, got Linear"):
        calibrate(torch.nn.Linear(2, 2), batches())
    with pytest.raises(ValueError, match="LlamaForCausalLM has no plan"):
        calibrate(tiny("llama"), batches())
    with pytest.raises(ValueError, match="no layer to calibrate"):
        calibrate(apply_plan(tiny("llama"), FastPlan(attention=Window(window=5))), batches())
    model = apply_plan(tiny("llama"), KEYS)
    model.model.layers[1].self_attn.to("meta")
    with pytest.raises(ValueError, match="meta device"):
        calibrate(model, batches())
