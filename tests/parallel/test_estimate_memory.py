"""Bytes that are kept, against what autograd saves, number for number; and what a dropped term does to that."""

import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, LlamaConfig

from hf_tfast import Dense, Hashed, Nystrom, Performer, TFastConfig, TFastForCausalLM, Window
from hf_tfast.parallel.estimate_memory import Part, activations, kept_of_layer
from hf_tfast.parallel.estimate_model import Sizes
from hf_tfast.training.allocated import Sampler, allocated_bytes

LENGTH = 256


def _told():
    try:
        return allocated_bytes() > 0
    except OSError:
        return False


needs_glibc = pytest.mark.skipif(not _told(), reason="only glibc 2.33 or later tells what it has allocated")
FIELDS = {"vocab_size": 64, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
CASES = {
    "window": (Window(window=16), {"causal": True}),
    "window, bidirectional": (Window(window=16), {"causal": False}),
    "dense": (Dense(), {"causal": True}),
    "performer": (Performer(features=16), {"causal": True}),
    "performer, bidirectional": (Performer(features=16), {"causal": False}),
    "nystrom": (Nystrom(landmarks=8), {"causal": False}),
    "layer norm, no gate": (Window(window=16), {"causal": True, "norm_type": "layer_norm", "mlp_gated": False}),
    "norms behind": (Window(window=16), {"causal": True, "norm_type": "layer_norm", "norm_placement": "post",
                                         "position_encoding": "learned"}),
}  # fmt: skip


def saved_bytes(model, narrow, length):
    """Of the tensors that autograd saves in a forward pass, each piece of memory once, parameters left out."""
    ids = torch.randint(64, (1, length))
    own, seen = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}
    kept = []

    def pack(x):
        memory = x.untyped_storage()
        if memory.data_ptr() not in own:
            seen[memory.data_ptr()] = memory.nbytes()
            kept.append(memory)  # no other tensor may come to lie there
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=narrow == 2),
    ):
        states = model(ids, **({"use_cache": False} if model.config.model_type == "llama" else {})).last_hidden_state
    del states
    return sum(seen.values())


def of_a_layer(config, narrow, length=LENGTH, auto=AutoModelForCausalLM):
    """Bytes of a token that one more layer saves, without the narrow copies of its weights."""
    found = []
    for layers in (1, 3):
        torch.manual_seed(layers)
        config.num_hidden_layers = layers
        found.append(saved_bytes(auto.from_config(config).train().base_model, narrow, length))
    sizes = Sizes.of(config)
    return ((found[1] - found[0]) / 2 - (sizes.layer * 2 if narrow == 2 else 0)) / length, sizes


@pytest.mark.parametrize("narrow", [4, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_layer_keeps_what_autograd_saves(case, narrow):
    mechanism, fields = CASES[case]
    config = TFastConfig(**FIELDS, intermediate_size=176, attention=mechanism, **fields)
    auto = AutoModelForCausalLM if fields["causal"] else AutoModelForMaskedLM
    # landmarks keep matrices of their own, which do not grow with the tokens
    saved, sizes = of_a_layer(config, narrow, 2048 if case == "nystrom" else LENGTH, auto)
    kept = kept_of_layer(sizes, mechanism, Part(rows=1, tokens=LENGTH, narrow=narrow, fused_norm=False))
    assert sum(map(sum, kept.values())) == pytest.approx(saved, rel=0.02)
    for what, part in kept.items():  # a term that is dropped is seen, unless it is nothing or next to it
        if sum(part) > 0.03 * saved:
            assert sum(map(sum, kept.values())) - sum(part) != pytest.approx(saved, rel=0.02), what


def test_of_transformers_own():
    config = LlamaConfig(**FIELDS, intermediate_size=176, attn_implementation="sdpa")
    saved, sizes = of_a_layer(config, 4)
    kept = kept_of_layer(sizes, Dense(), Part(rows=1, tokens=LENGTH, narrow=4))
    assert sizes.norm == "rms_chain"
    assert sum(map(sum, kept.values())) == pytest.approx(saved, rel=0.02)


class Fullest(TorchDispatchMode):
    """The most that is allocated after any operation."""

    def __init__(self):
        super().__init__()
        self.before = self.most = allocated_bytes()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.most = max(self.most, allocated_bytes())
        return made


@needs_glibc
@pytest.mark.parametrize(
    ("narrow", "checkpointing", "vocabulary", "inner"),
    [(4, False, 64, 352), (2, False, 64, 352), (4, True, 64, 352), (2, True, 2048, 64), (4, False, 2048, 64)],
    ids=["fp32", "bf16", "checkpointing", "scores, bf16", "scores"],
)
def test_the_fullest_moment(narrow, checkpointing, vocabulary, inner):
    """Where layers are wide the peak lies in the last one, where there are many words in the loss."""
    fields = {**FIELDS, "hidden_size": 128, "vocab_size": vocabulary, "intermediate_size": inner}
    config = TFastConfig(**fields, num_hidden_layers=4, attention=Window(window=16), causal=True)
    model, ids = TFastForCausalLM(config).train(), torch.randint(64, (1, 1024))
    if checkpointing:
        model.gradient_checkpointing_enable()

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow == 2):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()

    step()  # gradients stay, as those of earlier rows do
    with Fullest() as found:
        step()
    part = Part(rows=2, tokens=1024, narrow=narrow, fused_norm=False, checkpointing=checkpointing)
    sizes = Sizes.of(config)
    assert activations(sizes, Window(window=16), part) == pytest.approx(found.most - found.before, rel=0.1)


@needs_glibc
def test_allocated_memory_is_told_without_holes():
    before = allocated_bytes()
    held = [torch.ones(2**18) for _ in range(32)]
    del held[::2]
    held += [torch.ones(2**18 + 1) for _ in range(8)]  # none of the holes is large enough
    assert allocated_bytes() - before == pytest.approx(24 * 2**20, rel=0.05)
    sampler = Sampler()
    sampler.start()
    held.append(torch.ones(2**24))
    time.sleep(0.1)
    held.clear()
    assert sampler.stop() == pytest.approx(2**26, rel=0.05)


def test_what_has_no_formula():
    sizes = Sizes(layers=1, hidden=64, heads=4, groups=4, width=16, inner=64, vocabulary=64)
    with pytest.raises(ValueError, match="no formula for hashed"):
        activations(sizes, Hashed(), Part(rows=1, tokens=8))
