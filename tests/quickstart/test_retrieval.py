"""Scores of rankings, pooling, and the vectors that each rival makes."""

import random

import pytest
import torch

from hf_tfast import Window
from hf_tfast.quickstart.corpus import Corpus, Document
from hf_tfast.quickstart.encoder import lengthened, load_encoder, planned, pool, span_vectors
from hf_tfast.quickstart.retrieval import (
    Reading,
    Record,
    Rival,
    Text,
    document_table,
    passage_table,
    quality,
    ranks,
    rivals,
    tokenized,
)
from tests.quickstart.tiny_encoder import WORDS, save_tiny_encoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return load_encoder(str(save_tiny_encoder(tmp_path_factory.mktemp("tiny"))), device="cpu")


def test_scores_are_those_of_a_naive_computation():
    draw = torch.Generator().manual_seed(3)
    scores = torch.rand(40, 9, generator=draw)
    right = torch.randint(9, (40,), generator=draw)
    reciprocal, first = 0.0, 0
    for row, answer in zip(scores.tolist(), right.tolist(), strict=True):
        order = sorted(range(9), key=lambda n: -row[n])
        reciprocal += 1 / (order.index(answer) + 1)
        first += order[0] == answer
    found = quality(ranks(scores, right))
    assert found["mrr"] == pytest.approx(reciprocal / 40)
    assert found["recall_at_1"] == first / 40


def test_a_tie_is_no_success():
    assert ranks(torch.ones(1, 4), torch.tensor([2])).tolist() == [4]


def test_padding_does_not_reach_a_vector(encoder):
    rows = [random.Random(n).choices(range(5, 100), k=k) for n, k in enumerate((7, 30, 61))]
    together = encoder.vectors(rows)
    for row, vector in zip(rows, together, strict=True):
        torch.testing.assert_close(encoder.vectors([row])[0], vector, rtol=0, atol=1e-5)


def test_pool_is_the_mean_of_valid_states():
    states, valid = torch.randn(2, 5, 4), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    states[0, 3:] = 1e6
    mean = states[0, :3].mean(0)
    torch.testing.assert_close(pool(states, valid)[0], mean / mean.norm())
    torch.testing.assert_close(pool(states, valid, "cls")[1], states[1, 0] / states[1, 0].norm())


def test_span_vectors_are_means_of_their_tokens():
    states = torch.randn(9, 4)
    found = span_vectors(states, [(0, 2), (2, 9)])
    for vector, part in zip(found, (states[:2], states[2:]), strict=True):
        torch.testing.assert_close(vector, part.mean(0) / part.mean(0).norm())


def words(count, seed):
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def document(count=100, seed=0):
    text = words(count // 2, seed) + "\n\n" + words(count // 2, seed + 1)
    half = text.index("\n\n")
    return Document("d", text, [(0, half), (half + 2, len(text))], [(words(5, 9), 1)])


def test_tokens_of_passages(encoder):
    text = tokenized(encoder, document(), 102)
    assert (len(text.ids), text.spans, text.passages) == (100, [(0, 50), (50, 100)], [0, 1])
    cut = tokenized(encoder, document(), 42)
    assert (len(cut.ids), cut.spans, cut.passages) == (40, [(0, 40)], [0])


def test_what_each_rival_reads(encoder):
    """Vectors recomputed here from the model alone, by the definition of each rival."""
    dense = lengthened(encoder, 128)
    fast = planned(dense, Window(window=8, sinks=1))
    text = tokenized(encoder, document(), 128)
    read = {r.key: r.read(text) for r in rivals(encoder, dense, fast, 64, 128)}

    def states(model, ids):
        with torch.no_grad():
            return model(input_ids=torch.tensor([[2, *ids, 3]])).last_hidden_state[0]

    def unit(x):
        return x.mean(0) / x.mean(0).norm()

    def same(a, b):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)

    same(read["truncated"].document, unit(states(encoder.model, text.ids[:62])))
    chunks = [states(encoder.model, text.ids[n : n + 62]) for n in (0, 62)]
    same(read["chunked"].document, unit(torch.cat(chunks)))
    content = torch.cat([chunk[1:-1] for chunk in chunks])
    same(read["chunked"].passages, torch.stack([unit(content[:50]), unit(content[50:])]))
    for key, model in (("dense", dense.model), ("fast", fast.model)):
        whole = states(model, text.ids)
        same(read[key].document, unit(whole))
        same(read[key].passages, torch.stack([unit(whole[1:51]), unit(whole[51:101])]))
    assert read["alone"].document is None
    same(read["alone"].passages, torch.stack([unit(states(encoder.model, text.ids[a:b])) for a, b in text.spans]))
    assert (read["dense"].document - read["fast"].document).abs().max() > 1e-3


def test_longer_positions_leave_the_teacher_as_it_is(encoder):
    dense = lengthened(encoder, 128)
    assert encoder.model.config.max_position_embeddings == 64
    row = [list(range(5, 60))]
    assert torch.equal(encoder.vectors(row), dense.vectors(row))
    assert dense.tokenizer.model_max_length == 128
    assert encoder.tokenizer.model_max_length == 64


def record(key, documents=None, passages=None):
    made = Record(Rival(key, key, lambda text: Reading(None)), documents or [], passages or [], [2.0, 0.5, 1.0])
    made.peak_bytes, made.peak_method = 7, "kernel"
    return made


def test_tables_score_what_was_asked():
    docs = [Document(f"d{n}", "x", [(0, 1), (0, 1)], [(f"q{n}", 1)]) for n in range(3)]
    corpus = Corpus("test", docs)
    texts = [Text([1], [(0, 1), (0, 1)], [0, 1])] * 2 + [Text([1], [(0, 1)], [0])]  # the last passage was not read
    asked = torch.eye(4)[:3]
    documents = [torch.eye(4)[0], torch.eye(4)[1], torch.eye(4)[1] * 0.5 + torch.eye(4)[2] * 0.1]
    row = document_table([record("a", documents), record("alone")], corpus, asked)
    assert len(row) == 1
    assert (row[0]["mrr"], row[0]["recall_at_1"], row[0]["documents_per_second"]) == (1.0, 1.0, 1.0)
    # Passages 0 and 1 of each document: query 0 finds its own passage, query 1 only its document's other one.
    passages = [torch.stack([torch.eye(4)[3], torch.eye(4)[0]]), torch.eye(4)[[1, 3]], torch.eye(4)[[3]]]
    found = passage_table([record("a", passages=passages)], corpus, texts, asked)[0]
    assert found["queries"] == 2
    assert found["passage"]["recall_at_1"] == 0.5
    assert found["document"] == {"mrr": 1.0, "recall_at_1": 1.0}


def test_a_corpus_without_known_passages_is_scored_by_documents_alone():
    corpus = Corpus("test", [Document(f"d{n}", "x", [(0, 1)], [(f"q{n}", None)]) for n in range(2)])
    texts = [Text([1], [(0, 1)], [0])] * 2
    found = passage_table([record("a", passages=[torch.eye(2)[[0]], torch.eye(2)[[1]]])], corpus, texts, torch.eye(2))
    assert found[0]["passage"] is None
    assert found[0]["document"]["mrr"] == 1.0
