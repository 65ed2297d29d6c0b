"""Tiny random models of many families, float32, two layers, a few thousand weights each, and inputs for them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from hf_tfast.testing import generator

VOCABULARY = 99
TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SMALL, **TEXT, "num_key_value_heads": 2, "head_dim": 8}
HALVES = {
    **TEXT,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 1,
}
IMAGE = {"image_size": 16, "patch_size": 4, "num_channels": 3}


@dataclass(frozen=True)
class Family:
    """A model family: how to make one, what its attention modules are, and what it can do."""

    make: Callable[[], hf.PreTrainedModel]
    modules: int  # self-attention modules that a plan for the whole model stamps with its mechanism
    causal: bool = False
    inputs: str = "text"  # or "image", "audio", "pair" (encoder-decoder), "image and text"
    auto: Any = field(default=hf.AutoModel)


def _make(model: Any, config: Any, **fields: Any) -> Callable[[], hf.PreTrainedModel]:
    return lambda: model(config(**fields))


def _llava() -> hf.PreTrainedModel:
    vision = hf.CLIPVisionConfig(**SMALL, **IMAGE)
    text = hf.LlamaConfig(**GROUPED)
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=98, image_seq_length=16)
    )


def _encoder_decoder() -> hf.PreTrainedModel:
    bert = {**SMALL, **TEXT, "max_position_embeddings": 128}
    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(hf.BertConfig(**bert), hf.BertConfig(**bert))
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return hf.EncoderDecoderModel(config)


def _trocr() -> hf.PreTrainedModel:
    decoder = hf.TrOCRConfig(
        **TEXT, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, is_decoder=True
    )
    return hf.VisionEncoderDecoderModel(
        hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(hf.ViTConfig(**SMALL, **IMAGE), decoder)
    )


GPT2 = {**TEXT, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
WHISPER = {**HALVES, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
MODERN = {"global_attn_every_n_layers": 2, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2}

LM, MLM = hf.AutoModelForCausalLM, hf.AutoModelForMaskedLM
FAMILIES = {
    "bert": Family(_make(hf.BertModel, hf.BertConfig, **SMALL, **TEXT, max_position_embeddings=128), 2),
    "roberta": Family(_make(hf.RobertaModel, hf.RobertaConfig, **SMALL, **TEXT, max_position_embeddings=128), 2),
    "modernbert": Family(_make(hf.ModernBertModel, hf.ModernBertConfig, **SMALL, **TEXT, **MODERN), 2),
    "llama": Family(_make(hf.LlamaForCausalLM, hf.LlamaConfig, **GROUPED), 2, True, auto=LM),
    "qwen3": Family(_make(hf.Qwen3ForCausalLM, hf.Qwen3Config, **GROUPED), 2, True, auto=LM),
    "mistral": Family(_make(hf.MistralForCausalLM, hf.MistralConfig, **GROUPED, sliding_window=12), 2, True, auto=LM),
    "gemma2": Family(_make(hf.Gemma2ForCausalLM, hf.Gemma2Config, **GROUPED, sliding_window=12), 2, True, auto=LM),
    "gpt_oss": Family(
        _make(
            hf.GptOssForCausalLM,
            hf.GptOssConfig,
            **GROUPED,
            sliding_window=12,
            num_local_experts=2,
            num_experts_per_tok=1,
        ),
        2,
        True,
        auto=LM,
    ),
    "gpt2": Family(_make(hf.GPT2LMHeadModel, hf.GPT2Config, **GPT2), 2, True, auto=LM),
    "bart": Family(
        _make(hf.BartForConditionalGeneration, hf.BartConfig, **HALVES, max_position_embeddings=128),
        4,
        inputs="pair",
        auto=hf.AutoModelForSeq2SeqLM,
    ),
    "encoder_decoder": Family(_encoder_decoder, 4, inputs="pair", auto=hf.EncoderDecoderModel),
    "whisper": Family(
        _make(hf.WhisperForConditionalGeneration, hf.WhisperConfig, **WHISPER),
        4,
        inputs="audio",
        auto=hf.AutoModelForSpeechSeq2Seq,
    ),
    "vit": Family(_make(hf.ViTModel, hf.ViTConfig, **SMALL, **IMAGE), 2, inputs="image"),
    "llava": Family(_llava, 2, True, inputs="image and text", auto=hf.AutoModelForImageTextToText),
}
BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}
REFUSED = {
    "t5": _make(hf.T5ForConditionalGeneration, hf.T5Config, **T5),
    "bloom": _make(hf.BloomModel, hf.BloomConfig, **BLOOM),
    "deberta": _make(hf.DebertaV2Model, hf.DebertaV2Config, **SMALL, vocab_size=VOCABULARY),
    "mpnet": _make(hf.MPNetModel, hf.MPNetConfig, **SMALL, vocab_size=VOCABULARY),
    "trocr": _trocr,
}


def tiny(name: str) -> hf.PreTrainedModel:
    """A model of this family with random weights, the same on every call, in eval mode. Weights are large enough that
    attention is far from uniform, so that a wrong key shows."""
    torch.manual_seed(len(name))
    model = (FAMILIES[name].make if name in FAMILIES else REFUSED[name])().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.25)
            elif "sinks" in parameter_name(model, parameter):
                parameter.normal_()
    return model


def parameter_name(model: torch.nn.Module, parameter: Tensor) -> str:
    return next(name for name, other in model.named_parameters() if other is parameter)


def tokens(*seed: Any, batch: int = 2, length: int = 30) -> Tensor:
    """Token ids that meet no special token."""
    return torch.randint(3, 97, (batch, length), generator=generator("tokens", *seed))


def inputs(name: str, *seed: Any, length: int = 30) -> dict[str, Tensor]:
    """What the family's forward takes, unpadded."""
    kind, ids, random = FAMILIES[name].inputs, tokens(name, *seed, length=length), generator("inputs", name, *seed)
    if kind == "image":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=random)}
    if kind == "audio":
        return {"input_features": torch.randn(2, 8, 40, generator=random), "decoder_input_ids": ids}
    if kind == "pair":
        return {"input_ids": ids, "decoder_input_ids": tokens(name, "out", *seed, length=length - 7)}
    if kind == "image and text":
        ids[:, 2:18] = 98  # one image of 4 x 4 patches
        return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16, generator=random)}
    return {"input_ids": ids}


def output(model: hf.PreTrainedModel, given: dict[str, Tensor]) -> Tensor:
    """Logits, or the last hidden states of a model without a head."""
    with torch.no_grad():
        out = model(**given)
    return out.logits if "logits" in out else out.last_hidden_state
