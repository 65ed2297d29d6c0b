"""The recall task: what it asks for, and that a run leaves what it says."""

import json

import pytest
import torch

from hf_tfast.distillation import recall_task
from hf_tfast.distillation.recall_task import ASK, FACT, FILLER, KEYS, VALUES, Recall
from hf_tfast.training.packing import IGNORED


@pytest.mark.parametrize(("length", "pairs"), [(128, 16), (200, 5), (1024, 32)])
def test_every_question_has_one_answer(length, pairs):
    """Facts in the first three quarters, each key once; each is asked for, and the label is its value."""
    rows = Recall(6, length, pairs, seed=4)
    for n in range(len(rows)):
        row = rows[n]
        ids, labels = row["input_ids"], row["labels"]
        facts = {int(x - FACT) // VALUES: int(x - FACT) % VALUES for x in ids[(ids >= FACT) & (ids < FILLER)]}
        assert len(facts) == pairs
        assert ((ids >= FACT) & (ids < FILLER)).nonzero().max() < length * 3 // 4
        asked = ((ids >= ASK) & (ids < ASK + KEYS)).nonzero().flatten()
        assert asked.min() >= length * 3 // 4
        assert {int(ids[at] - ASK): int(labels[at + 1]) for at in asked} == facts
        assert int((labels != IGNORED).sum()) == pairs
        assert torch.equal(labels[labels != IGNORED], ids[labels != IGNORED])
        again = Recall(3, length, pairs, seed=4)
        assert n >= 3 or torch.equal(again[n]["input_ids"], ids)
    assert not torch.equal(rows[0]["input_ids"], Recall(1, length, pairs, seed=5)[0]["input_ids"])


@pytest.mark.parametrize(("length", "pairs"), [(64, 16), (1024, KEYS + 1), (64, 0)])
def test_what_does_not_fit(length, pairs):
    with pytest.raises(ValueError, match="pairs need a length"):
        Recall(1, length, pairs)


def test_a_short_run(tmp_path, capsys):
    given = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--steps", "3", "--lengths", "128"]
    given += ["--tokens", "256", "--sequences", "2", "--heal", "2"]
    found = recall_task.main(given)
    for name in recall_task.STUDENTS:
        assert 0.0 <= found[name]["swapped"] <= 1.0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["teacher"]["history"][0]["steps"] == 3
    assert "| hashed (bits=6" in (tmp_path / "out" / "table.md").read_text()
    capsys.readouterr()
    recall_task.main(given)
    assert "length 128 step 0" not in capsys.readouterr().out, "the teacher is kept"
