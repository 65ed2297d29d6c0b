"""The attention of all layers of a model without the model: what it adds to the same one with attention left out."""

import torch
from torch import Tensor

from ..attention import Mask, Mechanism, attend
from .whole_models import ENCODERS, LLAMA, Built, only_encoders
from .workload import DTYPES, Case, Inputs


def alone(case: Case, inputs: Inputs, *, fast: Mechanism, shape: str | None = None) -> Built:
    """Of the Llama-like model, or of the encoder of this shape: from projected queries, keys and values of every layer
    to what is projected back. A training step gives each layer a gradient of full size. CannotRun where the model
    is not measured either."""
    if shape is not None:
        only_encoders(case)
    sizes, both = LLAMA if shape is None else ENCODERS[shape], case.passes == "both"
    h = sizes["num_attention_heads"]
    g, width = sizes.get("num_key_value_heads", h), sizes["hidden_size"] // h
    random = torch.Generator().manual_seed(0)
    made = [torch.randn(case.batch, case.length, n * width, generator=random) for n in (h, g, g)]
    leaves = tuple(x.to(case.device, DTYPES[case.dtype]).requires_grad_(both) for x in made)

    def layers() -> Tensor:
        q, k, v = (x.unflatten(-1, (-1, width)).transpose(1, 2) for x in leaves)
        o = [attend(q, k, v, fast, Mask(causal=case.causal)) for _ in range(sizes["num_hidden_layers"])]
        return torch.stack([x.transpose(1, 2).flatten(2)[0, 0, 0] for x in o]).sum()  # a gradient that costs nothing

    return layers, leaves if both else ()
