"""A module of the package as source: its statements, what each binds and uses, and where its imports lead."""

import ast
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ._names import Use, bound, uses

__all__ = ["External", "Module", "Package", "Statement"]

# What is there wherever a model runs: torch and Transformers with what they need themselves.
ALLOWED = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub"} | set(sys.stdlib_module_names)


@dataclass(frozen=True, order=True)
class External:
    """An import of another package: `import module`, or `from module import name`."""

    module: str
    name: str | None = None

    def text(self, local: str) -> str:
        """The statement that makes it known as `local`."""
        if self.name is not None:
            return f"from {self.module} import {self.name}" + (f" as {local}" if local != self.name else "")
        return f"import {self.module}" + (f" as {local}" if local != self.module.split(".")[0] else "")


@dataclass
class Statement:
    """A statement at the top of a module, with the comment lines right above it."""

    node: ast.stmt
    first: int  # its first line, from 1, comments and decorators included
    binds: set[str]

    @cached_property
    def uses(self) -> list[Use]:
        return uses(self.node)

    @property
    def last(self) -> int:
        return self.node.end_lineno or self.node.lineno

    @property
    def is_block(self) -> bool:
        return isinstance(self.node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


@dataclass
class Module:
    """`name` dotted, as "hf_tfast.attention.window"; `imports` what local names mean, wherever the import stands."""

    name: str
    root: Path
    path: Path
    lines: list[str]
    tree: ast.Module
    statements: list[Statement] = field(default_factory=list)
    imports: dict[str, External | tuple[str, str]] = field(default_factory=dict)
    needs: list[str] = field(default_factory=list)  # modules of the package that must run before this one

    def defining(self, name: str) -> Statement | None:
        return next((s for s in reversed(self.statements) if name in s.binds), None)


class Package:
    """Modules of the package in `root`, read on demand. `replaced`: "attention._base:mechanisms" -> other source."""

    def __init__(self, root: Path, replaced: dict[str, str]) -> None:
        self.root = root
        self.replaced = dict(replaced)
        self._modules: dict[str, Module] = {}

    def file(self, name: str) -> Path | None:
        """The file of a module; None where there is no such module."""
        path = self.root.joinpath(*name.split(".")[1:])
        found = [p for p in (path / "__init__.py", path.with_suffix(".py")) if p.is_file()]
        return found[0] if found else None

    def module(self, name: str) -> Module:
        if name not in self._modules:
            path = self.file(name)
            if path is None:
                raise ValueError(f"there is no module {name} in {self.root}")
            self._modules[name] = self._read(name, path)
        return self._modules[name]

    def _read(self, name: str, path: Path) -> Module:
        text = path.read_text(encoding="utf-8")
        for key, source in self.replaced.items():
            where, _, what = key.partition(":")
            if f"{self.root.name}.{where}" == name:
                text = _replace(text, what, source, name)
        module = Module(name, self.root, path, text.splitlines(), ast.parse(text))
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        self._imports(module, package)
        end = 0
        for node in module.tree.body:
            start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
            while start - 1 > end and module.lines[start - 2].startswith("#"):
                start -= 1
            end = node.end_lineno or node.lineno
            if isinstance(node, ast.Import | ast.ImportFrom) or _is_docstring(node) or _for_types(node):
                continue
            module.statements.append(Statement(node, start, bound([node])))
        return module

    def _imports(self, module: Module, package: str) -> None:
        """Fill `imports` and `needs`. Imports of other packages count at the top only: inside a function they stay."""
        top = {id(n) for n in module.tree.body}
        top |= {id(n) for s in module.tree.body if _for_types(s) for n in ast.walk(s)}
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                parts = package.split(".")
                base = ".".join(parts[: len(parts) - node.level + 1])
                target = f"{base}.{node.module}" if node.module else base
                for alias in node.names:
                    inner = f"{target}.{alias.name}"
                    module.imports[alias.asname or alias.name] = (target, alias.name)
                    if id(node) in top:
                        module.needs.append(inner if self.file(inner) else target)
            elif isinstance(node, ast.ImportFrom) and id(node) in top:
                for alias in node.names:
                    module.imports[alias.asname or alias.name] = External(node.module or "", alias.name)
            elif isinstance(node, ast.Import) and id(node) in top:
                for alias in node.names:
                    module.imports[alias.asname or alias.name.split(".")[0]] = External(alias.name)


def _replace(text: str, what: str, source: str, module: str) -> str:
    """`text` with the definition of `what` at its top exchanged."""
    for node in ast.parse(text).body:
        if what in bound([node]):
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
            lines = text.splitlines()
            return "\n".join([*lines[: first - 1], source.strip("\n"), *lines[node.end_lineno or first :]]) + "\n"
    raise ValueError(f"{module} has no {what} to replace; its flat form has to be written anew")


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _for_types(node: ast.stmt) -> bool:
    """`if TYPE_CHECKING:` around imports."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
