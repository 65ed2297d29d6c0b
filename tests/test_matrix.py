"""`.ci/matrix`: which versions of Transformers it means, and what it says when one of them fails."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="a script of bash")


def matrix(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / ".ci/matrix"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_it_reads_the_range_of_the_project():
    done = matrix("--list", PYTHON="true")  # a Python that knows no package index
    assert done.returncode == 0, done.stderr
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    lowest = re.search(r'"transformers>=([\d.]+),', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[1]
    pinned = re.search(r"^transformers==([\d.]+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)[1]
    assert said["lowest"].startswith(lowest)
    assert said["lowest"].count(".") == 2
    assert said["pinned"] == pinned
    assert said["newest"] == ""


def test_it_goes_on_after_a_failure_and_reports_it(tmp_path):
    for version, canary in (("5.90.0", 1), ("5.91.0", 0)):
        python = tmp_path / f"transformers-{version}" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\necho "ran $*"\ncase "$*" in *test_canary*) exit {canary};; esac\n')
        python.chmod(0o755)
        (tmp_path / f"transformers-{version}" / ".ready").touch()
    done = matrix("5.90.0", "5.91.0", MATRIX_DIR=str(tmp_path))
    assert done.returncode == 1
    assert "| 5.90.0 | failed: tests/integration/test_canary.py |" in done.stdout
    assert "| 5.91.0 | passed |" in done.stdout
    runs = [line for line in done.stdout.splitlines() if line.startswith("ran ")]
    assert len(runs) == 3  # the canary twice, the rest where it held
    assert runs[-1].endswith("tests/integration tests/models tests/hub")
