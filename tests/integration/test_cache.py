"""The bounded cache gives the numbers of the full one, and stays bounded: generation, batches, beams, roll-backs."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache, StaticCache

from hf_tfast.attention.dense import Dense
from hf_tfast.attention.window import Window
from hf_tfast.integration.apply import apply_plan, remove_plan
from hf_tfast.integration.cache import cache_bytes, unbound_cache
from hf_tfast.integration.caches import window as cache_module
from hf_tfast.integration.caches.window import ROLLBACK, WindowLayer
from hf_tfast.integration.plan import FastPlan

WORDS = 40
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
KINDS = {
    "llama": {**SMALL, "num_key_value_heads": 2},
    "qwen3": {**SMALL, "num_key_value_heads": 1, "head_dim": 8},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 512, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {**SMALL, "num_key_value_heads": 2, "sliding_window": None},
}


def build(kind="llama", plan=None, **more):
    """A tiny float64 model whose logits depend on all it has read."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=WORDS, **{**KINDS[kind], **more}))
    model = model.double().eval()
    for p in model.parameters():
        p.data = torch.randn_like(p) * 0.4 + (p.dim() == 1)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model if plan is None else apply_plan(model, FastPlan(attention=plan))


def unbounded(model):
    """The same model with Transformers' own cache."""
    model = copy.deepcopy(model)
    for module in model.modules():
        unbound_cache(module)
    return model


def prompt(pads, length=20, seed=0):
    words = torch.randint(5, WORDS, (len(pads), length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(words)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    return {"input_ids": words * mask, "attention_mask": mask}


def generate(model, inputs, new=80, **options):
    """Sampled by default: greedy tokens of a random model soon repeat, and hide what is read."""
    torch.manual_seed(1)
    options = {"do_sample": True, "return_dict_in_generate": True, "output_logits": True, **options}
    return model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, **options)


def same(one, two, beams=False):
    assert torch.equal(one.sequences, two.sequences)
    if not beams:
        torch.testing.assert_close(torch.stack(one.logits), torch.stack(two.logits), rtol=0.0, atol=2e-6)


def stored(cache):
    return [layer.keys.shape[2] for layer in cache.layers]


def layers_of(cache, kind=WindowLayer):
    assert all(type(layer) is kind for layer in cache.layers)
    return cache.layers


@pytest.fixture(params=[1, 32], ids=["rollback 1", "rollback 32"])
def rollback(request, monkeypatch):
    monkeypatch.setattr(cache_module, "ROLLBACK", request.param)
    return request.param


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_the_same_and_bounded(kind, sinks):
    model = build(kind, Window(window=8, sinks=sinks))
    inputs = prompt([0, 0])
    bounded, full = generate(model, inputs), generate(unbounded(model), inputs)
    uncached = generate(model, inputs, use_cache=False)
    same(bounded, full)
    same(bounded, uncached)
    layers_of(bounded.past_key_values)
    assert stored(full.past_key_values) == [99, 99]
    assert stored(bounded.past_key_values) == [sinks + 8 + ROLLBACK] * 2
    assert bounded.past_key_values.get_seq_length() == 99
    assert cache_bytes(bounded.past_key_values) < cache_bytes(full.past_key_values) * 0.52
    greedy = {"do_sample": False}
    assert torch.equal(
        generate(model, inputs, **greedy).sequences, generate(model, inputs, use_cache=False, **greedy).sequences
    )


@pytest.mark.parametrize("sinks", [0, 4, 12])
@pytest.mark.parametrize("pads", [[0, 7, 19], [3, 3, 3], [17, 18, 19], [0, 20, 4]], ids=str)
def test_left_padded_batches(monkeypatch, sinks, pads):
    """Rows shorter than the sinks, shorter than the window, and one without a token."""
    monkeypatch.setattr(cache_module, "ROLLBACK", 1)
    model = build("llama", Window(window=8, sinks=sinks))
    inputs = prompt(pads)
    bounded = generate(model, inputs, new=40)
    same(bounded, generate(unbounded(model), inputs, new=40))
    assert max(stored(bounded.past_key_values)) <= sinks + 8 + 1
    for row, pad in enumerate(pads):  # and as alone
        if pad < 20:
            alone = {"input_ids": inputs["input_ids"][row : row + 1, pad:]}
            tokens = bounded.sequences[row : row + 1, 20:]
            with torch.no_grad():
                logits = model(torch.cat([alone["input_ids"], tokens], 1), use_cache=False).logits[0, 19 - pad : -1]
            torch.testing.assert_close(torch.stack(bounded.logits)[:, row].double(), logits, rtol=0.0, atol=2e-6)


def test_right_padding_and_holes(rollback):
    """Steps with any mask: tokens that come late, rows that pause."""
    model = build("llama", Window(window=6, sinks=2))
    full = unbounded(model)
    random = torch.Generator().manual_seed(3)
    words = torch.randint(5, WORDS, (3, 150), generator=random)
    mask = (torch.rand(3, 150, generator=random) < 0.7).long()
    mask[:, -1] = 1
    caches, at = (DynamicCache(), DynamicCache()), 0
    with torch.no_grad():
        for step in (30, 1, 1, 1, 17, 1, 40, 1, 1, 5, 1, 30, 1, 19, 1):
            at += step
            ids = (mask[:, :at].cumsum(-1) - 1).clamp(min=0)[:, -step:]
            one, two = (
                m(words[:, at - step : at], attention_mask=mask[:, :at], position_ids=ids, past_key_values=c).logits
                for m, c in zip((model, full), caches, strict=True)
            )
            seen = mask[:, at - step : at].bool()
            torch.testing.assert_close(one[seen], two[seen], rtol=0.0, atol=1e-9)
    assert max(stored(caches[0])) <= 2 + 6 + rollback
    assert stored(caches[1]) == [150, 150]


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("pads", [[0, 0], [0, 11]], ids=str)
def test_chunks_after_keys_were_dropped(rollback, sinks, pads):
    model = build("llama", Window(window=8, sinks=sinks))
    inputs = prompt(pads, length=140)
    words, mask = inputs["input_ids"], inputs["attention_mask"]
    ids = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, got = DynamicCache(config=model.config), []
    with torch.no_grad():
        for first, last in ((0, 50), (50, 51), (51, 90), (90, 92), (92, 140)):
            part = slice(first, last)
            got.append(
                model(
                    words[:, part], attention_mask=mask[:, :last], position_ids=ids[:, part], past_key_values=cache
                ).logits
            )
        whole = model(words, attention_mask=mask, position_ids=ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(got, 1)[mask.bool()], whole[mask.bool()], rtol=0.0, atol=1e-9)
    assert max(stored(cache)) <= sinks + 7 + rollback
    assert layers_of(cache)[0].keys.untyped_storage().nbytes() == layers_of(cache)[0].keys.nbytes  # nothing held back


@pytest.mark.parametrize("pads", [[0, 0], [0, 9]], ids=str)
def test_beams(pads):
    model = build("llama", Window(window=8, sinks=4))
    inputs = prompt(pads)
    options = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    bounded, full = (generate(m, inputs, **options) for m in (model, unbounded(model)))
    same(bounded, full, beams=True)
    torch.testing.assert_close(bounded.sequences_scores, full.sequences_scores, rtol=0.0, atol=1e-5)
    assert max(stored(layers_of(bounded.past_key_values) and bounded.past_key_values)) <= 4 + 8 + ROLLBACK


@pytest.mark.parametrize("pads", [[0, 0, 0], [0, 5, 9], [0, 36, 38]], ids=str)
def test_rows_can_be_chosen_and_repeated(monkeypatch, pads):
    monkeypatch.setattr(cache_module, "ROLLBACK", 2)
    model = build("llama", Window(window=8, sinks=2))
    inputs = prompt(pads, length=40)
    mask, caches, models = inputs["attention_mask"], (DynamicCache(), DynamicCache()), (model, unbounded(model))
    changes = [
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda c: c.batch_select_indices(torch.tensor([5, 3, 0])), [5, 3, 0]),
        (lambda c: c.reorder_cache(torch.tensor([1, 0, 0])), [1, 0, 0]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda c: c.batch_select_indices([True, False, True, True, True, False]), [0, 2, 3, 4]),
    ]
    with torch.no_grad():
        for m, c in zip(models, caches, strict=True):
            m(**inputs, past_key_values=c)
        for change, order in changes:
            for c in caches:
                change(c)
            mask = mask[order]
            for _ in range(4):
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
                step = {"input_ids": torch.randint(5, WORDS, (len(mask), 1)), "attention_mask": mask}
                one, two = (m(**step, past_key_values=c).logits for m, c in zip(models, caches, strict=True))
                torch.testing.assert_close(one, two, rtol=0.0, atol=1e-9)
    assert max(stored(caches[0])) < 20 < stored(caches[1])[0]


@pytest.mark.parametrize("plan", [{"1-": Window(window=8)}, {"0": Window(window=8, sinks=2)}], ids=str)
@pytest.mark.parametrize("pads", [[0, 0], [0, 9]], ids=str)
def test_mixtures_bound_the_window_layers_only(plan, pads):
    model = build("llama", plan)
    inputs = prompt(pads)
    bounded = generate(model, inputs)
    same(bounded, generate(unbounded(model), inputs))
    for layer, module in zip(bounded.past_key_values.layers, model.model.layers, strict=True):
        window = not isinstance(module.self_attn._tfast_stamp.mechanism, Dense)
        assert isinstance(layer, WindowLayer) == window
        assert layer.keys.shape[2] < 99 if window else layer.keys.shape[2] == 99


def test_two_windows_in_one_model(rollback):
    model = build("llama", {"0": Window(window=5, sinks=1), "1": Window(window=20)})
    inputs = prompt([0, 9])
    bounded = generate(model, inputs)
    same(bounded, generate(unbounded(model), inputs))
    assert stored(bounded.past_key_values) == [1 + 5 + rollback, 20 + rollback]


def test_a_cache_can_be_copied_and_continued():
    model = build("llama", Window(window=8, sinks=2))
    inputs = prompt([0, 9], length=100)
    start = DynamicCache(config=model.config)
    ids = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        model(**inputs, position_ids=ids, past_key_values=start)
    more = torch.randint(5, WORDS, (2, 30))
    longer = {
        "input_ids": torch.cat([inputs["input_ids"], more], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1),
    }
    before = stored(start)
    first = generate(model, longer, past_key_values=copy.deepcopy(start))
    second = generate(model, longer, past_key_values=copy.deepcopy(start))
    same(first, second)
    same(first, generate(model, longer, use_cache=False))
    assert stored(start) == before
    assert start.get_seq_length() == 100


def test_a_user_s_cache_is_used_as_it_is():
    model = build("llama", Window(window=8, sinks=2))
    inputs = prompt([0, 9])
    wanted = generate(model, inputs, use_cache=False)
    static = StaticCache(config=model.config, max_cache_len=128)
    same(generate(model, inputs, past_key_values=static), wanted)
    assert not any(isinstance(layer, WindowLayer) for layer in static.layers)
    dense = DynamicCache()
    with torch.no_grad():
        for i in range(2):  # filled before the model sees it
            dense.update(torch.zeros(2, 2, 0, 4).double(), torch.zeros(2, 2, 0, 4).double(), i)
    same(generate(model, inputs, past_key_values=dense), wanted)
    assert stored(dense) == [99, 99]


def test_a_model_s_own_sliding_layers_stay():
    model = build("mistral", Window(window=8, sinks=2), sliding_window=16)
    inputs = prompt([0, 9])
    bounded = generate(model, inputs)
    same(bounded, generate(model, inputs, use_cache=False))
    assert not any(isinstance(layer, WindowLayer) for layer in bounded.past_key_values.layers)
    assert stored(bounded.past_key_values) == [15, 15]


def test_a_dense_mask_keeps_everything():
    model = build("llama", Window(window=8))
    words = prompt([0])["input_ids"]
    dense = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    cache = DynamicCache()
    with torch.no_grad():
        model(words, attention_mask=dense, past_key_values=cache)
        layers_of(cache, type(DynamicCache(config=model.config).layers[0]))
        cache = DynamicCache()
        model(words, past_key_values=cache)
        with pytest.raises(ValueError, match="dense 4-D mask came after the cache"):
            model(words[:, :2], attention_mask=torch.ones(1, 1, 2, 22, dtype=torch.bool), past_key_values=cache)


def test_assisted_generation_takes_tokens_back():
    model = build("llama", Window(window=8, sinks=2))
    helper = build("llama", num_hidden_layers=1)
    inputs = {"input_ids": prompt([0], length=60)["input_ids"], "attention_mask": torch.ones(1, 60, dtype=torch.long)}
    wanted = generate(model, inputs, do_sample=False, use_cache=False)
    for options in ({"assistant_model": helper}, {"prompt_lookup_num_tokens": 5}):
        got = generate(model, inputs, do_sample=False, **options)
        assert torch.equal(got.sequences, wanted.sequences)
        assert max(stored(got.past_key_values)) <= 2 + 8 + ROLLBACK + 20


@pytest.mark.parametrize("pads", [[0, 0], [0, 9]], ids=str)
def test_crop(pads):
    model = build("llama", Window(window=8, sinks=2))
    inputs = prompt(pads, length=120)
    words, mask = inputs["input_ids"], inputs["attention_mask"]
    run = lambda to, cache=None, since=0: model(  # noqa: E731
        words[:, since:to], attention_mask=mask[:, :to], past_key_values=cache,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, since:to],
    ).logits  # fmt: skip
    with torch.no_grad():
        cache = DynamicCache()
        run(100, cache)
        cache.crop(-ROLLBACK)
        assert cache.get_seq_length() == 100 - ROLLBACK
        torch.testing.assert_close(run(80, cache, 100 - ROLLBACK)[:, -1], run(80)[:, -1], rtol=0.0, atol=1e-9)
        run(100, cache, 80)
        with pytest.raises(ValueError, match="activate_past_recording"):
            cache.crop(-ROLLBACK - 1)
        cache.activate_past_recording()
        run(120, cache, 100)
        cache.crop(-40)
        torch.testing.assert_close(run(120, cache, 80)[:, -1], run(120)[:, -1], rtol=0.0, atol=1e-9)
        cache.crop(0)
        assert max(stored(cache)) <= 2 + 7 + ROLLBACK
        short = DynamicCache()
        run(15, short)
        short.crop(-14)  # nothing dropped yet
        torch.testing.assert_close(run(15, short, 1)[:, -1], run(15)[:, -1], rtol=0.0, atol=1e-9)


def test_reset_starts_anew():
    model = build("llama", Window(window=8, sinks=2))
    cache = DynamicCache()
    with torch.no_grad():
        first = model(**prompt([0, 9], length=60), past_key_values=cache).logits
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(model(**prompt([0, 9], length=60), past_key_values=cache).logits, first)


def test_gradients_flow_through_the_cache():
    model = build("llama", Window(window=8, sinks=2))
    words = prompt([0, 0], length=90)["input_ids"]
    grads = []
    for cache in (DynamicCache(), None):
        model.zero_grad()
        if cache is None:
            out = model(words, use_cache=False).logits[:, -30:]
        else:
            model(words[:, :60], past_key_values=cache)
            out = model(words[:, 60:], past_key_values=cache).logits
        out.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_encoder_decoder():
    fields = {
        "d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 200,
        "forced_eos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("bart", vocab_size=WORDS, **fields)).double().eval()
    for p in model.parameters():
        p.data = torch.randn_like(p) * 0.4
    model.generation_config.eos_token_id, model.generation_config.forced_eos_token_id = None, None
    apply_plan(model, FastPlan(attention={"decoder.0-": Window(window=8, sinks=2)}))
    inputs = prompt([0, 0])
    bounded = generate(model, inputs)
    same(bounded, generate(model, inputs, use_cache=False))
    layers_of(bounded.past_key_values.self_attention_cache)
    assert stored(bounded.past_key_values.self_attention_cache) == [2 + 8 + ROLLBACK] * 2
    assert stored(bounded.past_key_values.cross_attention_cache) == [20, 20]
    assert cache_bytes(bounded.past_key_values) > cache_bytes(bounded.past_key_values.self_attention_cache)


def test_wrong_use_is_loud():
    model = build("llama", Window(window=8, sinks=2))
    inputs = prompt([0, 9], length=60)
    cache = DynamicCache()
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        words, mask = torch.tensor([[7], [8]]), torch.ones(2, 61, dtype=torch.long)
        with pytest.raises(ValueError, match="cannot change"):  # the padding of the prompt is forgotten
            model(words, attention_mask=mask, past_key_values=copy.deepcopy(cache))
        with pytest.raises(ValueError, match="cannot change"):
            model(words, past_key_values=copy.deepcopy(cache))
        layer = cache.layers[0]
        with pytest.raises(ValueError, match="does not run on them"):
            layer.update(layer.keys[:, :, :1], layer.values[:, :, :1])
        other = DynamicCache()
        model(**inputs, past_key_values=other)
        with pytest.raises(ValueError, match=r"Window\(window=8, sinks=2\).*now runs Window\(window=4, sinks=2\)"):
            build("llama", Window(window=4, sinks=2))(words, past_key_values=other)
        model.set_attn_implementation("sdpa")
        with pytest.raises(ValueError, match="now runs sdpa"):
            model(words, past_key_values=other)


def test_removing_the_plan_removes_the_hook():
    model = build("llama", Window(window=8))
    remove_plan(model)
    cache = DynamicCache()
    with torch.no_grad():
        model(**prompt([0, 0]), past_key_values=cache)
    assert not any(isinstance(layer, WindowLayer) for layer in cache.layers)
    assert not any(module._forward_pre_hooks for module in model.modules())
