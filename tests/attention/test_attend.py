"""The functional door: what it refuses, and how it chooses backend and seed."""

import pytest
import torch

from hf_tfast.attention import Mask, Mechanism, Score, attend
from hf_tfast.attention.window import Window
from hf_tfast.testing import Shape, qkv

WINDOW = Window(window=4)


def inputs(**sizes):
    return qkv(Shape(**{"j": 9, **sizes}), "attend")


def changed(n, change):
    """q, k, v with one of them changed."""
    return tuple(change(x) if at == n else x for at, x in enumerate(inputs()))


REFUSED = {
    "three axes": (changed(0, lambda q: q[0]), {}, "expected q"),
    "another batch": (changed(0, lambda q: q[:1]), {}, "batch"),
    "another width": (changed(1, lambda k: k[..., :5]), {}, "width"),
    "fewer values than keys": (changed(2, lambda v: v[:, :, 1:]), {}, "must agree"),
    "other value heads": (changed(2, lambda v: v[:, :1]), {}, "must agree"),
    "heads that do not divide": (changed(0, lambda q: q[:, :3]), {}, "3 query heads cannot share 2"),
    "more queries than keys": (changed(0, lambda q: torch.cat([q, q], 2)), {}, "last positions"),
    "two dtypes": (changed(0, torch.Tensor.float), {}, "one floating dtype"),
    "integers": (tuple(x.long() for x in inputs()), {}, "floating dtype"),
    "two devices": (changed(1, lambda k: k.to("meta")), {}, "one device"),
    "an unknown backend": (inputs(), {"backend": "cuda"}, "unknown backend 'cuda'; expected one of auto"),
    "a missing backend": (inputs(), {"backend": "triton"}, "window has no triton path .has: reference"),
    "a backend of another device": (inputs(), {"backend": "flex"}, "window cannot run on backend 'flex': .*CUDA only"),
    "valid of another length": (inputs(), {"mask": Mask(valid=torch.ones(2, 8, dtype=torch.bool))}, "valid must be"),
    "valid that is an additive mask": (inputs(), {"mask": Mask(valid=torch.zeros(2, 9))}, "valid must be bool"),
    "valid of integers": (inputs(), {"mask": Mask(valid=torch.ones(2, 9, dtype=torch.int64))}, "valid must be bool"),
    "segments of another batch": (inputs(), {"mask": Mask(segments=torch.ones(3, 9).long())}, "segments must be"),
    "segments of floats": (inputs(), {"mask": Mask(segments=torch.ones(2, 9))}, "segments must be integers"),
    "starts of another batch": (inputs(), {"mask": Mask(start=torch.ones(3).long())}, "start must be"),
    "a negative start": (inputs(), {"mask": Mask(start=-1)}, "start must be"),
    "a negative number kept": (inputs(), {"mask": Mask(start=2, kept=-3)}, "kept must be"),
    "sinks of fewer heads": (inputs(), {"score": Score(sinks=torch.zeros(2))}, "sinks must be"),
}


@pytest.mark.parametrize(("tensors", "rest", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(tensors, rest, message):
    with pytest.raises(ValueError, match=message):
        attend(*tensors, WINDOW, **rest)


def test_a_mechanism_is_an_object():
    for wrong in (Window, "window", {"mechanism": "window"}, None):
        with pytest.raises(TypeError, match="Window.window=512."):
            attend(*inputs(), wrong)


def test_auto_takes_the_first_backend():
    class Told(Window):
        backends = ("flex", "torch")

        def fast(self, q, k, v, mask, score, backend="torch", choice=None):
            return torch.full_like(q, len(backend))

    told = Told(window=4)
    assert attend(*inputs(), told).unique().tolist() == [4.0]
    assert attend(*inputs(), told, backend="torch").unique().tolist() == [5.0]


def test_unfinished_mechanisms_say_so():
    class Empty(Mechanism):
        name = "empty"

    for backend, what in (("torch", "no fast path"), ("reference", "not a pattern")):
        with pytest.raises(NotImplementedError, match=f"Empty .*{what}"):
            attend(*inputs(), Empty(), backend=backend)


def test_dropout_is_drawn_from_torchs_generator():
    tensors, score = inputs(), Score(dropout=0.5)
    torch.manual_seed(1)
    one, other = attend(*tensors, WINDOW, score=score), attend(*tensors, WINDOW, score=score)
    torch.manual_seed(1)
    again = attend(*tensors, WINDOW, score=score)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    fixed = [attend(*tensors, WINDOW, score=Score(dropout=0.5, seed=4)) for _ in range(2)]
    assert torch.equal(*fixed)


def test_an_empty_call():
    assert attend(*inputs(i=0), WINDOW).shape == (2, 4, 0, 8)
    mask = Mask(causal=True, valid=torch.ones(0, 9, dtype=torch.bool))
    assert attend(*inputs(b=0), WINDOW, mask).shape == (0, 4, 9, 8)
