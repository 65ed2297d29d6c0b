"""Fresh processes: each has its own empty cache, and, if asked, cannot import hf_tfast."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.hub.server import LocalHub

ROOT = Path(__file__).parents[2]

_WITHOUT = """\
import sys

class _Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_tfast":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, _Absent())
"""

_BEGIN = """\
import json, sys, traceback
import torch, transformers
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
said = {}

def error(act):
    try:
        act()
    except Exception as found:
        return f"{type(found).__name__}: {found}"
    return None

"""


def run(hub: LocalHub, home: Path, code: str, *, without: bool = False, timeout: float = 900) -> dict[str, Any]:
    """Run `code` in a new interpreter and a new cache `home`; what it puts into the dict `said` comes back.

    without  hf_tfast cannot be imported, as on a machine that has only torch and Transformers.
    """
    out = home.parent / f"{home.name}.json"
    home.mkdir()
    parts = [_WITHOUT if without else "", _BEGIN, code, f"\njson.dump(said, open({str(out)!r}, 'w'))\n"]
    script = home.parent / f"{home.name}.py"
    script.write_text("".join(parts))
    environment = hub.environment(home, **({} if without else {"PYTHONPATH": str(ROOT)}))
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, cwd=home, capture_output=True, text=True, timeout=timeout
    )
    if done.returncode:
        raise AssertionError(f"{script} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return {**json.loads(out.read_text()), "stderr": done.stderr}
