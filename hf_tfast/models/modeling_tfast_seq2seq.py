"""TFast encoder-decoders: fast self-attention in both stacks, dense cross-attention, the conventions of BART and T5.

One table of word embeddings serves the encoder, the decoder and, unless tie_word_embeddings is False, the head; it
belongs to the encoder.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..integration._forms import start_forms
from .configuration_tfast import TFastConfig
from .configuration_tfast_seq2seq import TFastSeq2SeqConfig
from .modeling_tfast import TFastModel, TFastPreTrainedModel, count_positions
from .modeling_tfast_layers import TFastAttention, TFastEmbeddings, TFastLayer, TFastRotaryEmbedding, make_norm

__all__ = ["TFastForConditionalGeneration", "TFastSeq2SeqModel", "TFastSeq2SeqPreTrainedModel"]

logger = logging.get_logger(__name__)

_REFUSED = {
    "position_ids": "positions are counted from the masks; packed documents cannot be told apart in cross-attention",
    "token_type_ids": "encoder-decoders know no token types",
    "is_causal": "the encoder is always bidirectional and the decoder causal",
}


class TFastSeq2SeqPreTrainedModel(TFastPreTrainedModel):
    """What the encoder-decoders share."""

    config: TFastSeq2SeqConfig
    config_class = TFastSeq2SeqConfig  # type: ignore[assignment]


class TFastSeq2SeqEncoder(TFastModel):
    """The encoder: a bidirectional TFastModel whose layers are those of the config's "encoder"."""

    config_class = TFastSeq2SeqConfig  # type: ignore[assignment]
    stack = "encoder"

    def make_layers(self, config: TFastConfig) -> list[TFastLayer]:
        count = config.stacks["encoder"]
        return [TFastLayer(config, n, is_causal=False, stack="encoder") for n in range(count)]


class TFastSeq2SeqDecoder(TFastSeq2SeqPreTrainedModel):
    """The decoder: causal self-attention, and attention to the encoder's states, on word embeddings made outside."""

    _can_record_outputs = {
        "hidden_states": TFastLayer,
        "attentions": OutputRecorder(TFastAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(TFastAttention, index=1, layer_name="cross_attn"),
    }

    def __init__(self, config: TFastSeq2SeqConfig) -> None:
        super().__init__(config)
        self.embeddings = TFastEmbeddings(config)
        layers = range(config.stacks["decoder"])
        self.layers = nn.ModuleList(
            TFastLayer(config, n, is_causal=True, has_cross=True, stack="decoder") for n in layers
        )
        self.norm = make_norm(config) if config.norm_placement == "pre" else nn.Identity()
        self.rotary_emb = TFastRotaryEmbedding(config) if config.position_encoding == "rotary" else None
        self.gradient_checkpointing = False
        start_forms(self, lambda layer: config.forms(layer, "decoder"))
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """inputs_embeds [b i hidden], encoder_hidden_states [b j hidden] -> the last states [b i hidden].

        attention_mask          [b, cached and new tokens], 1 for tokens and 0 for padding, or a dense 4-D mask.
        encoder_attention_mask  [b j], the encoder's.
        """
        if encoder_hidden_states is None:
            raise ValueError("the decoder needs encoder_hidden_states, the last states of the encoder")
        if use_cache and self.gradient_checkpointing and self.training:
            logger.warning_once("use_cache=True does not go with gradient checkpointing: set to False")
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        own = past_key_values
        if isinstance(past_key_values, EncoderDecoderCache):
            own = past_key_values.self_attention_cache
        elif past_key_values is not None:
            raise ValueError(
                f"an encoder-decoder needs an EncoderDecoderCache(self-attention cache, cross-attention cache), got "
                f"{type(past_key_values).__name__}"
            )
        mask = create_causal_mask(
            config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask, past_key_values=own
        )
        cross_mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=encoder_attention_mask,
            encoder_hidden_states=encoder_hidden_states,
        )
        position_ids = count_positions(inputs_embeds, attention_mask, own)
        hidden_states = self.embeddings(inputs_embeds, position_ids)
        rotary = None if self.rotary_emb is None else self.rotary_emb(hidden_states, position_ids=position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                encoder_hidden_states,  # by position: reentrant checkpointing gives others no gradient
                attention_mask=mask,
                position_embeddings=rotary,
                past_key_values=past_key_values,
                encoder_attention_mask=cross_mask,
                **kwargs,
            )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )


class TFastSeq2SeqModel(TFastSeq2SeqPreTrainedModel):
    """The encoder and the decoder without a head."""

    def __init__(self, config: TFastSeq2SeqConfig) -> None:
        super().__init__(config)
        self.encoder = TFastSeq2SeqEncoder(config)
        self.decoder = TFastSeq2SeqDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.embed_tokens = value  # type: ignore[assignment]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqModelOutput:
        """input_ids [b j] (or inputs_embeds, or encoder_outputs of an earlier call) and decoder_input_ids [b i] (or
        decoder_inputs_embeds) -> the decoder's last states [b i hidden].

        attention_mask          [b j], 1 for tokens and 0 for padding: of the encoder and of cross-attention.
        decoder_attention_mask  [b, cached and new tokens]; None: no padding.
        """
        for name, why in _REFUSED.items():
            if kwargs.get(name) is not None:
                raise ValueError(f"{type(self).__name__} takes no {name}: {why}")
        if (decoder_input_ids is None) == (decoder_inputs_embeds is None):
            raise ValueError(
                "give either decoder_input_ids or decoder_inputs_embeds (or labels, to a model with a head)"
            )
        if encoder_outputs is not None and (input_ids is not None or inputs_embeds is not None):
            raise ValueError(
                "encoder_outputs were given, so input_ids and inputs_embeds would be ignored: leave them out"
            )
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
            )
        elif not isinstance(encoder_outputs, ModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        if decoder_inputs_embeds is None:
            decoder_inputs_embeds = self.encoder.embed_tokens(decoder_input_ids)
        decoded: BaseModelOutputWithPastAndCrossAttentions = self.decoder(
            inputs_embeds=decoder_inputs_embeds,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            past_key_values=decoded.past_key_values,  # type: ignore[arg-type]
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


class TFastForConditionalGeneration(TFastSeq2SeqPreTrainedModel, GenerationMixin):
    """An encoder-decoder that predicts the next token of the output."""

    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: TFastSeq2SeqConfig) -> None:
        super().__init__(config)
        self.model = TFastSeq2SeqModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForMaskedLM"  # labels are what each position predicts: not shifted once more
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqLMOutput:
        """As TFastSeq2SeqModel, with logits [b i vocab] of the output. labels [b i], -100 is ignored; they are
        also the decoder's input, one token later, where none is given."""
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs: Seq2SeqModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(cast(Tensor, outputs.last_hidden_state), logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """[b i] labels -> decoder_input_ids: decoder_start_token_id, then the labels but the last; -100 is padding."""
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or pad is None:
            raise ValueError(
                "labels become decoder inputs behind a first token: set config.decoder_start_token_id and "
                f"config.pad_token_id (now {start} and {pad}), or give decoder_input_ids"
            )
        shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == -100, pad)
