"""Positions: what tells a model where a token stands, and how a pretrained model reads longer inputs."""

from .extend import extend_positions

__all__ = ["extend_positions"]
