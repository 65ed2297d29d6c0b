"""Healing of an encoder: its rows, its losses and gradients, and a training that stops and goes on."""

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from hf_tfast import FastPlan, Window, apply_plan
from hf_tfast.distillation.encoder import EncoderArguments, EncoderTrainer, contrastive_loss, pooled
from hf_tfast.distillation.encoder_pairs import Example, Query
from hf_tfast.distillation.encoder_rows import Rows, collate
from hf_tfast.training.trainer import Diverged

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@dataclass(frozen=True)
class Encoder:
    """Words w0, w1, ... are the tokens 5, 6, ...; [CLS] 2 and [SEP] 3."""

    model: Any
    pooling: str = "mean"
    front: tuple[int, ...] = (2,)
    back: tuple[int, ...] = (3,)
    special: int = 2

    def content(self, text):
        words = [(m, n) for m, n in _words(text)]
        return [int(text[m + 1 : n]) + 5 for m, n in words], words


def _words(text):
    at = 0
    for word in text.split():
        at = text.index(word, at)
        yield at, at + len(word)
        at += len(word)


def bert(seed=0, plan=True, positions=256):
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                        num_attention_heads=2, max_position_embeddings=positions, initializer_range=0.3)  # fmt: skip
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = BertModel(config, add_pooling_layer=False).double()
    return apply_plan(model, FastPlan(attention=Window(window=8, sinks=1))) if plan else model


def words(draw, count, topic):
    return " ".join(f"w{draw.choice([topic, topic + 1, draw.randrange(50)])}" for _ in range(count))


def examples(count=6, seed=0, length=60):
    draw = random.Random(seed)
    found = []
    for n in range(count):
        text = "\n\n".join(words(draw, length // 4, 5 * n) for _ in range(4))
        queries = (Query(words(draw, 5, 5 * n)), Query(words(draw, 4, 5 * n), (10, 60)))
        found.append(Example(str(n), text, queries))
    return found


def make(tmp_path, *, rows=None, model=None, teacher=None, evaluate=None, **given):
    student = Encoder(model or bert())
    rows = rows or Rows(examples(), student, length=50, seed=1)
    options = {"eval_strategy": "no", "load_best_model_at_end": False, "report_to": [], "use_cpu": True,
               "per_device_train_batch_size": 3, "learning_rate": 3e-3, "save_strategy": "no", "disable_tqdm": True,
               "keep_weight": 0.0 if teacher is None else 1.0, "logging_steps": 1}  # fmt: skip
    args = EncoderArguments(output_dir=str(tmp_path / "out"), **{**options, **given})
    return EncoderTrainer(student=student, rows=rows, args=args, teacher=teacher, evaluate=evaluate)


def losses(trainer):
    return [h["loss"] for h in trainer.state.log_history if "loss" in h]


def test_rows_are_crops_with_their_spans():
    encoder = Encoder(None)
    text = examples(1)[0]
    rows = Rows([text], encoder, length=32, query=5, queries=2, passages=3, seed=3)
    ids, offsets = encoder.content(text.text)
    seen = set()
    for epoch in range(20):
        rows.set_epoch(epoch)
        row = rows[0]
        assert row == rows[0]  # a function of seed, epoch and number
        assert len(row["document"]) == 32
        assert (row["document"][0], row["document"][-1]) == (2, 3)
        start = next(n for n in range(len(ids)) if ids[n : n + 30] == row["document"][1:-1])
        seen.add(start)
        assert all(len(query) <= 5 for query in row["queries"])
        known = [(a, b) for place in row["places"] if place >= 0 for a, b in [row["spans"][place]]]
        for a, b in known:  # the tokens of characters 10 to 60
            chars = offsets[start + a - 1][0], offsets[start + b - 2][1]
            assert chars[0] <= 10 or offsets[start + a - 2][1] <= 10
            assert chars[1] >= 60 or offsets[start + b - 1][0] >= 60
    assert len(seen) > 5


def test_an_example_that_stands_twice_is_never_its_own_wrong_answer(tmp_path):
    once = examples(2)
    encoder = Encoder(bert())
    rows = Rows([*once, once[0]], encoder, length=100)
    assert collate([rows[n] for n in range(3)])["example"].tolist() == [0, 1, 0]
    trainer = make(tmp_path, rows=rows, passage_weight=0.0)
    trainer.model.train()
    with torch.no_grad():
        pair = trainer.compute_loss(trainer.model, _only(collate([rows[0], rows[1]]), 0))
        with_itself = trainer.compute_loss(trainer.model, _only(collate([rows[0], rows[1], rows[2]]), 0))
        other = trainer.compute_loss(trainer.model, _only(collate([rows[0], rows[1], rows[2]]), 1))
    assert float(with_itself) == pytest.approx(float(pair), rel=1e-12)
    assert float(other) != pytest.approx(float(pair), rel=1e-3)


def _only(batch, document):
    """The queries of one document."""
    mine = batch["owner"] == document
    parts = batch["query_ids"].split(batch["query_lengths"].tolist())
    kept = [part for part, use in zip(parts, mine, strict=True) if use]
    lengths = torch.tensor([len(part) for part in kept])
    return batch | {"query_ids": torch.cat(kept), "query_lengths": lengths, "owner": batch["owner"][mine],
                    "places": batch["places"][mine]}  # fmt: skip


def test_contrastive_loss_is_its_formula():
    generator = torch.Generator().manual_seed(1)
    q, d = (torch.nn.functional.normalize(torch.randn(n, 6, generator=generator, dtype=torch.double), dim=-1)
            for n in (4, 5))  # fmt: skip
    right = torch.tensor([0, 3, 3, 1])
    ignored = torch.zeros(4, 5, dtype=torch.bool)
    ignored[0, 4] = ignored[1, 3] = True  # of the second query the right answer, which always counts
    expected = 0.0
    for m in range(4):
        scores = {n: float(q[m] @ d[n]) / 0.1 for n in range(5) if (m, n) != (0, 4)}
        total = sum(torch.tensor(s, dtype=torch.double).exp() for s in scores.values())
        expected -= float(scores[int(right[m])] - total.log()) / 4
    assert float(contrastive_loss(q, d, right, 0.1, ignored)) == pytest.approx(expected, rel=1e-12)
    assert float(contrastive_loss(q[:0], d, right[:0], 0.1)) == 0.0


@pytest.mark.parametrize("how", ["mean", "cls"])
def test_pooled_reads_valid_tokens(how):
    states = torch.randn(2, 7, 4, dtype=torch.double)
    valid = torch.arange(7) < torch.tensor([[7], [3]])
    spoiled = states.masked_fill(~valid[..., None], 1e4)
    assert torch.allclose(pooled(spoiled, how, valid)[1], pooled(states[1:, :3], how)[0])


def test_recomputed_gradients_are_those_of_the_whole_batch(tmp_path):
    teacher = Encoder(bert(5, plan=False, positions=40))
    found = []
    for recompute in (True, False):
        trainer = make(tmp_path, teacher=teacher, recompute=recompute)
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, collate([trainer.train_dataset[n] for n in range(5)]))
        loss.backward()
        found.append((loss.detach(), [p.grad for p in trainer.model.parameters()]))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-12)
    assert all(g is not None for g in found[0][1])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_a_batch_is_computed_as_each_text_alone(tmp_path):
    """Padding of queries, order and cutting change nothing: every vector is that of its text by itself."""
    teacher = Encoder(bert(5, plan=False))
    every = Rows(examples(), Encoder(None), length=100, seed=2)  # no crops, so the places of queries are known
    trainer = make(tmp_path, rows=every, teacher=teacher, passage_weight=0.7, keep_weight=0.3)
    rows = [trainer.train_dataset[n] for n in (4, 0, 2)]
    student, model = trainer.student, trainer.model.eval()

    def vector(of, ids, span=None):
        states = of(input_ids=torch.tensor([ids])).last_hidden_state[0]
        mean = states[slice(*span) if span else slice(None)].mean(0)
        return mean / mean.norm()

    with torch.no_grad():
        documents = [vector(model, row["document"]) for row in rows]
        asked = [(n, query, place) for n, row in enumerate(rows)
                 for query, place in zip(row["queries"], row["places"], strict=True)]  # fmt: skip
        queries = [vector(model, query) for _, query, _ in asked]
        spans = [(n, span) for n, row in enumerate(rows) for span in row["spans"]]
        passages = [vector(model, rows[n]["document"], span) for n, span in spans]
        ce = [
            -(torch.stack(documents) @ q / 0.05).log_softmax(0)[n] for (n, _, _), q in zip(asked, queries, strict=True)
        ]
        known = [(n, place, q) for (n, _, place), q in zip(asked, queries, strict=True) if place >= 0]
        index = [sum(len(r["spans"]) for r in rows[:n]) + place for n, place, _ in known]
        found = [-(torch.stack(passages) @ q / 0.05).log_softmax(0)[at]
                 for at, (_, _, q) in zip(index, known, strict=True)]  # fmt: skip
        alone = [vector(teacher.model, [2, *rows[n]["document"][a:b], 3]) for n, (a, b) in spans]
        kept = [1 - vector(teacher.model, query) @ q for (_, query, _), q in zip(asked, queries, strict=True)]
        cut = [1 - a @ p for a, p in zip(alone, passages, strict=True)]
        expected = (
            sum(ce) / len(ce) + 0.7 * sum(found) / len(found) + 0.3 * (sum(kept) / len(kept) + sum(cut) / len(cut))
        )
        loss = trainer.compute_loss(model, collate(rows))
    assert student.model is model
    assert float(loss) == pytest.approx(float(expected), rel=1e-9)


def test_training_finds_documents_and_goes_on_after_a_stop(tmp_path):
    teacher = Encoder(bert(0, plan=False))
    given = {"max_steps": 24, "save_strategy": "steps", "save_steps": 11, "save_total_limit": 5, "teacher": teacher}
    whole = make(tmp_path / "a", **given)
    whole.train()
    curve = losses(whole)
    assert sum(curve[-4:]) < 0.7 * sum(curve[:4])
    entry = next(h for h in whole.state.log_history if "loss" in h)
    assert entry["loss"] == pytest.approx(
        entry["loss_documents"] + 0.5 * entry["loss_passages"] + entry["loss_keep"], rel=1e-4
    )
    again = make(tmp_path / "a", model=bert(9), **given)  # its weights come from the checkpoint
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "out" / "checkpoint-11"))
    assert losses(again) == pytest.approx(curve, rel=1e-6)


def test_the_best_checkpoint_is_kept(tmp_path):
    scores = iter([0.2, 0.9, 0.3])
    given = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    trainer = make(tmp_path, evaluate=lambda: {"mrr": next(scores)}, load_best_model_at_end=True, **given)
    trainer.train()
    assert trainer.state.best_metric == 0.9
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    saved = BertModel.from_pretrained(tmp_path / "out" / "checkpoint-4", add_pooling_layer=False)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), trainer.model.parameters(), strict=True))


def test_a_loss_that_is_no_number_stops_and_spoils_nothing(tmp_path):
    model = bert()
    trainer = make(tmp_path, model=model, max_steps=6, save_strategy="steps", save_steps=1)
    step, before = trainer.compute_loss, {}

    def spoiled(model, inputs, **options):
        loss = step(model, inputs, **options)
        if trainer.state.global_step == 2:
            before.update({n: p.detach().clone() for n, p in model.named_parameters()})
            return loss * float("nan")
        return loss

    trainer.compute_loss = spoiled
    with pytest.raises(Diverged, match="nan at step 3"):
        trainer.train()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"keep_weight": -1.0}, "keep_weight"),
        ({"keep_weight": 1.0}, "needs a teacher"),
        ({"per_device_train_batch_size": 7}, "6 documents, and a step takes 7"),
        ({"per_device_train_batch_size": 1}, "no wrong answers"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path, given, words):
    with pytest.raises(ValueError, match=words):
        make(tmp_path, **given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"length": 2}, "length must leave room"),
        ({"query": 1}, "query must leave"),
        ({"queries": 0}, "at least 1 query"),
    ],
)
def test_rows_that_cannot_be_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        Rows(examples(), Encoder(None), **given)
    with pytest.raises(ValueError, match="no examples"):
        Rows([], Encoder(None))
    with pytest.raises(ValueError, match="x: the document or a query holds nothing"):
        Rows([replace(examples(1)[0], name="x", queries=(Query(" "),))], Encoder(None))
