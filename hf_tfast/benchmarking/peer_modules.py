"""Transformers' own attention modules as competitors: the same activations and projection weights, their own code.

Each is run as its model runs it, without dropout and biases, with the output projection behind it that ours has:

longformer      LongformerSelfAttention, no global tokens
bigbird         BigBirdBlockSparseAttention. Its random blocks are drawn while training only: forward alone is timed as
                inference runs it, without drawing, forward and backward as training runs it.
reformer        LSHSelfAttention, chunks of 64, the number of buckets that it sets itself
nystromformer   NystromformerSelfAttention without convolution; its pseudo-inverse starts from each head's own norm,
                which costs the same and makes its numbers comparable
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.utils import logging

from .workload import CannotRun, Case, Inputs

CHUNK = 64  # tokens of a chunk of Reformer
Built = tuple[Callable[[], Tensor], tuple[Tensor, ...]]


def longformer(case: Case, inputs: Inputs, *, window: int) -> Built:
    """A window of `window` tokens on each side."""
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    _multiple("Longformer", case.length, 2 * window)
    config = LongformerConfig(
        **_sizes(case), attention_window=[2 * window], attention_probs_dropout_prob=0.0, num_hidden_layers=1
    )
    module = LongformerSelfAttention(config, 0)
    reached = _given(module, inputs, query=1, key=2, value=3)
    nobody = torch.zeros(case.batch, case.length, dtype=torch.bool)
    masks: dict[str, Any] = {"is_index_masked": nobody, "is_index_global_attn": nobody, "is_global_attn": False}
    masks["attention_mask"] = inputs.tensors[0].new_zeros(nobody.shape)
    return _projected(lambda x: module(x, **masks)[0], reached)


def bigbird(case: Case, inputs: Inputs, *, block: int, blocks: int) -> Built:
    """Blocks of `block`: the first, the last, the three around a query's own, and `blocks` random ones."""
    from transformers import BigBirdConfig, BigBirdModel
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

    _multiple("BigBird", case.length, block)
    if case.length <= (5 + 2 * blocks) * block:
        raise CannotRun(f"BigBird goes dense up to {(5 + 2 * blocks) * block} tokens")
    config = BigBirdConfig(
        **_sizes(case), block_size=block, num_random_blocks=blocks, use_bias=False,
        max_position_embeddings=max(4096, case.length),
    )  # fmt: skip
    module = BigBirdBlockSparseAttention(config, seed=0)
    module.train(case.passes == "both")
    reached = _given(module, inputs, query=1, key=2, value=3)
    everybody = inputs.tensors[0].new_ones(case.batch, case.length).detach()
    blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(everybody, block)
    masks = {"band_mask": band, "from_mask": rows, "to_mask": columns}
    masks |= {"from_blocked_mask": blocked, "to_blocked_mask": blocked}
    return _projected(lambda x: module(x, **masks)[0], reached)


def bigbird_density(length: int, block: int, blocks: int) -> float:
    """Share of the pairs that BigBird reads: everything in the first and last row of blocks, see `bigbird`."""
    n = length // block
    return (2 * n + 2 * (4 + blocks) + (n - 4) * (5 + blocks)) / n**2


def reformer(case: Case, inputs: Inputs, *, hashes: int) -> Built:
    """Shared queries and keys in sorted chunks of 64, each reading itself and the one before, in `hashes` rounds."""
    module = reformer_module(case, inputs, hashes)
    reached = _given(module, inputs, query_key=1, value=3)
    return _projected(lambda x: module(x).hidden_states, reached)


def reformer_module(case: Case, inputs: Inputs, hashes: int) -> Any:
    """Transformers' LSHSelfAttention with the weights of `inputs`."""
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    _multiple("Reformer", case.length, CHUNK)
    config = ReformerConfig(
        **_sizes(case), attention_head_size=case.width, lsh_attn_chunk_length=CHUNK, num_hashes=hashes,
        is_decoder=False, lsh_attention_probs_dropout_prob=0.0, max_position_embeddings=max(4096, case.length),
        hash_seed=0,
    )  # fmt: skip
    module = LSHSelfAttention(config)
    with _quiet():  # it warns that it sets the number of buckets itself, as its authors recommend
        module._set_num_buckets(case.length)
    _given(module, inputs, query_key=1, value=3)
    return module.to(inputs.tensors[0].dtype)


def nystromformer(case: Case, inputs: Inputs, *, landmarks: int) -> Built:
    """`landmarks` segment means, six steps towards the pseudo-inverse."""
    from transformers import NystromformerConfig
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    _multiple("Nystromformer", case.length, landmarks)
    config = NystromformerConfig(
        **_sizes(case), num_landmarks=landmarks, segment_means_seq_len=case.length,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    module = NystromformerSelfAttention(config)
    module.init_option, module.conv_kernel_size = "exact", None  # its config takes neither
    reached = _given(module, inputs, query=1, key=2, value=3)
    return _projected(lambda x: module(x)[0], reached)


def tried(build: Callable[..., Built], case: Case, inputs: Inputs, **options: Any) -> Built:
    """`build`, after one call on trial: a module that raises in this case becomes CannotRun, with its words."""
    forward, reached = build(case, inputs, **options)
    try:
        with torch.no_grad():
            forward()
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        if "out of memory" in str(error).lower() or "can't allocate memory" in str(error):
            raise
        raise CannotRun(f"raises {type(error).__name__}: {' '.join(str(error).split())[:150]}") from error
    return forward, reached


def peer(build: Callable[..., Built], **options: Any) -> Callable[[Case, Inputs], Built]:
    """`build` with its options, as a Competitor takes it."""
    return partial(tried, build, **options)


def _sizes(case: Case) -> dict[str, Any]:
    if case.heads != case.kv_heads or case.causal or case.left_padding or case.level != "module":
        raise CannotRun("peers run as bidirectional modules without padding, with as many key/value heads as heads")
    return {"hidden_size": case.heads * case.width, "num_attention_heads": case.heads}


def _multiple(name: str, length: int, of: int) -> None:
    if length % of:
        raise CannotRun(f"{name} needs lengths that are multiples of {of}, got {length}")


def _given(module: nn.Module, inputs: Inputs, **places: int) -> tuple[Tensor, ...]:
    """Put weights of `inputs` into linear layers of `module`, biases off; what a backward pass reaches: the
    activations, these weights, the output projection. They are parameters as in a model also where only the forward
    pass is timed: torch takes other ways through `linear` for weights that ask for no gradient, some far slower."""
    made = []
    for name, place in places.items():
        layer, weight = getattr(module, name), inputs.tensors[place]
        layer.weight = nn.Parameter(weight.detach())
        layer.bias = None
        made.append(layer.weight)
    module.to(inputs.tensors[0].device)
    return (inputs.tensors[0], *made, nn.Parameter(inputs.tensors[4].detach()))


def _projected(attention: Callable[[Tensor], Tensor], reached: tuple[Tensor, ...]) -> Built:
    return (lambda: linear(attention(reached[0]), reached[-1])), reached


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
