"""Several trainings on the same data and seed in one table: quality, the loss of far tokens, speed and memory."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..benchmarking.environment import describe
from .plot import label, plot_curves

Record = dict[str, Any]
RESULTS = "results.json"


def compare(records: Sequence[Record], folder: Path, *, draw: bool = True) -> None:
    """Write results.json, table.md and curves.png to `folder` and print the table. Models come in the order given."""
    digests = {record["data"]["digest"] for record in records}
    if len(digests) != 1:
        raise ValueError(f"these trainings saw different data ({', '.join(sorted(digests))}) and cannot be compared")
    folder.mkdir(parents=True, exist_ok=True)
    text = table(records)
    for name, content in ((RESULTS, json.dumps({"records": list(records)}, indent=1)), ("table.md", text)):
        new = folder / f".{name}.new"
        new.write_text(content + "\n", encoding="utf-8")
        new.replace(folder / name)
    if draw:
        new = folder / ".curves.png.new"
        plot_curves(records, new, describe(records[0]["environment"]))
        new.replace(folder / "curves.png")
    print(text)


def table(records: Sequence[Record]) -> str:
    """Markdown: one row a model, and below it what was trained on what."""
    two_way = "eval_accuracy" in records[0]["final"]
    columns = ["attention", "loss", "perplexity", "accuracy" if two_way else "bits per byte"]
    columns += ["loss near", "loss far", "loss new", "tokens/s", "seconds", "MiB a step"]
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    for record in records:
        final = record["final"]
        share = final.get("eval_accuracy", final.get("eval_bits_per_byte"))
        quality = [final["eval_loss"], final["eval_perplexity"], share]
        quality += [final.get(f"eval_loss_{name}") for name in ("near", "far", "new")]
        cells = ["-" if x is None else f"{x:.3f}" for x in quality]
        cells += [f"{record['tokens_per_second']:,.0f}", f"{record['training_seconds']:.0f}"]
        cells.append(f"{record['step_peak_bytes'] / 2**20:,.0f}")
        lines.append("| " + " | ".join([label(record), *cells]) + " |")
    return "\n".join([*lines, "", *_foot(records)])


def _foot(records: Sequence[Record]) -> list[str]:
    first = records[0]
    data, final, training = first["data"], first["final"], first["training"]
    occurrence = "a token" if data["unit"] == 1 else f"a token with the {data['unit'] - 1} before it"
    side = "nearest visible occurrence" if "eval_accuracy" in final else "last occurrence"
    shares = ", ".join(f"{final[f'eval_share_{name}']:.1%} {name}" for name in ("near", "far", "new"))
    loads = sorted({record["environment"]["cpu_in_use"] for record in records})
    return [
        f"{first['parameters']:,} parameters, {first['tokens_seen']:,} tokens in {first['steps']} steps of sequences "
        f"of {data['length']}, the same ones in the same order for every model (seed {training['seed']}); "
        f"mixed precision: {training['mixed_precision']}.",
        f"Losses are nats per token on {final['eval_targets']:,.0f} targets of held-out documents. Far: the "
        f"{side} of {occurrence} in the same document lies more than {data['far']} tokens away; new: there is none. "
        f"Targets: {shares}.",
        "Seconds and tokens/s count steps of training alone; MiB a step are the peak of one forward and backward "
        f"above weights and optimiser. Processor in use right after a training: {min(loads):.0%} to {max(loads):.0%}.",
        f"Machine: {describe(first['environment'])}.",
        f"Command: `{first['environment']['command']}`",
    ]
