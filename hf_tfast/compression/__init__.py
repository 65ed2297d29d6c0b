"""Verbs that make a model small: convert with calibration and a report, masks."""

from .convert import convert

__all__ = ["convert"]
