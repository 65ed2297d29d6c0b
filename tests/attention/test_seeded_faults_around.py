"""The checks checked, continued: faults in the cutting of rows, in a module's docstring, in a mechanism's fields."""

import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import ClassVar

import pytest
import torch

import hf_tfast.attention as attention
from hf_tfast.attention import Mask, Mechanism, _base
from hf_tfast.attention.window import Window
from tests.attention import contract_calls, contract_ways

WINDOW = Window(window=8, sinks=2)


def only_masked(run, q, k, v, mask, score):
    """Padding multiplied away instead of cut away."""
    there = mask.valid if mask.valid is not None else mask.segments != 0
    o = run(q, k, v * there[:, None, :, None], Mask(causal=mask.causal), score)
    return o * there[:, None, -q.shape[2] :, None]


def only_filled(run, q, k, v, mask, score):
    """Padding filled, but positions counted from the buffer's first slot."""
    there = mask.valid if mask.valid is not None else mask.segments != 0
    queries = there[:, None, -q.shape[2] :, None]
    k, v = k.masked_fill(~there[:, None, :, None], -1e3), v.masked_fill(~there[:, None, :, None], 0.0)
    return run(q.masked_fill(~queries, 0.0), k, v, Mask(causal=mask.causal), score).masked_fill(~queries, 0.0)


def ignored(run, q, k, v, mask, score):
    return run(q, k, v, Mask(causal=mask.causal), score)


def detached(run, q, k, v, mask, score):
    return torch.zeros_like(q)


@pytest.mark.parametrize(
    ("rows", "check"),
    [
        (only_masked, lambda m: contract_calls.check_poison(m, "left", True, "torch")),
        (only_masked, lambda m: contract_calls.check_poison(m, "holes", False, "reference")),
        (ignored, lambda m: contract_calls.check_poison(m, "right", True, "torch")),
        (only_filled, lambda m: contract_calls.check_padding(m, False, "torch")),
        (ignored, lambda m: contract_calls.check_packing(m, True, "torch")),
        (only_filled, lambda m: contract_calls.check_packing(m, True, "torch")),
        (ignored, lambda m: contract_calls.check_nothing_valid(m, True, "torch")),
        (detached, lambda m: contract_calls.check_nothing_valid(m, True, "torch")),
    ],
)
def test_faulty_rows_are_found(rows, check, monkeypatch):
    check(WINDOW)
    whole = attention.over_full_rows
    cut = lambda run, q, k, v, mask, score: (  # noqa: E731
        (whole if mask.valid is None and mask.segments is None else rows)(run, q, k, v, mask, score)
    )
    monkeypatch.setattr(attention, "over_full_rows", cut)
    with pytest.raises(AssertionError):
        check(WINDOW)


def test_matmuls_under_autocast_are_found(monkeypatch):
    contract_ways.check_autocast(WINDOW, torch.float32, True)
    without_the_door = lambda m, mask, path: lambda q, k, v, score: m.reference(q, k, v, mask, score)  # noqa: E731
    monkeypatch.setattr(contract_ways, "through_attend", without_the_door)
    with pytest.raises(AssertionError, match="autocast"):
        contract_ways.check_autocast(WINDOW, torch.float32, True)


DOCUMENTED = """Toy: reads everything, for the sake of a test.

    o_i = sum_j p_ij v_j

Shapes   q, k, v
Cost     O(i j)
Exact    yes
Source   nobody, http://example.org
Padding  exact
Causal   yes
Differs  in nothing
"""


def toy(monkeypatch, text=DOCUMENTED, checked=True, title="Toy", **fields):
    """A mechanism in a module of its own, found under the name toy."""
    module = ModuleType("somewhere.toy", text)
    monkeypatch.setitem(sys.modules, "somewhere", ModuleType("somewhere"))
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def __post_init__(self):
        for name in fields if checked else ():
            _base.whole(name, getattr(self, name), 1)

    body = {
        "__module__": module.__name__,
        "__doc__": "Reads everything.",
        "name": "toy",
        "__post_init__": __post_init__,
    }
    body |= {"__annotations__": {"name": ClassVar[str], **dict.fromkeys(fields, int)}, **fields}
    cls = dataclass(frozen=True, kw_only=True)(type(title, (Mechanism,), body))
    setattr(module, title, cls)
    monkeypatch.setattr(_base, "mechanisms", lambda: {"toy": cls})
    return cls


def test_a_sound_file_passes(monkeypatch):
    cls = toy(monkeypatch, size=4)
    contract_calls.check_docstring(cls)
    contract_calls.check_config(cls)


@pytest.mark.parametrize(
    ("here", "there"),
    [("Cost ", "Costs"), ("Differs  in nothing", "Differs"), ("Toy:", "Game:"), ("    o_i", "o_i"), ("http", "ftp"),
     ("Causal   yes\n", "")],
)  # fmt: skip
def test_a_faulty_docstring_is_found(monkeypatch, here, there):
    with pytest.raises(AssertionError):
        contract_calls.check_docstring(toy(monkeypatch, DOCUMENTED.replace(here, there)))


@pytest.mark.parametrize(
    "fault", [{"checked": False, "size": 4}, {"title": "Play"}, {"size": field(default_factory=lambda: [4])}]
)
def test_a_faulty_config_is_found(monkeypatch, fault):
    with pytest.raises((AssertionError, pytest.fail.Exception, ValueError, TypeError)):
        contract_calls.check_config(toy(monkeypatch, **fault))
