"""Packing loses nothing, tells pieces apart, and a model over packed rows does what it does over single documents."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_tfast.models.configuration_tfast import TFastConfig
from hf_tfast.models.modeling_tfast import TFastForCausalLM, TFastForMaskedLM
from hf_tfast.training.packing import IGNORED, PackedRows, collate, pack

PAD = 0
documents = st.lists(st.lists(st.integers(1, 9), max_size=30), max_size=12).filter(any)


@settings(max_examples=150, deadline=None)
@given(found=documents, length=st.integers(2, 20))
def test_every_token_once(found, length):
    packed = pack(found, length, PAD)
    flat = [token for document in found for token in document]
    assert packed.ids.shape == packed.positions.shape == (-(-len(flat) // length), length)
    assert packed.ids.flatten()[packed.real.flatten()].tolist() == flat
    assert packed.ids[~packed.real].tolist() == [PAD] * packed.report.padding


@settings(max_examples=150, deadline=None)
@given(found=documents, length=st.integers(2, 20))
def test_segments_are_pieces_of_documents(found, length):
    packed = pack(found, length, PAD)
    owner = [n for n, document in enumerate(found) for _ in document]
    expected, seen = [], None
    for place in range(packed.ids.numel()):
        here = (place // length, owner[place] if place < len(owner) else "padding")
        expected.append(0 if here != seen else expected[-1] + 1)
        seen = here
    assert packed.positions.flatten().tolist() == expected
    report, full = packed.report, [document for document in found if document]
    assert (report.documents, report.empty) == (len(full), len(found) - len(full))
    assert report.tokens + report.padding == packed.ids.numel()
    assert report.pieces == expected.count(0) - bool(report.padding)
    assert int(packed.segments[:, -1].sum()) == expected.count(0)
    assert int(packed.segments.amin()) == 1


@settings(max_examples=80, deadline=None)
@given(found=documents, length=st.integers(2, 20))
def test_labels_are_all_but_the_first_of_a_piece(found, length):
    packed = pack(found, length, PAD)
    rows = PackedRows(packed)
    batch = collate([rows[n] for n in range(len(rows))])
    targets = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][targets], batch["input_ids"][targets])
    assert int(targets.sum()) == packed.report.tokens - packed.report.pieces
    assert not targets[batch["position_ids"] == 0].any()
    assert packed.report.unpredicted == packed.report.pieces - packed.report.documents


@pytest.mark.parametrize("attention", ["window", "hashed", "sdpa"])
@pytest.mark.parametrize("two_way", [False, True])
def test_packed_equals_separate(attention, two_way):
    draw = random.Random(f"{attention}{two_way}")
    found = [[draw.randrange(1, 20) for _ in range(draw.randrange(1, 40))] for _ in range(9)]
    choice = {
        "mechanism": "dense" if attention == "sdpa" else attention,
        **({} if attention == "sdpa" else {"window": 6}),
    }
    config = TFastConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                         intermediate_size=32, attention=choice)  # fmt: skip
    torch.manual_seed(draw.randrange(999))
    model = (TFastForMaskedLM if two_way else TFastForCausalLM)(config).double().eval()
    packed = pack(found, 48, PAD)
    rows = PackedRows(packed)
    batch = collate([rows[n] for n in range(len(rows))])
    if attention == "sdpa":
        model.set_attn_implementation("sdpa")
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        for row in range(len(rows)):
            for piece in range(1, int(packed.segments[row].amax()) + 1):
                mine = packed.segments[row] == piece
                alone = model(input_ids=batch["input_ids"][row][mine][None]).logits[0]
                torch.testing.assert_close(together[row][mine], alone, atol=1e-10, rtol=1e-10)


def test_first():
    packed = pack([[1] * 50], 10, PAD)
    assert len(packed.first(3).ids) == 3
    assert packed.first(3).report == packed.report
    assert packed.first(None) is packed.first(9) is packed


def test_part_of_a_packing_knows_its_padding():
    packed = pack([[1] * 25], 10, PAD)
    assert packed.first(2).real.all()
    assert int((~packed.real).sum()) == 5


@pytest.mark.parametrize(
    ("found", "length", "words"), [([[1]], 1, "at least 2 tokens"), ([[], []], 8, "all of the 2 documents are empty")]
)
def test_bad_packing_is_told(found, length, words):
    with pytest.raises(ValueError, match=words):
        pack(found, length, PAD)
