"""TFastSeq2SeqConfig: an encoder and a decoder of the TFast family, each with its own choice of attention.

TFastSeq2SeqConfig(attention=Window(window=256))                                      # both stacks
TFastSeq2SeqConfig(attention={"encoder": Nystrom(landmarks=64), "decoder": Window(window=256)})
TFastSeq2SeqConfig(attention={"encoder.0-3": Window(window=64), "decoder.4-": Window(window=512)})
"""

from typing import Any

from huggingface_hub.dataclasses import strict

from ..attention import Mechanism, mechanisms
from ..integration.plan import FastPlan
from .configuration_tfast import TFastConfig

__all__ = ["TFastSeq2SeqConfig"]

STACKS = ("encoder", "decoder")


@strict
class TFastSeq2SeqConfig(TFastConfig):
    """Configuration of encoder-decoders: the fields of TFastConfig hold for both stacks, except

    encoder_layers, decoder_layers   None: num_hidden_layers.
    attention                        as in TFastConfig for both stacks, or {"encoder": ..., "decoder": ...} with a
                                     mechanism, ranges or a list for each, or ranges named "encoder.0-3". The encoder
                                     is bidirectional, the decoder causal, cross-attention dense.
    decoder_start_token_id           the first token of every output; labels become decoder inputs behind it.

    position_encoding acts on both stacks; rotary turns queries and keys of self-attention only.
    ValueError as for TFastConfig, for mechanisms without a causal form in the decoder, and for the fields that have no
    meaning here (causal, type_vocab_size, classifier_pooling).
    """

    model_type = "tfast_seq2seq"
    base_model_tp_plan = {
        f"{stack}.{name}": style for stack in STACKS for name, style in TFastConfig.base_model_tp_plan.items()
    } | {
        name.replace("layers.*.self_attn", "decoder.layers.*.cross_attn"): style
        for name, style in TFastConfig.base_model_tp_plan.items()
        if "self_attn" in name
    }
    base_model_pp_plan = None  # type: ignore[assignment]

    encoder_layers: int | None = None
    decoder_layers: int | None = None
    is_encoder_decoder: bool = True
    decoder_start_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("encoder_layers", "decoder_layers"):
            if getattr(self, name) is None:
                setattr(self, name, self.num_hidden_layers)
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        super().__post_init__(**kwargs)

    @classmethod
    def saved_attention(cls, given: Any) -> Any:
        if isinstance(given, list | tuple) and given:
            raise ValueError(
                'a list of mechanisms does not say which stack it is for: give {"encoder": [...], "decoder": [...]}'
            )
        if not isinstance(given, dict) or not any(stack in given for stack in STACKS):
            return super().saved_attention(given)
        if other := [key for key in given if key not in STACKS]:
            raise ValueError(
                f"attention names whole stacks and {other[0]!r} beside them: put ranges inside their stack, as in "
                '{"encoder": {"0-3": Window(window=64)}, "decoder": ...}'
            )
        stacks = {stack: super(TFastSeq2SeqConfig, cls).saved_attention(one) for stack, one in given.items()}
        return {stack: one for stack, one in stacks.items() if one is not None} or None

    @property
    def stacks(self) -> dict[str | None, int]:
        return {"encoder": self.encoder_layers or 0, "decoder": self.decoder_layers or 0}

    def _of_stacks(self) -> dict[str, Any]:
        """The choices that were made for whole stacks."""
        given = self.attention
        return given if isinstance(given, dict) and any(stack in given for stack in STACKS) else {}

    def _plan(self) -> FastPlan | None:
        stacks = self._of_stacks()
        if not stacks:
            return super()._plan()
        ranges = {}
        for stack, one in stacks.items():
            if isinstance(one, list):
                one = dict(enumerate(one))
            elif "mechanism" in one:
                one = {"0-": one}
            ranges.update({f"{stack}.{layers}": mechanism for layers, mechanism in one.items()})
        return FastPlan(attention=ranges)

    def check(self) -> None:
        super().check()
        if self.causal:
            raise ValueError("causal=True: the encoder is always bidirectional and the decoder causal; leave it out")
        if not self.is_encoder_decoder:
            raise ValueError("is_encoder_decoder=False: take TFastConfig for a single stack")
        for name in ("type_vocab_size", "classifier_pooling"):
            if getattr(self, name):
                raise ValueError(f"{name} has no meaning in an encoder-decoder, got {getattr(self, name)!r}")

    def _check_attention(self) -> None:
        for stack, one in self._of_stacks().items():
            if isinstance(one, list) and len(one) != self.stacks[stack]:
                raise ValueError(
                    f"attention lists {len(one)} mechanisms for the {self.stacks[stack]} layers of the {stack}: give "
                    'one for each, or a dict of ranges such as {"0": Dense(), "1-": Window(window=512)}'
                )
        super()._check_attention()

    def is_causal_stack(self, stack: str | None) -> bool:
        return stack == "decoder"

    def _check_mechanism(self, mechanism: Mechanism, layer: int, stack: str | None) -> None:
        if stack == "decoder" and not mechanism.causal:
            able = ", ".join(name for name, cls in mechanisms().items() if cls.causal)
            raise ValueError(
                f"{mechanism.name} in layer decoder.{layer} has no causal form, and a decoder is causal: name it for "
                f'the encoder alone, attention={{"encoder": ..., "decoder": ...}}, or take one of {able}'
            )
        super()._check_mechanism(mechanism, layer, stack)
