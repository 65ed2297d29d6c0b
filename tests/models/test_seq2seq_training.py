"""Training encoder-decoders: gradients, labels, checkpointing, adapters, and that they learn to copy."""

import copy

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from hf_tfast import TFastForConditionalGeneration, Window
from hf_tfast.attention import mechanisms
from hf_tfast.attention.linformer import Linformer
from hf_tfast.attention.nystrom import Nystrom
from hf_tfast.testing import assert_near
from tests.models.tiny_seq2seq import END, NARROW, START, make
from tests.models.tiny_tfast import POSITIONS, logits, small, tokens

SHAPES = {
    "plain": {},
    "post-norm": {"norm_placement": "post", "norm_type": "layer_norm", "mlp_gated": False, "hidden_act": "gelu"},
    "cosine": {"similarity": "cosine", "attention_gate": True, "attention_bias": True, "mlp_bias": True},
    "learned": {
        "attention": {"encoder": [Linformer(rank=4), Nystrom(landmarks=4)], "decoder": Window(window=4)},
        "linformer_projection": "learned",
        "nystrom_kernel": 3,
    },
    "untied": {"tie_word_embeddings": False, "encoder_layers": 1, "decoder_layers": 3, "attention": None},
    **{positions: {"position_encoding": positions} for positions in POSITIONS},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_parameter_has_a_gradient(shape):
    made = make(**{"attention": NARROW, **SHAPES[shape]})
    made(input_ids=tokens(2, 64), labels=tokens(2, 64, "target")).loss.backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        dead = shape == "cosine" and "k_proj.bias" in name  # nearly: a shift of all keys
        assert dead or parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("name", list(mechanisms()))
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_every_mechanism_trains_where_its_direction_allows(name, stack):
    if stack == "decoder" and not mechanisms()[name].causal:
        with pytest.raises(ValueError, match="no causal form"):
            make(attention={stack: small(name)})
        return
    made = make(attention={stack: small(name)}).train()
    step, losses = torch.optim.Adam(made.parameters(), lr=3e-3), []
    for _ in range(3):
        step.zero_grad()
        losses.append(made(input_ids=tokens(2, 40), labels=tokens(2, 40, "target")).loss)
        losses[-1].backward()
        step.step()
    assert losses[-1] < losses[0] - 0.05, losses
    layer = getattr(made.model, stack).layers[0].self_attn
    assert layer._tfast_stamp.mechanism.name == name
    assert layer._tfast_ran.mechanism.name in (name, "dense")
    assert layer.v_proj.weight.grad.abs().max() > 0


def test_labels_are_shifted_for_the_decoder_and_compared_unshifted():
    made, source, labels = make(attention=NARROW), tokens(), tokens(2, 9, "target")
    labels[1, 5:] = -100
    with torch.no_grad():
        out = made(input_ids=source, labels=labels)
    inputs = made.prepare_decoder_input_ids_from_labels(labels)
    assert inputs[:, 0].tolist() == [START] * 2
    assert torch.equal(inputs[0, 1:], labels[0, :-1])
    assert inputs[1].tolist() == [START, *labels[1, :5].tolist(), 0, 0, 0]
    assert torch.equal(out.logits, logits(made, source, decoder_input_ids=inputs))
    kept = labels != -100
    expected = F.cross_entropy(out.logits[kept], labels[kept])
    assert_near(out.loss, expected, "loss")
    with torch.no_grad():
        summed = made(input_ids=source, labels=labels, num_items_in_batch=torch.tensor(28)).loss
    assert_near(summed, expected * int(kept.sum()) / 28, "loss over 28 items")


def test_padding_of_labels_changes_nothing():
    made, source = make(attention=NARROW).double(), tokens()
    short, long = tokens(2, 6, "target"), torch.full((2, 10), -100)
    long[:, :6] = short
    runs = []
    for labels in (short, long):
        made.zero_grad()
        loss = made(input_ids=source, labels=labels).loss
        loss.backward()
        runs.append((loss.detach(), made.lm_head.weight.grad.clone()))
    assert_near(runs[1][0], runs[0][0], "loss")
    assert_near(runs[1][1], runs[0][1], "gradient")


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("choice", ["narrow", "nystrom and hashed"])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, choice):
    attention = NARROW if choice == "narrow" else {"encoder": small("nystrom"), "decoder": small("hashed")}
    dropout = 0.2 if choice == "narrow" else 0.0
    made = make(attention=attention, attention_dropout=dropout, hidden_dropout=0.1).train()
    checkpointed = copy.deepcopy(made)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    for one in (made, checkpointed):
        torch.manual_seed(0)
        one(input_ids=tokens(2, 30), labels=tokens(2, 20, "target")).loss.backward()
    for (name, one), other in zip(made.named_parameters(), checkpointed.parameters(), strict=True):
        assert_near(other.grad, one.grad, name)


def test_lora_trains_saves_and_merges(tmp_path):
    peft = pytest.importorskip("peft")
    made, given = make(attention=NARROW), {"input_ids": tokens(), "labels": tokens(2, 12, "target")}
    made.save_pretrained(tmp_path / "base")
    targets = ["q_proj", "v_proj", "up_proj"]
    adapted = peft.get_peft_model(
        copy.deepcopy(made), peft.LoraConfig(r=4, target_modules=targets, task_type="SEQ_2_SEQ_LM")
    ).train()
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert any("encoder" in name for name in trained)
    assert any("cross_attn" in name for name in trained)
    step, losses = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.05), []
    for _ in range(4):
        step.zero_grad()
        losses.append(adapted(**given).loss)
        losses[-1].backward()
        step.step()
    assert losses[-1] < losses[0] - 0.1
    adapted.eval().save_pretrained(tmp_path / "adapter")
    base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    expected = logits(adapted, **given)
    assert torch.equal(logits(loaded, **given), expected)
    merged = loaded.merge_and_unload()
    assert type(merged) is TFastForConditionalGeneration
    assert_near(logits(merged, **given), expected, "merged")


def test_trainer_with_the_usual_collator(tmp_path):
    made = make(attention=NARROW)

    class Tokenizer:  # what the collator asks of one
        padding_side, pad_token_id = "right", 0

        def pad(self, rows, **_):
            longest = max(len(row["input_ids"]) for row in rows)
            ids = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows]
            return {"input_ids": torch.tensor(ids), "attention_mask": (torch.tensor(ids) != 0).long()}

    rows = [{"input_ids": tokens(1, 6 + n, n)[0].tolist(), "labels": tokens(1, 9, n)[0].tolist()} for n in range(8)]
    given = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, learning_rate=1e-2, max_steps=4, report_to=[],
        use_cpu=True, disable_tqdm=True, logging_steps=1, save_strategy="no", gradient_accumulation_steps=2,
    )  # fmt: skip
    collator = DataCollatorForSeq2Seq(Tokenizer(), model=made)
    batch = collator(copy.deepcopy(rows))
    assert torch.equal(batch["decoder_input_ids"], made.prepare_decoder_input_ids_from_labels(batch["labels"]))
    trainer = Trainer(made, given, train_dataset=rows, data_collator=collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize(("positions", "repeated"), [("rotary", False), ("sinusoidal", True)])
def test_learns_to_copy(positions, repeated):
    """Eight tokens in, the same out, by cross-attention only, on rows that training never saw. Cross-attention finds a
    place by sinusoids, or what stood behind the last token, which must then stand there once."""
    attention = {"encoder": Window(window=4), "decoder": Window(window=4)}
    made = make(positions, attention=attention, position_encoding=positions, initializer_range=0.05, vocab_size=99)
    made.train()
    random = torch.Generator().manual_seed(0)
    step = torch.optim.AdamW(made.parameters(), lr=3e-3)

    def rows(count):
        digits = torch.rand(count, 20, generator=random).argsort(-1)[:, :8] + 2
        if repeated:
            digits = torch.randint(2, 22, (count, 8), generator=random)
        return digits, torch.cat([digits, torch.full((count, 1), END)], 1)

    for _ in range(500):
        source, labels = rows(32)
        step.zero_grad()
        made(input_ids=source, labels=labels).loss.backward()
        step.step()
    source, labels = rows(64)
    found = made.eval().generate(source, max_new_tokens=9, do_sample=False)[:, 1:]
    assert found.shape == labels.shape
    assert (found == labels).float().mean() > 0.9
