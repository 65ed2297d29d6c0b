"""What the three libraries of attention in C have in common: no default, stride or view changes a number."""

import pytest
import torch

from hf_tfast.attention import Mask, Score, attend
from hf_tfast.attention.hashed import Hashed
from hf_tfast.attention.nystrom import Nystrom
from hf_tfast.attention.window import Window
from hf_tfast.backends import few_native, fused, native, run_native
from hf_tfast.backends.tiles import Layout
from hf_tfast.testing import Shape, qkv

LIBRARIES = {
    "band": (fused, Window(window=9, sinks=2), True),
    "few": (few_native, Nystrom(landmarks=8), False),
    "runs": (run_native, Hashed(bits=2, rounds=2, cap=9, window=3), True),
}


@pytest.fixture(params=LIBRARIES)
def case(request, monkeypatch):
    """A call that the C serves, and how often it ran; skips where there is none."""
    module, mechanism, causal = LIBRARIES[request.param]
    if module._library() is None:
        pytest.skip("this machine has no C compiler, or no wide vectors")
    calls, run = [], module._run
    monkeypatch.setattr(module, "_run", lambda *given: (calls.append(given[0]), run(*given))[1])
    return lambda q, k, v: attend(q, k, v, mechanism, Mask(causal=causal), Score(), backend="torch"), calls


def inputs(dtype=torch.float32, g=2):
    return qkv(Shape(b=2, h=4, g=g, j=120, d=16), "native", dtype=dtype, grad=True)


def both(run, given, leaves=None):
    o = run(*given)
    return o.detach(), *torch.autograd.grad(o, leaves or given, torch.ones_like(o))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_is_not_read(case, default):
    (run, calls), before = case, torch.get_default_dtype()
    first, count = both(run, inputs()), len(calls)
    try:
        torch.set_default_dtype(default)
        other = both(run, [x.detach().requires_grad_() for x in inputs()])
    finally:
        torch.set_default_dtype(before)
    assert count
    assert len(calls) == 2 * count
    assert all(map(torch.equal, first, other))


def test_the_gradient_may_come_expanded(case):
    (run, calls), given = case, inputs()
    expected = both(run, given)[1:]
    assert all(map(torch.equal, torch.autograd.grad(run(*given).sum(), given), expected))
    assert calls


@pytest.mark.parametrize("which", range(3))
def test_one_input_alone_may_need_a_gradient(case, which):
    (run, calls), given = case, inputs()
    expected = both(run, given)[1 + which]
    alone = [x if n == which else x.detach() for n, x in enumerate(given)]
    assert torch.equal(torch.autograd.grad(run(*alone).sum(), alone[which])[0], expected)
    assert calls


def test_keys_may_be_expanded(case):
    """One head of keys for all, which nobody copied."""
    (run, calls), (q, k, v) = case, inputs(g=1)
    wide = [x.detach().expand(-1, 4, -1, -1) for x in (k, v)]
    copies = [q, *(x.contiguous().requires_grad_() for x in wide)]
    views = [q, *(x.requires_grad_() for x in wide)]
    assert all(map(torch.equal, both(run, views), both(run, copies)))
    assert calls


def test_heads_may_overlap(case):
    """Views whose heads and numbers both lie one apart."""
    run, calls = case
    overlapping = [x.detach().flatten().as_strided((2, n, 120, 16), (600, 1, 3, 1))
                   for x, n in zip(inputs(), (4, 2, 2), strict=True)]  # fmt: skip
    copies = [x.contiguous().requires_grad_() for x in overlapping]
    views = [x.requires_grad_() for x in overlapping]
    assert all(map(torch.equal, both(run, views), both(run, copies)))
    assert calls


def test_a_second_derivative_is_refused(case):
    (run, calls), given = case, inputs()
    (first,) = torch.autograd.grad(run(*given).square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
    assert calls


def test_what_is_to_be_negated_first_is_not_for_the_c():
    q, k, v = (x.detach() for x in inputs())
    negative = torch._neg_view(-q)
    assert not native.wanted(negative, k, v)
    assert torch.equal(native.as_rows(negative)[0], q)
    assert not native.wanted(q.to_sparse())


def test_dtypes_have_to_agree():
    q, k, v = (x.detach() for x in inputs())
    wide = [x[:, :, :7].flatten(0, 1) for x in (k, v)]
    layout = Layout(near=lambda i, j: i - j <= 7, before=7, solid=True)
    assert not few_native.serves((q, k.bfloat16()), (wide[0],), None)
    assert not few_native.serves((q,), (wide[0], wide[1].double()), None)
    assert not run_native.serves(q, k, v.bfloat16(), Score(), 20)
    assert not run_native.serves(q, k.bfloat16(), v, Score(), 20)
    assert not fused.serves(layout, Score(), q, k, v.bfloat16(), 0)
    assert not fused.serves(layout, Score(), q, k.bfloat16(), v, 0)
