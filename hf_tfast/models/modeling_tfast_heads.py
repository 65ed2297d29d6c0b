"""TFast classifiers: of rows, of tokens, and of where an answer begins and ends."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_tfast import TFastConfig
from .modeling_tfast import TFastModel, TFastPreTrainedModel

__all__ = ["TFastForQuestionAnswering", "TFastForSequenceClassification", "TFastForTokenClassification"]


class _Classifier(TFastPreTrainedModel):
    """A TFast model with one linear layer on its states; in the direction that config.causal says."""

    def __init__(self, config: TFastConfig, outputs: int) -> None:
        super().__init__(config)
        self.model = TFastModel(config)
        self.score = nn.Linear(config.hidden_size, outputs)
        self.post_init()

    def scores(self, states: Tensor) -> Tensor:
        """[.. hidden] -> [.. outputs]"""
        return self.score(F.dropout(states, p=self.config.classifier_dropout, training=self.training))


class TFastForSequenceClassification(_Classifier):
    """Scores a whole row by its first, last or mean state, as config.classifier_pooling says."""

    def __init__(self, config: TFastConfig) -> None:
        super().__init__(config, cast(int, config.num_labels))

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
    ) -> SequenceClassifierOutput:
        """As TFastModel, with logits [b num_labels]; labels [b] classes, or [b num_labels] floats."""
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            use_cache=False,
            **kwargs,
        )
        states = cast(Tensor, outputs.last_hidden_state)
        valid = self._valid(states, input_ids, attention_mask)
        logits = self.scores(pool(states, valid, self.config.pooling))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, logits=logits, config=self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _valid(self, states: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        """[b i] bool: which tokens are not padding, by the mask, else by pad_token_id."""
        if attention_mask is not None and attention_mask.ndim == 2:
            return attention_mask.bool()
        if input_ids is not None and self.config.pad_token_id is not None:
            return input_ids != self.config.pad_token_id
        return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)


def pool(states: Tensor, valid: Tensor, how: str) -> Tensor:
    """States [b i hidden] of tokens, valid [b i] bool -> [b hidden]: the first or last valid one, or their mean."""
    if how == "mean":
        wide = torch.promote_types(states.dtype, torch.float32)
        total = states.to(wide).masked_fill(~valid[..., None], 0.0).sum(1)
        return (total / valid.sum(-1, keepdim=True).clamp(min=1)).to(states.dtype)
    at = torch.arange(valid.shape[1], device=valid.device)
    chosen = torch.where(valid, at if how == "last" else -at, -valid.shape[1]).argmax(-1)
    return states[torch.arange(len(states), device=states.device), chosen.to(states.device)]


class TFastForTokenClassification(_Classifier):
    """Scores every token."""

    def __init__(self, config: TFastConfig) -> None:
        super().__init__(config, cast(int, config.num_labels))

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
    ) -> TokenClassifierOutput:
        """As TFastModel, with logits [b i num_labels]; labels [b i], -100 is ignored."""
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            use_cache=False,
            **kwargs,
        )
        logits = self.scores(cast(Tensor, outputs.last_hidden_state))
        loss = None if labels is None else self.loss_function(logits, labels, self.config)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class TFastForQuestionAnswering(_Classifier):
    """Scores every token as the beginning and as the end of an answer."""

    def __init__(self, config: TFastConfig) -> None:
        super().__init__(config, 2)

    @can_return_tuple
    def forward(  # type: ignore[misc]  # Transformers' models name position_ids twice, too
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:
        """As TFastModel, with start_logits and end_logits [b i]; start_positions and end_positions [b]."""
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            use_cache=False,
            **kwargs,
        )
        start, end = self.scores(cast(Tensor, outputs.last_hidden_state)).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start, end, start_positions, end_positions)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start.contiguous(),
            end_logits=end.contiguous(),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
