"""More of rule 1 as plain functions: however a mechanism is called and whatever its fields, fast is reference.

See contract.py. Nothing here names a mechanism.
"""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch

from hf_tfast.attention import Mask, Mechanism, Score, attend
from hf_tfast.testing import Shape, assert_near, qkv, with_gradients
from tests.attention import contract
from tests.attention.contract import supported, through_attend

OTHER = {int: (1, 2, 5, 300), float: (0.0, 0.3, 2.5), bool: (False, True)}


def other_fields(mechanism: Mechanism) -> Iterator[Mechanism]:
    """The mechanism with one field at a time at its extremes, where it takes them."""
    for field in fields(mechanism):  # type: ignore[arg-type]
        for value in OTHER.get(type(getattr(mechanism, field.name)), ()):
            try:
                yield replace(mechanism, **{field.name: value})  # type: ignore[type-var]
            except ValueError:  # a value it refuses
                continue


def check_autocast(mechanism: Mechanism, dtype: torch.dtype, causal: bool, path: str = "torch") -> None:
    """Under autocast, as Trainer runs, nothing is computed in less than the inputs call for; backward is outside."""
    q, k, v = qkv(Shape(j=90), "autocast", dtype=dtype)
    run = through_attend(mechanism, Mask(causal=causal), path)
    plain = with_gradients(run, q, k, v, Score())
    cast = with_gradients(torch.autocast("cpu", dtype=torch.bfloat16)(run), q, k, v, Score())
    for name, want in plain.items():
        assert cast[name].dtype == dtype, f"autocast turns {name} into {cast[name].dtype}"
        assert torch.equal(cast[name], want), f"autocast changes {name}"


def check_modes(mechanism: Mechanism, causal: bool, path: str = "torch") -> None:
    """Without gradients, in inference mode, and when only some inputs have a gradient: the same numbers."""
    q, k, v = qkv(Shape(i=60, j=75, d=5, e=7), "modes")
    mask = Mask(causal=causal)
    score = supported(mechanism, contract.make_score("sinks", 4))
    expected = with_gradients(through_attend(mechanism, mask, path), q, k, v, score)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            o = attend(q, k, v, mechanism, mask, score, backend=path)
        assert not o.requires_grad
        assert_near(o.clone(), expected["o"], f"under {type(mode).__name__}")
    upstream = torch.ones_like(expected["o"])
    leaves = {"q": q, "k": k, "v": v} | ({} if score.sinks is None else {"sinks": score.sinks})
    alone = {}
    for chosen in (*leaves, "all"):
        mine = {n: x.detach().clone().requires_grad_(chosen in (n, "all")) for n, x in leaves.items()}
        given = replace(score, sinks=mine.get("sinks"))
        o = attend(mine["q"], mine["k"], mine["v"], mechanism, mask, given, backend=path)
        o.backward(upstream)
        for name, x in mine.items():
            if chosen == "all":
                assert_near(alone[name], x.grad, f"the gradient of {name} alone")
            elif chosen == name:
                alone[name] = x.grad
            else:
                assert x.grad is None


def check_other_fields(mechanism: Mechanism, causal: bool, path: str = "torch") -> None:
    """Rules 1, 4 and 5 with the fields at their extremes."""
    tried: list[Any] = []
    for other in other_fields(mechanism):
        tried.append(other)
        for case in (
            contract.Case(1, 1, causal, "none", "plain", 2),
            contract.Case(65, 65, causal, "left", "everything", 1),
            contract.Case(30, 100, causal, "none", "plain", 4),
        ):
            try:
                contract.check_fast_is_reference(other, case, path)
                if causal:
                    contract.check_future(other, Shape(b=1, h=2, g=1, j=40), (0, 19), path)
                    contract.check_decoding(other, Mask(causal=True), path, j=40)
            except Exception as error:
                raise AssertionError(f"{other}: {error}") from error
    assert tried or not fields(mechanism), "no other field value was accepted"  # type: ignore[arg-type]
