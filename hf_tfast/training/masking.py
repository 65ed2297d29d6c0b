"""Masked language modelling over packed sequences: which tokens are hidden is a function of seed, epoch and row.

Devlin et al., "BERT", section 3.1 (https://arxiv.org/abs/1810.04805): of all text tokens a share (15 %) is to be
predicted; of these 80 % are replaced by the mask token, 10 % by a random token and 10 % stay. Transformers' collator
does the same from torch's global generator, which resuming cannot repeat (batches are fetched ahead of the step that
saves it), and it knows no pieces. Here every epoch draws anew, resuming draws the same, and an evaluation (whose epoch
never changes) hides the same tokens every time and for every model.
"""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..backends.draws import draw, uniform
from .packing import IGNORED, Packed, PackedRows

MASKED, REPLACED = 0.8, 0.1  # shares of the chosen tokens; the rest stay


class MaskedRows(PackedRows):
    """The sequences for a two-way model: input_ids (masked), position_ids and labels, [length] int64 each."""

    two_way = True

    def __init__(self, packed: Packed, tokenizer: PreTrainedTokenizerBase, share: float = 0.15, seed: int = 0) -> None:
        super().__init__(packed)
        if not 0 < share < 1:
            raise ValueError(f"the share of masked tokens must lie between 0 and 1, got {share}")
        if tokenizer.mask_token_id is None:
            raise ValueError("the tokenizer has no mask token; masked language modelling needs one")
        self.share, self.seed, self.epoch = share, seed, 0
        self.mask = int(tokenizer.mask_token_id)
        special = torch.zeros(len(tokenizer), dtype=torch.bool)
        special[tokenizer.all_special_ids] = True
        self.special = special
        self.text = (~special).nonzero().flatten()  # tokens that a random replacement may be

    def set_epoch(self, epoch: int) -> None:
        """Hide other tokens from now on."""
        self.epoch = epoch

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        ids, real = self.packed.ids[n].long(), self.real[n]
        place = torch.tensor(self.epoch), torch.tensor(n), torch.arange(len(ids))
        chosen = (uniform(self.seed, *place, torch.tensor(0)) < self.share) & real & ~self.special[ids]
        what = uniform(self.seed, *place, torch.tensor(1))
        other = self.text[draw(self.seed, *place, torch.tensor(2)).long() % len(self.text)]
        seen = ids.where(~chosen | (what >= MASKED), self.mask)
        seen = torch.where(chosen & (what >= MASKED) & (what < MASKED + REPLACED), other, seen)
        return {
            "input_ids": seen,
            "position_ids": self.packed.positions[n].long(),
            "labels": ids.where(chosen, IGNORED),
        }
