"""Metrics as `evaluate.Metric` classes that come with the package: nothing is downloaded.

    from hf_tfast import metrics
    metric = metrics.load("rouge")                       # or metrics.Rouge()
    metric.compute(predictions=[...], references=[...])

One metric a file, found in this folder; its class is the file's name in camel case.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

__all__ = ["load", "names"]


def names() -> list[str]:
    """All metrics by name."""
    return sorted(file.name for file in iter_modules(__path__) if not file.name.startswith("_"))


def load(name: str, **options: Any) -> Any:
    """The metric of that name; options are those of evaluate.Metric. Predictions are kept in memory, not in a file.

    ValueError for unknown names, ImportError naming the extra where a package is missing.
    """
    return _class(name)(**{"keep_in_memory": True, **options})


def _class(name: str) -> Any:
    if name not in names():
        raise ValueError(f"unknown metric {name!r}; expected one of {', '.join(names())}")
    try:
        home = import_module(f"{__name__}.{name}")
    except ImportError as error:
        if (error.name or "").startswith("hf_tfast"):
            raise
        raise ImportError(f'the metric {name} needs {error.name}: pip install "hf_tfast[metrics]"') from error
    return getattr(home, _camel(name))


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def __getattr__(name: str) -> Any:
    for file in names():
        if _camel(file) == name:
            return _class(file)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
