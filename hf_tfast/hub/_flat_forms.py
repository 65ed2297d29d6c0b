"""What stands in the flat file instead of code that reads the package's folders or lives in it."""

from collections.abc import Iterable

__all__ = ["HEAD", "TAIL", "replaced"]

HEAD = '''\
"""{title} in one file: runs on torch and Transformers, hf_tfast need not be installed. Where it is, it is used.

Made by hf_tfast {version} from its own source: do not edit, `save_pretrained(..., remote_code=True)` makes it anew.
Attention mechanisms in this file: {mechanisms}. For others, plans and tools: pip install hf_tfast
Licensed under the Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0
"""

'''

TAIL = """

# --- which code runs ---


try:
    import hf_tfast as _installed
except ImportError:
    _installed = None

if _installed is None:
    register_names()
else:
{subclasses}

__all__ = {names}
"""

POINTER = '''\
"""{title}: the code of this model is the package hf_tfast. pip install hf_tfast

With `import hf_tfast` before loading, this file is not read and trust_remote_code is not needed.
"""

import hf_tfast

{subclasses}

__all__ = {names}
'''

_NAME = """\
import hashlib

# Of this file alone: several such files and hf_tfast itself can be loaded side by side.
NAME = "tfast_" + hashlib.sha256(__name__.encode()).hexdigest()[:8]
"""

_NAMES = '''\
def register_names() -> None:
    """Add this file's names, and `tfast_<mechanism>` where it is free, to Transformers' interfaces."""
    from ..attention import mechanisms

    known = AttentionInterface().valid_keys()
    for name, free in [(NAME, "tfast"), *((f"{NAME}_{m}", f"tfast_{m}") for m in mechanisms())]:
        for registered in (name, *(() if free in known else (free,))):
            AttentionInterface.register(registered, _attention_function(name))
            AttentionMaskInterface.register(registered, key_row)
'''

_DEFAULT = '''\
@cache
def default_mechanism(name: str) -> Mechanism:
    """The mechanism behind a name that ends in it, with its default fields."""
    from ..attention import mechanisms

    cls = next(cls for mechanism, cls in mechanisms().items() if name.endswith(f"_{mechanism}"))
    try:
        return cls()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{cls.__name__} has no default fields ({error}); give them in config.attention") from error
'''

_SHARED = '''\
class SharedModel(PreTrainedModel):
    """Transformers copies this file when it saves a model that was loaded with it."""

    def save_pretrained(self, save_directory: Any, *args: Any, remote_code: bool = True, **kwargs: Any) -> None:
        """As in Transformers; the code is always saved with the model."""
        if not remote_code:
            raise ValueError("this model was loaded by its own code: saved without it, nothing could load it")
        super().save_pretrained(save_directory, *args, **kwargs)

    def push_to_hub(self, repo_id: str, *, remote_code: bool = True, **options: Any) -> str:
        """As in Transformers; the code is always pushed with the model."""
        if not remote_code:
            raise ValueError("this model was loaded by its own code: pushed without it, nothing could load it")
        return super().push_to_hub(repo_id, **options)
'''

_TABLE = '''\
@cache
def {function}() -> dict[str, type[{base}]]:
    """What this file holds, by name."""
{imports}
    return {{cls.name: cls for cls in ({classes})}}
'''


def table(function: str, base: str, classes: Iterable[type]) -> str:
    """A function that lists classes instead of finding their files."""
    found = sorted(classes, key=lambda cls: cls.__module__)
    imports = "".join(f"    from .{cls.__module__.rpartition('.')[2]} import {cls.__name__}\n" for cls in found)
    return _TABLE.format(
        function=function, base=base, imports=imports, classes="".join(f"{c.__name__}, " for c in found).strip()
    )


def replaced(mechanisms: Iterable[type], forms: Iterable[type]) -> dict[str, str]:
    """ "module:definition" -> its flat form."""
    return {
        "attention._base:mechanisms": table("mechanisms", "Mechanism", mechanisms),
        "feed_forward._base:forms": table("forms", "Form", forms),
        "integration._stamps:NAME": _NAME,
        "integration.interface:default_mechanism": _DEFAULT,
        "integration.interface:register_names": _NAMES,
        "models._sharing:SharedModel": _SHARED,
    }
