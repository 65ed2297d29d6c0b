"""One step of generation over a cache that holds many tokens already, as Transformers makes it.

attention   all between the rotation of keys and the output projection, in one layer: the cache takes in the keys and
            values of the new token, and the attention function that the model would call runs over the cache.
model       a whole step of a Llama-like model: 4 layers, 512 wide, vocabulary 8192.

Both go through Transformers' own cache and attention interfaces, so that what a layer of ours costs besides arithmetic
(its hook, its checks, the mask it reads) is in the figure. The cache is filled with keys and values drawn at random.
Every call is the next step: the cache grows by one token a call.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention import Mask, Mechanism, Score
from ..integration.apply import apply_plan
from ..integration.cache import cache_bytes, meet_cache
from ..integration.caches._own import OwnLayer
from ..integration.plan import FastPlan
from .workload import DTYPES, Case, Inputs

__all__ = ["ROOM", "SHAPES", "Steps", "bytes_held", "forget", "run", "steps"]

ROOM = 4096  # steps that a cache has room for, where the room is made beforehand
SHAPES: dict[str, dict[str, Any]] = {
    "attention": {"hidden_size": 512, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 16},
    "model": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "vocab_size": 8192},
}


class Steps(NamedTuple):
    """The next step, and the cache it steps through."""

    call: Callable[[], Tensor]
    cache: Cache


class InPlace(DynamicLayer):
    """Keys and values in room made beforehand, where a step writes one token and copies nothing: the least that dense
    attention can do. Transformers' own growing cache copies all of it at every step."""

    keys: Tensor  # type: ignore[assignment]
    values: Tensor  # type: ignore[assignment]

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.held = room, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            size = (*key_states.shape[:2], self.room)
            self.keys = key_states.new_empty(*size, key_states.shape[3])
            self.values = value_states.new_empty(*size, value_states.shape[3])
        first, self.held = self.held, self.held + key_states.shape[2]
        if self.held > self.room:
            raise ValueError(
                f"this cache has room for {self.room} tokens and was given {self.held}: take fewer rounds"
            )
        self.keys[:, :, first : self.held] = key_states
        self.values[:, :, first : self.held] = value_states
        return self.keys[:, :, : self.held], self.values[:, :, : self.held]

    def get_seq_length(self) -> int:
        return self.held

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.held + query_length, 0


def run(
    case: Case, inputs: Inputs, *, what: str, fast: Mechanism | None = None, in_place: bool = False
) -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
    """For `Competitor.build`: the step of `steps`."""
    return steps(what, case, fast, in_place).call, ()


@cache
@torch.no_grad()
def steps(what: str, case: Case, fast: Mechanism | None, in_place: bool) -> Steps:
    """`what` of SHAPES with `fast` in all layers (None: SDPA), over `case.length` tokens. Made once; see `forget`."""
    torch.manual_seed(0)
    shape = {**SHAPES[what], "hidden_size": case.heads * case.width}
    config = LlamaConfig(
        **shape, num_attention_heads=case.heads, num_key_value_heads=case.kv_heads, head_dim=case.width,
        max_position_embeddings=case.length + ROOM,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=DTYPES[case.dtype])
    model = model.to(case.device).eval()
    if fast is not None:
        model = apply_plan(model, FastPlan(attention=fast))
    attentions = [layer.self_attn for layer in model.model.layers]
    held: Cache = DynamicCache()
    if in_place:
        held = Cache(layers=[InPlace(case.length + ROOM) for _ in attentions])
    for module in attentions:
        _fill(module, held, case)
    made = _attention_step(attentions[0], held, case) if what == "attention" else _model_step(model, held, case)
    return Steps(made, held)


def forget() -> None:
    """Let go of everything that `steps` has made."""
    steps.cache_clear()


def bytes_held(made: Steps) -> int:
    """Bytes of the cache after one more step; of `InPlace` without the room that is still free."""
    with torch.no_grad():
        made.call()
    parts = [x[:, :, : layer.held] for layer in made.cache.layers if isinstance(layer, InPlace)
             for x in (layer.keys, layer.values)]  # fmt: skip
    return sum(x.nbytes for x in parts) if parts else cache_bytes(made.cache)


def _draw(case: Case, heads: int, tokens: int) -> Tensor:
    return torch.randn(case.batch, heads, tokens, case.width).to(case.device, DTYPES[case.dtype])


def _fill(module: Any, held: Cache, case: Case) -> None:
    """The layer's keys and values of `case.length` tokens, as a prefill leaves them."""
    heads = (case.heads, case.kv_heads, case.kv_heads)
    q, k, v = (_draw(case, n, case.length) for n in heads)  # the same draws for everybody
    meet_cache(module, held, None)
    k, v = held.update(k, v, module.layer_idx)
    layer = held.layers[module.layer_idx]
    if isinstance(layer, OwnLayer):
        layer.fit(None)
        layer.attend(q, k, v, layer.mechanism, Mask(causal=True), Score())


def _attention_step(module: Any, held: Cache, case: Case) -> Callable[[], Tensor]:
    q, k, v = (_draw(case, heads, 1) for heads in (case.heads, case.kv_heads, case.kv_heads))
    function = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, None)  # type: ignore[arg-type]

    def step() -> Tensor:
        meet_cache(module, held, None)  # what the module's hook does
        keys, values = held.update(k, v, module.layer_idx)
        return function(module, q, keys, values, None, dropout=0.0, scaling=module.scaling)[0]

    return step


def _model_step(model: Any, held: Cache, case: Case) -> Callable[[], Tensor]:
    token = torch.randint(model.config.vocab_size, (case.batch, 1), device=case.device)
    every = torch.ones(case.batch, case.length + ROOM, dtype=torch.int64, device=case.device)

    def step() -> Tensor:
        mask = every[:, : held.get_seq_length() + 1]
        return model(input_ids=token, attention_mask=mask, past_key_values=held, use_cache=True).logits

    return step
