"""Many modules of the package as one file that needs none of them: what the wanted names reach, and nothing else.

Source is moved, not rewritten: comments and layout stay. Relative imports go, since what they named stands in the same
file; two things of one name get two names; imports of other packages are gathered at the top.
"""

import ast
import builtins
import re
import textwrap
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from ._names import Use
from ._source import ALLOWED, External, Module, Package, Statement

__all__ = ["flatten"]

_OWN = {"__file__", "__package__", "__path__", "__spec__"}  # what a module is, and a flat file is not
Key = tuple[str, str]  # (module of the package, name defined at its top)


def flatten(package: Package, wanted: list[Key]) -> str:
    """The source of one file that defines `wanted` and all they use.

    ValueError where the source holds what cannot be moved: a statement with an effect, a package that is not there
    beside torch and Transformers, or the name of a file or module of its own.
    """
    flat = _Flat(package)
    for module, name in wanted:
        flat.reach(package.module(module), name)
    while flat.waiting:
        flat.follow(*flat.waiting.pop())
    flat.give_names()
    return flat.text()


@dataclass
class _Flat:
    package: Package
    kept: dict[str, list[Statement]] = field(default_factory=dict)  # module -> statements that are reached
    order: list[str] = field(default_factory=list)  # modules, each after those it needs
    waiting: list[tuple[Module, Statement]] = field(default_factory=list)
    externals: dict[str, set[External]] = field(default_factory=dict)  # local name -> what it means, anywhere
    names: dict[Key | External, str] = field(default_factory=dict)  # what it is called in the flat file

    def resolve(self, module: Module, name: str) -> Key | External | str | None:
        """What a global name of `module` means: a definition, an import, a module of the package (its dotted name), or
        None for a builtin."""
        if module.defining(name) is not None:
            return module.name, name
        meaning = module.imports.get(name)
        if meaning is None:
            if name in _OWN:
                raise ValueError(f"{module.path.name} uses {name}, which means nothing in a flat file")
            if not hasattr(builtins, name):
                raise ValueError(f"{module.path.name} uses {name!r}, which is defined nowhere")
            return None
        if isinstance(meaning, External):
            return meaning
        target, inner = meaning
        if self.package.file(f"{target}.{inner}"):
            return f"{target}.{inner}"
        return self.resolve(self.package.module(target), inner)

    def meaning(self, module: Module, use: Use) -> Key | External | None:
        """As `resolve`, through the attribute where a module's name stands in front."""
        found = self.resolve(module, use.name)
        if not isinstance(found, str):
            return found
        if use.attribute is None:
            raise ValueError(f"{module.path.name} passes on the module {found}; a flat file has none")
        inner = self.resolve(self.package.module(found), use.attribute.attr)
        if isinstance(inner, str) or inner is None:
            raise ValueError(f"{module.path.name}: {found}.{use.attribute.attr} is no definition")
        return inner

    def reach(self, module: Module, name: str) -> None:
        statement = module.defining(name)
        if statement is None:
            raise ValueError(f"{module.name} defines no {name}")
        self._place(module)
        kept = self.kept[module.name]
        if statement not in kept:
            kept.append(statement)
            self.waiting.append((module, statement))

    def _place(self, module: Module) -> None:
        if module.name in self.kept:
            return
        self.kept[module.name] = []
        for need in module.needs:
            if need != self.package.root.name:
                self._place(self.package.module(need))
        self.order.append(module.name)
        for statement in module.statements:
            if not statement.binds:
                raise ValueError(
                    f"{module.path.name}, line {statement.node.lineno}, does something when it is imported; move it "
                    "into a function"
                )

    def follow(self, module: Module, statement: Statement) -> None:
        """Reach what a statement uses."""
        _check_packages(module, statement.node)
        for use in statement.uses:
            meaning = self.meaning(module, use)
            if isinstance(meaning, External):
                _check_package(module, meaning.module)
                self.externals.setdefault(use.name, set()).add(meaning)
            elif meaning is not None:
                self.reach(self.package.module(meaning[0]), meaning[1])

    def give_names(self) -> None:
        """Names in the flat file, each once: imports first, then definitions in order. A name that is taken gets that
        of its module put in front."""
        taken = set(dir(builtins))
        for local, meanings in sorted(self.externals.items()):
            for meaning in sorted(meanings, key=str):
                name = local if local not in taken else f"{meaning.module.replace('.', '_')}_{local}"
                self.names.setdefault(meaning, name)
                taken.add(self.names[meaning])
        for module in self.order:
            for statement in self._sorted(module):
                for name in sorted(statement.binds):
                    self.names[module, name] = self._free(name, module, taken)
                    taken.add(self.names[module, name])

    def _free(self, name: str, module: str, taken: set[str]) -> str:
        if name not in taken:
            return name
        stem = module.rpartition(".")[2].strip("_")
        if name.isupper():
            stem = stem.upper()
        new = f"_{stem}_{name.lstrip('_')}"
        if new in taken:
            new = "_".join(["", *module.split(".")[1:-1], stem, name.lstrip("_")])
        if new in taken:
            raise ValueError(f"no free name for {name} of {module}")
        return new

    def _sorted(self, module: str) -> list[Statement]:
        return sorted(self.kept[module], key=lambda s: s.first)

    def text(self) -> str:
        imports = [meaning.text(name) for meaning, name in self.names.items() if isinstance(meaning, External)]
        parts = ["\n".join(_gathered(imports))]
        for name in self.order:
            statements = self._sorted(name)
            if statements:
                module = self.package.module(name)
                parts.append(_title(module))
                parts += [self._moved(module, statement) for statement in statements]
        return _spaced(parts)

    def _moved(self, module: Module, statement: Statement) -> str:
        """The source of a statement under its new names, without relative imports."""
        edits = []
        for use in statement.uses:
            meaning = self.meaning(module, use)
            if meaning is None:
                continue
            of_module = use.attribute is not None and isinstance(self.resolve(module, use.name), str)
            old = f"{use.name}.{use.attribute.attr}" if of_module and use.attribute else use.name
            if (new := self.names[meaning]) != old:
                edits.append(_edit(module, use, old, new))
        node = statement.node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            new = self.names[module.name, node.name]
            if new != node.name:
                start = module.lines[node.lineno - 1].encode().index(node.name.encode())
                edits.append((node.lineno, start, len(node.name.encode()), new))
        lines = {n: module.lines[n - 1] for n in range(statement.first, statement.last + 1)}
        for line, start, size, new in sorted(set(edits), reverse=True):
            raw = lines[line].encode()
            lines[line] = (raw[:start] + new.encode() + raw[start + size :]).decode()
        for inner in ast.walk(node):
            if isinstance(inner, ast.ImportFrom) and inner.level:
                _drop(node, inner, lines)
        return "\n".join(line for _, line in sorted(lines.items()))


def _title(module: Module) -> str:
    """A comment that says what the following is and where it comes from."""
    where = PurePosixPath(module.name.split(".")[0], module.path.relative_to(module.root).as_posix())
    about = (ast.get_docstring(module.tree) or "").split("\n\n")[0]
    lines = textwrap.wrap(" ".join(about.split()), 116)
    return "\n".join([f"# --- {where} ---", *(f"# {line}" for line in lines)])


def _edit(module: Module, use: Use, old: str, new: str) -> tuple[int, int, int, str]:
    """(line, first byte, bytes, new text); ValueError where the source does not read as its tree says."""
    node = use.node
    raw = module.lines[node.lineno - 1].encode()
    if isinstance(node, ast.Constant):
        start, end = node.col_offset, node.end_col_offset or 0
        quoted = re.sub(rf"\b{re.escape(old)}\b", new, raw[start:end].decode())
        return node.lineno, start, end - start, quoted
    size = len(old.encode())
    if raw[node.col_offset : node.col_offset + size] != old.encode():
        raise ValueError(f"{module.path.name}, line {node.lineno}: cannot rename {old}; take it out of the f-string")
    return node.lineno, node.col_offset, size, new


def _drop(statement: ast.stmt, node: ast.ImportFrom, lines: dict[int, str]) -> None:
    """Take an import out of a function; `pass` stays where it stood alone."""
    alone = any(
        isinstance(block, list) and block == [node] for outer in ast.walk(statement) for block in vars(outer).values()
    )
    for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
        lines.pop(line)
    if alone:
        lines[node.lineno] = " " * node.col_offset + "pass"


def _check_packages(module: Module, node: ast.AST) -> None:
    """Imports inside functions: Transformers wants every package of them, but for those in a `try`."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            _check_package(module, alias.name)
    elif isinstance(node, ast.ImportFrom) and not node.level:
        _check_package(module, node.module or "")
    elif not isinstance(node, ast.Try):
        for inner in ast.iter_child_nodes(node):
            _check_packages(module, inner)


def _check_package(module: Module, name: str) -> None:
    if name.split(".")[0] not in ALLOWED:
        raise ValueError(f"{module.path.name} imports {name}, which is not there with torch and Transformers alone")


def _gathered(imports: list[str]) -> list[str]:
    """Imports without doubles: plain ones first, names of one module on one line."""
    plain = sorted({text for text in imports if text.startswith("import ")})
    names: dict[str, set[str]] = {}
    for text in imports:
        if text.startswith("from "):
            _, module, _, name = text.split(" ", 3)
            names.setdefault(module, set()).add(name)
    lines = []
    for module, found in sorted(names.items()):
        line = f"from {module} import {', '.join(sorted(found))}"
        if len(line) > 119:
            line = f"from {module} import (\n" + "".join(f"    {name},\n" for name in sorted(found)) + ")"
        lines.append(line)
    return [*plain, *lines]


def _spaced(parts: list[str]) -> str:
    """Parts with two blank lines around blocks and one elsewhere."""
    text = parts[0]
    for before, part in zip(parts, parts[1:], strict=False):
        blocks = [re.match(r"# ---|(#.*\n)*(@|def |class |async )", p) for p in (before, part)]
        text += ("\n\n\n" if any(blocks) else "\n") + part
    return text + "\n"
