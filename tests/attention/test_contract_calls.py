"""What every mechanism must keep, continued: padding and segments, no state, dropout, worst cases, the file itself."""

import pytest

from hf_tfast.attention import mechanism_from_dict, mechanisms
from tests.attention import contract_calls as contract
from tests.attention.test_contract import DIRECTION, EVERY, PATH, small

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@EVERY
@DIRECTION
@PATH
@pytest.mark.parametrize("kind", ["left", "right", "holes", "interleaved", "padded_segments"])
def test_poison(cls, causal, path, kind):
    contract.check_poison(small(cls, causal), kind, causal, path)


@EVERY
@DIRECTION
@PATH
def test_padding(cls, causal, path):
    contract.check_padding(small(cls, causal), causal, path)


@EVERY
@DIRECTION
@PATH
def test_packing(cls, causal, path):
    contract.check_packing(small(cls, causal), causal, path)


@EVERY
@DIRECTION
@PATH
def test_nothing_valid(cls, causal, path):
    contract.check_nothing_valid(small(cls, causal), causal, path)


@EVERY
@PATH
def test_no_state(cls, path):
    contract.check_no_state(small(cls), path)


@EVERY
@DIRECTION
@PATH
def test_rows_apart(cls, causal, path):
    contract.check_rows_apart(small(cls, causal), causal, path)


@EVERY
@DIRECTION
@PATH
def test_heads_apart(cls, causal, path):
    contract.check_heads_apart(small(cls, causal), causal, path)


@EVERY
@PATH
def test_every_length(cls, path):
    contract.check_every_length(small(cls, True), path)


@EVERY
@PATH
def test_checkpointing(cls, path):
    contract.check_checkpointing(small(cls), path)


@EVERY
@DIRECTION
@PATH
def test_dropout(cls, causal, path):
    if not cls.dropout:
        pytest.skip("no dropout: test_refuses_dropout")
    contract.check_dropout(small(cls, causal), causal, path)


@EVERY
def test_refuses_dropout(cls):
    if cls.dropout:
        pytest.skip("has dropout")
    contract.check_refuses_dropout(small(cls))


@EVERY
@DIRECTION
@PATH
def test_worst_content(cls, causal, path):
    contract.check_worst_content(small(cls, causal), causal, path)


@EVERY
@DIRECTION
@pytest.mark.parametrize("alike", [False, True], ids=["any", "alike"])
def test_memory(cls, causal, alike):
    contract.check_memory(small(cls, causal), causal, alike)


@EVERY
def test_docstring(cls):
    contract.check_docstring(cls)


@EVERY
def test_config(cls):
    contract.check_config(cls)


def test_unknown_mechanism():
    for wrong in ("nonsense", None, 3):
        with pytest.raises(ValueError, match="(?s)unknown.*expected one of .*" + ".*".join(mechanisms())):
            mechanism_from_dict({"mechanism": wrong})
