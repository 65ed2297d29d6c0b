"""Masked language modelling: how many tokens, which, replaced by what, and when anew."""

import random

import pytest
import torch

from hf_tfast.training.masking import MaskedRows
from hf_tfast.training.packing import IGNORED, collate, pack
from hf_tfast.training.run import pretrain
from hf_tfast.training.tokens import byte_tokenizer
from tests.training.tiny import arguments, write_texts

TOKENIZER = byte_tokenizer(256)


@pytest.fixture(scope="module")
def packed():
    draw = random.Random(5)
    found = [[1, *(draw.randrange(4, 260) for _ in range(draw.randrange(50, 600))), 2] for _ in range(200)]
    return pack(found, 256, 0)


def seen(rows):
    batch = collate([rows[n] for n in range(len(rows))])
    return batch["input_ids"], batch["labels"] != IGNORED, batch


@pytest.mark.parametrize("share", [0.15, 0.4])
def test_shares(packed, share):
    ids, chosen, batch = seen(MaskedRows(packed, TOKENIZER, share, seed=random.randrange(10**6)))
    text = packed.ids > 3
    count = int(chosen.sum())
    assert not (chosen & ~text).any(), "special tokens and padding stay"
    near = lambda x, p, n: abs(x - p) < 5 * (p * (1 - p) / n) ** 0.5  # noqa: E731 five standard deviations
    assert near(count / int(text.sum()), share, int(text.sum()))
    assert near(int((ids[chosen] == 3).sum()) / count, 0.8, count)
    assert near(int((ids[chosen] == packed.ids[chosen]).sum()) / count, 0.1 + 0.1 / 256, count)
    assert torch.equal(ids[~chosen], packed.ids[~chosen].long())
    assert torch.equal(batch["labels"][chosen], packed.ids[chosen].long())
    replaced = ids[chosen & (ids != 3) & (ids != packed.ids)]
    assert int(replaced.amin()) > 3
    assert len(replaced.unique()) > 225, "any token of text may replace"


def test_places_are_spread_evenly(packed):
    _, chosen, _ = seen(MaskedRows(packed, TOKENIZER, 0.15, seed=1))
    columns = chosen.float().mean(0)
    assert float(columns.amin()) > 0.15 - 5 * (0.15 * 0.85 / len(chosen)) ** 0.5 - 0.02
    assert float(columns.amax()) < 0.15 + 5 * (0.15 * 0.85 / len(chosen)) ** 0.5
    neighbours = (chosen[:, 1:] & chosen[:, :-1]).float().mean()
    assert abs(float(neighbours) - 0.15**2) < 0.003, "neighbours are chosen independently"


def test_every_epoch_draws_anew_and_the_same_again(packed):
    rows = MaskedRows(packed, TOKENIZER, seed=7)
    first, again = seen(rows), seen(rows)
    assert torch.equal(first[0], again[0])
    rows.set_epoch(1)
    second = seen(rows)
    both = float((first[1] & second[1]).float().mean())
    assert abs(both - 0.15**2) < 0.003, "independent of the epoch before"
    rows.set_epoch(0)
    assert torch.equal(seen(rows)[0], first[0])
    assert not torch.equal(seen(MaskedRows(packed, TOKENIZER, seed=8))[1], first[1])


def test_no_call_touches_the_global_generator(packed):
    before = torch.random.get_rng_state()
    MaskedRows(packed, TOKENIZER)[0]
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_bad_share(packed, share):
    with pytest.raises(ValueError, match="between 0 and 1"):
        MaskedRows(packed, TOKENIZER, share)


def test_a_tokenizer_without_a_mask(packed):
    tokenizer = byte_tokenizer(8)
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="no mask token"):
        MaskedRows(packed, tokenizer)


def test_a_training_draws_every_epoch_anew(tmp_path, monkeypatch):
    """Which rows a training reads, and in which epoch it takes them to be: each once an epoch."""
    read, plain = [], MaskedRows.__getitem__

    def spied(self, n):
        if len(self) > 3:
            read.append((self.epoch, n))
        return plain(self, n)

    texts = write_texts(tmp_path / "texts", count=6, words=20)
    given = arguments(texts, tmp_path / "out", max_steps=-1, num_train_epochs=3, eval_strategy="no",
                      per_device_train_batch_size=4)  # fmt: skip
    monkeypatch.setattr(MaskedRows, "__getitem__", spied)
    (record,) = pretrain(*given, two_way=True)
    rows = record["data"]["train"]["sequences"]
    drawn = read[: 3 * rows]
    assert sorted(drawn) == [(epoch, n) for epoch in range(3) for n in range(rows)]
    assert [epoch for epoch, _ in drawn] == sorted(epoch for epoch, _ in drawn)
