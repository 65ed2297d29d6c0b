"""Training: gradients, checkpointing, dropout, embeddings tied and resized, adapters, dtypes, how weights begin."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_tfast import (
    Dense,
    TFastForCausalLM,
    TFastForMaskedLM,
    TFastForTokenClassification,
    TFastModel,
    Window,
)
from hf_tfast.attention import mechanisms
from hf_tfast.testing import assert_near
from tests.models.tiny_tfast import POSITIONS, config, logits, make, small, tokens

NARROW = Window(window=4, sinks=1)
SHAPES = {
    "plain": {},
    "post-norm": {"norm_placement": "post", "norm_type": "layer_norm", "mlp_gated": False, "hidden_act": "gelu"},
    "cosine": {"similarity": "cosine", "attention_gate": True, "attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 16, "num_key_value_heads": 1, "position_encoding": "low_rank", "hidden_act": "relu"},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("model", [TFastForCausalLM, TFastForMaskedLM])
def test_every_parameter_has_a_gradient(shape, model):
    made, ids = make(model, attention=NARROW, **SHAPES[shape]), tokens()
    made(ids, labels=ids).loss.backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("name", list(mechanisms()))
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(name, reentrant):
    model = TFastForCausalLM if mechanisms()[name].causal else TFastForMaskedLM
    attention_dropout = 0.2 if mechanisms()[name].dropout else 0.0
    made = make(model, attention=small(name), attention_dropout=attention_dropout, hidden_dropout=0.1).train()
    checkpointed, ids = copy.deepcopy(made), tokens(2, 40)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    for one in (made, checkpointed):
        torch.manual_seed(0)
        one(ids, labels=ids).loss.backward()
    for (name, one), other in zip(made.named_parameters(), checkpointed.parameters(), strict=True):
        assert_near(other.grad, one.grad, name)


def test_dropout_is_active_in_training_only():
    for field in ("attention_dropout", "hidden_dropout"):
        made, ids = make(TFastForCausalLM, attention=NARROW, **{field: 0.3}), tokens()
        assert torch.equal(logits(made, ids), logits(make(TFastForCausalLM, attention=NARROW), ids)), field
        assert not torch.equal(logits(made.train(), ids), logits(made, ids)), field
    made = make(TFastForTokenClassification, classifier_dropout=0.3).train()
    assert not torch.equal(logits(made, tokens()), logits(made, tokens()))


def test_tied_and_untied_embeddings(tmp_path):
    for model in (TFastForCausalLM, TFastForMaskedLM):
        tied, free = make(model), make(model, tie_word_embeddings=False)
        assert tied.lm_head.weight is tied.model.embed_tokens.weight
        assert free.lm_head.weight is not free.model.embed_tokens.weight
        for made in (tied, free):
            made.save_pretrained(tmp_path)
            loaded = model.from_pretrained(tmp_path).eval()
            assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (made is tied)
            assert torch.equal(logits(loaded, tokens()), logits(made, tokens()))


@pytest.mark.parametrize("model", [TFastForCausalLM, TFastForMaskedLM])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("ignore:.*mean_resizing.*")
def test_embeddings_are_resized(model, tied, tmp_path):
    made, ids = make(model, tie_word_embeddings=tied, attention=NARROW), tokens()
    before = logits(made, ids)
    made.resize_token_embeddings(120)
    assert made.config.vocab_size == 120
    assert logits(made, ids).shape[-1] == 120
    assert_near(logits(made, ids)[..., :99], before, "the old words")
    made.save_pretrained(tmp_path)
    assert torch.equal(logits(model.from_pretrained(tmp_path).eval(), ids), logits(made, ids))
    made.resize_token_embeddings(99)
    assert_near(logits(made, ids), before, "there and back")


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_weights_begin_with_sane_statistics(positions, placement):
    made = make(TFastForMaskedLM, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256,
                initializer_range=0.02, position_encoding=positions, norm_placement=placement,
                max_position_embeddings=128, attention=NARROW)  # fmt: skip
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().max() == 0, name
        elif "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif "embeddings.positions" not in name:
            assert 0.018 < parameter[parameter != 0].std() < 0.022, name
    if positions == "low_rank":
        close = make(TFastModel, position_encoding="low_rank", position_error=0.1, hidden_size=128)
        assert close.embeddings.positions.distance() <= 0.1
        assert close.embeddings.positions.rank < 60
    if positions in ("learned", "low_rank"):
        table = made.model.embeddings.positions(torch.arange(128)[None], torch.float32)
        assert 0.015 < table.std() < 0.025
    states = made.model(tokens(4, 64), output_hidden_states=True).hidden_states
    assert all(state.isfinite().all() and state.std() < 2 for state in states)
    ids = tokens(4, 64)
    assert abs(float(made(ids, labels=ids).loss.detach()) - math.log(99)) < 0.2, "logits begin near zero"


def test_cosine_similarity_begins_as_wide_as_the_dot_product():
    made = make(TFastForCausalLM, similarity="cosine", head_dim=64)
    attention = made.model.layers[0].self_attn
    assert torch.allclose(attention.log_temperature.exp(), torch.tensor(8.0))
    q, k = torch.randn(2, 4, 200, 64, generator=torch.Generator().manual_seed(0))
    cosines = nn.functional.cosine_similarity(q[..., None, :], k[..., None, :, :], dim=-1)
    assert 0.9 < float((cosines * 8.0).std()) < 1.1


def test_cosine_similarity_does_not_see_the_size_of_states():
    made, ids = make(TFastForCausalLM, similarity="cosine", attention=Dense()).double(), tokens()
    before = logits(made, ids)
    for layer in made.model.layers:
        with torch.no_grad():
            layer.self_attn.q_proj.weight *= 3.0
            layer.self_attn.k_proj.weight *= 0.1
    assert_near(logits(made, ids), before, "scaled projections")
    with torch.no_grad():
        made.model.layers[0].self_attn.log_temperature += 1.0
    assert (logits(made, ids) - before).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype, tmp_path):
    made, ids = make(TFastForCausalLM, attention=NARROW, similarity="cosine", position_encoding="sinusoidal"), tokens()
    made.save_pretrained(tmp_path)
    low = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert {p.dtype for p in low.parameters()} == {dtype}
    assert logits(low, ids).dtype == dtype
    expected = logits(made, ids)
    assert (logits(low, ids).float() - expected).abs().mean() < 0.02 * expected.abs().mean() + 0.02
    low.save_pretrained(tmp_path / "low")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "low").eval()
    assert again.dtype == dtype
    assert torch.equal(logits(again, ids), logits(low, ids))
    low(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in low.parameters())


def test_sharded_checkpoints_and_device_maps(tmp_path):
    made, ids = make(TFastForCausalLM, attention=NARROW, position_encoding="learned"), tokens()
    made.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    for given in ({}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": True}):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **given).eval()
        assert torch.equal(logits(loaded, ids), logits(made, ids)), given


@pytest.mark.parametrize("positions", POSITIONS)
def test_meta_device_then_weights(positions, tmp_path):
    made, ids = make(TFastModel, position_encoding=positions, attention=NARROW), tokens()
    with torch.device("meta"):
        empty = TFastModel(config(position_encoding=positions, attention=NARROW))
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    made.save_pretrained(tmp_path)
    assert torch.equal(logits(TFastModel.from_pretrained(tmp_path).eval(), ids), logits(made, ids))


def test_lora_trains_saves_and_merges(tmp_path):
    peft = pytest.importorskip("peft")
    made, ids = make(TFastForCausalLM, attention=NARROW), tokens()
    made.save_pretrained(tmp_path / "base")
    given = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(copy.deepcopy(made), given).train()
    step = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        step.zero_grad()
        losses.append(adapted(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        step.step()
    assert losses[-1] < losses[0] - 0.1
    adapted.eval().save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    expected = logits(adapted, input_ids=ids)
    assert torch.equal(logits(loaded, input_ids=ids), expected)
    merged = loaded.merge_and_unload()
    assert type(merged) is TFastForCausalLM
    assert_near(logits(merged, ids), expected, "merged")
    assert (expected - logits(made, ids)).abs().max() > 0.1


def test_trainer_trains_and_resumes(tmp_path):
    made = make(TFastForCausalLM, attention=NARROW)
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 16)]
    given = {"output_dir": str(tmp_path), "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 2,
             "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}  # fmt: skip
    trainer = Trainer(model=made, args=TrainingArguments(max_steps=4, **given), train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    again = Trainer(model=make(TFastForCausalLM, "other", attention=NARROW),
                    args=TrainingArguments(max_steps=4, **given), train_dataset=rows)  # fmt: skip
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for one, other in zip(made.parameters(), again.model.parameters(), strict=True):
        assert_near(other, one, "resumed")
