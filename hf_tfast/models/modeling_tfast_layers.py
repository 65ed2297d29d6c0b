"""The parts of TFast models: positions, attention, feed-forward, norms and the layer that holds them.

Attention goes through Transformers' interface. "tfast" reads the stamp that every attention module gets here.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ..attention import Mechanism
from ..attention.dense import Dense
from ..attention.linformer import Linformer
from ..attention.nystrom import Nystrom
from ..integration._stamps import NAME, Stamp, set_stamp, stamp_of
from ..integration.cache import meet_cache
from ..positions.encodings import make_positions
from .configuration_tfast import TFastConfig
from .modeling_tfast_learned import LearnedLinformer, TFastProjection, TFastValueConvolution, local_part

__all__ = ["TFastAttention", "TFastEmbeddings", "TFastLayer", "TFastMLP", "TFastRotaryEmbedding", "make_norm"]


class TFastRotaryEmbedding(nn.Module):
    """cos and sin [b i d] of rotary positions, by Transformers' rope_parameters."""

    inv_freq: Tensor

    def __init__(self, config: TFastConfig) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type: str = cast(dict[str, Any], config.rope_parameters)["rope_type"]
        default = self.rope_type == "default"
        frequencies = self.compute_default_rope_parameters if default else ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = frequencies(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: TFastConfig, **options: Any) -> tuple[Tensor, float]:
        """The frequencies base^(-2n / head_dim) for n below head_dim / 2, and no scaling."""
        width, base = cast(int, config.head_dim), cast(dict[str, Any], config.rope_parameters)["rope_theta"]
        return base ** -(torch.arange(0, width, 2, dtype=torch.float) / width), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        both = torch.cat((angles, angles), dim=-1)
        cos, sin = both.cos() * self.attention_scaling, both.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (n, n + d / 2) of x [b h i d] by the angles of cos and sin [b i d]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Dense attention: q [b h i d], k, v [b g j d], an additive mask -> output [b i h d] and weights [b h i j]."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class TFastAttention(nn.Module):
    """Self-attention, or attention to `key_value_states` (`is_cross`), through Transformers' attention interface.

    The module is stamped with what its layer of the config says, which "tfast" runs; cross-attention is dense.
    """

    def __init__(
        self,
        config: TFastConfig,
        layer_idx: int,
        is_causal: bool,
        is_cross: bool = False,
        stack: str | None = None,
    ) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.is_causal, self.is_cross_attention = is_causal and not is_cross, is_cross
        heads, groups = config.num_attention_heads, cast(int, config.num_key_value_heads)
        self.head_dim, self.num_key_value_groups = cast(int, config.head_dim), heads // groups
        self.attention_dropout = config.attention_dropout
        self.scaling = 1.0 if config.similarity == "cosine" else self.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, groups * self.head_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, groups * self.head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=config.attention_bias)
        if config.attention_gate:
            self.gate_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=config.attention_bias)
        self.convolution: TFastValueConvolution | None = None
        self.cosine = config.similarity == "cosine"
        if self.cosine:
            self.log_temperature = nn.Parameter(torch.zeros(heads))
        mechanism = Dense() if is_cross else self._with_learned(config.mechanism(layer_idx, stack))
        stamp = Stamp(
            path=f"{stack or 'layers'}.{layer_idx}.{'cross_attn' if is_cross else 'self_attn'}",
            stack=stack or "text",
            layer=layer_idx,
            kind="cross" if is_cross else "self",
            mechanism=mechanism,
            heads=heads,
        )
        set_stamp(self, stamp)

    def _with_learned(self, mechanism: Mechanism) -> Mechanism:
        """Make what is learned of the mechanism, if the config wants that, and tell the mechanism of it."""
        if isinstance(mechanism, Nystrom) and self.config.nystrom_kernel is not None:
            self.convolution = TFastValueConvolution(self.config.num_attention_heads, self.config.nystrom_kernel)
        if isinstance(mechanism, Linformer) and self.config.linformer_projection == "learned":
            self.projection = TFastProjection(mechanism, self.config.max_position_embeddings)
            return LearnedLinformer(rank=mechanism.rank, seed=mechanism.seed, projection=self.projection)
        return mechanism

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        key_value_states: Tensor | None = None,
        documents: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [b i hidden] -> the same shape, and weights [b h i j] or None.

        documents  [b j] int: the packed document of every token, 0 for padding; None: one document, no padding. Only
                   the convolution of values reads it: attention has its mask.
        """
        shape = hidden_states.shape[:-1]
        if past_key_values is not None and self.config._attn_implementation == NAME and not self.is_cross_attention:
            meet_cache(self, past_key_values, attention_mask)
        query = self._split(self.q_proj(hidden_states))
        if query.shape[1] != self.config.num_attention_heads:
            self._meet_rank()
        if self.cosine:
            query = _unit(query) * local_part(self.log_temperature).exp().to(query.dtype)[:, None, None]
        if position_embeddings is not None:
            query = rotate(query, *position_embeddings)
        key, value = self._keys(hidden_states, position_embeddings, past_key_values, key_value_states)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        if self.convolution is not None:
            out = out + self.convolution(value, documents, shape[1]).transpose(1, 2)
        out = out.reshape(*shape, -1)
        if self.config.attention_gate:
            out = out * self.gate_proj(hidden_states).sigmoid()
        return self.o_proj(out), weights

    def _meet_rank(self) -> None:
        """Under tensor parallelism this process has some of the heads: seeded draws are by global head."""
        stamp, mesh = stamp_of(self), getattr(self.q_proj.weight, "device_mesh", None)
        if stamp is not None and mesh is not None:
            mesh = mesh["tp"] if "tp" in (mesh.mesh_dim_names or ()) else mesh
            set_stamp(self, replace(stamp, rank=mesh.get_local_rank()))

    def _split(self, x: Tensor) -> Tensor:
        """[b i h*d] -> [b h i d]"""
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def _keys(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        past_key_values: Cache | None,
        key_value_states: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [b g j d], of this call and of the cache."""
        cache: Any = past_key_values
        if isinstance(past_key_values, EncoderDecoderCache):
            cache = past_key_values.self_attention_cache
            if self.is_cross_attention:
                cache = past_key_values.cross_attention_cache
                if past_key_values.is_updated.get(self.layer_idx):
                    return cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        source = key_value_states if self.is_cross_attention else hidden_states
        if source is None:
            raise ValueError("cross-attention needs key_value_states, the states of the encoder")
        key, value = self._split(self.k_proj(source)), self._split(self.v_proj(source))
        if self.cosine:
            key = _unit(key)
        if position_embeddings is not None and not self.is_cross_attention:
            key = rotate(key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
            if self.is_cross_attention and isinstance(past_key_values, EncoderDecoderCache):
                past_key_values.is_updated[self.layer_idx] = True
        return key, value


def _unit(x: Tensor) -> Tensor:
    """x at length 1 along the last axis, computed in at least fp32; zeros stay zeros."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.normalize(x.to(wide), dim=-1).to(x.dtype)


class TFastMLP(nn.Module):
    """The feed-forward of one token: down(act(gate(x)) * up(x)), or down(act(up(x)))."""

    def __init__(self, config: TFastConfig) -> None:
        super().__init__()
        if config.mlp_gated:
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.gated = config.mlp_gated

    def forward(self, x: Tensor) -> Tensor:
        inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x) if self.gated else self.act_fn(self.up_proj(x))
        return self.down_proj(inner)


def make_norm(config: TFastConfig) -> nn.Module:
    """The norm that the config names."""
    kind = nn.LayerNorm if config.norm_type == "layer_norm" else nn.RMSNorm
    return kind(config.hidden_size, eps=config.norm_eps)


class TFastLayer(GradientCheckpointingLayer):
    """Self-attention, attention to an encoder's states where `has_cross`, and the feed-forward, each a residual."""

    def __init__(
        self,
        config: TFastConfig,
        layer_idx: int,
        is_causal: bool,
        has_cross: bool = False,
        stack: str | None = None,
    ) -> None:
        super().__init__()
        self.pre = config.norm_placement == "pre"
        self.dropout = config.hidden_dropout
        self.self_attn = TFastAttention(config, layer_idx, is_causal, stack=stack)
        self.self_attn_norm = make_norm(config)
        if has_cross:
            self.cross_attn = TFastAttention(config, layer_idx, is_causal=False, is_cross=True, stack=stack)
            self.cross_attn_norm = make_norm(config)
        self.mlp = TFastMLP(config)
        self.mlp_norm = make_norm(config)
        self.has_cross = has_cross

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        attended, _ = self.self_attn(
            self.self_attn_norm(hidden_states) if self.pre else hidden_states,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = self._add(hidden_states, attended, self.self_attn_norm)
        if self.has_cross:
            attended, _ = self.cross_attn(
                self.cross_attn_norm(hidden_states) if self.pre else hidden_states,
                attention_mask=encoder_attention_mask,
                past_key_values=past_key_values,
                key_value_states=encoder_hidden_states,
            )
            hidden_states = self._add(hidden_states, attended, self.cross_attn_norm)
        transformed = self.mlp(self.mlp_norm(hidden_states) if self.pre else hidden_states)
        return self._add(hidden_states, transformed, self.mlp_norm)

    def _add(self, x: Tensor, change: Tensor, norm: nn.Module) -> Tensor:
        """The residual: x + change, normalised here where norms come after."""
        total = x + F.dropout(change, p=self.dropout, training=self.training)
        return total if self.pre else norm(total)


class TFastEmbeddings(nn.Module):
    """Adds to word embeddings [b i hidden] what the config says of positions and of token types."""

    def __init__(self, config: TFastConfig) -> None:
        super().__init__()
        self.positions = make_positions(config)
        # sinusoids are of size 1: as in their source, word embeddings are scaled up to them
        self.scale = config.hidden_size**0.5 if self.positions is not None and self.positions.unit else 1.0
        if config.type_vocab_size:
            self.token_types = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = make_norm(config) if config.norm_placement == "post" else nn.Identity()
        self.dropout = config.hidden_dropout
        self.type_vocab_size = config.type_vocab_size

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        x = inputs_embeds * self.scale if self.scale != 1.0 else inputs_embeds
        if self.positions is not None:
            x = x + self.positions(position_ids, x.dtype)
        if self.type_vocab_size:
            kinds = torch.zeros_like(position_ids) if token_type_ids is None else token_type_ids
            x = x + self.token_types(kinds)
        elif token_type_ids is not None and bool(token_type_ids.any()):
            raise ValueError(
                "token_type_ids are not all 0, but this model knows no token types: set type_vocab_size=2"
            )
        return F.dropout(self.norm(x), p=self.dropout, training=self.training)
