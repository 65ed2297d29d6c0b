"""TFast models pushed with and without code, and loaded where hf_tfast is imported, is installed, and is missing."""

import pytest

from tests.hub.processes import run
from tests.hub.server import OWNER, LocalHub

MODELS = """
__import__("os").environ["HF_TFAST_NATIVE"] = "0"  # one file carries no C: the same operations on both sides
NAMES = ["window", "hashed", "causal", "masked", "seq2seq"]
HEADS = {"masked": "AutoModelForMaskedLM", "seq2seq": "AutoModelForSeq2SeqLM"}
IDS = torch.arange(80).reshape(2, 40) * 7 % 97 + 1
MASK = torch.ones_like(IDS)
MASK[0, :6] = 0

def auto(name):
    return getattr(transformers, HEADS.get(name, "AutoModelForCausalLM"))

def logits(model):
    with torch.no_grad():
        more = {"decoder_input_ids": IDS[:, :20]} if model.config.is_encoder_decoder else {}
        return model.eval()(input_ids=IDS, attention_mask=MASK, **more).logits.tolist()
"""
PUSH = (
    MODELS
    + """
import os
import hf_tfast
from hf_tfast import TFastConfig, TFastForCausalLM, TFastForConditionalGeneration, TFastForMaskedLM, mechanisms
from hf_tfast import TFastSeq2SeqConfig

SMALL = {"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 48, "max_position_embeddings": 128, "pad_token_id": 0, "initializer_range": 0.3}
EVERY = [cls(**cls.small) for cls in mechanisms().values()]
CAUSAL = [one for one in EVERY if one.causal and one.name != "svd"]  # which needs a calibrated basis there
LAYERS = {
    "window": [{"mechanism": "window", "window": 5, "sinks": 1}] * 2,
    "hashed": [{"mechanism": "hashed", "bits": 2, "rounds": 2, "cap": 4, "window": 2}] * 2,
    "causal": CAUSAL,
    "masked": EVERY,
    "seq2seq": {"encoder": {"mechanism": "nystrom", "landmarks": 4},
                "decoder": {"1-": {"mechanism": "window", "window": 5}}},
}
MORE = {"window": {"position_encoding": "sinusoidal", "similarity": "cosine", "attention_gate": True},
        "seq2seq": {"decoder_start_token_id": 1},
        "masked": {"nystrom_kernel": 3, "linformer_projection": "learned", "position_encoding": "low_rank"}}
said["masked mechanisms"] = [one.name for one in EVERY]
torch.manual_seed(7)
for name, layers in LAYERS.items():
    config = (TFastSeq2SeqConfig if name == "seq2seq" else TFastConfig)(
        attention=layers, num_hidden_layers=len(layers), **SMALL, **MORE.get(name, {}))
    heads = {"masked": TFastForMaskedLM, "seq2seq": TFastForConditionalGeneration}
    model = heads.get(name, TFastForCausalLM)(config).eval()
    said[name] = logits(model)
    model.push_to_hub(f"flat-{name}", remote_code=True)
    if name == "window":
        model.push_to_hub("pointer")
        model.save_pretrained("bare")
        said["bare"] = sorted(os.listdir("bare"))
        model.save_pretrained("pushed-on-saving", push_to_hub=True, remote_code=True)
    if name != "masked":
        given = {"attention_mask": MASK, "max_new_tokens": 6, "do_sample": False}
        said[f"{name} tokens"] = model.generate(IDS, **given).tolist()
    if name == "hashed":
        said["pushed"] = hf_tfast.push(model, "somebody/with-card", remote_code=True, license="mit")
        hf_tfast.push(model, "somebody/with-card", license="apache-2.0")
        said["by hand"] = error(lambda: hf_tfast.push(model, "somebody/flat-hashed", license="mit"))
        said["no licence"] = error(lambda: hf_tfast.push(model, "somebody/new"))
        said["there"] = error(lambda: hf_tfast.save(model, "bare", license="mit"))
    model.set_attn_implementation("sdpa")
    said[f"{name} dense"] = logits(model)
"""
)
WITHOUT = (
    MODELS
    + """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

said["installed"] = error(lambda: __import__("hf_tfast"))
models = {}
for name in NAMES:
    models[name] = auto(name).from_pretrained(f"OWNER/flat-{name}", trust_remote_code=True)
    said[name] = logits(models[name])
for name, model in models.items():  # several files side by side, each with its own classes
    said[f"{name} again"] = logits(model)
    model.save_pretrained(name)
    said[f"{name} saved"] = logits(auto(name).from_pretrained(name, trust_remote_code=True))
    if name != "masked":
        given = {"attention_mask": MASK, "max_new_tokens": 6, "do_sample": False}
        said[f"{name} tokens"] = model.generate(IDS, **given).tolist()
window = models["window"]
said["files"] = sorted(__import__("os").listdir("window"))
said["auto_map"] = json.load(open("window/config.json"))["auto_map"]
said["base"] = type(AutoModel.from_pretrained("OWNER/flat-window", trust_remote_code=True)).__name__
window.push_to_hub("again")
said["pushed again"] = logits(AutoModelForCausalLM.from_pretrained("OWNER/again", trust_remote_code=True))
said["saved without"] = error(lambda: window.save_pretrained("x", remote_code=False))
window.set_attn_implementation("sdpa")
said["window dense"] = logits(window)
window.set_attn_implementation("tfast_window")
said["other fields"] = logits(window)
said["untrusted"] = error(lambda: AutoModelForCausalLM.from_pretrained("OWNER/flat-window", trust_remote_code=False))
said["pointer"] = error(lambda: AutoModelForCausalLM.from_pretrained("OWNER/pointer", trust_remote_code=True))
said["pointer untrusted"] = error(lambda: AutoModel.from_pretrained("OWNER/pointer", trust_remote_code=False))
json.dump({"model_type": "tfast"}, open("config.json", "w"))
said["bare"] = error(lambda: AutoConfig.from_pretrained("."))
"""
).replace("OWNER", OWNER)
IMPORTED = (
    MODELS
    + """
import hf_tfast
from transformers import AutoModelForCausalLM
for trust in (None, True):
    model = AutoModelForCausalLM.from_pretrained("OWNER/flat-window", trust_remote_code=trust)
    said[f"class {trust}"] = type(model).__module__
    said[f"window {trust}"] = logits(model)
model.save_pretrained("plain")
said["files"] = sorted(__import__("os").listdir("plain"))
said["auto_map"] = json.load(open("plain/config.json")).get("auto_map")
said["pointer"] = logits(AutoModelForCausalLM.from_pretrained("OWNER/pointer"))
said["pushed"] = logits(AutoModelForCausalLM.from_pretrained("OWNER/pushed-on-saving"))
model.save_pretrained("code", remote_code=True)
said["again"] = open("code/modeling_tfast.py").read() == open(CODE).read()
"""
).replace("OWNER", OWNER)
INSTALLED = (
    MODELS
    + """
from transformers import AutoModelForCausalLM
for repository in ("flat-window", "pointer"):
    said["before"] = "hf_tfast" in sys.modules
    model = AutoModelForCausalLM.from_pretrained(f"OWNER/{repository}", trust_remote_code=True)
    import hf_tfast
    said[f"{repository} is ours"] = isinstance(model, hf_tfast.TFastForCausalLM)
    said[repository] = logits(model)
    model.save_pretrained(repository)
    said[f"{repository} saved"] = logits(AutoModelForCausalLM.from_pretrained(repository))
    said[f"{repository} auto_map"] = json.load(open(f"{repository}/config.json")).get("auto_map")
    model.push_to_hub(f"again-{repository}")
    model.save_pretrained(f"{repository}-code", remote_code=True)
    said[f"{repository} code"] = "class Window(" in open(f"{repository}-code/modeling_tfast.py").read()
    said[f"{repository} plain"] = error(lambda: hf_tfast.TFastForCausalLM(model.config).save_pretrained("plain"))
"""
).replace("OWNER", OWNER)


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    place = tmp_path_factory.mktemp("remote")
    with LocalHub() as hub:
        yield hub, run(hub, place / "push", PUSH), place


def test_one_file_runs_without_hf_tfast_to_the_last_bit(pushed):
    hub, before, place = pushed
    after = run(hub, place / "without", WITHOUT, without=True)
    assert after["installed"].startswith("ModuleNotFoundError")
    assert len(before["masked mechanisms"]) >= 13
    for name in ("window", "hashed", "causal", "masked", "seq2seq"):
        assert before[name] != before[f"{name} dense"], "the mechanism must show"
        for case in (name, f"{name} again", f"{name} saved"):
            assert after[case] == before[name], case
        assert after.get(f"{name} tokens") == before.get(f"{name} tokens")
    assert after["pushed again"] == before["window"]
    assert after["window dense"] == before["window dense"]
    assert after["other fields"] != before["window"]
    assert after["files"] == ["config.json", "generation_config.json", "model.safetensors", "modeling_tfast.py"]
    assert after["auto_map"]["AutoModelForCausalLM"] == "modeling_tfast.TFastForCausalLM"
    assert after["base"] == "TFastModel"
    assert "nothing could load it" in after["saved without"]
    assert "trust_remote_code=True" in after["untrusted"]
    assert "pip install hf_tfast" in after["pointer"]
    assert after["pointer"].startswith("ImportError")
    assert "trust_remote_code=True" in after["pointer untrusted"]
    assert "model type `tfast`" in after["bare"], "what Transformers says where nothing points to hf_tfast"
    assert before["bare"] == ["config.json", "generation_config.json", "model.safetensors"]
    assert hub.unknown == []


def test_where_hf_tfast_is_imported_no_code_of_the_repository_runs(pushed):
    hub, before, place = pushed
    code = place / "pushed.py"
    code.write_bytes(hub.files(f"{OWNER}/flat-window")["modeling_tfast.py"])
    asked = len(hub.requests)
    after = run(hub, place / "imported", f"CODE = {str(code)!r}\n{IMPORTED}")
    for trust in (None, True):
        assert after[f"class {trust}"] == "hf_tfast.models.modeling_tfast"
        assert after[f"window {trust}"] == before["window"]
    assert not [request for request in hub.requests[asked:] if request.endswith("modeling_tfast.py")]
    assert after["files"] == ["config.json", "generation_config.json", "model.safetensors"]
    assert after["auto_map"] is None
    assert after["pointer"] == after["pushed"] == before["window"]
    assert after["again"], "the same model gives the same file in another process"


def test_where_hf_tfast_is_installed_its_classes_win(pushed):
    hub, before, place = pushed
    after = run(hub, place / "installed", INSTALLED)
    # the first is loaded before hf_tfast is imported, through the repository's code, and the second after it, without
    assert after["flat-window auto_map"]["AutoModelForCausalLM"] == "modeling_tfast.TFastForCausalLM"
    assert after["pointer auto_map"] is None
    for repository in ("flat-window", "pointer"):
        assert after[f"{repository} is ours"]
        assert after[repository] == after[f"{repository} saved"] == before["window"]
        assert after[f"{repository} code"], "written anew from the installed package"
        pushed_again = hub.files(f"{OWNER}/again-{repository}")
        assert pushed_again["modeling_tfast.py"] == hub.files(f"{OWNER}/{repository}")["modeling_tfast.py"]
        assert after[f"{repository} plain"] is None, "the installed class is not marked as one from a repository"


def test_pushed_with_a_card(pushed):
    hub, before, _ = pushed
    files = hub.files(f"{OWNER}/with-card")
    card = files["README.md"].decode()
    assert "license: apache-2.0" in card, "a card of ours is renewed"
    assert "| text 0 to 1 | self | `Hashed(" in card
    assert before["pushed"].startswith(hub.url)
    first = hub.repositories[f"{OWNER}/with-card"].commits[1][1]
    assert b"class Hashed(" in first["modeling_tfast.py"]
    assert b"class Hashed(" not in files["modeling_tfast.py"]
    assert "a card that hf_tfast did not make" in before["by hand"]
    assert "needs a licence" in before["no licence"]
    assert "FileExistsError" in before["there"]
    assert f"{OWNER}/new" not in hub.repositories
