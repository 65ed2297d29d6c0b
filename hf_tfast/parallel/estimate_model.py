"""What an estimate needs to know of a model and of a mechanism: sizes from a config, formulas by definition."""

from dataclasses import dataclass
from typing import Any

from ..attention import Mechanism
from ..attention.dense import Dense
from ..attention.nystrom import Nystrom
from ..attention.performer import Performer
from ..attention.window import Window

__all__ = ["CHUNK", "KNOWN", "Sizes", "cache_bytes", "halo", "pairs_per_token", "sent_per_layer"]

CHUNK = 128  # positions for which a causal Performer keeps one state while it trains
KNOWN = "dense, window, performer, nystrom"
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
INNER = ("intermediate_size", "n_inner", "ffn_dim")
# feed-forwards with a gate, by the model type, where norms are LayerNorms and the config does not say so
GATED = {"bert": False, "roberta": False, "gpt2": False, "gpt_neox": False, "opt": False, "phi": False,
         "modernbert": True}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """layers, hidden width, query heads, key heads, width of a head, inner width of the feed-forward, vocabulary."""

    layers: int
    hidden: int
    heads: int
    groups: int
    width: int
    inner: int
    vocabulary: int
    gated: bool = True
    tied: bool = True
    causal: bool = True
    norm: str = "rms"  # torch's; "rms_chain": made of single operations, as in Transformers' Llama; or "layer"
    rotary: bool = True

    @classmethod
    def of(cls, config: Any) -> "Sizes":
        """From a config of Transformers. ValueError names what it does not tell, or what has no formula."""
        config, whole = config.get_text_config(), config
        kind = getattr(config, "model_type", "")
        if any((getattr(config, name, None) or 1) > 1 for name in EXPERTS):
            raise ValueError(f"{type(config).__name__} has experts: there are formulas for one feed-forward a layer")
        if getattr(whole, "is_encoder_decoder", False):
            raise ValueError(f"{type(whole).__name__} has an encoder and a decoder: there are formulas for one stack")

        def told(*names: str) -> Any:
            found = next((getattr(config, n) for n in names if getattr(config, n, None) is not None), None)
            if found is None:
                raise ValueError(f"{type(config).__name__} does not tell {names[0]}: no estimate can be made of it")
            return found

        heads, hidden = told("num_attention_heads"), told("hidden_size")
        root_mean_square = hasattr(config, "rms_norm_eps")
        norm = {"layer_norm": "layer", "rms_norm": "rms"}.get(getattr(config, "norm_type", ""))
        inner = 4 * hidden if kind == "gpt2" and config.n_inner is None else told(*INNER)
        gated = getattr(config, "mlp_gated", True if root_mean_square else GATED.get(kind))
        if gated is None:
            raise ValueError(
                f"{type(config).__name__} does not tell what its feed-forward is made of: known are TFast models, "
                f"those with rms_norm_eps, and {', '.join(GATED)}"
            )
        return cls(
            layers=told("num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            groups=getattr(config, "num_key_value_heads", None) or heads,
            width=getattr(config, "head_dim", None) or hidden // heads,
            inner=inner,
            vocabulary=told("vocab_size"),
            gated=bool(gated),
            tied=bool(getattr(config, "tie_word_embeddings", True)),
            causal=_causal(config),
            norm=norm or ("rms_chain" if root_mean_square else "layer"),
            rotary=getattr(config, "position_encoding", "rotary" if _turned(config) else "") == "rotary",
        )

    @property
    def readers(self) -> int:
        """Matrices of a layer that read what a norm made."""
        return 5 if self.gated else 4

    @property
    def layer(self) -> int:
        """Weights of one layer's matrices."""
        attention = self.hidden * self.width * (2 * self.heads + 2 * self.groups)
        return attention + (3 if self.gated else 2) * self.hidden * self.inner

    @property
    def multiplied(self) -> int:
        """Weights that every token is multiplied with: all but the table of word embeddings."""
        return self.layers * self.layer + self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Without norms, biases and learned positions, which are less than one in a hundred."""
        return self.multiplied + (0 if self.tied else self.vocabulary * self.hidden)


def _causal(config: Any) -> bool:
    """As the config says; else a model is causal that Transformers loads as a causal language model alone."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as GENERATE,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES as FILL,
    )

    told, kind = getattr(config, "causal", None), getattr(config, "model_type", "")
    if told is not None:
        return bool(told)
    if kind in GENERATE and kind in FILL:
        return bool(getattr(config, "is_decoder", False))
    if kind not in GENERATE and kind not in FILL:
        raise ValueError(f"{type(config).__name__} does not tell whether its attention is causal")
    return kind in GENERATE


def _turned(config: Any) -> bool:
    return bool(getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None))


def pairs_per_token(mechanism: Mechanism, sizes: Sizes, length: int) -> float:
    """Keys that a query meets (or work that costs as much), of `length`: 4 x heads x width operations each."""
    if isinstance(mechanism, Window):
        reach = mechanism.window if sizes.causal else 2 * mechanism.window + 1
        return min(reach + mechanism.sinks, length / 2 if sizes.causal else length)
    if isinstance(mechanism, Performer):  # features of query and key, the state read and written, a chunk met directly
        return 2 * mechanism.features + (CHUNK if sizes.causal else 0)
    if isinstance(mechanism, Nystrom):
        return 2 * mechanism.landmarks + 6 * mechanism.iterations * mechanism.landmarks**3 / (2 * sizes.width * length)
    if isinstance(mechanism, Dense):
        return length / 2 if sizes.causal else length
    raise ValueError(f"there is no formula for {mechanism.name}; there are formulas for {KNOWN}")


def halo(sizes: Sizes, mechanism: Mechanism) -> int:
    """Keys of its neighbours that a rank has beside its own, where a sequence is shared."""
    if not isinstance(mechanism, Window):
        return 0
    return (mechanism.window - 1 if sizes.causal else 2 * mechanism.window) + mechanism.sinks


def cache_bytes(sizes: Sizes, mechanism: Mechanism, length: int, bytes_each: int) -> float:
    """Of one sequence while it is generated; 0 for bidirectional models."""
    if not sizes.causal:
        return 0.0
    if isinstance(mechanism, Performer):
        return 4.0 * sizes.layers * sizes.heads * mechanism.features * (sizes.width + 1)
    kept = min(length, mechanism.window + mechanism.sinks) if isinstance(mechanism, Window) else length
    return 2.0 * sizes.layers * sizes.groups * sizes.width * kept * bytes_each


def sent_per_layer(sizes: Sizes, mechanism: Mechanism, ranks: int, bytes_each: int) -> tuple[float, float]:
    """Bytes that the busiest rank sends for one layer and row, forward and backward, and messages one after another.

    Measured against these: docs/results/sequence_parallel.
    """
    if ranks < 2:
        return 0.0, 0.0
    token = 2 * sizes.groups * sizes.width * bytes_each
    ends = 0.5 if ranks == 2 else 1.0  # of two ranks each has one neighbour, and sends it one of what others send
    if isinstance(mechanism, Window):
        # causal: a halo forward and a gradient backward; bidirectional: both on both sides
        halo = (1 if sizes.causal else 2) * ends * (mechanism.window - 1 if sizes.causal else mechanism.window) * token
        around = 2 * (ranks - 1) / ranks * sizes.heads * mechanism.sinks * (2 * sizes.width + 1) * 4
        firsts = (ranks - 1) * mechanism.sinks * token * ends
        return 2 * (halo + firsts) + (0 if sizes.causal else 2 * around), 2.0 if sizes.causal else 6.0
    if isinstance(mechanism, Performer):
        state = sizes.heads * (mechanism.features * (sizes.width + 1) + 1) * 4
        return (2 if sizes.causal else 4) * ends * state, (2 if sizes.causal else 4) * float(ranks - 1)
    if isinstance(mechanism, Nystrom):
        m, around = mechanism.landmarks, 2 * (ranks - 1) / ranks * 4
        means, read = m * (sizes.heads + sizes.groups) * sizes.width, m * sizes.heads * (sizes.width + 1)
        return around * (2 * means + 2 * read + m * sizes.heads), 5.0
    raise ValueError(f"{mechanism.name} does not share a sequence; window, performer and nystrom do")
