"""Key-value recall: does fast attention find a value that was said thousands of tokens ago?

    python -m hf_tfast.distillation.recall_task --out docs/results/recall_task

A sequence holds facts, a key bound to a value, drawn anew for every sequence and strewn among filler tokens; near its
end keys are asked for, and the model has to say their values. Nothing but attention to the one place of the fact gives
the answer, and most facts lie further back than any window here reaches. A small dense model learns this, from short
sequences to long ones; then its attention is swapped for mechanisms that each read about as many keys a query, and,
after that, distilled (both stages) on the same task.

Source: Arora et al., "Zoology", https://arxiv.org/abs/2312.04927, section 3 (multi-query associative recall).
Differs: there key and value are two tokens, and a model has to learn to join neighbours first; here a fact is one of
KEYS * VALUES tokens, so that one step of attention answers. The test is of finding, not of joining.
"""

import argparse
import json
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainingArguments, set_seed

from ..benchmarking.environment import describe, environment
from ..models.configuration_tfast import TFastConfig
from ..models.modeling_tfast import TFastForCausalLM
from ..training.packing import IGNORED, collate
from .layerwise import LayerMatching
from .losses import cross_entropy, next_tokens
from .students import fast_copy
from .trainer import DistillationTrainer
from .whole import LogitMatching

__all__ = ["Recall", "accuracy", "learn", "main"]

KEYS, VALUES, FILLERS = 32, 8, 32
VALUE, ASK, FACT = 0, VALUES, VALUES + KEYS  # where tokens of a kind begin: values, questions, facts, fillers
FILLER = FACT + KEYS * VALUES
VOCABULARY = FILLER + FILLERS
HISTORY = "history.json"
LENGTHS = (128, 512, 4096)  # of the sequences that the teacher learns from, one after the other
STUDENTS: dict[str, dict[str, Any]] = {  # each reads at most 256 keys a query
    "window": {"mechanism": "window", "window": 256},
    "topk": {"mechanism": "topk", "k": 192, "block": 16, "window": 64},
    "hashed": {"mechanism": "hashed", "bits": 6, "rounds": 3, "cap": 64, "window": 64},
}


class Recall(Dataset[dict[str, Tensor]]):
    """`count` sequences of `length`, a pure function of seed and number: input_ids and labels, the asked values alone.

    pairs  facts, each of another key, in the first three quarters; in the last quarter each key is asked for once,
           and the token after the question is its value.
    """

    def __init__(self, count: int, length: int, pairs: int = 16, seed: int = 0) -> None:
        if not 1 <= pairs <= KEYS or length // 4 < 2 * pairs:
            raise ValueError(f"{pairs} pairs need a length of {8 * pairs} at least (and {KEYS} keys), got {length}")
        self.count, self.length, self.pairs, self.seed = count, length, pairs, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        if not 0 <= n < self.count:
            raise IndexError(n)
        random = torch.Generator().manual_seed(hash((self.seed, n, self.length)) % 2**63)
        ids = torch.randint(FILLER, VOCABULARY, (self.length,), generator=random)
        labels = torch.full_like(ids, IGNORED)
        keys = torch.randperm(KEYS, generator=random)[: self.pairs]
        values = torch.randint(0, VALUES, (self.pairs,), generator=random)
        border = self.length * 3 // 4
        for first, last, asked in ((0, border, False), (border, self.length, True)):
            slots = torch.randperm((last - first) // 2, generator=random)[: self.pairs] * 2 + first
            order = torch.randperm(self.pairs, generator=random)
            if asked:
                ids[slots], ids[slots + 1] = ASK + keys[order], VALUE + values[order]
                labels[slots + 1] = VALUE + values[order]
            else:
                ids[slots] = FACT + keys[order] * VALUES + values[order]
        return {"input_ids": ids, "labels": labels}


@torch.no_grad()
def accuracy(model: PreTrainedModel, rows: Recall) -> float:
    """Share of the asked values that the model says."""
    right = asked = 0
    model.eval()
    for n in range(len(rows)):
        batch = collate([rows[n]])
        wanted = next_tokens(batch["labels"])
        kept = wanted != IGNORED
        said = model(input_ids=batch["input_ids"], use_cache=False).logits.argmax(-1)
        right += int((said == wanted)[kept].sum())
        asked += int(kept.sum())
    return right / asked


def learn(
    model: PreTrainedModel, steps: int, tokens: int, rate: float, lengths: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Teach the task, from short sequences to long ones; a length ends when 19 of 20 are right in ten steps.

    Longer ones than the first get a quarter of the steps: what is left to learn is to look further. The rate falls to
    a tenth over the steps of each length.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    history = []
    for n, length in enumerate(lengths):
        most = steps if n == 0 else max(steps // 4, 1)
        size, start = max(tokens // length, 1), time.perf_counter()
        recent: list[float] = []
        rows = Recall(most * size, length, pairs=min(16, length // 8), seed=1)
        for step in range(most):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 50) * (1 - 0.9 * step / most)
            batch = collate([rows[m] for m in range(step * size, (step + 1) * size)])
            wanted = next_tokens(batch["labels"])
            logits = model.train()(input_ids=batch["input_ids"], use_cache=False).logits
            loss = cross_entropy(logits, wanted)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            kept = wanted != IGNORED
            recent = [*recent[-9:], float((logits.argmax(-1) == wanted)[kept].float().mean())]
            if step % 50 == 0:
                right = sum(recent) / len(recent)
                print(f"length {length} step {step} loss {loss.detach().item():.3f} right {right:.3f}", flush=True)
            if len(recent) == 10 and sum(recent) / 10 > 0.95:
                break
        seconds = time.perf_counter() - start
        history.append({"length": length, "steps": step + 1, "right": sum(recent) / len(recent), "seconds": seconds})
        print(history[-1], flush=True)
    return history


def _healed(student: PreTrainedModel, teacher: PreTrainedModel, length: int, steps: int, out: Path) -> PreTrainedModel:
    """The student after both stages of distillation on the task, half of the steps each."""
    for name, objective, share in (("layers", LayerMatching(), steps // 2), ("logits", LogitMatching(), steps // 2)):
        args = TrainingArguments(
            str(out / name), use_cpu=True, max_steps=share, per_device_train_batch_size=1, learning_rate=1e-3,
            logging_steps=10, save_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        rows = Recall(max(share, 1), length, seed=2)
        DistillationTrainer(
            model=student, teacher=teacher, objective=objective, args=args, train_dataset=rows, data_collator=collate
        ).train()
    return student


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Teach, swap, heal, measure; results.json and table.md in --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results.json and table.md")
    parser.add_argument("--work", type=Path, default=Path("runs/recall"), help="folder of the teacher, which is kept")
    parser.add_argument("--steps", type=int, default=2000, help="of the teacher at the first length, at most")
    parser.add_argument("--tokens", type=int, default=4096, help="of a step of the teacher")
    parser.add_argument("--rate", type=float, default=5e-3, help="the teacher's learning rate")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="that the teacher learns from")
    parser.add_argument("--heal", type=int, default=60, help="steps of distillation of each student, both stages")
    parser.add_argument("--sequences", type=int, default=16, help="held-out ones that all are measured on")
    given = parser.parse_args(arguments)
    set_seed(0)
    config = TFastConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128, max_position_embeddings=max(given.lengths), causal=True, initializer_range=0.125,
        position_encoding="none",
    )  # fmt: skip
    place, length = given.work / "teacher", given.lengths[-1]
    if not (place / HISTORY).is_file():
        teacher: PreTrainedModel = TFastForCausalLM(config)
        history = learn(teacher, given.steps, given.tokens, given.rate, tuple(given.lengths))
        teacher.save_pretrained(place)
        (place / HISTORY).write_text(json.dumps(history), encoding="utf-8")
    teacher = TFastForCausalLM.from_pretrained(place)
    history = json.loads((place / HISTORY).read_text(encoding="utf-8"))
    rows = Recall(given.sequences, length, seed=3)
    found: dict[str, Any] = {"length": length, "teacher": {"right": accuracy(teacher, rows), "history": history}}
    for name, attention in STUDENTS.items():
        student = fast_copy(str(place), attention)
        swapped = accuracy(student, rows)
        healed = _healed(deepcopy(student), teacher, length, given.heal, given.work / name) if given.heal else student
        found[name] = {"attention": attention, "swapped": swapped, "healed": accuracy(healed, rows)}
        print(name, found[name], flush=True)
    found["environment"] = environment()
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (given.out / "table.md").write_text(_table(found, given) + "\n", encoding="utf-8")
    return found


def _table(found: dict[str, Any], given: argparse.Namespace) -> str:
    lines = ["| attention | keys a query reads | right, swapped | right, distilled |", "|---|---:|---:|---:|"]
    lines.append(f"| dense (teacher) | all | {found['teacher']['right']:.1%} | |")
    for name in STUDENTS:
        record = found[name]
        fields = ", ".join(f"{key}={value}" for key, value in record["attention"].items() if key != "mechanism")
        lines.append(f"| {name} ({fields}) | at most 256 | {record['swapped']:.1%} | {record['healed']:.1%} |")
    foot = (
        f"16 facts in the first three quarters of {found['length']} tokens, asked for in the last; {given.sequences} "
        f"held-out sequences; chance is {1 / VALUES:.1%}. Distilled: {given.heal} steps of one sequence."
    )
    history = "; ".join(
        f"{h['steps']} steps at {h['length']} ({h['seconds']:.0f} s)" for h in found["teacher"]["history"]
    )
    about = [f"Teacher: {history}; {given.tokens} tokens a step.", f"Machine: {describe(found['environment'])}."]
    return "\n".join([*lines, "", foot, *about, f"Command: `{found['environment']['command']}`"])


if __name__ == "__main__":
    main()
