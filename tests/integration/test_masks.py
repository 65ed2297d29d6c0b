"""Rows of words against Transformers' own masks, dense masks, packed documents, and what a row cannot say."""

import logging

import pytest
import torch
from transformers import DynamicCache
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)

from hf_tfast import FastPlan, Window, apply_plan, mechanisms
from hf_tfast.integration._dense import pairs
from hf_tfast.integration.masks import key_row, pack_row, read_row
from hf_tfast.testing import assert_near, generator
from tests.integration.tiny_models import inputs, output, tiny, tokens

MASKS = {
    "causal": create_causal_mask,
    "causal window": create_sliding_window_causal_mask,
    "two-way": create_bidirectional_mask,
    "two-way window": create_bidirectional_sliding_window_mask,
    "chunks": create_chunked_causal_mask,
}


def _config(implementation, window=6):
    config = tiny("mistral").config
    config.sliding_window, config.attention_chunk_size = window, window
    config._attn_implementation = implementation
    return config


def _masks(make, length, **given):
    """Transformers' own bool mask and our row, for one forward of `length` new tokens."""
    given = {"attention_mask": None, "past_key_values": None, **given}
    embeds = torch.zeros(2, length, 8)
    return [make(config=_config(name), inputs_embeds=embeds, **given) for name in ("sdpa", "tfast")]


def _padding(side, length=20):
    valid = torch.ones(2, length, dtype=torch.long)
    if side == "left":
        valid[0, :7] = 0
    elif side == "right":
        valid[1, -5:] = 0
    elif side == "holes":
        valid[0, 4:6] = valid[1, 9] = 0
    elif side == "nothing":
        valid[0] = 0
    return valid


@pytest.mark.parametrize("kind", ["causal", "causal window", "two-way", "two-way window"])
@pytest.mark.parametrize("side", ["none", "left", "right", "holes", "nothing"])
def test_a_row_says_what_transformers_mask_says(kind, side):
    theirs, row = _masks(MASKS[kind], 20, attention_mask=None if side == "none" else _padding(side))
    causal = kind.startswith("causal")
    assert row.dtype == torch.int64
    assert row.shape == (2, 1, 1, 20), "O(L), never L x L"
    read = read_row(row)
    assert read.causal is causal
    assert read.window == (6 if "window" in kind else None)
    mask = type(read.mask)(causal=causal, valid=read.mask.valid)
    valid = torch.ones(2, 20, dtype=torch.bool) if side == "none" else _padding(side).bool()
    ours = pairs(mask, read.window, 20, 20, row.device).expand(2, 1, 20, 20)
    if theirs is None:  # Transformers leaves it to the module's flag
        assert side == "none"
        theirs = torch.ones(20, 20, dtype=torch.bool).tril() if causal else torch.ones(20, 20, dtype=torch.bool)
    there = valid[:, None, :, None]  # rows of padding are free: Transformers lets them read, ours are zeros
    assert torch.equal(ours & there, theirs.expand(2, 1, 20, 20) & there)


def test_packed_borders_are_read_from_the_mask_function():
    positions = torch.tensor([[*range(7), *range(5), *range(8)], [*range(20)]])
    for kind in ("causal", "causal window"):
        theirs, row = _masks(MASKS[kind], 20, position_ids=positions)
        read = read_row(row)
        assert read.mask.segments.tolist() == [[1] * 7 + [2] * 5 + [3] * 8, [1] * 20]
        mask = type(read.mask)(causal=True, segments=read.mask.segments)
        assert torch.equal(pairs(mask, read.window, 20, 20, row.device), theirs)


@pytest.mark.parametrize("padded", [False, True])
def test_a_sliding_cache_says_what_it_dropped(padded):
    model = tiny("mistral")  # window 12
    cache = DynamicCache(config=model.config)
    ids = tokens("sliding", length=30)
    valid = torch.ones(2, 31, dtype=torch.long)
    if padded:
        valid[0, :8] = 0
    with torch.no_grad():
        model(ids, attention_mask=valid[:, :30], past_key_values=cache)
    length, offset = cache.get_mask_sizes(1, 0)
    assert (length, offset) == (12, 19)
    row = create_sliding_window_causal_mask(
        config=_config("tfast", 12), inputs_embeds=torch.zeros(2, 1, 8), attention_mask=valid, past_key_values=cache
    )
    start = read_row(row).mask.start
    assert (start.tolist() == [11, 19]) if padded else start == 19
    assert read_row(row).mask.kept == 0


def test_patterns_that_a_row_cannot_say_are_refused():
    with pytest.raises(ValueError, match="chunked_overlay"):
        _masks(MASKS["chunks"], 20)
    inside = read_row(_masks(MASKS["chunks"], 6)[1])
    assert (inside.causal, inside.window, inside.mask.segments) == (True, None, None), "one chunk is plain causal"
    with pytest.raises(ValueError, match="or_masks"):
        _masks(create_causal_mask, 20, or_mask_function=lambda b, h, q, k: k < 3)
    with pytest.raises(ValueError, match="test_masks"):
        _masks(create_causal_mask, 20, and_mask_function=lambda b, h, q, k: k != 3)
    with pytest.raises(ValueError, match="or_masks"):
        _masks(create_causal_mask, 20, block_sequence_ids=torch.zeros(2, 20, dtype=torch.long))
    with pytest.raises(ValueError, match="'speed'"):
        key_row(2, 20, 20, speed=3)
    with pytest.raises(ValueError, match="attention mask"):
        key_row(2, 20, 20, attention_mask=torch.ones(2, 20, 20))


def test_words_survive_slices_moves_and_copies():
    documents = torch.tensor([[0, 0, 1, 1, 2, 2], [1, 1, 1, 1, 1, 1]])
    row = pack_row(documents, torch.tensor([[0], [5]]), window=9, causal=True)
    for same in (row, row.clone(), row.repeat(2, 1, 1, 1)[:2], row.to("cpu", copy=True)):
        read = read_row(same)
        assert torch.equal(read.mask.segments, documents)
        assert read.mask.start.tolist() == [0, 5]
        assert (read.window, read.causal, read.keys) == (9, True, 6)
    gap = pack_row(torch.ones(1, 6), torch.tensor([[0, 0, 7, 7, 7, 7]]))
    assert (read_row(gap).mask.start, read_row(gap).mask.kept) == (7, 2)
    row[0, 0, 0, :2] = row[0, 0, 0, 2]  # changed in place: read again
    assert read_row(row).mask.segments[0].tolist() == [1, 1, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="packed documents"):
        pack_row(torch.full((1, 3), 1 << 20))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_equals_separate(name):
    model = apply_plan(tiny(name), FastPlan(attention=Window(window=5, sinks=2 if name == "llama" else 0)))
    ids = inputs(name)["input_ids"][:1]
    borders = [13, 4, 12, 1]
    positions = torch.cat([torch.arange(n) for n in borders])[None]
    together = output(model, {"input_ids": ids, "position_ids": positions, "use_cache": False})
    alone = [output(model, {"input_ids": part, "use_cache": False}) for part in ids.split(borders, 1)]
    assert_near(together, torch.cat(alone, 1), name)


def test_positions_that_restart_unseen_are_refused():
    """Transformers finds packed documents only without a mask and without a cache."""
    model = apply_plan(tiny("llama"), FastPlan(attention=Window(window=5)))
    ids = inputs("llama")["input_ids"]
    positions = torch.cat([torch.arange(18), torch.arange(12)])[None].expand(2, -1)
    for given in ({"use_cache": True}, {"attention_mask": torch.ones_like(ids), "use_cache": False}):
        with pytest.raises(ValueError, match="position_ids restart"):
            output(model, {"input_ids": ids, "position_ids": positions, **given})
    with pytest.raises(ValueError, match="cu_seq_lens"):
        output(model, {"input_ids": ids, "cu_seq_lens_q": torch.tensor([0, 18, 30]), "use_cache": False})


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_dense_mask_is_honoured_exactly_with_one_warning(dtype, caplog):
    logging.Logger.warning_once.cache_clear()
    plan = FastPlan(attention=Window(window=7, sinks=1))
    model, given = apply_plan(tiny("llama"), plan), inputs("llama")
    i, j = torch.arange(30)[:, None], torch.arange(30)
    drawn = torch.rand(2, 1, 30, 30, generator=generator("dense mask", dtype)) < 0.7
    seen = drawn & ((j <= i) | (j == i + 2)) | (i == j)  # not even causal: the mask decides
    bias = torch.randn(2, 1, 30, 30, generator=generator("bias")) if dtype != torch.bool else torch.zeros(2, 1, 30, 30)
    floor = torch.finfo(torch.float32).min
    mask = seen if dtype == torch.bool else bias.masked_fill(~seen, floor)
    pattern = (i - j < 7) | (j < 1) | (i < 1)
    oracle = tiny("llama")
    oracle.set_attn_implementation("eager")
    expected = output(oracle, {**given, "attention_mask": bias.masked_fill(~(seen & pattern), floor)})
    assert_near(output(model, {**given, "attention_mask": mask}), expected, str(dtype))
    output(model, {**given, "attention_mask": mask})
    told = [record for record in caplog.records if "dense 4-D attention mask" in record.message]
    assert len(told) == 1
    assert "O(queries x keys)" in told[0].message


def test_masks_of_another_kind_are_refused():
    model, given = apply_plan(tiny("llama"), FastPlan(attention=Window(window=7))), inputs("llama")
    for mask in (torch.ones(2, 1, 30, 30, dtype=torch.long), torch.ones(2, 1, 29, 30, dtype=torch.bool)):
        with pytest.raises(ValueError, match="dense mask"):
            output(model, {**given, "attention_mask": mask})
    turned = pack_row(torch.ones(2, 30), causal=True).float()
    with pytest.raises(ValueError, match="turned the integer row"):
        output(model, {**given, "attention_mask": turned})


def test_both_registrations_exist_for_every_name():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    names = {"tfast", *(f"tfast_{name}" for name in mechanisms())}
    assert names <= set(ALL_ATTENTION_FUNCTIONS)
    assert all(ALL_MASK_ATTENTION_FUNCTIONS[name] is key_row for name in names)
