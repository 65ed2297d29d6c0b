"""Writes docs/api/ from the docstrings of the public names: `python docs/make_api.py`; `--check` only compares.

Read from the source, without importing it, so that the pages are the same on every machine and Python.
"""

import argparse
import ast
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, PAGES = ROOT / "hf_tfast", Path(__file__).resolve().parent / "api"

TITLES = {  # room -> title of its page; the order of the index
    "attention": "Attention: the functional door, masks, mechanisms",
    "feed_forward": "Feed-forward forms",
    "integration": "Plans on Transformers' models",
    "models": "Models of our own",
    "positions": "Positions",
    "compression": "Conversion",
    "planner": "Planner",
    "distillation": "Distillation",
    "parallel": "Several processes",
    "hub": "Saving and sharing",
}
# What every mechanism and form has: said once, in CONTRIBUTING.md.
CONTRACT = {"attention": "Mechanism", "feed_forward": "Form"}
NOTICE = "<!-- made by `python docs/make_api.py` from the docstrings; do not edit -->"


@dataclass(frozen=True)
class Found:
    """A public name: where it is defined, and the module that holds it."""

    name: str
    path: Path
    module: ast.Module
    node: ast.ClassDef | ast.FunctionDef


def homes() -> dict[str, str]:
    """{public name: module} as hf_tfast/__init__.py says."""
    for node in ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_HOMES":
            return {name: module for module, names in ast.literal_eval(node.value).items() for name in names}
    raise ValueError("hf_tfast/__init__.py has no _HOMES")


def file_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def locate(module: str, name: str) -> Found:
    """Follow imports inside the package to where a name is defined."""
    path = file_of(module)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return Found(name, path, tree, node)
    here = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    base = here[: len(here) - node.level + 1]
                    return locate(".".join([*base, *(node.module or "").split(".")]).rstrip("."), alias.name)
    raise ValueError(f"{name} is not defined in {module}, and not imported there from this package")


def pages() -> dict[str, str]:
    """{file name: text} of the whole reference."""
    rooms: dict[str, list[Found]] = {room: [] for room in TITLES}
    for name, module in sorted(homes().items(), key=lambda item: item[0].lower()):
        room = module.split(".")[1]
        if room not in rooms:
            raise ValueError(f"docs/make_api.py has no title for the room {room!r}, which holds {name}")
        rooms[room].append(locate(module, name))
    made = {"README.md": index(rooms)}
    for room, found in rooms.items():
        parts = [f"# {TITLES[room]}", NOTICE, *(part for one in found for part in entry(one, room))]
        made[f"{room}.md"] = "\n\n".join(parts) + "\n"
    return made


def index(rooms: dict[str, list[Found]]) -> str:
    lines = ["# Reference", "", NOTICE, "", "Every public name: `from hf_tfast import ...`.", ""]
    for room, found in rooms.items():
        lines += [f"## [{TITLES[room]}]({room}.md)", ""]
        for one in found:
            lines.append(f"- [`{one.name}`]({room}.md#{one.name.lower()}): {escape(first_sentence(one))}")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def first_sentence(found: Found) -> str:
    doc = ast.get_docstring(found.module if is_contracted(found) else found.node) or ""
    first = " ".join(doc.split("\n\n")[0].split())
    first = first.partition(": ")[2] if is_contracted(found) else first
    return re.split(r"(?<=[\w`)]\.)\s", first)[0]


def is_contracted(found: Found) -> bool:
    """A mechanism or form: its module's docstring says what it is."""
    contract = CONTRACT.get(found.path.parent.name)
    return any(one.name == contract or is_contracted(one) for one in parents(found))


def parents(found: Found) -> Iterator[Found]:
    """The classes of this package that a class names as its bases."""
    module = ".".join(found.path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for base in bases(found.node):
        try:
            yield locate(module, base)
        except ValueError:
            continue  # a class of another package


def bases(node: ast.ClassDef | ast.FunctionDef) -> list[str]:
    return [ast.unparse(base).split("[")[0] for base in getattr(node, "bases", [])]


def entry(found: Found, room: str) -> Iterator[str]:
    """The Markdown paragraphs of one name."""
    yield f"## {found.name}"
    where = found.path.relative_to(ROOT).as_posix()
    yield f"```text\n{signature(found)}\n```"
    if is_contracted(found):
        yield from paragraphs(ast.get_docstring(found.module) or "")
    yield from paragraphs(ast.get_docstring(found.node) or "")
    if isinstance(found.node, ast.ClassDef):
        if rows := fields(found.node):
            table = ["| field | type | default |", "|---|---|---|"]
            yield "\n".join(table + [f"| `{name}` | {cell(kind)} | {cell(value)} |" for name, kind, value in rows])
        if not is_contracted(found):
            yield from members(found.node)
    yield f"Defined in [{where}](../../{where})."


def signature(found: Found) -> str:
    node = found.node
    if isinstance(node, ast.FunctionDef):
        return wrap(node.name, node)
    made = initialiser(found)
    if made is not None:
        return wrap(node.name, made, skip=1)
    given = ", ".join(name if value == "" else f"{name}={value}" for name, _, value in fields(node))
    return f"{node.name}({'*, ' if given and is_contracted(found) else ''}{given})"


def initialiser(found: Found) -> ast.FunctionDef | None:
    """`__init__` of a class, or of the first of its bases in this package that has one."""
    for part in found.node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            return part
    return next(filter(None, map(initialiser, parents(found))), None)


def wrap(name: str, node: ast.FunctionDef, skip: int = 0) -> str:
    """The signature, one parameter a line where it is long."""
    arguments = ast.unparse(node.args)
    parts = [re.sub(r"^(\*{0,2}\w+: .*?)=(?!=)", r"\1 = ", part) for part in split(arguments)[skip:]]
    result = f" -> {ast.unparse(node.returns)}" if node.returns is not None and not skip else ""
    line = f"{name}({', '.join(parts)}){result}"
    if len(line) <= 100:
        return line
    return "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){result}"])


def split(arguments: str) -> list[str]:
    """At the commas between parameters."""
    parts, depth, start = [], 0, 0
    for n, letter in enumerate(arguments):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append(arguments[start:n].strip())
            start = n + 1
    return [part for part in [*parts, arguments[start:].strip()] if part]


def fields(node: ast.ClassDef) -> list[tuple[str, str, str]]:
    """(name, type, default) of the annotated fields of a class, "" without a default."""
    return [
        (part.target.id, ast.unparse(part.annotation), "" if part.value is None else ast.unparse(part.value))
        for part in node.body
        if isinstance(part, ast.AnnAssign)
        and isinstance(part.target, ast.Name)
        and not part.target.id.startswith("_")
        and "ClassVar" not in ast.unparse(part.annotation)
    ]


def members(node: ast.ClassDef) -> Iterator[str]:
    """Public methods and properties that say what they do."""
    for part in node.body:
        if not isinstance(part, ast.FunctionDef) or part.name.startswith("_"):
            continue
        marks = {ast.unparse(mark) for mark in part.decorator_list}
        doc = ast.get_docstring(part)
        if doc is None or any(mark.endswith(".setter") for mark in marks):
            continue
        still = marks & {"staticmethod"}
        head = part.name if "property" in marks else wrap(part.name, part, skip=0 if still else 1)
        yield f"### `{node.name}.{part.name}`"
        yield f"```text\n{head}\n```"
        yield from paragraphs(doc)


def paragraphs(doc: str) -> Iterator[str]:
    """A docstring as Markdown: indented parts as code, aligned terms as a list, the rest as it is."""
    for block in re.split(r"\n\s*\n", doc):
        lines = block.splitlines()
        if all(line.startswith("    ") for line in lines):
            yield f"```text\n{textwrap.dedent(block)}\n```"
        elif re.match(r"\S+(?:,? \S+){0,4}\s{2,}\S", lines[0]):
            yield "\n".join(terms(lines))
        else:
            yield escape("\n".join(line.strip() for line in lines))


def terms(lines: list[str]) -> Iterator[str]:
    """ "name   what it is" with further lines indented -> list items."""
    item: list[str] = []
    for line in lines:
        start = re.match(r"(\S+(?:,? \S+){0,4})\s{2,}(\S.*)", line)
        if start and item:
            yield " ".join(item)
        if start:
            item = [f"- **{escape(start[1])}**: {escape(start[2])}"]
        else:
            item.append(escape(line.strip()))
    yield " ".join(item)


def escape(text: str) -> str:
    """Keep Markdown from reading stars and angle brackets outside of code."""
    parts = re.split(r"(`[^`]*`|https?://\S+)", text)
    return "".join(part if n % 2 else re.sub(r"([*<|])", r"\\\1", part) for n, part in enumerate(parts))


def cell(code: str) -> str:
    return f"`{code}`".replace("|", "\\|") if code else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 where a page is not what the code says")
    only = parser.parse_args().check
    made = pages()
    stale = [
        name
        for name in {*made, *(path.name for path in PAGES.glob("*.md"))}
        if not (PAGES / name).is_file() or (PAGES / name).read_text(encoding="utf-8") != made.get(name)
    ]
    if only:
        if stale:
            sys.exit(f"out of date: {', '.join(sorted(stale))}; run `python docs/make_api.py`")
        return
    PAGES.mkdir(exist_ok=True)
    for name in stale:
        if name in made:
            (PAGES / name).write_text(made[name], encoding="utf-8")
        else:
            (PAGES / name).unlink()


if __name__ == "__main__":
    main()
