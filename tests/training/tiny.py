"""Arguments of a training that takes a second, over texts made for the test, and recipes as modules."""

import importlib.util
import random
from pathlib import Path

from hf_tfast.training.arguments import DataArguments, ModelArguments, PretrainingArguments

WORDS = ("window", "bucket", "token", "naïve", "query", "key", "λ", "value", "sum", "row")

RECIPES = Path(__file__).parents[2] / "recipes"


def load(name: str):
    """A recipe as a module."""
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_texts(folder: Path, count: int = 8, words: int = 60, seed: int = 0) -> Path:
    """`count` files of random words, no two alike."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        text = " ".join(draw.choice(WORDS) for _ in range(draw.randrange(words // 2, words * 2)))
        (folder / f"{n}.txt").write_text(f"{n} {text}\n", encoding="utf-8")
    return folder


def arguments(
    texts: Path, out: Path, *, data: dict | None = None, model: dict | None = None, **training
) -> tuple[DataArguments, ModelArguments, PretrainingArguments]:
    """A model of one layer and 16 channels over bytes, two steps of two sequences of 32."""
    sizes = {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 32}
    quick = {
        "use_cpu": True,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "eval_steps": 1,
        "save_steps": 1,
        "disable_tqdm": True,
        "plot": False,
        "report_to": "none",
    }
    small = {"text": [str(texts)], "tokenizer": "bytes", "length": 32, "validation_sequences": 2, "far": 8}
    return (
        DataArguments(**{**small, **(data or {})}),
        ModelArguments(**{**sizes, **(model or {})}),
        PretrainingArguments(**{**quick, "output_dir": str(out), **training}),
    )
