"""The code that goes with a TFast model for those who have not imported hf_tfast: `modeling_tfast.py` in its folder.

    save_code(model, folder, standalone=True)     the whole model in one file, on torch and Transformers alone
    save_code(model, folder, standalone=False)    a pointer: asks for `pip install hf_tfast` where it is missing

Transformers runs either only where a user passes trust_remote_code=True. It copies single files, so the package's
modules are flattened into one: what the model's classes reach, and of the mechanisms those that its config names.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_imports

from ..attention import mechanisms
from ._flat_forms import HEAD, POINTER, TAIL, replaced
from ._flatten import flatten
from ._source import Package

__all__ = ["CODE", "is_ours", "is_standalone", "save_code"]

CODE = "modeling_tfast.py"
_ROOT = Path(__file__).parents[1]


def save_code(model: PreTrainedModel, folder: str | Path, *, standalone: bool = True) -> Path:
    """Write the code of a saved model into its folder, and into config.json which classes it holds. Returns the file.

    An older `modeling_tfast.py` is replaced. ValueError for models that are not of the TFast family, for a model with
    a FastPlan or quantisation beside its config (standalone only), and for a folder without config.json.
    """
    folder = Path(folder)
    family = _family(model)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json: save the model there first")
    text = flat_source(model) if standalone else _pointer(family)
    compile(text, CODE, "exec")
    (folder / CODE).write_text(text, encoding="utf-8")
    if found := get_relative_imports(folder / CODE):
        raise ValueError(f"Transformers would look for the files {found}: a line of {CODE} reads like an import")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {auto: f"{CODE.removesuffix('.py')}.{cls.__name__}" for auto, cls in family.items()}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder / CODE


def flat_source(model: PreTrainedModel) -> str:
    """The whole model in one file. The same model and version give the same text."""
    from .. import __version__

    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            "this model has a plan or quantisation beside its config, which a file on its own cannot carry: it loads "
            "where hf_tfast is imported; save and push it without remote_code"
        )
    family = _family(model)
    used = _mechanisms(model)
    package = Package(_ROOT, replaced(used.values(), _forms(model)))
    wanted = [(cls.__module__, cls.__name__) for cls in dict.fromkeys(family.values())]
    body = flatten(package, [*wanted, (f"{_ROOT.name}.integration.interface", "register_names")])
    head = HEAD.format(title=_title(family), version=__version__, mechanisms=", ".join(sorted(used)))
    return head + body + TAIL.format(subclasses=_subclasses(family, "_installed", "    "), names=_names(family))


def is_standalone(text: str) -> bool:
    """Is this the whole model in one file, and not a pointer to the package?"""
    return "register_names()" in text


def _pointer(family: dict[str, type]) -> str:
    classes = _subclasses(family, "hf_tfast", "")
    return POINTER.format(title=_title(family), subclasses=classes, names=_names(family))


def is_ours(model: PreTrainedModel) -> bool:
    """Is this a model of the TFast family, whose code is that of the package installed here?"""
    return None not in (_installed(type(model.config)), _installed(type(model)))


def _installed(cls: type) -> type | None:
    """The package's own class: `cls`, or what a pointer in a repository made it from. None for all others."""
    if cls.__module__.partition(".")[0] == "transformers_modules":
        cls = cls.__mro__[1]
    return cls if cls.__module__.startswith(f"{_ROOT.name}.models.") else None


def _family(model: PreTrainedModel) -> dict[str, type]:
    """{"AutoConfig": its config class, "AutoModelFor...": the classes that Transformers' Auto classes know for it}."""
    from transformers.models.auto import modeling_auto

    config, own = _installed(type(model.config)), _installed(type(model))
    if config is None or own is None:
        raise ValueError(
            f"{type(model).__name__} is a class of {type(model).__module__}, not of the TFast family: its code is not "
            "ours to copy. With a FastPlan it loads wherever hf_tfast is imported: push it without remote_code"
        )
    found: dict[str, type] = {"AutoConfig": config}
    for name, auto in sorted(vars(modeling_auto).items()):
        mapping = getattr(auto, "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None and config in mapping._extra_content:
            found[name] = mapping._extra_content[config]
    if own not in found.values():
        raise ValueError(f"no Auto class of Transformers knows {own.__name__}, so none could load it")
    return found


def _mechanisms(model: PreTrainedModel) -> dict[str, type]:
    """The mechanisms that the config names, dense attention among them; by name."""
    named = {value for key, value in _entries(model.config.to_dict()) if key == "mechanism"}
    return {name: cls for name, cls in mechanisms().items() if name in named | {"dense"}}


def _forms(model: PreTrainedModel) -> list[type]:
    from ..feed_forward import forms

    named = {value for key, value in _entries(model.config.to_dict()) if key == "form"}
    return [cls for name, cls in forms().items() if name in named]


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth, where the value is text."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, str):
                yield key, inner
            yield from _entries(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _entries(inner)


def _subclasses(family: dict[str, type], package: str, indent: str) -> str:
    """Transformers marks the classes that it loads from a file; the installed ones must stay unmarked."""
    config, *models = dict.fromkeys(family.values())
    lines = [f"class {config.__name__}({package}.{config.__name__}):", f'    """{package}\'s own."""', ""]
    for cls in models:
        lines += ["", f"class {cls.__name__}({package}.{cls.__name__}):", f'    """{package}\'s own."""', ""]
        lines += [f"    config_class = {config.__name__}", ""]
    return "\n".join(indent + line if line else "" for line in lines[:-1])


def _title(family: dict[str, type]) -> str:
    return f"{family['AutoConfig'].__name__.removesuffix('Config')} models"


def _names(family: dict[str, type]) -> str:
    return "[" + ", ".join(f'"{name}"' for name in sorted({cls.__name__ for cls in family.values()})) + "]"
