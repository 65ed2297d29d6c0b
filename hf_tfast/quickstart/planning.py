"""`--plan auto`: the planner chooses the attention of the fast model, on this machine and this corpus.

It reads rows of `length` tokens, documents one after the other; it sees neither queries nor which document answers
them.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..planner import Proposal, propose_plan
from ..planner.report import markdown, plot
from .encoder import Encoder
from .retrieval import Text

__all__ = ["AUTO", "PARETO", "SECONDS", "TABLE", "choose", "draw_choice", "rows_of", "words"]

AUTO = "auto"
PARETO, TABLE = "pareto.png", "plan.md"  # files of a run
SECONDS = 120.0  # about what choosing may take
ROWS = 3  # one each for layers, for the choice and for the last check


def rows_of(encoder: Encoder, texts: Sequence[Text], length: int, rows: int = ROWS) -> list[dict[str, torch.Tensor]]:
    """Batches of one row of exactly `length` tokens each, special ones at its ends. ValueError where text is short."""
    room = length - encoder.special
    ids: list[int] = []
    for text in texts:
        if len(ids) >= rows * room:
            break
        ids += text.ids
    if len(ids) < rows * room:
        raise ValueError(
            f"--plan auto measures on {rows} rows of {length} tokens, and the corpus has {len(ids)} tokens: give more "
            "text, a shorter --length, or --plan window"
        )
    cut = [[*encoder.front, *ids[n * room : (n + 1) * room], *encoder.back] for n in range(rows)]
    return [{"input_ids": torch.tensor([row], device=encoder.model.device)} for row in cut]


def choose(
    dense: Encoder, texts: Sequence[Text], length: int, max_error: float, report: Callable[[str], None]
) -> Proposal:
    """The planner's proposal for the lengthened encoder, which is as before afterwards."""
    batches = rows_of(dense, texts, length)
    return propose_plan(dense.model, batches, max_error=max_error, rounds=3, seconds=SECONDS, report=report)


def draw_choice(proposal: Proposal, folder: Path) -> None:
    """pareto.png and plan.md, the table of layers and of all that was tried, into the folder of the run."""
    plot(proposal, folder / PARETO)
    (folder / TABLE).write_text(markdown(proposal), encoding="utf-8")


def words(plan: dict[str, Any]) -> list[str]:
    """What was chosen and why, from the proposal as results.json holds it."""
    runs: dict[str, list[int]] = {}
    for row in plan["layers"]:
        runs.setdefault(row["mechanism"], []).append(row["layer"])
    chosen = "; ".join(f"layers {', '.join(map(str, layers))}: `{name}`" for name, layers in runs.items())
    said = [
        f"Chosen on this machine: {chosen}.",
        f"Why: of what keeps the mean hidden states within {plan['max_error']:g} (one minus the cosine with the dense "
        f"ones; this plan: {plan['error']:.3g}, on a row that nothing was chosen by {plan['unseen']:.3g}), it was the "
        f"fastest whole model: {plan['speedup']:.2f}x as fast as dense attention.",
    ]
    left = len(plan["left_out"])
    tried = sum(point["kind"] == "single" for point in plan["points"])
    if plan["single"] is None:
        of = f"None of the {tried} single mechanisms that there was time for" if left else "No single mechanism"
        said.append(f"{of} in all layers stayed within that.")
    elif plan["single_seconds"] > plan["seconds"]:
        gain = plan["single_seconds"] / plan["seconds"]
        said.append(
            f"The best single mechanism in all layers, `{plan['single']}`, is slower: the plan is {gain:.2f}x it."
        )
    if left:
        said.append(
            f"{left} more were not tried in all layers at once, for want of time; `tfast plan` without --seconds does."
        )
    if not plan["kept"]:
        said.append("On the row that nothing was chosen by the error is above the budget.")
    return said
