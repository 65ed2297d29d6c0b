"""Int8 products to test with, and LLM.int8 by its definition."""

import torch

from hf_tfast.backends.int8 import Int8Product
from hf_tfast.testing import generator


def random(*seed, size):
    return torch.randn(size, generator=generator("int8", *seed))


def product(o, i, *seed, threshold=6.0, bias=True):
    weight = random("weight", *seed, size=(o, i))
    return weight, Int8Product(
        *Int8Product.quantise(weight), random("bias", *seed, size=(o,)) if bias else None, threshold
    )


def definition(x, p):
    """LLM.int8 in fp64, pair by pair: round rows, multiply whole numbers, scale back; large columns as they are."""
    x, scale = x.double(), p.scale.double()
    large = (x.abs() >= p.threshold).any(0) if p.threshold else torch.zeros(x.shape[1], dtype=torch.bool)
    small = x.masked_fill(large, 0)
    s = small.abs().amax(1, keepdim=True)
    codes = torch.where(s > 0, small * 127 / s, 0).round()
    y = (codes @ p.codes.double().T) * s * scale / 127**2
    y += x[:, large] @ (p.codes.double() * scale[:, None] / 127)[:, large].T
    return y if p.bias is None else y + p.bias.double()
