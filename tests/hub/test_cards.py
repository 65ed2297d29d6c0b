"""Model cards: what they say is what the model runs and what was measured of it, and nothing of another model."""

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import BertConfig, BertModel

from hf_tfast import (
    FastPlan,
    Int8,
    TFastConfig,
    TFastForCausalLM,
    TFastForMaskedLM,
    Window,
    apply_plan,
    cli,
    model_card,
)  # fmt: skip
from hf_tfast.benchmarking.environment import environment
from hf_tfast.hub.folder import skeleton, write_card
from tests.integration.tiny_models import tiny
from tests.training.tiny import write_texts

ROOT = Path(__file__).parents[2]
WINDOW = {"mechanism": "window", "window": 5, "sinks": 1}
OTHER = {"mechanism": "window", "window": 6, "sinks": 1}
SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
COMMANDS = re.findall(r"^    (tfast card .*)$", (ROOT / "model_cards/README.md").read_text(), re.MULTILINE)


@pytest.fixture
def planned():
    return apply_plan(tiny("llama"), FastPlan(attention={"1-": Window(window=5, sinks=1)}))


@pytest.fixture
def own():
    return TFastForCausalLM(TFastConfig(attention={"0-1": WINDOW}, max_position_embeddings=64, **SMALL))


def front(card):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---", card.content, re.DOTALL)[1])


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def fidelity(path, model, mechanism):
    numbers = {"error": 0.125, "cosine": 0.75, "recall": 0.5, "density": 0.25, "documents": 1}
    record = {"kind": "fidelity", "label": "Window", **mechanism, "stack": "text", "layer": 0, **numbers}
    about = {"kind": "input", "model": model, "corpus": "texts", "tokens": [40]}
    return lines(path, [{"kind": "environment", **environment()}, about, record])


def training(attention, parameters):
    final = {"eval_loss": 1.5, "eval_perplexity": 4.4817, "eval_bits_per_byte": 2.16, "eval_loss_far": 2.0,
             "eval_targets": 100.0}  # fmt: skip
    data = {"length": 64, "far": 16, "digest": "x", "unit": 1}
    size = {"parameters": parameters, "tokens_seen": 1000, "steps": 10}
    speed = {"tokens_per_second": 123.0, "training_seconds": 8.1, "environment": environment()}
    return {"attention": attention, "final": final, "data": data, **size, **speed}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: Path(shlex.split(c)[2]).name)
def test_the_committed_cards_are_what_the_committed_results_make(command, tmp_path, monkeypatch):
    given = shlex.split(command)
    folder = ROOT / given[2]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [*given, "--out", str(tmp_path / folder.name)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    for name in ("README.md", "config.json"):
        assert (tmp_path / folder.name / name).read_text() == (folder / name).read_text(), f"make it again: {command}"


def test_every_card_has_its_line():
    made = {shlex.split(command)[2] for command in COMMANDS}
    assert made == {f"model_cards/{path.parent.name}" for path in (ROOT / "model_cards").glob("*/README.md")}
    assert made
    for path in (ROOT / "model_cards").rglob("*.md"):
        assert not re.search(r"(?<![\w./-])/(tmp|home|work|root)/", path.read_text()), "a path of somebody's machine"


def test_metadata_that_the_hub_understands(planned):
    card = model_card(planned, "somebody/fast", license="mit", base_model="somebody/dense", tags=["mine"])
    assert front(card) == {
        "license": "mit",
        "base_model": "somebody/dense",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hf_tfast", "window-attention", "mine"],
    }
    assert ModelCard(card.content).data.to_dict() == card.data.to_dict()


def test_a_plan_is_said_layer_by_layer(planned):
    text = model_card(planned, "somebody/fast", license="mit").content
    assert "| text 0 | self | `Dense()` | 100.00% | 100.00% |" in text
    assert "| text 1 | self | `Window(window=5, sinks=1)` |" in text
    assert "Import hf_tfast before loading. Without it loading raises" in text
    assert '`attn_implementation="sdpa"` runs the same weights densely' in text
    assert 'AutoModelForCausalLM.from_pretrained("somebody/fast")' in text
    assert json.dumps({"quantization_config": planned.config.quantization_config.to_dict()}, indent=2) in text
    assert "Nothing yet." in text


def test_a_model_of_our_own(own):
    text = model_card(own, "somebody/own", license="mit", description="Knows nothing.").content
    assert "| text 0 to 1 | self | `Window(window=5, sinks=1)` |" in text
    assert "| text 2 | self | `Dense()` | 100.00% | 100.00% |" in text
    assert "this repository holds no other code" in text
    assert "Knows nothing." in text
    assert "generated from the package" in model_card(own, "somebody/own", license="mit", remote_code=True).content


def test_figures_come_with_machine_and_command(planned, own, tmp_path):
    near = fidelity(tmp_path / "results.jsonl", "somebody/dense", WINDOW)
    text = model_card(planned, "x", license="mit", base_model="somebody/dense", results=[near]).content
    assert "0.125" in text
    assert f"Made by: `{environment()['command']}`" in text
    assert environment()["cpu"] in text
    assert "Nothing yet." not in text
    records = [training({"mechanism": "dense"}, own.num_parameters()),
               training(own.config.attention, own.num_parameters())]  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps({"records": records}))
    card = model_card(own, "somebody/own", license="mit", results=[tmp_path / "results.json"])
    assert card.content.count("**4.482**") == 1
    assert card.content.count("| 4.482 |") == 1
    assert front(card)["model-index"][0]["results"][0]["metrics"] == [{"type": "perplexity", "value": 4.4817}]


def test_timings_of_the_model_s_mechanism_alone(planned, tmp_path):
    path = ROOT / "docs/results/targets/results.jsonl"
    with pytest.raises(ValueError, match="nothing about what this model runs"):
        model_card(planned, "x", license="mit", results=[path])
    wide = apply_plan(tiny("llama"), FastPlan(attention=Window(window=256)))
    text = model_card(wide, "x", license="mit", results=[path.parent]).content
    assert "Window(window=256)" in text
    assert "sinks=4)" not in text, "the awkward case has other fields"
    assert "SDPA" in text


def test_results_of_another_model_are_refused(planned, own, tmp_path):
    refused = {
        "another base": (
            planned,
            fidelity(tmp_path / "a.jsonl", "somebody/else", WINDOW),
            "measured on 'somebody/else'",
        ),
        "other fields": (planned, fidelity(tmp_path / "b.jsonl", "somebody/dense", OTHER), "nothing about what"),
        "quick start": (planned, ROOT / "docs/results/quickstart", "measured on 'sentence-transformers"),
    }
    for name, record in {"attention": training(OTHER, own.num_parameters()),
                         "size": training(own.config.attention, 7)}.items():  # fmt: skip
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(record))
        refused[name] = (own, path, "another model")
    for content, message in (("{", "no JSON"), ("{}", "no result of tfast"), ("[1]", "no result of tfast")):
        path = tmp_path / f"{len(content)}{message[:3]}.json"
        path.write_text(content)
        refused[content] = (own, path, message)
    refused["empty folder"] = (own, tmp_path, "expected one of")
    for model, path, message in refused.values():
        with pytest.raises(ValueError, match=message):
            model_card(model, "x", license="mit", base_model="somebody/dense", results=[path])


def test_bad_input_is_refused(planned):
    with pytest.raises(ValueError, match="needs a licence"):
        model_card(planned, "x")
    with pytest.raises(ValueError, match="as the Hub names it"):
        model_card(planned, "x", license="Apache License 2.0")
    with pytest.raises(ValueError, match="license_name"):
        model_card(planned, "x", license="other")
    with pytest.raises(ValueError, match="no field 'licence'"):
        model_card(planned, "x", licence="mit")
    with pytest.raises(ValueError, match="neither a FastPlan nor a TFastConfig"):
        model_card(tiny("llama"), "x", license="mit")
    planned.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="instead of its plan"):
        model_card(planned, "x", license="mit")


@pytest.mark.parametrize("name", ["llama", "bert", "whisper"])
def test_the_card_of_a_folder_needs_no_weights(name, tmp_path):
    model = apply_plan(tiny(name), FastPlan(attention=Window(window=5)))
    model.save_pretrained(tmp_path / "fast")
    expected = model_card(model, "fast", license="mit").content
    (tmp_path / "fast/model.safetensors").unlink()
    assert skeleton(tmp_path / "fast").device.type == "meta"
    path = write_card(tmp_path / "fast", license="mit")
    assert path.read_text() == expected
    with pytest.raises(FileExistsError, match="--overwrite"):
        write_card(tmp_path / "fast", license="mit")
    write_card(tmp_path / "fast", license="apache-2.0", overwrite=True)
    assert "license: apache-2.0" in path.read_text()


def test_the_card_of_our_own_folder(tmp_path):
    model = TFastForMaskedLM(TFastConfig(attention={"mechanism": "nystrom", "landmarks": 4}, **SMALL))
    model.save_pretrained(tmp_path / "own", remote_code=True)
    text = write_card(tmp_path / "own", license="mit", name="somebody/own").read_text()
    assert text == model_card(model, "somebody/own", license="mit", remote_code=True).content
    assert "pipeline_tag: fill-mask" in text
    with pytest.raises(ValueError, match="no saved model"):
        write_card(tmp_path, license="mit")


def test_the_card_of_a_model_that_a_recipe_trained(tmp_path):
    """Two steps of two mechanisms: the files of a real training, the folder of a real model, and one command."""
    spec = importlib.util.spec_from_file_location("pretrain_clm", ROOT / "recipes/pretrain_clm.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    small = "--tokenizer bytes --length 32 --hidden_size 16 --layers 1 --heads 2 --intermediate_size 32 --max_steps 2 "
    small += "--validation_sequences 2 --far 8 --plot false --disable_tqdm true --use_cpu true --compare window dense"
    recipe.main(
        ["--text", str(write_texts(tmp_path / "texts")), "--output_dir", str(tmp_path / "out"), *small.split()]
    )
    place = tmp_path / "out/window"
    record = json.loads((place / "metrics.json").read_text())
    text = write_card(place / "model", license="mit", results=[tmp_path / "out"]).read_text()
    assert f"**{record['final']['eval_perplexity']:.3f}**" in text
    assert "| dense() |" in text
    assert f"{record['steps']} steps of sequences of 32" in text
    alone = write_card(place / "model", license="mit", results=[place], overwrite=True).read_text()
    assert f"**{record['final']['eval_perplexity']:.3f}**" in alone
    assert "dense()" not in alone
    with pytest.raises(ValueError, match="another model"):
        write_card(tmp_path / "out/dense/model", license="mit", results=[place])


def test_a_card_of_int8_feed_forwards(tmp_path):
    """The folder's weights are not read, and a model on the meta device cannot be checked or fused."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    plan = FastPlan(attention=Window(window=8), feed_forward=Int8())
    apply_plan(BertModel(config).eval(), plan).save_pretrained(tmp_path / "fast")
    text = write_card(tmp_path / "fast", license="mit").read_text()
    assert '"form": "int8"' in text
    (tmp_path / "fast" / "model.safetensors").unlink()
    assert write_card(tmp_path / "fast", license="mit", overwrite=True).read_text() == text


def test_the_quick_start_s_figures_are_those_of_its_whole_plan(tmp_path):
    """With the same attention, figures of int8 feed-forwards do not go on a card of dense ones, nor the other way."""
    results = ROOT / "docs/results/quickstart/results.json"
    content = json.loads(results.read_text())
    attention = Window(window=content["settings"]["window"], sinks=content["settings"]["sinks"])
    model = apply_plan(tiny("bert"), FastPlan(attention=attention))
    given = {"license": "mit", "base_model": content["settings"]["model"]}
    assert content["settings"]["plan"]["feed_forward"]["form"] == "int8"
    with pytest.raises(ValueError, match="was measured with feed_forward="):
        model_card(model, "x", results=[results], **given)
    content["settings"]["plan"].pop("feed_forward")
    other = tmp_path / "results.json"
    other.write_text(json.dumps(content))
    assert "Finding long documents" in model_card(model, "x", results=[other], **given).content
