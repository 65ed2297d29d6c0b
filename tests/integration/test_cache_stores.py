"""Caches that keep codes, block bounds or a running state give the numbers of the whole input, at fewer bytes."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hf_tfast.attention import _steps, hashed
from hf_tfast.attention.hashed import Hashed
from hf_tfast.attention.performer import Performer
from hf_tfast.attention.quantized import Quantized
from hf_tfast.attention.threshold import Threshold
from hf_tfast.attention.topk import TopK
from hf_tfast.attention.window import Window
from hf_tfast.integration.cache import cache_bytes
from hf_tfast.integration.caches.store import StoreLayer
from tests.integration.test_cache import WORDS, build, generate, prompt, same

PLANS = {
    "quantized": Quantized(smooth=8),
    "quantized 4": Quantized(bits=4, smooth=8, scheme="log"),
    "quantized queries": Quantized(smooth=0, queries=True, weights="bfloat16", sums="bfloat16"),
    "topk": TopK(k=8, block=4, window=3),
    "topk wide": TopK(k=5, block=3, window=0),
    "threshold": Threshold(tau=0.05, block=3, window=2),
    "threshold whole": Threshold(tau=0.1, block=4, window=5, renormalise=True),
    "performer": Performer(features=24),
    "hashed": Hashed(bits=2, rounds=2, cap=3, window=2),
    "hashed alone": Hashed(bits=10, rounds=3, cap=40, window=0),
}
CHANGED = {
    "quantized": {"bits": 4, "smooth": 3},
    "topk": {"block": 2},
    "threshold": {"tau": 0.3},
    "performer": {"seed": 1},
    "hashed": {"seed": 1},
}
plans = pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
pads = pytest.mark.parametrize("pads", [[0, 0], [0, 11], [20, 0]], ids=str)


def own(cache):
    assert all(type(layer) is StoreLayer for layer in cache.layers)
    return cache


def steps(model, words, mask, cuts, cache):
    """Logits of the tokens that exist, the input given in parts."""
    ids, got, at = (mask.cumsum(-1) - 1).clamp(min=0), [], 0
    with torch.no_grad():
        for to in cuts:
            part = slice(at, to)
            given = {"attention_mask": mask[:, :to], "position_ids": ids[:, part], "past_key_values": cache}
            got.append(model(words[:, part], **given).logits)
            at = to
    return torch.cat(got, 1)


def near(one, two, mask=None):
    one, two = (x if mask is None else x[mask.bool()] for x in (one, two))
    torch.testing.assert_close(one, two, rtol=0.0, atol=1e-8)


@plans
@pads
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generation_is_that_of_the_whole_input(kind, plan, pads):
    model = build(kind, plan)
    inputs = prompt(pads)
    for options in ({}, {"do_sample": False}):
        kept = generate(model, inputs, new=30, **options)
        same(kept, generate(model, inputs, new=30, use_cache=False, **options))
        assert own(kept.past_key_values).get_seq_length() == 49
    dense = generate(build(kind), inputs, new=30)
    assert not torch.allclose(torch.stack(kept.logits), torch.stack(dense.logits), atol=1e-3)


@plans
@pytest.mark.parametrize("holes", [0.0, 0.3])
def test_any_parts_and_any_mask(plan, holes):
    """Chunks, steps, tokens that come late and rows that pause."""
    model = build("llama", plan)
    random = torch.Generator().manual_seed(int(holes * 10))
    words = torch.randint(5, WORDS, (3, 90), generator=random)
    mask = (torch.rand(3, 90, generator=random) >= holes).long()
    mask[0, :13] = 0
    whole = model(words, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), use_cache=False).logits
    for cuts in ((30, 31, 32, 50, 51, 90), (1, 2, 40, 41, 42, 43, 90)):
        near(steps(model, words, mask, cuts, own_cache := DynamicCache()), whole, mask)
        own(own_cache)


@plans
def test_beams_and_rows(plan):
    model = build("llama", plan)
    inputs = prompt([0, 9])
    options = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "new": 20}
    kept, whole = (generate(model, inputs, use_cache=use, **options) for use in (True, False))
    same(kept, whole, beams=True)
    torch.testing.assert_close(kept.sequences_scores, whole.sequences_scores, rtol=0.0, atol=1e-5)
    words, mask = (inputs[name] for name in ("input_ids", "attention_mask"))
    cache = DynamicCache()
    steps(model, words, mask, (20,), cache)
    for change, order in (
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda c: c.batch_select_indices(torch.tensor([3, 1, 2])), [3, 1, 2]),
        (lambda c: c.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
        (lambda c: c.batch_select_indices([True, False, True]), [0, 2]),
    ):
        change(cache)
        words, mask = words[order], mask[order]
        for _ in range(3):
            words = torch.cat([words, torch.randint(5, WORDS, (len(words), 1))], 1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            ids = mask.sum(-1, keepdim=True) - 1
            with torch.no_grad():
                one = model(words[:, -1:], attention_mask=mask, position_ids=ids, past_key_values=cache).logits[:, -1]
                whole = model(words, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
            near(one, whole.logits[:, -1])


@plans
def test_assisted_generation(plan):
    model, helper = build("llama", plan), build("llama", num_hidden_layers=1)
    inputs = prompt([0], length=30)
    wanted = generate(model, inputs, new=40, do_sample=False, use_cache=False)
    for options in ({"assistant_model": helper}, {"prompt_lookup_num_tokens": 5}):
        got = generate(model, inputs, new=40, do_sample=False, **options)
        assert torch.equal(got.sequences, wanted.sequences)
        own(got.past_key_values)
    as_helper = generate(helper, inputs, new=40, do_sample=False, assistant_model=model)
    assert torch.equal(as_helper.sequences, generate(helper, inputs, new=40, do_sample=False).sequences)


@plans
@pads
def test_crop_takes_tokens_back(plan, pads):
    model = build("llama", plan)
    inputs = prompt(pads, length=90)
    words, mask = inputs["input_ids"], inputs["attention_mask"]
    whole = steps(model, words, mask, (90,), None)
    cache = DynamicCache()
    steps(model, words, mask, (60, 70), cache)
    for _ in range(2):
        cache.crop(-4)
    assert cache.get_seq_length() == 62
    ids = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        given = {"attention_mask": mask[:, :80], "position_ids": ids[:, 62:80], "past_key_values": cache}
        near(model(words[:, 62:80], **given).logits, whole[:, 62:80], mask[:, 62:80])
        given = {"attention_mask": mask, "position_ids": ids[:, 80:], "past_key_values": cache}
        near(model(words[:, 80:], **given).logits, whole[:, 80:], mask[:, 80:])
    with pytest.raises(ValueError, match="cannot take back 91 tokens: the cache holds 90"):
        cache.crop(-91)


@plans
def test_copies_resets_and_chunked_prefill(plan):
    model = build("llama", plan)
    inputs = prompt([0, 9], length=40)
    words, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = DynamicCache()
    first = steps(model, words, mask, (30,), cache)
    other = copy.deepcopy(cache)
    ids = (mask.cumsum(-1) - 1).clamp(min=0)[:, 30:]
    with torch.no_grad():
        one, two = (
            model(words[:, 30:], attention_mask=mask, position_ids=ids, past_key_values=c).logits
            for c in (cache, other)
        )
    assert torch.equal(one, two)
    cache.reset()
    assert cache.get_seq_length() == 0
    near(steps(model, words, mask, (30,), cache), first, mask[:, :30])
    whole = generate(model, inputs, new=10)
    same(generate(model, inputs, new=10, prefill_chunk_size=7), whole)


@plans
def test_other_caches_stay_as_they_are(plan):
    model = build("llama", plan)
    inputs = prompt([0, 9])
    wanted = generate(model, inputs, new=10, use_cache=False)
    static = StaticCache(config=model.config, max_cache_len=64)
    same(generate(model, inputs, new=10, past_key_values=static), wanted)
    filled = DynamicCache()
    for i in range(2):
        filled.update(torch.zeros(2, 2, 0, 4).double(), torch.zeros(2, 2, 0, 4).double(), i)
    same(generate(model, inputs, new=10, past_key_values=filled), wanted)
    assert not any(isinstance(layer, StoreLayer) for cache in (static, filled) for layer in cache.layers)


@plans
def test_a_cache_of_another_plan_is_refused(plan):
    model = build("llama", plan)
    words = prompt([0])["input_ids"]
    cache = DynamicCache()
    with torch.no_grad():
        model(words, past_key_values=cache)
    for other in (Window(window=8), {"0": Window(window=8)}, None, replace(plan, **CHANGED[plan.name])):
        with pytest.raises(ValueError, match="this cache holds what .* reads, and .*: (.*; )?start with a new cache"):
            build("llama", other)(words, past_key_values=copy.deepcopy(cache))
    mask = torch.ones(1, 21, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad(), pytest.raises(ValueError, match="counts .* valid tokens before these"):
        model(words[:, :1], attention_mask=mask, past_key_values=copy.deepcopy(cache))
    with pytest.raises(ValueError, match="dense 4-D mask came after"):
        model(words[:, :2], attention_mask=torch.ones(1, 1, 2, 22, dtype=torch.bool), past_key_values=cache)


@plans
def test_a_gradient_through_the_cache_is_refused_and_prefill_has_one(plan):
    model = build("llama", plan)
    words = prompt([0, 0])["input_ids"]
    cache = DynamicCache()
    grads = []
    for given in ({"past_key_values": cache}, {"use_cache": False}):
        model.zero_grad()
        model(words, **given).logits.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
    later = model(words[:, :3], past_key_values=cache).logits
    with pytest.raises(ValueError, match="keeps no gradient: train on whole sequences"):
        later.sum().backward()


@plans
def test_checked_against_the_definition(plan, monkeypatch):
    monkeypatch.setenv("HF_TFAST_CHECK", "1")
    model = build("llama", plan)
    generate(model, prompt([0, 7]), new=5)
    if plan.name == "quantized" and not plan.queries:
        monkeypatch.setattr(Quantized, "resume", lambda self, store, q, score, new: q * 0)
        with pytest.raises(ValueError, match="differs from its reference"):
            generate(model, prompt([0, 7]), new=5)


@pytest.mark.parametrize(("bits", "most"), [(8, 0.56), (4, 0.31)])
@pytest.mark.parametrize("prefill", [True, False], ids=["prefill", "steps"])
def test_quantized_bytes(bits, most, prefill):
    """At head width 64, of what Transformers' own cache takes in bf16."""
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096}
    model = build("llama", Quantized(bits=bits), **sizes).to(torch.bfloat16)
    words = torch.randint(5, WORDS, (2, 1000))
    ours, theirs = DynamicCache(), DynamicCache()
    mask = torch.ones_like(words)
    steps(model, words, mask, (1000,) if prefill else (900, *range(901, 1001)), ours)
    steps(build("llama", **sizes).to(torch.bfloat16), words, mask, (1000,), theirs)
    assert cache_bytes(theirs) == 2 * 2 * 1000 * 128 * 2
    assert most - 0.05 < cache_bytes(own(ours)) / cache_bytes(theirs) <= most


@pytest.mark.parametrize("pads", [[0, 0], [0, 300]], ids=str)
def test_a_step_reads_no_key_that_it_did_not_choose(pads):
    """2048 tokens are cached; all blocks of keys and values but those that a step reads are spoiled before it."""
    model = build("llama", TopK(k=128, block=32, window=32), num_hidden_layers=1, max_position_embeddings=4096)
    inputs = prompt(pads, length=2048)
    words, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = DynamicCache()
    steps(model, words, mask, (2047,), cache)
    store, read = own(cache).layers[0].store, []
    clean, attend_one = copy.deepcopy(cache), _steps.attend_one

    def watched(q, k, v, reads, score, beside):
        read.append(reads.starts // reads.span)
        return attend_one(q, k, v, reads, score, beside)

    ids = mask.sum(-1, keepdim=True) - 1
    step = {"input_ids": words[:, -1:], "attention_mask": mask, "position_ids": ids}
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_steps, "attend_one", watched)
        wanted = model(**step, past_key_values=clean).logits
    near = [(2047 - pad) // 32 for pad in pads]
    for b, own_block in enumerate(near):
        for g in range(2):
            chosen = {int(n) for n in read[0][b, 2 * g : 2 * g + 2].flatten()}
            spoiled = [n for n in range(64) if n not in chosen | {own_block, own_block - 1}]
            assert len(spoiled) > 40
            for n in spoiled:
                at = slice(n * 32, n * 32 + 32)
                store.keys.held[b, g, at] = store.values.held[b, g, at] = float("nan")
    with torch.no_grad():
        assert torch.equal(model(**step, past_key_values=cache).logits, wanted)


@pytest.mark.parametrize("pads", [[0, 0], [0, 300]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_step_hashes_one_key_and_reads_its_buckets_only(pads, dtype):
    """2048 tokens are cached; every key and value that a step does not read is spoiled before it."""
    mechanism = Hashed(bits=5, rounds=2, cap=40, window=8)
    model = build("llama", mechanism, num_hidden_layers=1, max_position_embeddings=4096).to(dtype)
    inputs = prompt(pads, length=2048)
    words, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = DynamicCache()
    steps(model, words, mask, (2047,), cache)
    store, read, made = own(cache).layers[0].store, [], []
    clean, attend_one, buckets = copy.deepcopy(cache), hashed.attend_one, hashed.buckets

    def watched(q, k, v, reads, score):
        read.append(reads)
        return attend_one(q, k, v, reads, score)

    def counted(x, turns, bits, rounds):
        made.append(x.shape[2])
        return buckets(x, turns, bits, rounds)

    ids = mask.sum(-1, keepdim=True) - 1
    step = {"input_ids": words[:, -1:], "attention_mask": mask, "position_ids": ids}
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashed, "attend_one", watched)
        patch.setattr(hashed, "buckets", counted)
        wanted = model(**step, past_key_values=clean).logits
    assert made == [1, 2], "the key, and the two queries that share it"
    found = read[0].starts
    assert 40 < int((found >= 0).sum(-1).max()) <= 80
    for b in range(2):
        for g in range(2):
            keep = torch.zeros(store.keys.held.shape[2], dtype=torch.bool)
            keep[found[b, 2 * g : 2 * g + 2].flatten().clamp(min=0)] = True
            keep[2047 - pads[b] - 7 : 2048 - pads[b]] = True
            store.keys.held[b, g, ~keep] = store.values.held[b, g, ~keep] = float("nan")
    with torch.no_grad():
        assert torch.equal(model(**step, past_key_values=cache).logits, wanted)


@pytest.mark.parametrize("lengths", [(200, 900)])
def test_a_running_state_does_not_grow(lengths):
    model = build("llama", Performer(features=24))
    sizes = []
    for length in lengths:
        cache = DynamicCache()
        words = torch.randint(5, WORDS, (2, length))
        steps(model, words, torch.ones_like(words), (length - 50, *range(length - 49, length + 1)), cache)
        sizes.append(cache_bytes(own(cache)))
    assert sizes[0] == sizes[1]
    with torch.no_grad(), pytest.raises(ValueError, match="summed up all but the last .*activate_past_recording"):
        cache.crop(-100)
    cache.activate_past_recording()
    more = torch.randint(5, WORDS, (2, 150))
    whole = torch.cat([words, more], 1)
    with torch.no_grad():
        model(more, past_key_values=cache)
        cache.crop(-140)
        later = model(whole[:, -140:], past_key_values=cache).logits
        near(later, model(whole, use_cache=False).logits[:, -140:])
        cache.crop(0)
        model(whole[:, :1], past_key_values=cache)
    assert cache_bytes(cache) <= sizes[0]


def test_fields_without_a_store_use_transformers_own():
    for mechanism in (TopK(k=4, block=1), Threshold(tau=0.1)):
        kept = generate(build("llama", mechanism), prompt([0]), new=3)
        assert not any(isinstance(layer, StoreLayer) for layer in kept.past_key_values.layers)
