"""Which mechanism for which layer: measured on this machine and on a model's own text, under an error budget."""

from .propose import Proposal, propose_plan

__all__ = ["Proposal", "propose_plan"]
