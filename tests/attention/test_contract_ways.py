"""What every mechanism must keep, continued: autocast, inference, single gradients, fields at their extremes."""

import pytest
import torch

from tests.attention import contract_ways as contract
from tests.attention.test_contract import DIRECTION, EVERY, PATH, small

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@EVERY
@DIRECTION
@PATH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_autocast(cls, causal, path, dtype):
    contract.check_autocast(small(cls, causal), dtype, causal, path)


@EVERY
@DIRECTION
@PATH
def test_modes(cls, causal, path):
    contract.check_modes(small(cls, causal), causal, path)


@EVERY
@DIRECTION
def test_other_fields(cls, causal):
    contract.check_other_fields(small(cls, causal), causal)
