"""Positions: what tells a model where a token stands, and how a pretrained model reads longer inputs."""

from .encodings import LearnedPositions, LowRankPositions, SinusoidalPositions, make_positions
from .extend import extend_positions

__all__ = ["LearnedPositions", "LowRankPositions", "SinusoidalPositions", "extend_positions", "make_positions"]
