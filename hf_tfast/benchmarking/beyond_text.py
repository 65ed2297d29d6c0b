"""Beyond text: a vision transformer at 4,096 patches and a Whisper encoder at full length, dense beside fast.

    python -m hf_tfast.benchmarking.beyond_text --out docs/results/beyond_text

Each fast model is a copy of the dense one with a FastPlan, so both have the same weights and read the same input. A
table tells the time of a forward (in turns, medians), its memory, and how far the last hidden states are from those of
the dense model in fp32: the norm of the difference over the norm.

Weights are random, because nothing is downloaded, and as large as keeps the size of what passes through them (their
deviation is width^-1/2; with the usual 0.02 attention would hardly count). Such attention knows no neighbourhood: it
is spread over the whole input, which no window sees. What trained weights lose has to be measured on them.
"""

import argparse
import json
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ViTConfig, ViTModel, WhisperConfig, WhisperModel

from ..attention._base import Mechanism
from ..attention.nystrom import Nystrom
from ..attention.performer import Performer
from ..attention.scatterbrain import Scatterbrain
from ..attention.window import Window
from ..integration.apply import apply_plan
from ..integration.plan import FastPlan
from .environment import busy, describe, environment
from .memory import peak_memory

__all__ = ["MODELS", "PLANS", "Example", "error", "main", "measure"]

PLANS: dict[str, Mechanism] = {
    "window": Window(window=128, sinks=1),
    "scatterbrain": Scatterbrain(window=128, features=256),
    "performer": Performer(features=256),
    "nystrom": Nystrom(landmarks=64),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Example:
    """A model, what it reads, and how many positions its attention has."""

    title: str
    model: nn.Module
    inputs: dict[str, Tensor]
    positions: int


def vision(patches: int = 64, width: int = 384, layers: int = 6) -> Example:
    """A ViT on a square image of patches * patches patches of 16 * 16 pixels: smooth noise, as photographs are."""
    size = 16 * patches
    config = ViTConfig(
        image_size=size, patch_size=16, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=width // 64, intermediate_size=4 * width, hidden_dropout_prob=0.0,
        initializer_range=width**-0.5,
    )  # fmt: skip
    model = ViTModel(config, add_pooling_layer=False).eval()
    noise = torch.randn(1, 3, 2 * patches, 2 * patches)
    image = nn.functional.interpolate(noise, size=(size, size), mode="bicubic", align_corners=False)
    shape = f"ViT, {layers} layers, {width} wide, {size} x {size} pixels"
    return Example(shape, model, {"pixel_values": image}, patches**2 + 1)


def audio(positions: int = 1500, width: int = 384, layers: int = 4) -> Example:
    """Whisper's encoder in the shape of whisper-tiny on 30 seconds, which are 1,500 positions."""
    config = WhisperConfig(
        d_model=width, encoder_layers=layers, decoder_layers=1, encoder_attention_heads=width // 64,
        decoder_attention_heads=width // 64, encoder_ffn_dim=4 * width, decoder_ffn_dim=width,
        max_source_positions=positions, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None, init_std=width**-0.5,
    )  # fmt: skip
    frames = torch.randn(1, config.num_mel_bins, 2 * positions).cumsum(-1)  # neighbours are alike, as in sound
    frames = (frames - frames.mean()) / frames.std()
    shape = f"Whisper encoder, {layers} layers, {width} wide, {positions // 50} seconds"
    return Example(shape, WhisperModel(config).eval(), {"input_features": frames}, positions)


MODELS: dict[str, Callable[..., Example]] = {"vit": vision, "whisper": audio}


def states(model: Any, inputs: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """[1 i d]: the last hidden states, of an encoder-decoder those of its encoder."""
    encoder: PreTrainedModel = model.get_encoder() if model.config.is_encoder_decoder else model
    with torch.no_grad():
        return encoder(**{name: x.to(dtype) for name, x in inputs.items()}).last_hidden_state


def error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def measure(example: Example, plans: dict[str, Mechanism], rounds: int) -> dict[str, Any]:
    """Times, memory and errors of the dense model and of its copies with each plan, in both types."""
    rows: dict[str, Any] = {}
    wanted = states(example.model, example.inputs)
    for kind, dtype in DTYPES.items():
        dense: Any = deepcopy(example.model).to(dtype)
        models: dict[str, Any] = {"dense": dense}
        for name, mechanism in plans.items():
            where: Any = {"encoder.0-": mechanism} if dense.config.is_encoder_decoder else mechanism
            models[name] = apply_plan(deepcopy(dense), FastPlan(attention=where))
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for n in range(rounds + 1):  # the first round warms up
            for name, model in models.items():
                begin = time.perf_counter()
                made = states(model, example.inputs, dtype)
                if n:
                    seconds[name].append(time.perf_counter() - begin)
                    continue
                about = {"attention": plans[name].to_dict()} if name in plans else {}
                rows.setdefault(name, about)[kind] = {"error": error(made, wanted)}
        for name, model in models.items():
            peak = peak_memory(partial(states, model, example.inputs, dtype))
            rows[name][kind] |= {"seconds": seconds[name], "peak_bytes": peak.bytes, "peak_method": peak.method}
    return {"title": example.title, "positions": example.positions, "rows": rows}


def table(found: dict[str, Any]) -> str:
    """Markdown: a table for each model."""
    parts = []
    for about in found["models"].values():
        parts.append(f"{about['title']}: {about['positions']:,} positions.\n")
        parts.append("| attention | fp32 ms | times as fast | peak MiB | error | bf16 ms | times as fast | error |")
        parts.append("|---|" + "---:|" * 7)
        base = about["rows"]["dense"]
        for name, row in about["rows"].items():
            fields = {k: v for k, v in row.get("attention", {}).items() if k not in ("mechanism", "seed")}
            said = ", ".join(f"{key}={value}" for key, value in fields.items())
            cells = [f"{name} ({said})" if said else name]
            for kind in DTYPES:
                spent, first = median(row[kind]["seconds"]), median(base[kind]["seconds"])
                cells += [f"{1e3 * spent:.0f}", f"{first / spent:.2f}"]
                cells += [f"{row[kind]['peak_bytes'] / 2**20:.0f}"] if kind == "fp32" else []
                cells.append("-" if row is base and kind == "fp32" else f"{row[kind]['error']:.2%}")
            parts.append("| " + " | ".join(cells) + " |")
        parts.append("")
    parts.append(
        "Random weights (deviation width^-1/2). Error: norm of the difference from the dense model's last hidden "
        f"states in fp32 over their norm. Times: medians of {found['rounds']} forwards in turns; memory: what a "
        "forward needs beside the model."
    )
    warning = busy(found["environment"])
    parts += [f"Warning: {warning}."] if warning else []
    parts += [f"Machine: {describe(found['environment'])}.", f"Command: `{found['environment']['command']}`"]
    return "\n".join(parts)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure and write results.json and table.md to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results.json and table.md")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="which")
    parser.add_argument("--rounds", type=int, default=5, help="timed forwards of each")
    given = parser.parse_args(arguments)
    if given.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {given.rounds}")
    found: dict[str, Any] = {"rounds": given.rounds, "environment": environment(), "models": {}}
    for name in given.models:
        torch.manual_seed(0)
        found["models"][name] = measure(MODELS[name](), PLANS, given.rounds)
    given.out.mkdir(parents=True, exist_ok=True)
    text = table(found)
    (given.out / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (given.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return found


if __name__ == "__main__":
    main()
