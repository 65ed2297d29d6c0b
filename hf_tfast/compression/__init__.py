"""Verbs that make a model small: convert with calibration, recovery and a report; masks; and a way back from int8."""

from .convert import convert
from .dequantise import dequantise
from .masks import make_permanent, mask, masked
from .report import Conversion

__all__ = ["Conversion", "convert", "dequantise", "make_permanent", "mask", "masked"]
