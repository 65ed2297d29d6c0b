"""A machine whose C compiler does not work, or that has none."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_tfast.backends import native


@contextmanager
def broken_compiler(
    monkeypatch: pytest.MonkeyPatch, folder: Path, script: str | None, *caches: Any, capability: str
) -> Iterator[Callable[[pytest.LogCaptureFixture, str], str]]:
    """While it lasts the only compiler is this shell script, None for none, on a processor of this `capability`.

    `caches` remember what was compiled before: they are empty within and afterwards. Gives a function that returns the
    one warning with these words, having checked that there is no other and that nothing was left in `folder`.
    """
    program = folder / "cc"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(native.shutil, "which", lambda name: script and str(program))
    monkeypatch.setattr(native, "_folder", lambda: folder)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)

    def said(caplog: pytest.LogCaptureFixture, words: str) -> str:
        (message,) = [record.message for record in caplog.records if words in record.message]
        assert list(folder.iterdir()) == [program]
        return message

    everything = (native.load, *caches)
    for cache in everything:
        cache.cache_clear()
    try:
        yield said
    finally:
        monkeypatch.undo()
        for cache in everything:
            cache.cache_clear()
