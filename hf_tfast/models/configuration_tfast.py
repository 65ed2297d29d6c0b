"""TFastConfig: the sizes of a TFast model and its three choices: attention, feed-forward and positions.

    TFastConfig(attention=Window(window=256), causal=True)
    TFastConfig(attention={"0": Dense(), "1-": Window(window=256)})          # ranges of layers, the others dense
    TFastConfig(num_hidden_layers=2, attention=[Dense(), Window(window=256)])  # one for each layer

Mechanisms are kept as the dicts of config.json, in the vocabulary of FastPlan, so the choice is saved with the model.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import RopeParameters

from ..attention import Mechanism, mechanisms
from ..attention.dense import Dense
from ..feed_forward import Form
from ..integration.plan import FastPlan

__all__ = ["TFastConfig"]

POSITION_ENCODINGS = ("rotary", "sinusoidal", "learned", "low_rank", "none")
NORMS = ("layer_norm", "rms_norm")
PLACEMENTS = ("pre", "post")
SIMILARITIES = ("dot", "cosine")


@strict
class TFastConfig(PreTrainedConfig):
    """Configuration of the encoders and decoders of the TFast family.

    causal               position i reads positions up to i. TFastForCausalLM sets it, TFastForMaskedLM unsets it.
    attention            a mechanism or its dict, a dict from layer ranges ("0", "1-4", "5-") to these, or a list of
                         one per layer. Layers that are not named are dense.
    feed_forward         None or "dense", a form, a list of forms, or a dict from layer ranges to them, as in a
                         FastPlan: LowRank, TensorTrain, Pruned, Activation. What needs weights or data to be made
                         (energy, calibration, Int8) comes after training, by a FastPlan or `convert`.
    position_encoding    "rotary" (see rope_parameters), "sinusoidal", "learned", "low_rank" or "none".
    position_rank        rank of the "low_rank" table; None: by position_error, else at most 64.
    position_error       the "low_rank" table starts as the sinusoidal one, factorised to this relative error.
    hidden_act           an activation of Transformers: "gelu", "relu", "silu", ...
    mlp_gated            down(act(gate(x)) * up(x)) instead of down(act(up(x))).
    norm_type            "layer_norm" or "rms_norm".
    norm_placement       "pre": x + f(norm(x)), with a norm after the last layer. "post": norm(x + f(x)), with a norm
                         after the embeddings.
    similarity           "dot": q . k / sqrt(head_dim). "cosine": a learned temperature per head times cos(q, k).
    linformer_projection "drawn", or "learned": Linformer layers own a projection [rank, max_position_embeddings].
    nystrom_kernel       None, or the odd size of the convolution of values that every Nystrom layer adds and learns.
    attention_gate       the attention output is multiplied by sigmoid(W x), element by element.
    type_vocab_size      kinds of segments that token_type_ids tell apart; 0: none.
    classifier_pooling   "first", "last" or "mean" token of a row; None: "last" for causal models, else "mean".

    ValueError for sizes that do not fit each other, unknown choices, layer lists of the wrong length, and mechanisms
    without a causal form (or without dropout) in a model that needs it. Fields that are not known are kept and saved.
    """

    model_type = "tfast"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {  # of all that a model may have; a config keeps what its own has
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.gate_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.self_attn.log_temperature": "colwise",
        "layers.*.self_attn.convolution.weight": "colwise",
        "layers.*.self_attn.projection": "replicated_with_grad_allreduce",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "embeddings": (["inputs_embeds"], ["hidden_states"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int = 2048
    hidden_act: str = "silu"
    mlp_gated: bool = True
    mlp_bias: bool = False
    attention_bias: bool = False
    norm_type: str = "rms_norm"
    norm_placement: str = "pre"
    norm_eps: float = 1e-6
    similarity: str = "dot"
    attention_gate: bool = False
    attention_dropout: int | float = 0.0
    hidden_dropout: int | float = 0.0
    classifier_dropout: int | float = 0.0
    classifier_pooling: str | None = None
    causal: bool = False
    attention: Any = None
    linformer_projection: str = "drawn"
    nystrom_kernel: int | None = None
    feed_forward: Any = None
    position_encoding: str = "rotary"
    position_rank: int | None = None
    position_error: float | None = None
    max_position_embeddings: int = 2048
    rope_parameters: RopeParameters | dict | None = None
    type_vocab_size: int = 0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    cls_token_id: int | None = None
    sep_token_id: int | None = None
    mask_token_id: int | None = None

    def __setattr__(self, key: str, value: Any) -> None:
        read = {"attention": self.saved_attention, "feed_forward": self.saved_feed_forward}.get(key)
        super().__setattr__(key, value if read is None else read(value))

    @classmethod
    def saved_attention(cls, given: Any) -> Any:
        """Mechanisms -> the dicts of config.json. ValueError names what is unknown."""
        if given is None or given == {} or given == []:
            return None
        if isinstance(given, list | tuple):
            return [TFastConfig.saved_attention(one) for one in given]
        return FastPlan(attention=given).to_dict()["attention"]

    @classmethod
    def saved_feed_forward(cls, given: Any) -> Any:
        """Forms -> the dicts of config.json. ValueError names what is unknown, and what only weights can decide."""
        if given in (None, {}, [], "dense"):
            return None
        plan = FastPlan(feed_forward=given)
        for form in plan.every_form:
            if not form.from_shapes:
                raise ValueError(
                    f"{form!r} is made from trained weights or data, and a TFast model begins with neither: train it "
                    "first, then use FastPlan(feed_forward=...) or hf_tfast.convert"
                )
        return plan.to_dict()["feed_forward"]

    def __post_init__(self, **kwargs: Any) -> None:
        _at_least_one(self, "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}; change one of them, or give head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)
        absent = self._absent_parts()
        self.base_model_tp_plan = {  # type: ignore[misc]
            name: how for name, how in (self.base_model_tp_plan or {}).items() if not name.endswith(absent)
        }
        self.check()

    def _absent_parts(self) -> tuple[str, ...]:
        """Ends of the names of parts that a model of this config does not have."""
        parts = {
            "attn.gate_proj": self.attention_gate,
            "attn.log_temperature": self.similarity == "cosine",
            "self_attn.convolution.weight": self.nystrom_kernel is not None,
            "self_attn.projection": self.linformer_projection == "learned",
            "cross_attn.convolution.weight": False,
            "cross_attn.projection": False,
            "mlp.gate_proj": self.mlp_gated,
        }
        return tuple(name for name, there in parts.items() if not there)

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        if self.position_encoding == "rotary":
            return super().convert_rope_params_to_dict(**kwargs)
        if self.rope_parameters is not None:
            raise ValueError(
                f"rope_parameters are read by position_encoding='rotary' only, not by {self.position_encoding!r}: "
                "remove them or change position_encoding"
            )
        return kwargs

    @property
    def stacks(self) -> dict[str | None, int]:
        """The stacks of layers that `attention` may name, with how many layers each has; None is the only one."""
        return {None: self.num_hidden_layers}

    @property
    def pooling(self) -> str:
        """What TFastForSequenceClassification makes of the states of a row."""
        return self.classifier_pooling or ("last" if self.causal else "mean")

    def mechanism(self, layer: int, stack: str | None = None) -> Mechanism:
        """What self-attention of this layer runs."""
        plan = self._plan()
        return Dense() if plan is None else plan.mechanism(layer, (stack,))

    def forms(self, layer: int, stack: str | None = None) -> tuple[Form, ...]:
        """What the feed-forward of this layer is made of, in order; () for a dense one."""
        if not self.feed_forward:
            return ()
        return FastPlan(feed_forward=self.feed_forward).forms(layer, (stack, None))

    def _plan(self) -> FastPlan | None:
        """The attention choice as a plan, which parses and compares ranges."""
        given = self.attention
        if not given:
            return None
        if isinstance(given, list):
            given = {str(layer): one for layer, one in enumerate(given)}
        return FastPlan(attention=given)

    def check(self) -> None:
        """ValueError for fields that contradict each other; asked when a config is made, saved or made a model."""
        _at_least_one(self, "head_dim", "num_key_value_heads", "max_position_embeddings", "vocab_size")
        if self.num_attention_heads % self.num_key_value_heads:  # type: ignore[operator]
            raise ValueError(
                f"{self.num_attention_heads} attention heads cannot share {self.num_key_value_heads} key/value heads "
                "evenly; make num_attention_heads a multiple of num_key_value_heads"
            )
        _one_of(self, "norm_type", NORMS)
        _one_of(self, "norm_placement", PLACEMENTS)
        _one_of(self, "similarity", SIMILARITIES)
        _one_of(self, "position_encoding", POSITION_ENCODINGS)
        _one_of(self, "classifier_pooling", (None, "first", "last", "mean"))
        _one_of(self, "linformer_projection", ("drawn", "learned"))
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"unknown hidden_act {self.hidden_act!r}; 'gelu', 'relu', 'silu' or another of "
                             f"{', '.join(sorted(ACT2FN))}")  # fmt: skip
        if self.position_encoding == "rotary" and self.head_dim % 2:  # type: ignore[operator]
            raise ValueError(f"rotary positions turn pairs of channels, so head_dim must be even, got {self.head_dim}")
        for name in ("position_rank", "position_error"):
            if self.position_encoding != "low_rank" and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} is read by position_encoding='low_rank' only, not by {self.position_encoding!r}"
                )
        for name in ("attention_dropout", "hidden_dropout", "classifier_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        for layers in [] if not self.feed_forward else FastPlan(feed_forward=self.feed_forward).feed_forward_ranges:
            have = max(self.stacks.values()) if layers.stack is None else self.stacks.get(layers.stack)
            if have is None or max(layers.first, layers.last or 0) >= have:
                raise ValueError(
                    f"feed_forward names layers {layers.text!r}, which a {self.model_type} like this lacks"
                )
        self._check_attention()

    def validate_architecture(self) -> None:
        self.check()

    def _check_attention(self) -> None:
        plan = self._plan()
        if isinstance(self.attention, list) and len(self.attention) != self.num_hidden_layers:
            raise ValueError(
                f"attention lists {len(self.attention)} mechanisms for {self.num_hidden_layers} layers: give one for "
                'each, or a dict of ranges such as {"0": Dense(), "1-": Window(window=512)}'
            )
        for layers in [] if plan is None else plan.ranges:
            if layers.stack not in self.stacks:
                named = ", ".join(f"{stack}.{layers.first}" for stack in self.stacks if stack is not None)
                raise ValueError(f"attention names {layers.text!r}, but {self.model_type} layers are named "
                                 f"{named or layers.text.split('.')[-1]}")  # fmt: skip
            last, have = layers.first if layers.last is None else layers.last, self.stacks[layers.stack]
            if max(layers.first, last) >= have:
                raise ValueError(f"attention names layers {layers.text!r}, but there are layers 0 to {have - 1}")
        used = set()
        for stack, count in self.stacks.items():
            for layer in range(count):
                mechanism = self.mechanism(layer, stack)
                self._check_mechanism(mechanism, layer, stack)
                used.add(mechanism.name)
        self._check_learned(used)

    def _check_learned(self, used: set[str]) -> None:
        if self.linformer_projection == "learned" and "linformer" not in used:
            raise ValueError("linformer_projection='learned', but no layer of attention is Linformer(...)")
        if self.nystrom_kernel is None:
            return
        if self.nystrom_kernel < 1 or self.nystrom_kernel % 2 == 0:
            raise ValueError(f"nystrom_kernel must be odd and at least 1, got {self.nystrom_kernel}")
        if "nystrom" not in used:
            raise ValueError(f"nystrom_kernel={self.nystrom_kernel}, but no layer of attention is Nystrom(...)")

    def is_causal_stack(self, stack: str | None) -> bool:
        """Does self-attention of this stack run causally?"""
        return self.causal

    def _check_mechanism(self, mechanism: Mechanism, layer: int, stack: str | None) -> None:
        where = f"layer {layer}" if stack is None else f"layer {stack}.{layer}"
        if self.is_causal_stack(stack) and not mechanism.causal:
            able = ", ".join(name for name, cls in mechanisms().items() if cls.causal)
            raise ValueError(
                f"{mechanism.name} in {where} has no causal form, and this model is causal: set causal=False "
                f"(TFastForMaskedLM and the classifiers can), or take one of {able}"
            )
        if self.attention_dropout and not mechanism.dropout:
            raise ValueError(f"{mechanism.name} in {where} has no attention dropout: set attention_dropout=0.0")


def _one_of(config: PreTrainedConfig, name: str, known: tuple[Any, ...]) -> None:
    if getattr(config, name) not in known:
        raise ValueError(f"unknown {name} {getattr(config, name)!r}; expected one of {', '.join(map(str, known))}")


def _at_least_one(config: PreTrainedConfig, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
