"""The rooms and their doors: which folder may import which, read from the source of every file."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_tfast"
STANDING = {"models", "integration", "attention", "backends", "feed_forward", "positions"}
ROOMS = {  # room: the rooms it may import; a room that is missing here fails test_every_room_is_known
    "backends": set(),
    "attention": {"backends"},
    "feed_forward": {"backends"},
    "positions": {"attention"},
    "integration": {"attention", "backends", "feed_forward", "positions"},
    "models": {"integration", "attention", "backends", "feed_forward", "positions"},
    "testing": {"attention", "backends", "feed_forward"},
    "benchmarking": STANDING,
    "metrics": set(),
    "compression": {"benchmarking", *STANDING},
    "parallel": {"benchmarking", *STANDING},
    "hub": {"benchmarking", *STANDING},
    "training": {"benchmarking", "metrics", "parallel", *STANDING},
    "distillation": {"benchmarking", "compression", "metrics", "training", *STANDING},
    "planner": {"benchmarking", "compression", *STANDING},
}
TOP = {"quickstart", "cli"}  # stand on everything
PUBLIC = {"__init__"}  # the lazy public names; importing the package registers them with Transformers
OUTSIDE = {"tests", "recipes", "model_cards"}


def room_of(module: str) -> str:
    """hf_tfast.attention.window -> attention; hf_tfast itself -> __init__."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path, package: Path) -> set[str]:
    """Absolute names of the modules that a file imports, anywhere in it, also under TYPE_CHECKING."""
    inside = path.relative_to(package.parent).with_suffix("").parts
    here = inside[:-1]  # the package that "from . import" means, for __init__.py too
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(here[: len(here) - node.level + 1]) if node.level else []
            target = ".".join([*base, *(node.module.split(".") if node.module else [])])
            # "from .. import attention" names a room in its last part, "from ..attention import Mask" before it
            found.update(f"{target}.{alias.name}" if target == package.name else target for alias in node.names)
    return found


def violations(package: Path) -> list[str]:
    """Every import that goes through a wall, in words."""
    found = []
    for path in sorted(package.rglob("*.py")):
        mine = room_of(".".join(path.relative_to(package.parent).with_suffix("").parts))
        for target in sorted(imports(path, package)):
            where = f"{path.relative_to(package.parent)} imports {target}"
            if target.split(".")[0] in OUTSIDE:
                found.append(f"{where}: the library stands without it")
            elif target.split(".")[0] == package.name and mine not in TOP | PUBLIC:
                other = room_of(target)
                if other in TOP or (other not in ROOMS[mine] | {mine} and other in ROOMS):
                    found.append(f"{where}: {mine} may import {', '.join(sorted(ROOMS[mine])) or 'nothing here'}")
    return found


def test_doors():
    assert violations(PACKAGE) == []


def test_every_room_is_known():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - set(ROOMS) - TOP - PUBLIC == set()


def test_the_table_has_no_circle():
    def reach(room, seen=()):
        assert room not in seen, (*seen, room)
        for other in ROOMS[room]:
            reach(other, (*seen, room))

    for room in ROOMS:
        reach(room)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("backends/x.py", "from ..attention import Mask"),
        ("backends/x.py", "from hf_tfast.attention.window import Window"),
        ("backends/x.py", "def f():\n    from .. import attention"),
        ("attention/x.py", "import hf_tfast.integration.plan"),
        ("attention/deep/x.py", "from ...integration import plan"),
        ("benchmarking/__init__.py", "from ..cli import main"),
        ("integration/x.py", "from ..quickstart import run"),
        ("cli/x.py", "from tests.conftest import x"),
    ],
)
def test_a_broken_wall_is_seen(tmp_path, file, line):
    path = tmp_path / "hf_tfast" / file
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert len(violations(tmp_path / "hf_tfast")) == 1


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("attention/x.py", "from ..backends.score import Score"),
        ("attention/__init__.py", "from ._base import Mask"),
        ("integration/x.py", "from .. import attention"),
        ("quickstart/x.py", "from ..benchmarking.memory import peak_memory"),
        ("__init__.py", "from .integration import register"),
    ],
)
def test_a_door_is_open(tmp_path, file, line):
    path = tmp_path / "hf_tfast" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line)
    assert violations(tmp_path / "hf_tfast") == []
