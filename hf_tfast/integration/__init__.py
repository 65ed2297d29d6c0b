"""Where mechanisms plug into Transformers: names, masks, plans, and the quantiser plug-in that carries them.

`register` only adds keys to Transformers' tables; every entry that exists stays the same object.
"""

from .interface import register_names
from .quantizer import register_plan

__all__ = ["register"]


def register() -> None:
    """Add `tfast` and `tfast_<mechanism>` to Transformers' tables. Called once, by `import hf_tfast`."""
    register_names()
    register_plan()
