"""Verbs that make a model small: convert with calibration and a report, masks."""

from .convert import convert
from .masks import make_permanent, mask, masked
from .report import Conversion

__all__ = ["Conversion", "convert", "make_permanent", "mask", "masked"]
