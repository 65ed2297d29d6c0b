"""Flattening: what moves into one file still means what it meant, and what cannot move is refused."""

import ast
import builtins
import symtable
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from hf_tfast import TFastConfig, TFastForCausalLM, TFastForMaskedLM, Window, apply_plan, save_code
from hf_tfast.attention import mechanisms
from hf_tfast.hub._flatten import flatten
from hf_tfast.hub._names import uses
from hf_tfast.hub._source import Package
from hf_tfast.hub.remote import flat_source
from hf_tfast.integration.plan import FastPlan
from tests.integration.tiny_models import tiny

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


@pytest.fixture
def package(tmp_path):
    """Make a package `pack` of these files: package({"a": source, "room.b": source})."""

    def make(files, replaced=None):
        root = tmp_path / "pack"
        for name, text in {"__init__": "", **files}.items():
            path = root.joinpath(*name.split(".")).with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / "__init__.py").touch()
            path.write_text(text)
        return Package(root, replaced or {})

    return make


def run(text):
    module = types.ModuleType("flat")
    exec(compile(text, "flat", "exec"), vars(module))
    return module


def undefined(text):
    """Global names that nothing in the file defines, by Python's own table of symbols."""
    top = symtable.symtable(text, "flat", "exec")
    known = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    found, tables = set(), [top]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        here = [s for s in table.get_symbols() if s.is_referenced() and (table is top or s.is_global())]
        found |= {s.get_name() for s in here}
    return found - known - set(dir(builtins)) - {"__name__"}


def test_things_of_one_name_stay_apart(package):
    made = package(
        {
            "a": "import json\nSIZE = 1\ndef _read():\n    return f'{SIZE} of a'\nclass A:\n    read = _read\n",
            "b": "from json import dumps as json\nSIZE = 2\ndef _read(SIZE=SIZE):\n    return SIZE\n"
            "def b(x: 'Thing') -> 'int | Thing':\n    return json(_read()), x\nclass Thing: ...\n",
            "c": "from . import a, b as other\nfrom .a import A as First\nfrom .a import _read as read\nThing = 5\n"
            "def c():\n    from .a import SIZE as s\n    sizes = [SIZE for SIZE in (7,)]\n"
            "    return First.read(), a.SIZE, other.SIZE, read(), other.b(0), s, Thing, sizes\n",
        }
    )
    text = flatten(made, [("pack.c", "c")])
    assert run(text).c() == ("1 of a", 1, 2, "1 of a", ("2", 0), 1, 5, [7])
    assert "'int | _b_Thing'" in text or "Thing = 5" in text
    assert undefined(text) == set()


def test_only_what_is_reached_comes_along(package):
    made = package(
        {
            "room.a": "import os\nimport sys\n\n# about used\n@staticmethod\ndef used(): return sys\n"
            "def unused(): return os\n",
            "b": "from .room.a import used, unused\nLIMIT = 3  # stays\ndef b():\n    return used, LIMIT\n",
        }
    )
    text = flatten(made, [("pack.b", "b")])
    assert "unused" not in text
    assert "import os" not in text
    assert "# about used\n@staticmethod" in text
    assert "LIMIT = 3  # stays" in text
    assert text == flatten(Package(made.root, {}), [("pack.b", "b")])


def test_imports_inside_functions_go_or_leave_pass(package):
    made = package(
        {
            "a": "def a(): return 1\n",
            "b": "def b(x):\n    if x:\n        from .a import (\n            a,\n        )\n    else:\n"
            "        from .a import a\n        import math\n    return a()\n",
        }
    )
    assert run(flatten(made, [("pack.b", "b")])).b(True) == 1


def test_replaced_definitions(package):
    made = package(
        {"a": "import os\ndef found():\n    return os.listdir(__file__)\nclass B: pass\ndef user(): return found()\n"},
        {"a:found": "def found():\n    return B\n"},
    )
    text = flatten(made, [("pack.a", "user")])
    assert run(text).user().__name__ == "B"
    assert "import os" not in text
    with pytest.raises(ValueError, match="has no gone to replace"):
        flatten(Package(made.root, {"a:gone": "x = 1"}), [("pack.a", "user")])


REFUSED = {
    "a file of its own": ("def a(): return __file__\n", "uses __file__"),
    "a package that may be missing": ("import rich\ndef a(): return rich\n", "imports rich"),
    "the same in a function": ("def a():\n    import rich\n    return rich\n", "imports rich"),
    "an effect": ("print('hello')\ndef a(): ...\n", "does something when it is imported"),
    "an unknown name": ("def a(): return b\n", "'b', which is defined nowhere"),
    "a module as a value": ("from . import x\ndef a(): return vars(x)\n", "passes on the module pack.x"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_move_is_refused(case, package):
    source, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        flatten(package({"a": source, "x": ""}), [("pack.a", "a")])


def test_a_package_in_a_try_may_be_missing(package):
    made = package({"a": "def a():\n    try:\n        import nowhere\n    except ImportError:\n        return 1\n"})
    assert run(flatten(made, [("pack.a", "a")])).a() == 1


def test_scopes():
    source = "def f(a, b=B, *c, d: D = E, **e) -> 'R':\n    x: T = a\n    for y in Y: z = [w for w in W if y]\n"
    source += "    with V as v: pass\n    try: pass\n    except U as u: u\n    def g(): return x, G\n    class C(K):\n"
    source += "        m = M\n        def n(self): return m\n    global H\n    H = lambda p, q=Q: (p, r)\n"
    source += "    return (r := 1)\n"
    found = {use.name for use in uses(ast.parse(source).body[0])}
    assert found == {*"BDERTYWVUGKMQH", "m"}


@pytest.mark.parametrize(
    "name",
    ["window", "hashed", *(pytest.param(x, marks=pytest.mark.slow) for x in ("performer", "scatterbrain", "nystrom"))],
)
def test_every_mechanism_alone_makes_a_whole_file(name, tmp_path):
    cls = mechanisms()[name]
    model = TFastForMaskedLM(TFastConfig(attention=cls(**cls.small), **SMALL))
    text = flat_source(model)
    assert undefined(text) == set()
    path = tmp_path / "modeling_tfast.py"
    path.write_text(text)
    assert get_relative_imports(path) == []
    assert set(get_imports(path)) <= {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
    assert f"class {cls.__name__}(" in text
    others = {"Hashed", "TopK", "Performer", "Quantized", "Scatterbrain", "Threshold"} - {cls.__name__}
    based = {c.__name__ for c in cls.__mro__} | ({"Performer"} if name == "scatterbrain" else set())
    assert not [other for other in others - based if f"class {other}(" in text], "only what the config names"


def test_where_hf_tfast_is_installed_the_file_holds_its_classes():
    model = TFastForCausalLM(TFastConfig(attention=Window(window=5), **SMALL)).eval()
    module = types.ModuleType("flat_beside_the_package")
    sys.modules[module.__name__] = module
    try:
        exec(compile(flat_source(model), "modeling_tfast.py", "exec"), vars(module))
        assert issubclass(module.TFastForCausalLM, TFastForCausalLM)
        assert issubclass(module.TFastConfig, TFastConfig)
        again = module.TFastForCausalLM(module.TFastConfig(**model.config.to_dict())).eval()
        again.load_state_dict(model.state_dict())
        ids = torch.arange(1, 30)[None]
        with torch.no_grad():
            assert torch.equal(again(ids).logits, model(ids).logits)
    finally:
        del sys.modules[module.__name__]


def test_save_code_refuses_what_it_cannot_carry(tmp_path):
    model = TFastForCausalLM(TFastConfig(attention=Window(window=5), **SMALL))
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        save_code(model, tmp_path)
    planned = apply_plan(tiny("llama"), FastPlan(attention=Window(window=5)))
    planned.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not of the TFast family"):
        save_code(planned, tmp_path)
    assert not (tmp_path / "modeling_tfast.py").exists()
    model.config.quantization_config = FastPlan(attention=Window(window=3))
    with pytest.raises(ValueError, match="push it without remote_code"):
        flat_source(model)


def test_a_folder_saved_again_without_code_asks_for_none(tmp_path):
    model = TFastForCausalLM(TFastConfig(attention=Window(window=5), **SMALL))
    model.save_pretrained(tmp_path / "code", remote_code=True)
    assert '"auto_map"' in (tmp_path / "code/config.json").read_text()
    again = TFastForCausalLM.from_pretrained(tmp_path / "code")
    again.save_pretrained(tmp_path / "plain")
    assert '"auto_map"' not in (tmp_path / "plain/config.json").read_text()
    assert not Path(tmp_path / "plain/modeling_tfast.py").exists()


def test_the_library_never_trusts_on_the_user_s_behalf():
    for path in (Path(__file__).parents[2] / "hf_tfast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.keyword) and node.arg == "trust_remote_code"), path


def test_a_class_of_the_user_s_is_not_ours_to_copy(tmp_path):
    class Mine(TFastForCausalLM):
        pass

    model = Mine(TFastConfig(attention=Window(window=5), **SMALL))
    with pytest.raises(ValueError, match="not of the TFast family"):
        model.save_pretrained(tmp_path, remote_code=True)
