"""Plans on a base: weights quantised by Transformers' own quantiser, attention by the plan."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from hf_tfast import SVD, FastPlan, LowRank, Window, apply_plan, calibrate, remove_plan
from tests.integration.tiny_models import GROUPED, tiny, tokens

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt", "ignore:.*_check_is_size.*")

WIDE = {**GROUPED, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
BASES = {
    "4-bit": {"load_in_4bit": True},
    "nested nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "8-bit": {"load_in_8bit": True},
}


@pytest.fixture
def dense(tmp_path):
    torch.manual_seed(3)
    LlamaForCausalLM(LlamaConfig(**WIDE)).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def load(folder, config=None):
    given = {} if config is None else {"quantization_config": config}  # Transformers takes None for "no plan"
    return AutoModelForCausalLM.from_pretrained(folder, **given).eval()


@torch.no_grad()
def logits(model):
    return model(tokens("base")).logits


@pytest.mark.parametrize("base", BASES)
def test_weights_are_those_of_transformers_quantiser_and_reload_bit_for_bit(base, dense, tmp_path):
    config = BitsAndBytesConfig(**BASES[base])
    stock = load(dense, config)
    model = load(dense, FastPlan(attention=Window(window=6), base=config))
    for (name, one), (_, other) in zip(model.state_dict().items(), stock.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    # saved before the first forward, in which bitsandbytes packs 4-bit weights anew on a CPU, with other roundings
    model.save_pretrained(tmp_path / "fast")
    load(tmp_path / "fast").save_pretrained(tmp_path / "twice")
    first = logits(model)
    assert not torch.allclose(first, logits(stock))
    wide = logits(load(dense, FastPlan(attention=Window(window=60), base=config)))
    # activations in 8 bits: a difference in the last place becomes one of a code
    torch.testing.assert_close(wide, logits(load(dense, config)), rtol=1e-4, atol=1e-5 if "4" in base else 5e-3)
    saved = json.loads((tmp_path / "fast" / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "tfast"
    assert saved["base"]["quant_method"] == "bitsandbytes"
    again = load(tmp_path / "fast")
    assert torch.equal(logits(again), first)
    assert again.config.quantization_config == model.config.quantization_config
    for each in (model, again):
        assert each.is_quantized
        assert each.quantization_method == "bitsandbytes"
        assert getattr(each, "is_loaded_in_4bit" if "4" in base else "is_loaded_in_8bit")
    assert torch.equal(logits(load(tmp_path / "twice")), first)


@pytest.mark.parametrize("base", ["4-bit", "8-bit"])
def test_lora_trains_on_it_saves_and_loads(base, dense, tmp_path):
    peft = pytest.importorskip("peft")
    plan = FastPlan(attention=Window(window=6), base=BitsAndBytesConfig(**BASES[base]))
    model = peft.get_peft_model(
        peft.prepare_model_for_kbit_training(load(dense, plan), use_gradient_checkpointing=False),
        peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=True),
    ).train()
    kinds = {
        type(m).__module__ for m in model.modules() if type(m).__name__.startswith("Linear") and hasattr(m, "lora_A")
    }
    assert kinds == {"peft.tuners.lora.bnb"}
    ids, losses = tokens("lora"), []
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    model.eval().save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(dense, plan), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again), logits(model))


def test_trainer_accepts_adapters_only(dense, tmp_path):
    """As with the base alone: weights that are not trainable need adapters."""
    from transformers import Trainer, TrainingArguments

    model = load(dense, FastPlan(attention=Window(window=6), base=BitsAndBytesConfig(load_in_4bit=True)))
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, TrainingArguments(output_dir=tmp_path, use_cpu=True, report_to=[]))


def test_attention_goes_onto_a_model_that_is_quantised_already(dense, tmp_path):
    config = BitsAndBytesConfig(load_in_4bit=True)
    model = load(dense, config)
    quantizer = model.hf_quantizer
    apply_plan(model, FastPlan(attention=Window(window=6)))
    model.save_pretrained(tmp_path / "fast")
    first = logits(load(dense, FastPlan(attention=Window(window=6), base=config)))
    assert torch.equal(first, logits(load(tmp_path / "fast")))
    remove_plan(model)
    assert isinstance(model.config.quantization_config, BitsAndBytesConfig)
    assert type(model.hf_quantizer) is type(quantizer)
    model.save_pretrained(tmp_path / "back")
    before = logits(load(dense, config))
    assert torch.equal(logits(load(tmp_path / "back")), before)
    assert torch.equal(logits(model), before)


def test_a_calibrated_basis_on_a_base(dense, tmp_path):
    plan = FastPlan(attention=SVD(rank=4, keys=8), base=BitsAndBytesConfig(load_in_4bit=True))
    model = calibrate(load(dense, plan), [tokens("calibrate")])
    model.save_pretrained(tmp_path / "fast")
    assert torch.equal(logits(load(tmp_path / "fast")), logits(model))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention": Window(), "base": object()}, "base is another quantisation"),
        ({"attention": Window(), "base": BitsAndBytesConfig()}, "load_in_4bit=True"),
        ({"attention": Window(), "base": FastPlan(attention=Window())}, "got FastPlan"),
        ({"feed_forward": LowRank(rank=3), "base": BitsAndBytesConfig(load_in_8bit=True)}, "made from dense weights"),
    ],
)
def test_bases_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        FastPlan(**fields)


def test_a_live_dense_model_takes_no_base(dense):
    with pytest.raises(ValueError, match="made while weights load"):
        apply_plan(tiny("llama"), FastPlan(attention=Window(), base=BitsAndBytesConfig(load_in_4bit=True)))
    with pytest.raises(ValueError, match="already has a plan or quantisation"):
        apply_plan(load(dense, BitsAndBytesConfig(load_in_4bit=True)), FastPlan(feed_forward=LowRank(rank=3)))
