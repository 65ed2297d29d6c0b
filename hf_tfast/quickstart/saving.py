"""Saves the fast encoder as a user would publish it, and proves in fresh processes that it reloads as it was.

The folder holds model, tokenizer, the files by which sentence-transformers finds its parts, and a model card. A fresh
process runs FRESH: plain AutoModel after `import hf_tfast`. Where sentence-transformers is installed, another one runs
FRESH_SENTENCES. Both need the import: it adds the plan's names to Transformers; without it, loading the folder raises.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .encoder import Encoder

FRESH = """\
import hf_tfast  # adds the plan's names to Transformers, alters nothing
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer(text, truncation=True, return_tensors="pt")
states = model(**inputs).last_hidden_state
"""

FRESH_SENTENCES = """\
import hf_tfast  # adds the plan's names to Transformers, alters nothing
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(folder)
vector = model.encode(text)
"""

_RUN = """\
import json, sys, torch, transformers
from safetensors.torch import save_file
transformers.utils.logging.disable_progress_bar()
folder, texts, out, device, snippet = sys.argv[1:]
torch.set_default_device(device)
torch.set_grad_enabled(False)
found = {}
for number, text in enumerate(json.load(open(texts))):
    names = {"folder": folder, "text": text}
    exec(snippet, names)
    result = names["states"] if "states" in names else torch.as_tensor(names["vector"])
    found[str(number)] = result.cpu().contiguous()
save_file(found, out)
"""


_INT8 = " Its feed-forwards store and multiply int8 (LLM.int8)."


def save_encoder(encoder: Encoder, folder: Path) -> None:
    """Model, tokenizer and sentence-transformers' module files, into a new folder."""
    encoder.model.save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)
    parts = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (path, kind) in enumerate(parts)
    ]
    pooling = {
        "word_embedding_dimension": encoder.model.config.hidden_size,
        "pooling_mode_cls_token": encoder.pooling == "cls",
        "pooling_mode_mean_tokens": encoder.pooling == "mean",
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    _write(folder / "modules.json", modules)
    _write(folder / "1_Pooling" / "config.json", pooling)
    _write(folder / "2_Normalize" / "config.json", {})
    _write(folder / "sentence_bert_config.json", {"max_seq_length": encoder.native, "do_lower_case": False})
    _write(folder / "config_sentence_transformers.json", {"similarity_fn_name": "cosine", "prompts": {}})


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def check_reload(encoder: Encoder, folder: Path, texts: Sequence[str]) -> dict[str, Any]:
    """What fresh processes make of `texts` with the saved folder, against `encoder` in this one.

    "equal": are all states of all texts equal to the last bit; "largest_difference" of any; "tokens" of each text.
    "sentence_transformers": None where it is not installed, else its version and the largest difference of a vector of
    length 1; "same" is bit-equality or a difference that only rounding explains.
    RuntimeError with the process's own words where it fails.
    """
    with torch.no_grad():
        inputs = [encoder.tokenizer(t, truncation=True, return_tensors="pt").to(encoder.model.device) for t in texts]
        here = [encoder.model(**i).last_hidden_state.cpu() for i in inputs]
    there = _in_fresh_process(FRESH, folder, texts, encoder.model.device)
    same = all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(here, there, strict=True))
    gap = max((a.float() - b.float()).abs().max().item() for a, b in zip(here, there, strict=True))
    result: dict[str, Any] = {"equal": same, "largest_difference": gap}
    result["tokens"] = [i["input_ids"].shape[1] for i in inputs]
    result["sentence_transformers"] = None
    if importlib.util.find_spec("sentence_transformers") is not None:
        result["sentence_transformers"] = _check_sentences(encoder, folder, texts)
    return result


def _check_sentences(encoder: Encoder, folder: Path, texts: Sequence[str]) -> dict[str, Any]:
    room = encoder.native - encoder.special
    here = [encoder.vectors([encoder.content(text)[0][:room]])[0].cpu() for text in texts]
    there = _in_fresh_process(FRESH_SENTENCES, folder, texts, encoder.model.device)
    gap = max((a - b.float()).abs().max().item() for a, b in zip(here, there, strict=True))
    enough = 1e-6 if encoder.model.dtype == torch.float32 else 4e-3
    version = metadata.version("sentence-transformers")
    return {"version": version, "largest_difference": gap, "same": gap <= enough}


def _in_fresh_process(snippet: str, folder: Path, texts: Sequence[str], device: torch.device) -> list[Tensor]:
    """Run the snippet once for each text in a new interpreter; its `states` or `vector`."""
    with tempfile.TemporaryDirectory() as scratch:
        given, made = Path(scratch) / "texts.json", Path(scratch) / "made.safetensors"
        given.write_text(json.dumps(list(texts)))
        # As many threads as here: sums are split by threads, and another split rounds otherwise.
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        command = [sys.executable, "-c", _RUN, str(folder), str(given), str(made), str(device), snippet]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"a fresh process could not load {folder.name}:\n{done.stderr.strip()[-2000:]}")
        found = load_file(made)
        return [found[str(n)] for n in range(len(texts))]


def _attention(results: dict[str, Any]) -> str:
    """The attention of the model's card, in words."""
    if results["proposal"]:
        return "attention that was chosen layer by layer, by measurement: " + ", ".join(
            f"layer {row['layer']} `{row['mechanism']}`" for row in results["proposal"]["layers"]
        )
    near, first = results["settings"]["window"], results["settings"]["sinks"]
    return (
        f"attention that reads {near} tokens on each side and the first {first}; time and memory grow linearly with "
        "the length"
    )


def write_card(encoder: Encoder, folder: Path, results: dict[str, Any], tables: str) -> None:
    """README.md of the model: licence and base model of the teacher, use, how it was made, what was measured."""
    from huggingface_hub import ModelCard, ModelCardData

    settings = results["settings"]
    on_hub = not Path(encoder.name).exists()
    data = ModelCardData(
        license=encoder.licence,
        base_model=encoder.name if on_hub else None,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["hf_tfast", "long-context", "sparse-attention", "feature-extraction"],
    )
    name = encoder.name if on_hub else Path(encoder.name).name
    licence = encoder.licence or "not stated by the base model; ask its authors before you publish this one"
    text = f"""---
{data.to_yaml()}
---

# {name.split("/")[-1]}, {settings["length"]} tokens, fast attention{", int8" if settings["int8"] else ""}

{name} with {settings["length"]} positions and {_attention(results)}.{_INT8 if settings["int8"] else ""} No weight was
trained: the learned positions were tiled, and the plan is in config.json.

    pip install {'"hf_tfast[int8]"' if settings["int8"] else "hf_tfast"}

With sentence-transformers:

```python
{FRESH_SENTENCES.replace("SentenceTransformer(folder)", 'SentenceTransformer("this-model")')}```

With Transformers alone:

```python
{FRESH.replace("folder", '"this-model"')}```

A vector is the {"mean of all states" if encoder.pooling == "mean" else "first state"}, scaled to length 1. Without
`import hf_tfast` the model does not load.

## Measured

{tables}

## Limits

- Positions beyond {settings["native"]} repeat learned ones: far apart, positions do not tell what comes first.
- Knowledge, bias and languages are those of the base model.
- The figures are of one corpus ({results["corpus"]["source"]}) on one machine; measure on yours:
  `tfast quickstart --corpus yours.jsonl`.

Licence: {licence}.
"""
    ModelCard(text).save(folder / "README.md")
