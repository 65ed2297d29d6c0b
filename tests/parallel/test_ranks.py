"""The helper that runs ranks: what they return, and that nothing of what goes wrong is lost."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.parallel.ranks import RankError, run


def behave(how):
    if how != "sum" and dist.get_rank() == 1:
        if how == "raise":
            raise KeyError("seven")
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        print("asleep")
        time.sleep(60)
    x = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(x)
    return x, os.environ["HERE"]


def test_what_ranks_return_and_how_they_fail():
    assert run(behave, 2, "sum", env={"HERE": "x"}) == [(torch.tensor([3.0]), "x")] * 2
    with pytest.raises(RankError, match="rank 1: Traceback[^$]*KeyError: 'seven'"):
        run(behave, 2, "raise", env={"HERE": ""})
    with pytest.raises(RankError, match="exit code -9") as died:
        run(behave, 2, "die", env={"HERE": ""})
    assert died.value.signals == {1: 9}
    with pytest.raises(RankError, match="not ended after 4 seconds") as hung:
        run(behave, 2, "hang", env={"HERE": ""}, timeout=4)
    assert "in behave" in str(hung.value)
    assert "asleep" in str(hung.value)
