"""A foreign model with a plan, pushed and loaded again: a process each, a fresh cache, nothing but the repository."""

import pytest

from tests.hub.processes import run
from tests.hub.server import OWNER, LocalHub

MODELS = """
import hf_tfast
from hf_tfast import Dense, FastPlan, Window, apply_plan
from tests.integration.tiny_models import inputs, output, tiny

PLANS = {
    "llama": FastPlan(attention={"0": Dense(), "1-": Window(window=5, sinks=1)}),
    "bert": FastPlan(attention=Window(window=5)),
}
"""
PUSH = (
    MODELS
    + """
for name, plan in PLANS.items():
    model = apply_plan(tiny(name), plan)
    model.push_to_hub(f"fast-{name}")
    said[name] = output(model, inputs(name)).tolist()
    said[f"{name} dense"] = output(tiny(name), inputs(name)).tolist()
"""
)
LOAD = (
    MODELS
    + """
from transformers import AutoModel, AutoModelForCausalLM
for name, auto in {"llama": AutoModelForCausalLM, "bert": AutoModel}.items():
    model = auto.from_pretrained(f"OWNER/fast-{name}").eval()
    said[name] = output(model, inputs(name)).tolist()
    said[f"{name} plan"] = model.config.quantization_config.to_dict() == PLANS[name].to_dict()
    dense = auto.from_pretrained(f"OWNER/fast-{name}", attn_implementation="sdpa").eval()
    said[f"{name} dense"] = output(dense, inputs(name)).tolist()
model = AutoModelForCausalLM.from_pretrained("OWNER/fast-llama")
said["tokens"] = model.generate(inputs("llama")["input_ids"], max_new_tokens=5).tolist()
""".replace("OWNER", OWNER)
)
WITHOUT = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
said["installed"] = error(lambda: __import__("hf_tfast"))
for name, auto in {"llama": AutoModelForCausalLM, "bert": AutoModel}.items():
    said[name] = error(lambda: auto.from_pretrained(f"OWNER/fast-{name}"))
    said[f"{name} trusting"] = error(lambda: auto.from_pretrained(f"OWNER/fast-{name}", trust_remote_code=True))
""".replace("OWNER", OWNER)


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """(the Hub, what the pushing process computed, where homes of processes go)."""
    place = tmp_path_factory.mktemp("foreign")
    with LocalHub() as hub:
        yield hub, run(hub, place / "push", PUSH), place


def test_loads_by_its_id_to_the_last_bit(pushed):
    hub, before, place = pushed
    after = run(hub, place / "load", LOAD)
    for name in ("llama", "bert"):
        assert after[name] == before[name]
        assert after[f"{name} plan"]
        assert before[name] != before[f"{name} dense"]
        assert after[f"{name} dense"] == before[f"{name} dense"], "asked for by name, the same weights run densely"
    assert len(after["tokens"][0]) > 5
    assert hub.unknown == []
    assert {"config.json", "model.safetensors", "README.md"} <= set(hub.files(f"{OWNER}/fast-bert"))


def test_without_hf_tfast_it_raises_and_names_what_is_missing(pushed):
    hub, _, place = pushed
    found = run(hub, place / "without", WITHOUT, without=True)
    assert found["installed"].startswith("ModuleNotFoundError")
    for name in ("llama", "bert"):
        for case in (name, f"{name} trusting"):
            assert found[case] is not None, "ran dense without a word"
            assert found[case].startswith("ValueError")
            assert "tfast" in found[case]
