"""Fast feed-forwards, one file per form: the linear layers of a feed-forward, replaced by smaller or faster ones."""

from ._base import Block, Form, form_from_dict, forms
from ._moments import Moments

__all__ = ["Block", "Form", "Moments", "form_from_dict", "forms"]
