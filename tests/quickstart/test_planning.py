"""The words of `--plan auto` claim no more than what was tried."""

from hf_tfast.quickstart.planning import words

PLAN = {
    "layers": [{"mechanism": "Window(window=8)", "layer": 0}], "max_error": 0.05, "error": 0.03, "unseen": 0.02,
    "speedup": 2.0, "seconds": 1.0, "single": None, "single_seconds": None, "kept": True, "left_out": (),
    "points": [{"kind": "single"}, {"kind": "mix"}, {"kind": "plan"}],
}  # fmt: skip


def test_what_was_not_tried_is_not_judged():
    assert "No single mechanism in all layers stayed within that." in words(PLAN)
    short = words({**PLAN, "left_out": ("Nystrom(landmarks=8)", "Linformer(rank=4)")})
    assert not any(line.startswith("No single mechanism") for line in short)
    assert any(line.startswith("None of the 1 single mechanisms that there was time for") for line in short)
    assert any(line.startswith("2 more were not tried") for line in short)
