"""A training of a tiny model on however many processes, for tests that compare them."""

import json
from pathlib import Path

from safetensors.torch import load_file

from hf_tfast.training.run import pretrain
from tests.training.tiny import arguments

LAYOUTS = {
    "data": {},
    "shard": {"shard": 2},
    "tensor": {"tensor_parallel": 2},
    "sequence": {"sequence_parallel": 2},
}
ROWS = 4  # of a step, over all processes


def train(texts, out, ranks=1, *, model=None, two_way=False, **training):
    """Curve (losses and norms of every step) and weights of `pretrain`; the same rows for every number of ranks."""
    fields = {"attention": "window", "layers": 2, "model": '{"attention_bias": true}', **(model or {})}
    options = {"max_steps": 3, "per_device_train_batch_size": ROWS // ranks, "warmup_steps": 0, "save_steps": 100,
               "eval_steps": 100, "lr_scheduler_type": "constant"}  # fmt: skip
    records = pretrain(*arguments(texts, Path(out), model=fields, **{**options, **training}), two_way=two_way)
    return result(out), records


def result(out):
    history = json.loads((Path(out) / "metrics.json").read_text())["history"]
    steps = [h for h in history if "grad_norm" in h]
    return {
        "loss": [h["loss"] for h in steps],
        "norm": [h["grad_norm"] for h in steps],
        "eval": [h["eval_loss"] for h in history if "eval_loss" in h],
        "tokens": history[-1].get("num_input_tokens_seen"),
        "weights": load_file(Path(out) / "model" / "model.safetensors"),
    }


def on_ranks(texts, folder, ranks, runs):
    """On a rank: every run of {name: options of `train`} -> its result."""
    found = {}
    for name, options in runs.items():
        data = ranks // options.get("tensor_parallel", 1) // options.get("sequence_parallel", 1)
        found[name] = train(texts, Path(folder) / name, data, **options)[0]
    return found
