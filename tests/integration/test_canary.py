"""The canary: what this package leans on in Transformers and its neighbours is where it was, and does what it did.

Read the sentence of a failure: it names what is gone, the file that needs it and what for. The rows are in hooks.py; a
use without a row fails too, so that a new one cannot slip in.
"""

import ast
import inspect
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from tests.integration import hooks
from tests.integration.hooks import HOOKS, Made, Name, Word

PACKAGE = Path(__file__).parents[2] / "hf_tfast"

# Classes of ours and the class of Transformers that they change, where the first is mixed into it elsewhere.
MIXED = {"Scaled": "Trainer"}
FOREIGN = {
    "Trainer": "transformers.trainer:Trainer",
    "Seq2SeqTrainer": "transformers.trainer_seq2seq:Seq2SeqTrainer",
    "PreTrainedModel": "transformers.modeling_utils:PreTrainedModel",
    "PreTrainedConfig": "transformers.configuration_utils:PreTrainedConfig",
    "HfQuantizer": "transformers.quantizers.base:HfQuantizer",
    "DynamicLayer": "transformers.cache_utils:DynamicLayer",
    "QuantizationConfigMixin": "transformers.utils.quantization_config:QuantizationConfigMixin",
    "TrainerCallback": "transformers.trainer_callback:TrainerCallback",
}
# Private only by their looks, or of libraries that are rivals in a benchmark.
EXEMPT = {
    "_replace": "of named tuples, documented",
    "_fields": "of named tuples, documented",
    "_packed_params": "of torch's own quantised layers, a rival",
    "_weight_bias": "of torch's own quantised layers, a rival",
    "_schema": "of torch's operators, in testing only",
    "_positive": "our own, set by a parent class",
}


@cache
def trees() -> dict[str, ast.Module]:
    """The package's files, parsed; not imported, since that may be what fails."""
    return {
        str(path.relative_to(PACKAGE)): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    }


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.id)
def test_hook_is_there(hook):
    if find_spec(hook.where.split(".")[0].split(":")[0]) is None:
        pytest.skip("not installed")
    fault = hook.fault()
    assert fault is None, hook.told(fault)


def test_every_import_is_there():
    missing = []
    for file, tree in trees().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or node.level or node.module is None:
                continue
            library = node.module.split(".")[0]
            if library not in hooks.VERSIONED or find_spec(library) is None:
                continue
            for alias in node.names:
                if not _importable(node.module, alias.name):
                    version = import_module(library).__version__
                    missing.append(
                        f"hf_tfast/{file}:{node.lineno} imports {alias.name} from {node.module}, and {library} "
                        f"{version} has none there: look where it went"
                    )
    assert missing == [], "\n".join(missing)


def _importable(module: str, name: str) -> bool:
    try:
        return hasattr(import_module(module), name) or find_spec(f"{module}.{name}") is not None
    except ImportError:
        return False


def test_every_private_use_has_a_row():
    """Private names of others: read as attributes, or asked for by getattr and its kin."""
    own = {name for tree in trees().values() for node in ast.walk(tree) for name in _defined(node)}
    rows = {hook.where.split(".")[-1].split(":")[-1] for hook in HOOKS}
    rows |= {name for hook in HOOKS if isinstance(hook, Made) for name in hook.has}
    words = " ".join(hook.text for hook in HOOKS if isinstance(hook, Word))
    lacking = []
    for file, tree in trees().items():
        for name, line in _private_uses(tree):
            known = name in rows or name in EXEMPT or name in own or re.search(rf"\b{name}\b", words)
            if not known and not name.startswith("_tfast"):
                lacking.append(f"hf_tfast/{file}:{line} uses {name}: add a row to tests/integration/hooks.py")
    assert lacking == [], "\n".join(lacking)


def _defined(node: ast.AST) -> Iterator[str]:
    """Names with an underscore that this piece of the package makes."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
        if node.value.id in ("self", "cls"):
            yield node.attr
    elif isinstance(node, ast.arg):
        yield node.arg


def _private_uses(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.attr, node.lineno
        elif isinstance(node, ast.stmt):
            inner = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
            parts = [part for child in inner for part in ast.walk(child)]
            asked = any(isinstance(p, ast.Call) and _called(p) in _ASKING for p in parts)
            inside = {id(v) for part in parts if isinstance(part, ast.JoinedStr) for v in part.values}
            for part in parts if asked else ():
                if (
                    isinstance(part, ast.Constant)
                    and id(part) not in inside
                    and re.fullmatch(r"_[a-z]\w*", str(part.value))
                ):
                    yield part.value, part.lineno


_ASKING = ("getattr", "hasattr", "setattr", "delattr")


def _called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else ""


def overrides() -> Iterator[tuple[str, str, str, str]]:
    """(file, class, name, class of Transformers): everything in a class of ours that replaces something of theirs."""
    classes = {
        node.name: (file, node)
        for file, tree in trees().items()
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }
    for name, (file, node) in classes.items():
        for base in {FOREIGN[b] for b in _ancestors(name, classes) if b in FOREIGN}:
            theirs = hooks.resolve(base)
            for member in (n for part in node.body for n in _members(part)):
                if hasattr(theirs, member) and not member.startswith("__") and not hasattr(object, member):
                    yield file, name, member, base


def _ancestors(name: str, classes: dict[str, tuple[str, ast.ClassDef]]) -> Iterator[str]:
    yield name
    if name in MIXED:
        yield MIXED[name]
    if name in classes and name not in FOREIGN:
        for base in classes[name][1].bases:
            if isinstance(base, ast.Name):
                yield from _ancestors(base.id, classes)


def _members(part: ast.stmt) -> Iterator[str]:
    if isinstance(part, ast.FunctionDef):
        yield part.name
    elif isinstance(part, ast.Assign):
        yield from (target.id for target in part.targets if isinstance(target, ast.Name))


def test_every_private_override_has_a_row():
    rows = {(hook.where.split(":")[0], hook.where.split(".")[-1]) for hook in HOOKS if isinstance(hook, Name)}
    named = {name for _, name in rows}
    lacking = sorted(
        f"hf_tfast/{file}: {cls} overrides {base}.{member}: add a row to tests/integration/hooks.py"
        for file, cls, member, base in overrides()
        if member.startswith("_") and member not in named and member != "_abc_impl"
    )
    assert lacking == [], "\n".join(lacking)


def test_overrides_take_what_they_are_given():
    """A parameter that Transformers has added to a method of its own must be accepted by ours."""
    refused, seen = [], 0
    for file, cls, member, base in overrides():
        module = import_module(f"hf_tfast.{file.removesuffix('.py').replace('/', '.')}")
        ours = inspect.getattr_static(getattr(module, cls), member)
        ours = getattr(ours, "__func__", ours)
        if not inspect.isfunction(ours) or member == "forward":
            continue
        theirs = inspect.signature(getattr(hooks.resolve(base), member)).parameters
        mine = inspect.signature(ours).parameters
        kinds = {p.kind for p in mine.values()}
        named = inspect.Parameter.VAR_KEYWORD in kinds
        placed = inspect.Parameter.VAR_POSITIONAL in kinds
        seen += 1
        for name, p in theirs.items():
            free = p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) or name in ("self", "cls")
            if not free and name not in mine and not (named or (placed and p.kind is not p.KEYWORD_ONLY)):
                refused.append(f"hf_tfast/{file}: {cls}.{member} does not take {name!r}, which {base} now has")
    assert seen > 60
    assert refused == [], "\n".join(refused)


def _remove(where: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Delete an attribute from wherever it is defined: the module, or every class that has it. Returns its name."""
    path, name = re.fullmatch(r"(.*)[:.](\w+)", where).groups()
    owner = hooks.resolve(path)
    kind = owner if isinstance(owner, type) else type(owner)
    for holder in (owner,) if inspect.ismodule(owner) else kind.__mro__:
        if name in vars(holder):
            monkeypatch.delattr(holder, name)
    return name


REMOVABLE = [h for h in HOOKS if isinstance(h, Name) and h.where.startswith(("transformers", "accelerate"))]


@pytest.mark.parametrize("hook", REMOVABLE, ids=lambda hook: hook.id)
def test_a_removal_is_caught(hook, monkeypatch):
    name = _remove(hook.where, monkeypatch)
    fault = hook.fault()
    assert fault is not None
    told = hook.told(fault)
    assert name in told
    assert f"hf_tfast/{hook.user}" in told


def test_a_changed_signature_a_lost_word_and_a_lost_attribute_are_caught(monkeypatch):
    slim = Name(where="transformers.cache_utils:DynamicLayer.crop", takes=("tokens_to_remove",), user="x", need="y")
    monkeypatch.setattr("transformers.cache_utils.DynamicLayer.crop", lambda self, length: None)
    assert "no longer ['tokens_to_remove']" in slim.fault()
    for hook in HOOKS:
        if isinstance(hook, Made):
            empty = Made(where="builtins:object", has=hook.has, user=hook.user, need=hook.need)
            assert "without" in empty.fault()
    monkeypatch.setattr(inspect, "getsource", lambda _: "def moved(): ...")
    for hook in HOOKS:
        if isinstance(hook, Word):
            assert "does not say" in hook.fault()


def test_files_in_the_table_exist_and_use_what_it_says():
    for hook in HOOKS:
        text = (PACKAGE / hook.user).read_text(encoding="utf-8")
        used = [hook.where.split(".")[-1].split(":")[-1]]
        used += list(hook.has) if isinstance(hook, Made) else []
        used += re.findall(r"\w+", hook.text) if isinstance(hook, Word) else []
        parts = [part for name in used for part in (name, name.removeprefix("ACCELERATE_USE_"))]
        assert any(part in text for part in parts), f"hf_tfast/{hook.user} does not use {hook.where}: mend its row"


@pytest.fixture
def probe():
    """An attention of ours by another name, which keeps what it and its mask function are called with."""
    from hf_tfast.integration.masks import key_row

    calls: list[dict] = []

    def attention(module, query, key, value, attention_mask, **options):
        calls.append(
            {
                "module": module,
                "q": query,
                "k": key,
                "mask": attention_mask,
                "options": {n for n, v in options.items() if v is not None and v is not False},
            }
        )
        return query.transpose(1, 2).contiguous(), None

    def mask(*args, **options):
        assert not args, "Transformers gives the mask function arguments by position now: see integration/masks.py"
        calls.append({"mask_options": set(options)})
        return key_row(**options)

    name = "canary_probe"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    yield name, calls
    for registry in (AttentionInterface, AttentionMaskInterface):
        registry._global_mapping.pop(name)


@pytest.mark.parametrize("family", ["llama", "bert", "mistral"])
def test_attention_is_called_as_it_was(probe, family):
    from hf_tfast.integration import interface, masks
    from tests.integration.tiny_models import FAMILIES

    name, calls = probe
    model = FAMILIES[family].make().eval()
    model.set_attn_implementation(name)
    tokens = torch.randint(3, 90, (2, 7))
    valid = torch.ones(2, 7, dtype=torch.int64)
    valid[0, :2] = 0
    with torch.no_grad():
        model(input_ids=tokens, attention_mask=valid)
    asked = next(c for c in calls if "mask_options" in c)
    known = set(inspect.signature(masks.key_row).parameters) | set(masks._HARMLESS)
    assert asked["mask_options"] <= known, "new arguments of mask functions: see hf_tfast/integration/masks.py"
    call = next(c for c in calls if "q" in c)
    known = {"dropout", "scaling", "is_causal", "softcap", "s_aux", "sliding_window", "position_ids"}
    known |= set(interface._HARMLESS) | set(interface._PACKING) | set(interface._REFUSED)
    assert call["options"] <= known, "new arguments of attention: see hf_tfast/integration/interface.py"
    assert {"dropout", "scaling"} <= call["options"]
    assert call["q"].shape == (2, 4, 7, 8), "queries are no longer [batch, heads, tokens, width]"
    assert call["k"].shape[1] == (4 if family == "bert" else 2), "key heads are repeated before the interface"
    row = masks.read_row(call["mask"])
    assert row.causal is (family != "bert")
    assert torch.equal(row.mask.valid, valid.bool())
    assert getattr(call["module"], "is_causal", None) is (family != "bert")


def test_mask_functions_come_apart():
    """Their names and the variables that they close over, which hf_tfast/integration/masks.py reads."""
    from hf_tfast.integration.masks import _pattern

    close = inspect.getclosurevars
    both = masking_utils.and_masks(masking_utils.sliding_window_overlay(5), masking_utils.causal_mask_function)
    assert len(close(both).nonlocals["mask_functions"]) == 2
    assert close(masking_utils.sliding_window_overlay(5)).nonlocals["sliding_window"] == 5
    assert close(masking_utils.sliding_window_bidirectional_overlay(6)).nonlocals["sliding_window"] == 6
    assert close(masking_utils.chunked_overlay(4, torch.zeros(1))).nonlocals["chunk_size"] == 4
    pattern = _pattern(both, 100)
    assert (pattern.causal, pattern.window) == (True, 5)
    packed = masking_utils.packed_sequence_mask_function(torch.tensor([[0, 0, 1]]))
    assert _pattern(masking_utils.and_masks(packed, masking_utils.causal_mask_function), 3).packed is packed


def test_quantiser_hooks_are_called_in_their_order(tmp_path, monkeypatch):
    from hf_tfast import FastPlan, Window
    from hf_tfast.integration.quantizer import FastQuantizer
    from tests.integration.tiny_models import FAMILIES

    FAMILIES["llama"].make().save_pretrained(tmp_path / "dense")
    order: list[str] = []
    names = (
        "update_attn_implementation",
        "_process_model_before_weight_loading",
        "param_needs_quantization",
        "_process_model_after_weight_loading",
        "get_state_dict_and_metadata",
    )

    def noted(name):
        own = getattr(FastQuantizer, name)

        def hook(self, *args, **kwargs):
            order.append(name)
            return own(self, *args, **kwargs)

        return hook

    for name in names:
        monkeypatch.setattr(FastQuantizer, name, noted(name))
    plan = FastPlan(attention=Window(window=8))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=plan)
    model.save_pretrained(tmp_path / "fast")
    assert list(dict.fromkeys(order)) == list(names), "Transformers calls the hooks of a quantiser in another order"
    order.clear()
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fast")
    asked = [name for name in dict.fromkeys(order) if name != "param_needs_quantization"]
    assert asked == [names[0], names[1], names[3]]


def test_a_new_cache_makes_its_layers_when_they_are_met():
    cache = transformers.DynamicCache()
    assert cache.layers == []
    assert cache.layer_class_to_replicate is transformers.cache_utils.DynamicLayer
    pair = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    assert isinstance(pair.self_attention_cache, transformers.DynamicCache)
    assert isinstance(pair.cross_attention_cache, transformers.DynamicCache)
    cache.update(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4), 0)
    cache.layers[0].crop(-2)
    assert cache.get_seq_length() == 3, "crop no longer takes the number of tokens to remove, as a negative number"
