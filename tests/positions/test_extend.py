"""extend_positions on tiny random models of every family: short inputs stay equal, long ones run, so do reloads."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModel, EncoderDecoderModel, GPT2LMHeadModel, WhisperModel

from hf_tfast.positions.extend import extend_positions

OLD, NEW, WORDS = 24, 90, 60
BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
TWO = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": OLD,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
DISTIL = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": OLD}
ROPE = {**BERT, "max_position_embeddings": OLD}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LEARNED = {  # model type, fields, path of a table, special rows in front of it, config field
    "bert": ({**BERT, "max_position_embeddings": OLD}, "embeddings.position_embeddings", 0, "max_position_embeddings"),
    "roberta": (
        {**BERT, "max_position_embeddings": OLD + 2, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
        "embeddings.position_embeddings", 2, "max_position_embeddings",
    ),
    "mpnet": (
        {**BERT, "max_position_embeddings": OLD + 2}, "embeddings.position_embeddings", 2, "max_position_embeddings",
    ),
    "distilbert": (DISTIL, "embeddings.position_embeddings", 0, "max_position_embeddings"),
    "electra": (
        {**BERT, "max_position_embeddings": OLD, "embedding_size": 8},
        "embeddings.position_embeddings", 0, "max_position_embeddings",
    ),
    "gpt2": (
        {
            "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": OLD, "n_ctx": OLD, "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "wpe", 0, "n_positions",
    ),
    "gpt_neo": (
        {
            "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_position_embeddings": OLD, "window_size": 30,
            "attention_types": [[["global", "local"], 1]], "bos_token_id": 1, "eos_token_id": 2,
        },
        "wpe", 0, "max_position_embeddings",
    ),
    "opt": (
        {
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 24,
            "word_embed_proj_dim": 16, "max_position_embeddings": OLD,
        },
        "decoder.embed_positions", 2, "max_position_embeddings",
    ),
    "bart": (TWO, "encoder.embed_positions", 2, "max_position_embeddings"),
}  # fmt: skip
SINUSOIDAL = {
    "distilbert": {**DISTIL, "sinusoidal_pos_embds": True},
    "marian": TWO,
    "pegasus": TWO,
    "m2m_100": TWO,
}
ROTARY = {
    "llama": ROPE,
    "qwen3": {**ROPE, "num_key_value_heads": 1, "head_dim": 8},
    "gpt_neox": {**ROPE, "hidden_size": 64, "bos_token_id": 1, "eos_token_id": 2},
    "gemma3_text": {
        **ROPE, **ENDS, "num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "modernbert": {**ROPE, **ENDS, "cls_token_id": 1, "sep_token_id": 2, "num_hidden_layers": 2, "local_attention": 8},
}  # fmt: skip


def build(kind, fields, seed=0, cls=AutoModel):
    torch.manual_seed(seed)
    model = cls.from_config(AutoConfig.for_model(kind, vocab_size=WORDS, **fields)).eval()
    for name, p in model.named_parameters():
        if p.requires_grad and not (fields.get("sinusoidal_pos_embds") and "position" in name):
            p.data = torch.randn_like(p) * 0.3  # the usual 0.02 would hide positions
    return model


def run(model, length, seed=0):
    """Hidden states of `length` random tokens, without padding."""
    words = torch.randint(5, WORDS, (2, length), generator=torch.Generator().manual_seed(seed))
    more = {"decoder_input_ids": words.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=words, **more)[0]


def reloaded(model, folder):
    model.save_pretrained(folder)
    again, notes = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not notes["mismatched_keys"]
    return again.eval()


def check_longer(model, before, folder):
    """Short inputs as before, inputs of the new length run and depend on the far tokens, the reload is equal."""
    assert (run(model, OLD) - before).abs().max() == 0.0
    long = run(model, NEW)
    assert long.shape[1] == NEW
    assert torch.isfinite(long).all()
    again = reloaded(model, folder)
    assert (run(again, NEW) - long).abs().max() == 0.0
    assert (run(again, OLD) - before).abs().max() == 0.0


@pytest.mark.parametrize("kind", LEARNED)
def test_learned_tables_are_tiled(kind, tmp_path):
    fields, path, front, field = LEARNED[kind]
    model = build(kind, fields)
    before, table = run(model, OLD), model.get_submodule(path)
    old, requires_grad = table.weight.detach().clone(), table.weight.requires_grad
    assert extend_positions(model, NEW) is model
    new = table.weight.detach()
    assert new.shape[0] == table.num_embeddings == front + NEW
    assert torch.equal(new[: front + OLD], old)
    for n in range(NEW):
        assert torch.equal(new[front + n], old[front + n % OLD])
    assert (new.dtype, table.weight.requires_grad) == (old.dtype, requires_grad)
    counted = front if kind in ("roberta", "mpnet") else 0
    assert getattr(model.config, field) == NEW + counted
    assert getattr(model.config, "n_ctx", NEW) == NEW
    for name, buffer in model.named_buffers():
        if name.endswith("position_ids"):
            assert torch.equal(buffer, torch.arange(NEW + counted)[None])
        if name.endswith("token_type_ids"):
            assert torch.equal(buffer, torch.zeros(1, NEW + counted, dtype=torch.int64))
    check_longer(model, before, tmp_path)


@pytest.mark.parametrize("kind", ["bert", "roberta", "opt", "bart"])
def test_learned_tables_are_interpolated(kind, tmp_path):
    fields, path, front, _ = LEARNED[kind]
    model = build(kind, fields)
    old = model.get_submodule(path).weight.detach().clone()
    length = 3 * (OLD - 1) + 1  # every third row is an old one
    extend_positions(model, length, method="interpolate")
    new = model.get_submodule(path).weight.detach()
    assert torch.equal(new[:front], old[:front])
    body = old[front:]
    assert torch.equal(new[front], body[0])
    assert torch.equal(new[-1], body[-1])
    torch.testing.assert_close(new[front::3], body)
    torch.testing.assert_close(new[front + 1 :: 3], body[:-1] * 2 / 3 + body[1:] / 3)
    assert (run(reloaded(model, tmp_path), length) - run(model, length)).abs().max() == 0.0


@pytest.mark.parametrize("kind", SINUSOIDAL)
def test_sinusoidal_tables_are_computed_further(kind, tmp_path):
    model = build(kind, SINUSOIDAL[kind])
    before = run(model, OLD)
    extend_positions(model, NEW)
    longer = build(kind, {**SINUSOIDAL[kind], "max_position_embeddings": NEW})
    for path, module in longer.named_modules():
        if path.endswith(("embed_positions", "position_embeddings")):
            name = "weight" if hasattr(module, "weight") else "weights"
            wanted, got = getattr(module, name), getattr(model.get_submodule(path), name)
            torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0.0)
            assert got.requires_grad == wanted.requires_grad
    check_longer(model, before, tmp_path)
    with pytest.raises(ValueError, match="sinusoid"):
        extend_positions(model, NEW + 8, method="interpolate")


def test_a_sinusoidal_table_that_was_trained_counts_as_learned():
    model = build("distilbert", SINUSOIDAL["distilbert"])
    with torch.no_grad():
        model.embeddings.position_embeddings.weight[3, 5] += 0.1
    old = model.embeddings.position_embeddings.weight.detach().clone()
    extend_positions(model, NEW)
    assert torch.equal(model.embeddings.position_embeddings.weight[OLD : 2 * OLD], old)


@pytest.mark.parametrize("kind", ROTARY)
def test_rotary_models_keep_their_frequencies(kind, tmp_path):
    model = build(kind, ROTARY[kind])
    before, rope = run(model, OLD), model.config.to_dict()["rope_parameters"]
    extend_positions(model, NEW)
    assert model.config.max_position_embeddings == NEW
    assert model.config.to_dict()["rope_parameters"] == rope
    assert model.rotary_emb.max_seq_len_cached == NEW
    check_longer(model, before, tmp_path)


def yarn(old, theta, factor, original):
    """YaRN's frequencies (section 3.2, alpha 1, beta 32), written from the paper; `old` are the plain ones."""
    d = 2 * len(old)
    border = lambda turns: d * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))  # noqa: E731
    low, high = max(math.floor(border(32)), 0), min(math.ceil(border(1)), d - 1)
    ramp = ((torch.arange(len(old)) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return old / factor * ramp + old * (1 - ramp)


@pytest.mark.parametrize("kind", ROTARY)
def test_rotary_models_are_interpolated_by_yarn(kind, tmp_path):
    model = build(kind, ROTARY[kind])
    nested = kind in ("gemma3_text", "modernbert")
    prefix = "full_attention_" if nested else ""
    old = {name: b.clone() for name, b in model.rotary_emb.named_buffers()}
    before = model.config.to_dict()["rope_parameters"]
    extend_positions(model, 4 * OLD, method="interpolate")
    rope = model.config.rope_parameters
    mine = rope["full_attention"] if nested else rope
    assert mine["rope_type"] == "yarn"
    assert (mine["factor"], mine["original_max_position_embeddings"]) == (4.0, OLD)
    wanted = yarn(old[f"{prefix}inv_freq"], mine["rope_theta"], 4.0, OLD)
    torch.testing.assert_close(getattr(model.rotary_emb, f"{prefix}inv_freq"), wanted)
    assert not torch.equal(wanted, old[f"{prefix}inv_freq"])
    assert getattr(model.rotary_emb, f"{prefix}attention_scaling") == pytest.approx(0.1 * math.log(4.0) + 1.0)
    if nested:
        assert rope["sliding_attention"] == before["sliding_attention"]
        assert torch.equal(model.rotary_emb.sliding_attention_inv_freq, old["sliding_attention_inv_freq"])
    assert (run(reloaded(model, tmp_path), 4 * OLD) - run(model, 4 * OLD)).abs().max() == 0.0
    with pytest.raises(ValueError, match="scaled by 'yarn' already"):
        extend_positions(model, 8 * OLD, method="interpolate")
    frequencies = getattr(model.rotary_emb, f"{prefix}inv_freq").clone()
    extend_positions(model, 8 * OLD)  # keeps YaRN with its factor
    assert torch.equal(getattr(model.rotary_emb, f"{prefix}inv_freq"), frequencies)
    assert model.config.max_position_embeddings == 8 * OLD


def test_a_dynamically_scaled_rotation_is_refused_and_unchanged():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = build("llama", {**ROPE, "rope_parameters": rope})
    with pytest.raises(ValueError, match="by itself"):
        extend_positions(model, NEW)
    assert model.config.max_position_embeddings == OLD
    assert model.config.rope_parameters == rope


def test_a_rotation_that_depends_on_the_declared_length_is_refused_and_unchanged():
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
        "original_max_position_embeddings": OLD // 2,
    }  # fmt: skip
    model = build("llama", {**ROPE, "rope_parameters": rope})
    before = run(model, OLD)
    with pytest.raises(ValueError, match="changes with max_position_embeddings"):
        extend_positions(model, NEW)
    assert model.config.max_position_embeddings == OLD
    assert torch.equal(run(model, OLD), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", ["tile", "interpolate"])
def test_dtype_and_frozen_tables_are_kept(dtype, method):
    model = build("bert", LEARNED["bert"][0]).to(dtype)
    model.requires_grad_(False)
    extend_positions(model, NEW, method)
    table = model.embeddings.position_embeddings.weight
    assert (table.dtype, table.requires_grad, table.is_leaf) == (dtype, False, True)


def test_a_trained_table_takes_gradients_in_every_copy():
    model = build("bert", LEARNED["bert"][0])
    extend_positions(model, NEW)
    model(input_ids=torch.randint(5, WORDS, (1, NEW)))[0].square().sum().backward()
    assert (model.embeddings.position_embeddings.weight.grad.abs().sum(-1) > 0).all()


def test_both_stacks_of_bart_grow():
    model = build("bart", TWO)
    extend_positions(model, NEW)
    for stack in (model.encoder, model.decoder):
        assert stack.embed_positions.weight.shape == (NEW + 2, 16)
    with pytest.raises(ValueError, match="extend the whole model"):
        extend_positions(model.get_encoder(), NEW + 1)
    with pytest.raises(ValueError, match="extend the whole model"):
        extend_positions(model.get_decoder(), NEW + 1)


def test_a_model_of_two_models(tmp_path):
    encoder = build("bert", LEARNED["bert"][0])
    decoder = build("gpt2", {**LEARNED["gpt2"][0], "n_positions": 40, "add_cross_attention": True, "is_decoder": True})
    head = GPT2LMHeadModel(decoder.config).eval()
    model = EncoderDecoderModel(encoder=encoder, decoder=head)
    words = torch.randint(5, WORDS, (2, NEW))
    with pytest.raises(ValueError, match="decoder.transformer.wpe .* takes 40 positions already"):
        extend_positions(model, 30)
    assert model.encoder.embeddings.position_embeddings.num_embeddings == OLD  # nothing half done
    extend_positions(model, NEW)
    with torch.no_grad():
        long = model(input_ids=words, decoder_input_ids=words).logits
        model.save_pretrained(tmp_path)
        again = EncoderDecoderModel.from_pretrained(tmp_path).eval()
        assert (again(input_ids=words, decoder_input_ids=words).logits - long).abs().max() == 0.0
    assert again.config.encoder.max_position_embeddings == again.config.decoder.n_positions == NEW


def whisper():
    fields = {k: v for k, v in TWO.items() if not k.startswith(("max_", "forced"))}
    return build("whisper", {**fields, "max_source_positions": 30, "max_target_positions": OLD, "num_mel_bins": 8})


def test_whisper_counts_tokens_at_the_top_and_frames_in_its_encoder(tmp_path):
    model = whisper()
    sound, words = torch.randn(1, 8, 60), torch.randint(5, WORDS, (1, NEW))
    extend_positions(model, NEW)
    assert (model.config.max_source_positions, model.config.max_target_positions) == (30, NEW)
    assert model.decoder.max_target_positions == NEW
    frames = model.encoder.embed_positions.weight.detach().clone()
    extend_positions(model.get_encoder(), 50)
    table = model.encoder.embed_positions.weight
    assert table.shape == (50, 16)
    assert not table.requires_grad
    assert torch.equal(table[:30], frames)
    with torch.no_grad():
        model(input_features=sound.repeat(1, 1, 2)[..., :100], decoder_input_ids=words)
        model.save_pretrained(tmp_path)
        again = WhisperModel.from_pretrained(tmp_path).eval()
        sound = torch.randn(1, 8, 100)
        one, two = (m(input_features=sound, decoder_input_ids=words)[0] for m in (model, again))
    assert (one - two).abs().max() == 0.0
    wanted = WhisperModel(model.config)
    torch.testing.assert_close(table, wanted.encoder.embed_positions.weight, atol=1e-5, rtol=0.0)


def test_a_vision_language_model_extends_its_text():
    fields = {
        "text_config": {"model_type": "llama", "vocab_size": WORDS, **ROPE},
        "vision_config": {"model_type": "clip_vision_model", **BERT, "image_size": 8, "patch_size": 4},
        "image_token_index": 3,
    }
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model("llava", **fields))
    vision = {k: v.clone() for k, v in model.vision_tower.state_dict().items()}
    extend_positions(model, NEW)
    assert model.config.text_config.max_position_embeddings == NEW
    assert all(torch.equal(v, vision[k]) for k, v in model.vision_tower.state_dict().items())
    with pytest.raises(ValueError, match="patches of an image"):
        extend_positions(model.vision_tower, NEW)


REFUSED = {
    "t5": ({"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 24, "d_kv": 8}, "relative position bias"),
    "bloom": ({"hidden_size": 16, "n_layer": 1, "n_head": 2}, "ALiBi"),
    "vit": ({**BERT, "image_size": 8, "patch_size": 4}, "patches of an image"),
    "deberta-v2": (
        {**BERT, "max_position_embeddings": OLD, "relative_attention": True, "pos_att_type": ["c2p"]},
        "rel_embeddings",
    ),
    "xlnet": ({"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24}, "found no positions that it knows"),
    "esm": ({**BERT, "max_position_embeddings": OLD, "position_embedding_type": "rotary", "pad_token_id": 1}, "know"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_models_without_extendable_positions_say_why(kind):
    fields, why = REFUSED[kind]
    with pytest.raises(ValueError, match=why):
        extend_positions(build(kind, fields), 4096)


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama", "m2m_100"])
@pytest.mark.parametrize("length", [OLD - 1, OLD])
def test_a_length_that_is_not_longer_is_refused(kind, length):
    fields = LEARNED[kind][0] if kind in LEARNED else {**ROTARY, **SINUSOIDAL}[kind]
    with pytest.raises(ValueError, match=f"takes {OLD} positions already.*got {length}"):
        extend_positions(build(kind, fields), length)


def test_bad_arguments():
    model = build("bert", LEARNED["bert"][0])
    for length in (0, -3, 64.0, True, "64"):
        with pytest.raises(ValueError, match="length must be a whole number"):
            extend_positions(model, length)
    with pytest.raises(ValueError, match="unknown method 'stretch'; expected one of tile, interpolate"):
        extend_positions(model, NEW, method="stretch")
    with pytest.raises(ValueError, match="expected a Transformers model, got Linear"):
        extend_positions(torch.nn.Linear(2, 2), NEW)
    with torch.device("meta"):
        empty = AutoModel.from_config(model.config)
    with pytest.raises(ValueError, match="sharded, offloaded or on meta"):
        extend_positions(empty, NEW)
