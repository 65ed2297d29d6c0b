"""TFast encoders and decoders: attention by any mechanism of hf_tfast, chosen in the config and saved with it.

`attn_implementation` is "tfast", the config's choice, unless another one is asked for: "sdpa" and "eager" run the same
weights densely, "tfast_<mechanism>" runs that mechanism in every layer.
"""

import math
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    find_packed_sequence_indices,
    packed_sequence_mask_function,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, MaskedLMOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..feed_forward.low_rank import LowRankLinear
from ..feed_forward.tensor_train import TensorTrainLinear
from ..integration._forms import start_forms
from ..integration._stamps import NAME
from ..positions.encodings import Positions
from ._sharing import SharedModel
from .configuration_tfast import TFastConfig
from .modeling_tfast_layers import TFastAttention, TFastEmbeddings, TFastLayer, TFastRotaryEmbedding, make_norm
from .modeling_tfast_learned import TFastProjection, TFastValueConvolution

__all__ = ["TFastForCausalLM", "TFastForMaskedLM", "TFastModel", "TFastPreTrainedModel"]


class TFastPreTrainedModel(SharedModel):
    """What all models of the family share: config, initialisation, and which attention they run."""

    config: TFastConfig
    config_class = TFastConfig
    base_model_prefix = "model"
    attention_in_config = True  # a FastPlan cannot hold another choice
    supports_gradient_checkpointing = True
    _no_split_modules = ["TFastLayer", "TFastEmbeddings"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": TFastLayer, "attentions": TFastAttention}

    def __init__(self, config: TFastConfig, *inputs: Any, **kwargs: Any) -> None:
        config.check()  # fields may have been set since it was made
        super().__init__(config, *inputs, **kwargs)
        implementation = str(config._attn_implementation)
        if config.output_attentions and implementation.startswith(NAME):
            raise ValueError(
                f"output_attentions=True, but {implementation!r} never forms attention weights: load with "
                "attn_implementation='eager' for dense ones, or use hf_tfast.attention_map for chosen rows"
            )

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Nothing asked for: the config's own choice."""
        return super().get_correct_attn_implementation(
            NAME if requested_attention is None else requested_attention, is_init_check
        )

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """Transformers passes over modules of custom code without tensors of their own, for models that overwrite
        loaded weights. `_init_weights` here never does, and has to see them."""
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TFastAttention) and module.cosine:  # logits as wide as those of q . k / sqrt(d)
            init.constant_(module.log_temperature, 0.5 * math.log(module.head_dim))
        elif isinstance(module, Positions):
            module.initialize(self.config.initializer_range)
        elif isinstance(module, LowRankLinear | TensorTrainLinear):
            module.draw(self.config.initializer_range)
        elif isinstance(module, TFastProjection):
            init.copy_(module.weight, module.start())
        elif isinstance(module, TFastValueConvolution):
            init.normal_(module.weight, std=self.config.initializer_range)


class TFastModel(TFastPreTrainedModel):
    """The stack of layers: an encoder, or a decoder where config.causal."""

    stack: str | None = None  # what the config calls it, where it has two

    def __init__(self, config: TFastConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embeddings = TFastEmbeddings(config)
        self.layers = nn.ModuleList(self.make_layers(config))
        self.norm = make_norm(config) if config.norm_placement == "pre" else nn.Identity()
        self.rotary_emb = TFastRotaryEmbedding(config) if config.position_encoding == "rotary" else None
        self.gradient_checkpointing = False
        start_forms(self, lambda layer: config.forms(layer, self.stack))
        self.post_init()

    def make_layers(self, config: TFastConfig) -> list[TFastLayer]:
        return [TFastLayer(config, n, config.causal) for n in range(config.num_hidden_layers)]

    @merge_with_config_defaults
    @capture_outputs
    def forward(  # type: ignore[misc]  # Transformers' models name position_ids twice, too
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """input_ids [b i] or inputs_embeds [b i hidden] -> the last states [b i hidden].

        attention_mask  [b j] over cached and new tokens, 1 for tokens and 0 for padding, or a dense 4-D mask.
        position_ids    [b i]; None: counted from the first token of each row that is not padding. Ids that restart
                        within a row, without attention_mask and cache, are packed documents that do not meet.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        kwargs = {**cast(dict, kwargs).pop("kwargs", {}), **kwargs}  # type: ignore[assignment]  # pipeline stages nest them
        causal = kwargs.get("is_causal")
        causal = self.config.causal if causal is None else bool(causal)
        if past_key_values is not None and not causal:
            raise ValueError(
                "past_key_values were given, but this model is bidirectional: every token reads all others"
            )
        packed = None
        if position_ids is not None and attention_mask is None and past_key_values is None:
            packed = find_packed_sequence_indices(position_ids.expand(inputs_embeds.shape[0], -1))
        if use_cache and causal and past_key_values is None and packed is None:  # packed documents cannot be continued
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = count_positions(inputs_embeds, attention_mask, past_key_values)
        documents = documents_of(attention_mask, packed) if self.config.nystrom_kernel is not None else None
        mask = self._mask(causal, inputs_embeds, attention_mask, past_key_values, packed)
        hidden_states = inputs_embeds
        if isinstance(self.layers[0], TFastLayer):  # not a later pipeline stage, which is given states of layers
            hidden_states = self.embeddings(inputs_embeds, position_ids, token_type_ids)
        rotary = None if self.rotary_emb is None else self.rotary_emb(hidden_states, position_ids=position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=rotary,
                position_ids=position_ids,
                past_key_values=past_key_values,
                documents=documents,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _mask(
        self,
        causal: bool,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        packed: Tensor | None,
    ) -> Any:
        """The mask in the form that the attention implementation reads."""
        return (create_causal_mask if causal else create_bidirectional_mask)(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            and_mask_function=None if packed is None else packed_sequence_mask_function(packed),
        )


def count_positions(inputs_embeds: Tensor, attention_mask: Tensor | None, past: Cache | None) -> Tensor:
    """[b or 1, i] position of each new token, counted from the first token of its row that is not padding."""
    length = inputs_embeds.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:].to(inputs_embeds.device)
    seen = past.get_seq_length() if past is not None else 0
    return torch.arange(length, device=inputs_embeds.device)[None] + seen


def documents_of(attention_mask: Tensor | None, packed: Tensor | None) -> Tensor | None:
    """[b j] int: the packed document of every token from 1, 0 for padding; None: one document, no padding."""
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            "nystrom_kernel needs to know which tokens are padding: give an attention_mask [batch, length], got "
            f"{tuple(attention_mask.shape)}"
        )
    if attention_mask is not None:
        return attention_mask.long()
    return None if packed is None else packed + 1


def with_direction(config: TFastConfig, causal: bool) -> TFastConfig:
    """The config, or a copy of it with another direction."""
    if config.causal == causal:
        return config
    config = deepcopy(config)
    config.causal = causal
    return config


class TFastForCausalLM(TFastPreTrainedModel, GenerationMixin):
    """A decoder that predicts the next token. Always causal, whatever config.causal said."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: TFastConfig) -> None:
        config = with_direction(config, causal=True)
        super().__init__(config)
        self.model = TFastModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(  # type: ignore[misc]  # Transformers' models name position_ids twice, too
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """As TFastModel, with logits [b i vocab] of the next token; labels [b i] are shifted here, -100 is ignored."""
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(cast(Tensor, outputs.last_hidden_state), logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class TFastPredictionHead(nn.Module):
    """dense, activation, norm: what stands between an encoder's states and its vocabulary."""

    def __init__(self, config: TFastConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.norm = make_norm(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.norm(self.act_fn(self.dense(hidden_states)))


class TFastForMaskedLM(TFastPreTrainedModel):
    """An encoder that predicts masked tokens. Always bidirectional, whatever config.causal said."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: TFastConfig) -> None:
        config = with_direction(config, causal=False)
        super().__init__(config)
        self.model = TFastModel(config)
        self.head = TFastPredictionHead(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=True)
        self.post_init()

    @can_return_tuple
    def forward(  # type: ignore[misc]  # Transformers' models name position_ids twice, too
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """As TFastModel, with logits [b i vocab] of every token; labels [b i], -100 is ignored."""
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            **kwargs,
        )
        logits = self.lm_head(self.head(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
