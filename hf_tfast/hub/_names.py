"""Which names in a piece of source mean what stands at the top of its module, and not something of a function's own.

Python's rules of scope, as far as moving a statement into another file needs them: arguments, assignments, loops,
imports, comprehensions and class bodies hide names; annotations in quotes count as code.
"""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

__all__ = ["Use", "bound", "uses"]

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(frozen=True)
class Use:
    """A global name in the source.

    node       the Name; of a quoted annotation, the string constant that holds it.
    attribute  the Attribute around it, where the name is that of a module: `blocks.attend_tiles`.
    """

    name: str
    node: ast.Name | ast.Constant
    attribute: ast.Attribute | None = None


@dataclass
class _Scope:
    names: set[str]
    of_class: bool = False


def bound(body: Iterable[ast.AST]) -> set[str]:
    """The names that these statements bind in their own scope. Relative imports do not count: they say where a name of
    the package comes from, which is the same for the whole file."""
    found: set[str] = set()
    declared: set[str] = set()
    for node in _same_scope(body):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            found.add(node.id)
        elif isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Import):
            found.update(alias.asname or alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            found.add(node.name)
        elif isinstance(node, ast.MatchMapping) and node.rest:
            found.add(node.rest)
        elif isinstance(node, ast.Global | ast.Nonlocal):
            declared.update(node.names)
    return found - declared


def _same_scope(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    for node in body:
        yield node
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef, ast.Lambda)):
            continue
        if isinstance(node, _COMPREHENSIONS):  # only := reaches out of one
            yield from (n.target for n in ast.walk(node) if isinstance(n, ast.NamedExpr))
            continue
        yield from _same_scope(ast.iter_child_nodes(node))


def uses(statement: ast.stmt) -> list[Use]:
    """Every global name that a statement at the top of a module reads or binds, in the order of the source."""
    reader = _Reader()
    reader.visit(statement)
    return reader.found


@dataclass
class _Reader(ast.NodeVisitor):
    found: list[Use] = field(default_factory=list)
    scopes: list[_Scope] = field(default_factory=list)

    def _hidden(self, name: str) -> bool:
        inner = self.scopes[-1:]
        outer = [scope for scope in self.scopes[:-1] if not scope.of_class]
        return any(name in scope.names for scope in (*inner, *outer))

    def _inside(self, scope: _Scope, nodes: Iterable[ast.AST]) -> None:
        self.scopes.append(scope)
        for node in nodes:
            self.visit(node)
        self.scopes.pop()

    def visit_Name(self, node: ast.Name) -> None:  # noqa: N802
        if not self._hidden(node.id):
            self.found.append(Use(node.id, node))

    def visit_Attribute(self, node: ast.Attribute) -> None:  # noqa: N802
        if isinstance(node.value, ast.Name):
            if not self._hidden(node.value.id):
                self.found.append(Use(node.value.id, node.value, node))
        else:
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:  # noqa: N802
        for part in node.decorator_list:
            self.visit(part)
        self._arguments(node.args)
        self._annotation(node.returns)
        self._inside(_Scope(_parameters(node.args) | bound(node.body)), node.body)

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

    def visit_Lambda(self, node: ast.Lambda) -> None:  # noqa: N802
        self._arguments(node.args)
        self._inside(_Scope(_parameters(node.args)), [node.body])

    def visit_ClassDef(self, node: ast.ClassDef) -> None:  # noqa: N802
        for part in (*node.decorator_list, *node.bases, *node.keywords):
            self.visit(part)
        self._inside(_Scope(bound(node.body), of_class=True), node.body)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:  # noqa: N802
        self.visit(node.target)
        self._annotation(node.annotation)
        if node.value is not None:
            self.visit(node.value)

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) -> None:
        first, *rest = node.generators
        self.visit(first.iter)
        results = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        inside = [first.target, *first.ifs, *(part for g in rest for part in (g.target, g.iter, *g.ifs)), *results]
        self._inside(_Scope(bound([g.target for g in node.generators])), inside)

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension  # noqa: N815

    def _arguments(self, given: ast.arguments) -> None:
        for default in (*given.defaults, *given.kw_defaults):
            if default is not None:
                self.visit(default)
        for argument in _every_argument(given):
            self._annotation(argument.annotation)

    def _annotation(self, node: ast.expr | None) -> None:
        if node is None:
            return
        for part in ast.walk(node):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                self._quoted(part, part.value)
        self.visit(node)

    def _quoted(self, constant: ast.Constant, text: str) -> None:
        try:
            inner = ast.parse(text, mode="eval")
        except SyntaxError:  # a string of Literal["..."] that is no name
            return
        for part in ast.walk(inner):
            if isinstance(part, ast.Name) and not self._hidden(part.id):
                self.found.append(Use(part.id, constant))


def _every_argument(given: ast.arguments) -> list[ast.arg]:
    stars = [a for a in (given.vararg, given.kwarg) if a is not None]
    return [*given.posonlyargs, *given.args, *given.kwonlyargs, *stars]


def _parameters(given: ast.arguments) -> set[str]:
    return {argument.arg for argument in _every_argument(given)}
