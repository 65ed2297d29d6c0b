"""What holds for every form: fields round trip, meta builds what weights build, dtypes stay, bad input is named."""

import copy

import pytest
import torch

from hf_tfast.feed_forward import form_from_dict, forms
from hf_tfast.feed_forward.activation import Activation
from hf_tfast.feed_forward.low_rank import LowRank
from hf_tfast.feed_forward.pruned import Pruned
from hf_tfast.feed_forward.tensor_train import TensorTrain, balanced, full_ranks
from tests.feed_forward.blocks import KINDS, block, error, inputs, moments, outputs

SOME = [
    LowRank(rank=7),
    LowRank(ratio=0.5, method="activation"),
    LowRank(energy=0.9),
    LowRank(rank=5, method="random"),
    TensorTrain(ranks=4),
    TensorTrain(ratio=0.5),
    Pruned(ratio=0.5),
    Pruned(width=16, method="activation", recover=True),
    Pruned(width=24, method="random"),
    Activation(kind="learned", bits=8),
    Activation(kind="binary", bits=3),
    Activation(kind="piecewise", bits=4),
]
FULL = max(full_ranks(balanced(24, 3, ""), balanced(40, 3, "")))
EXACT = [LowRank(rank=24), LowRank(energy=1.0), LowRank(rank=24, method="activation"), TensorTrain(ranks=FULL)]
EXACT += [Pruned(ratio=1.0), LowRank(rank=24, method="random")]


def test_forms_are_found():
    assert {"activation", "low_rank", "pruned", "tensor_train"} <= set(forms())


@pytest.mark.parametrize("form", SOME, ids=repr)
def test_dict_round_trip(form):
    assert form_from_dict(form.to_dict()) == form


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", SOME, ids=repr)
def test_meta_builds_what_weights_build(form, kind):
    """The checkpoint of a converted block fits a block built from shapes and the plan's sizes alone."""
    given = block(kind, form)
    empty = block(kind, form)
    empty.model.to("meta")
    x = inputs(form, kind)
    sizes = form.apply(given, moments=moments(given, x))
    assert form.apply(empty, size=sizes) == sizes
    state = given.model.state_dict()
    assert {n: (p.shape, p.dtype) for n, p in state.items()} == {
        n: (p.shape, p.dtype) for n, p in empty.model.state_dict().items()
    }
    assert all(p.is_meta for p in empty.model.parameters())
    empty.model.load_state_dict(state, assign=True)
    torch.testing.assert_close(outputs(empty, x), outputs(given, x), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", EXACT, ids=repr)
def test_full_budget_is_dense(form, kind):
    given, dense, x = block(kind, form), block(kind, form), inputs(form, kind)
    form.apply(given, moments=moments(given, x))
    assert error(given, dense, x) < 2e-6  # calibration sums in float32


@pytest.mark.parametrize("form", SOME, ids=repr)
def test_gradients_reach_inputs_and_parameters(form):
    given = block("gated", form)
    form.apply(given, moments=moments(given, inputs(form)))
    x = inputs(form, "grad", rows=9).requires_grad_()
    given.model(x).square().mean().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    for name, parameter in given.model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("form", SOME, ids=repr)
def test_dtype_training_mode_and_frozen_weights_stay(form):
    given = block("plain", form, dtype=torch.bfloat16)
    given.model.requires_grad_(False).eval()
    x = inputs(form, dtype=torch.bfloat16)
    form.apply(given, moments=moments(given, x))
    assert {p.dtype for p in given.model.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in given.model.modules())
    assert not any(p.requires_grad for n, p in given.model.named_parameters() if "levels" not in n)
    assert outputs(given, x).dtype == torch.bfloat16


@pytest.mark.parametrize("form", SOME, ids=repr)
def test_copies_do_not_share_weights(form):
    given, x = block("plain", form), inputs(form)
    form.apply(given, moments=moments(given, x))
    other, before = copy.deepcopy(given.model), outputs(given, x)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(7.0)
    torch.testing.assert_close(outputs(given, x), before, rtol=0, atol=0)


@pytest.mark.parametrize("form", [form for form in SOME if form.calibrated], ids=repr)
def test_calibrated_forms_say_that_they_need_data(form):
    with pytest.raises(ValueError, match=r"convert\(model, plan, calibration=batches\)"):
        form.apply(block("plain"))


@pytest.mark.parametrize("form", [form for form in SOME if not isinstance(form, Activation)], ids=repr)
def test_weights_that_are_not_finite_are_named(form):
    given, x = block("plain"), inputs()
    seen = moments(given, x)
    with torch.no_grad():
        given.model.down.weight[3, 4] = torch.inf
    with pytest.raises(ValueError, match="down has weights that are not finite"):
        form.apply(given, moments=seen)


@pytest.mark.parametrize("form", SOME, ids=repr)
def test_other_layers_are_named(form):
    given = block("plain")
    seen = moments(given, inputs())
    given.replace("up", torch.nn.Bilinear(3, 3, 4))
    with pytest.raises(ValueError, match="up is a Bilinear"):
        form.apply(given, moments=seen)


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown feed-forward form 'nine'; expected one of activation, "):
        form_from_dict({"form": "nine"})
    with pytest.raises(ValueError, match="LowRank has no field 'ranks'"):
        form_from_dict({"form": "low_rank", "ranks": 3})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRank(), "one of rank, ratio and energy, got none"),
        (lambda: LowRank(rank=3, ratio=0.5), "got rank and ratio"),
        (lambda: LowRank(rank=0), "at least 1, got 0"),
        (lambda: LowRank(ratio=1.5), "share above 0 and up to 1, got 1.5"),
        (lambda: LowRank(rank=4, method="nine"), "one of svd, random, activation, got 'nine'"),
        (lambda: LowRank(energy=0.9, method="random"), "energy needs all singular values"),
        (lambda: TensorTrain(), "one of ranks and ratio"),
        (lambda: TensorTrain(ranks=4, shape=((4, 6), (5,))), "equally many"),
        (lambda: TensorTrain(ranks=(4, 4), shape=((4, 6), (5, 8))), "2 factors have 1 ranks"),
        (lambda: TensorTrain(ranks=0), "at least 1"),
        (lambda: Pruned(), "one of width and ratio"),
        (lambda: Pruned(width=0), "at least 1, got 0"),
        (lambda: Pruned(ratio=0.0), "above 0"),
        (lambda: Activation(bits=9), "from 1 to 8, got 9"),
        (lambda: Activation(kind="nine"), "one of learned, binary, piecewise"),
        (lambda: Activation(limit=-1.0), "above 0, got -1.0"),
    ],
)
def test_bad_fields(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (LowRank(rank=25), "up is 24 -> 40: rank 25 is above its 24"),
        (TensorTrain(ranks=3, shape=((4, 5), (5, 8))), "up is 24 -> 40, but the shape .* multiplies to 20 -> 40"),
        (TensorTrain(ranks=9999), "rank 9999 is above"),
        (TensorTrain(ratio=0.001), "less than rank 1 takes"),
        (Pruned(width=41), "down reads 40 neurons: width 41 is above that"),
    ],
)
def test_budgets_beyond_the_layer(form, message):
    with pytest.raises(ValueError, match=message):
        form.apply(block("plain"))


def test_energy_cannot_be_built_without_weights_or_sizes():
    given = block("plain")
    given.model.to("meta")
    with pytest.raises(ValueError, match="follows from the weights"):
        LowRank(energy=0.9).apply(given)
