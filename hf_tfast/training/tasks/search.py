"""Hyper-parameter search through Trainer.hyperparameter_search, in a space given as JSON."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..arguments import _json
from ..run import write_json
from ._base import Task
from .trainer import TaskTrainer

__all__ = ["read_space", "search"]


def search(task: Task, args: Any, examples: dict[str, Any], tokenizer: Any, make: Callable[[], Any]) -> dict[str, Any]:
    """The best trial's values of the space, by the task's metric on the validation examples; kept in search.json."""
    space = read_space(args.search_space, args)
    try:
        import optuna  # type: ignore[import-not-found, unused-ignore]  # noqa: F401
    except ImportError:
        raise ImportError('a hyper-parameter search needs optuna: pip install "hf_tfast[search]"') from None
    kept = Path(args.output_dir).parent / "search.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text(encoding="utf-8"))["best"])
    trainer = TaskTrainer(
        task=task, model=None, args=args, train=examples["train"], validation=examples["validation"],
        tokenizer=tokenizer, model_init=lambda trial=None: make(),
    )  # fmt: skip
    metric = f"eval_{args.metric_for_best_model or task.best}".replace("eval_eval_", "eval_")
    greater = task.greater if args.greater_is_better is None else args.greater_is_better
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {name: _suggest(trial, name, given) for name, given in space.items()},
        compute_objective=lambda metrics: metrics[metric],
        n_trials=args.search_trials,
        direction="maximize" if greater else "minimize",
        backend="optuna",
        sampler=optuna.samplers.TPESampler(seed=args.seed),
    )
    found: dict[str, Any] = best.hyperparameters  # type: ignore[union-attr, assignment]
    if args.process_index == 0:
        write_json({"best": found, "objective": best.objective, "metric": metric, "space": space}, kept)  # type: ignore[union-attr]
    return found


def read_space(text: str, args: Any) -> dict[str, list[Any]]:
    """JSON of training arguments: [low, high], [low, high, "log"], [low, high, "int"], or ["choice", a, b, ...]."""
    space = _json("--search_space", text)
    if not space:
        raise ValueError('--search_trials needs --search_space, such as {"learning_rate": [1e-5, 1e-3, "log"]}')
    for name, given in space.items():
        if not hasattr(args, name):
            raise ValueError(f"--search_space names {name!r}, which is no training argument")
        if isinstance(given, list) and len(given) > 1 and given[0] == "choice":
            continue
        numbers = (
            isinstance(given, list) and len(given) in (2, 3) and all(isinstance(x, int | float) for x in given[:2])
        )
        if not numbers or given[0] >= given[1] or (len(given) == 3 and given[2] not in ("log", "int")):
            raise ValueError(
                f'{name} in --search_space is [low, high], [low, high, "log" or "int"] or ["choice", ...], got {given}'
            )
    return space


def _suggest(trial: Any, name: str, given: list[Any]) -> Any:
    if given[0] == "choice":
        return trial.suggest_categorical(name, given[1:])
    if given[2:] == ["int"]:
        return trial.suggest_int(name, *given[:2])
    return trial.suggest_float(name, *given[:2], log=given[2:] == ["log"])
