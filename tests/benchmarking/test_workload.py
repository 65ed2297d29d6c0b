"""What is timed computes what it says: mechanisms at full budget and SDPA give the same numbers in every form."""

from dataclasses import replace

import pytest
import torch

from hf_tfast import Dense, Window
from hf_tfast.benchmarking.workload import SDPA, SDPA_MASKED, Case, Competitor, TooLarge, label, make_inputs, workload

DENSE = Competitor("Dense", Dense())
SMALL = Case(length=33, dtype="fp64", heads=4, kv_heads=2, width=8, batch=2)


def results(case, who):
    made = workload(case, who, make_inputs(case))()
    return made if isinstance(made, tuple) else (made,)


@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("passes", ["forward", "both"])
@pytest.mark.parametrize("level", ["kernel", "module"])
def test_sdpa_and_dense_are_one_function(level, passes, causal):
    case = replace(SMALL, level=level, passes=passes, causal=causal)
    ours, theirs = results(case, DENSE), results(case, SDPA)
    assert len(ours) == len(theirs) == (1 if passes == "forward" else 5 if level == "module" else 3)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
        assert not one.requires_grad


@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
def test_masked_sdpa_honours_the_padding_and_plain_sdpa_does_not(causal):
    case = replace(SMALL, left_padding=7, causal=causal)
    right, wrong, ours = (results(case, who)[0][:, :, 7:] for who in (SDPA_MASKED, SDPA, DENSE))
    torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-10)
    assert (ours - wrong).abs().max() > 1e-2


def test_a_mechanism_is_really_called():
    narrow, wide = Competitor("w", Window(window=3)), Competitor("d", Window(window=33))
    assert (results(SMALL, narrow)[0] - results(SMALL, wide)[0]).abs().max() > 1e-2


def test_inputs_are_the_same_for_all_and_different_by_seed():
    one, same, other = make_inputs(SMALL), make_inputs(SMALL), make_inputs(SMALL, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(one.tensors, same.tensors, strict=True))
    assert not torch.equal(one.tensors[0], other.tensors[0])


def test_a_mask_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr("hf_tfast.benchmarking.workload.available_memory", lambda device: 1000)
    with pytest.raises(TooLarge, match="dense mask"):
        workload(replace(SMALL, left_padding=1), SDPA_MASKED, make_inputs(replace(SMALL, left_padding=1)))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"dtype": "int8"}, "dtype must be one of fp32, .*got 'int8'"),
        ({"passes": "backward"}, "passes must be one of"),
        ({"level": "layer"}, "level must be one of"),
        ({"heads": 6, "kv_heads": 4}, "6 query heads cannot share 4"),
        ({"left_padding": 33}, "left padding must leave tokens"),
    ],
)
def test_bad_cases(fields, words):
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **fields)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device that must be missing")
def test_a_missing_device_is_said():
    with pytest.raises(ValueError, match="no CUDA device"):
        Case(device="cuda")


def test_label_says_what_differs():
    assert label(Window(window=256, sinks=4)) == "Window(window=256, sinks=4)"
    assert label(Dense()) == "Dense"
