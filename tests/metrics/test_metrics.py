"""Every metric against numbers worked out by hand or by another implementation, and what it refuses."""

import math
import random

import numpy as np
import pytest

pytest.importorskip("evaluate")
evaluate = pytest.importorskip("evaluate")

from hf_tfast import metrics  # noqa: E402


def compute(name, predictions, references, **options):
    return metrics.load(name).compute(predictions=predictions, references=references, **options)


def test_every_metric_is_found_and_of_the_kind_that_evaluate_knows():
    assert metrics.names() == ["accuracy", "bleu", "exact_match", "f1", "perplexity", "retrieval", "rouge", "spans"]
    for name in metrics.names():
        metric = metrics.load(name)
        assert isinstance(metric, evaluate.Metric)
        assert metric.description
        assert type(metric) is getattr(metrics, type(metric).__name__)  # by class, too


def test_unknown():
    with pytest.raises(ValueError, match="unknown metric 'meteor'; expected one of accuracy, bleu"):
        metrics.load("meteor")
    with pytest.raises(AttributeError, match="Meteor"):
        metrics.Meteor  # noqa: B018


def test_batches_give_what_all_at_once_gives():
    """As any evaluate.Metric: add_batch, then compute."""
    metric = metrics.load("accuracy")
    metric.add_batch(predictions=[0, 1, 1], references=[0, 1, 0])
    metric.add_batch(predictions=[2], references=[2])
    assert metric.compute() == {"accuracy": 0.75}
    assert evaluate.combine([metrics.load("accuracy"), metrics.load("f1")]).compute([0, 1], [0, 1])["f1"] == 1.0


def test_classes_against_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    draw = random.Random(3)
    true = [draw.randrange(5) for _ in range(60)]
    said = [draw.choice([t, draw.randrange(6)]) for t in true]
    assert compute("accuracy", said, true)["accuracy"] == pytest.approx(sklearn.accuracy_score(true, said))
    for average in ("macro", "micro", "weighted"):
        found = compute("f1", said, true, average=average)
        wanted = sklearn.precision_recall_fscore_support(true, said, average=average, zero_division=0)
        assert [found[name] for name in ("precision", "recall", "f1")] == pytest.approx(list(wanted[:3]))
    assert compute("f1", ["a", "b"], ["a", "a"])["f1"] == pytest.approx((2 / 3 + 0) / 2)
    with pytest.raises(ValueError, match="average must be one of"):
        compute("f1", [1], [1], average="mean")


def test_bleu_and_rouge_are_those_of_their_packages():
    sacrebleu = pytest.importorskip("sacrebleu")
    said = ["the cat sat on the mat", "there is a dog here today"]
    true = [["the cat sat on a mat", "a cat was on the mat"], ["there is one dog here today", "a dog is here today"]]
    found = compute("bleu", said, true)
    assert found["bleu"] == pytest.approx(
        sacrebleu.corpus_bleu(said, [[t[0] for t in true], [t[1] for t in true]]).score
    )
    assert found["chrf"] == pytest.approx(
        sacrebleu.corpus_chrf(said, [[t[0] for t in true], [t[1] for t in true]]).score
    )
    assert compute("bleu", said, said)["bleu"] == pytest.approx(100)
    uneven = compute("bleu", said, [true[0], true[1][:1]])["bleu"]
    assert 0 < uneven <= found["bleu"]
    rouge = compute("rouge", ["a b c d"], ["a b x d"])
    assert rouge["rouge1"] == pytest.approx(3 / 4)
    assert rouge["rouge2"] == pytest.approx(1 / 3)
    assert rouge["rougeL"] == pytest.approx(3 / 4)
    assert compute("rouge", ["a b c d"], [["x", "a b c d"]])["rougeL"] == 1  # the best reference
    with pytest.raises(ValueError, match="row 1 has no reference"):
        compute("bleu", ["a", "b"], [["a"], []])


def test_exact_match_as_squad_counts():
    found = compute("exact_match", ["The cat!", "dog house", ""], [["cat"], ["a dog", "the red house"], ["x"]])
    assert found["exact_match"] == pytest.approx(1 / 3)
    assert found["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert compute("exact_match", ["The cat!"], ["cat"], normalize=False)["exact_match"] == 0


def test_spans_against_conlleval():
    """Worked out by hand: of three true spans one is found whole, one with a wrong border, one of a wrong kind."""
    true = [["B-A", "I-A", "O", "B-B"], ["O", "B-A"]]
    said = [["B-A", "I-A", "O", "B-A"], ["I-A", "I-A"]]
    found = compute("spans", said, true)
    assert found["precision"] == pytest.approx(1 / 3)
    assert found["recall"] == pytest.approx(1 / 3)
    assert found["f1"] == pytest.approx(1 / 3)
    assert found["accuracy"] == pytest.approx(3 / 6)
    with pytest.raises(ValueError, match="O, B-KIND or I-KIND, got 'A'"):
        compute("spans", [["A"]], [["O"]])
    with pytest.raises(ValueError, match="text 0 has 1 predicted labels for 2 tokens"):
        compute("spans", [["O"]], [["O", "O"]])


def test_spans_against_seqeval():
    seqeval = pytest.importorskip("seqeval.metrics")
    draw = random.Random(8)
    kinds = ["O", "B-A", "I-A", "B-B", "I-B"]
    true = [[draw.choice(kinds) for _ in range(draw.randrange(1, 9))] for _ in range(80)]
    said = [[draw.choice([tag, draw.choice(kinds)]) for tag in row] for row in true]
    found = compute("spans", said, true)
    assert found["f1"] == pytest.approx(seqeval.f1_score(true, said))
    assert found["precision"] == pytest.approx(seqeval.precision_score(true, said))


def test_perplexity_counts_tokens_not_texts():
    found = compute("perplexity", [2.0, 30.0], [1, 9])
    assert found["perplexity"] == pytest.approx(math.exp(3.2))
    assert found["nats_per_token"] == pytest.approx(3.2)
    for predictions, references in (([1.0], [0]), ([math.nan], [1]), ([1.0, 1.0], [-1, 3])):
        with pytest.raises(ValueError, match="perplexity needs|not finite"):
            compute("perplexity", predictions, references)


def test_retrieval():
    scores = [[0.1, 0.9, 0.5], [0.2, 0.1, 0.3], [1.0, 1.0, 1.0]]
    found = compute("retrieval", scores, [1, 0, 0], recall_at=(1, 2))
    assert found["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)  # what scores all alike finds nothing
    assert found["recall_at_1"] == pytest.approx(1 / 3)
    assert found["recall_at_2"] == pytest.approx(2 / 3)
    draw = np.random.default_rng(0)
    many = draw.normal(size=(40, 25))
    right = draw.integers(25, size=40)
    ranks = [list(np.argsort(-row)).index(r) + 1 for row, r in zip(many, right, strict=True)]
    assert compute("retrieval", many.tolist(), right.tolist())["mrr"] == pytest.approx(np.mean(1 / np.array(ranks)))
    with pytest.raises(ValueError, match="query 0: the right document is 3"):
        compute("retrieval", [[0.1, 0.2]], [3])
    with pytest.raises(ValueError, match="not finite"):
        compute("retrieval", [[math.nan, 0.2]], [1])


@pytest.mark.parametrize(("predictions", "references", "words"), [
    ([], [], "nothing to score"), ([1], [1, 2], "1 predictions for 2 references"), ([1], None, "needs both"),
])  # fmt: skip
def test_what_cannot_be_scored(predictions, references, words):
    with pytest.raises(ValueError, match=words):
        compute("accuracy", predictions, references)


def test_a_missing_package_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    monkeypatch.delitem(sys.modules, "hf_tfast.metrics.rouge", raising=False)
    with pytest.raises(ImportError, match=r"rouge needs rouge_score.*hf_tfast\[metrics\]"):
        metrics.load("rouge")
