"""Where texts come from: files, globs and folders, a data set of the Hub, or the sources and documentation of Python.

Every text is a document with a name; a split never cuts a document in two. Only `hub_documents` uses the network.
"""

import glob
import hashlib
import io
import sysconfig
import tokenize
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

PYTHON = "python"  # the source that every machine has


@dataclass(frozen=True)
class Document:
    """A text and where it came from."""

    name: str
    text: str


def documents(sources: Sequence[str]) -> list[Document]:
    """The texts behind names: "python", a file, a glob ("books/**/*.txt"), or a folder (all its files, recursively).

    ValueError for a name that matches nothing, a folder without files and a file that is not text in UTF-8.
    """
    if not sources:
        raise ValueError(f'no text was named; expected files, globs, folders or "{PYTHON}"')
    found: dict[str, Document] = {}
    for source in sources:
        for document in python_documents() if source == PYTHON else _files(source):
            found.setdefault(document.name, document)  # a file that two globs match is one document
    return list(found.values())


def python_files() -> dict[str, Path]:
    """The standard library of the running interpreter, without tests and installed packages: name -> file."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return {str(p.relative_to(root)): p for p in root.rglob("*.py") if not {"site-packages", "test"} & set(p.parts)}


def python_documents() -> list[Document]:
    """Sources of the standard library and the topics of its `help()`. ValueError where Python came without sources."""
    found = []
    for name, path in sorted(python_files().items()):
        if name.startswith("pydoc_data"):  # the topics again, as one dictionary
            continue
        data = path.read_bytes()
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
            found.append(Document(f"{PYTHON}/{name}", data.decode(encoding)))
        except (SyntaxError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no Python source: {error}") from error
    if not found:
        raise ValueError(
            f"this Python has no sources in {sysconfig.get_paths()['stdlib']}; name texts of your own with --text"
        )
    return found + [Document(f"{PYTHON}/help/{name}", text) for name, text in sorted(_topics().items())]


def _topics() -> dict[str, str]:
    """What `help()` explains, by name; some distributions ship it apart, and the sources alone are enough."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return dict(topics)


def _files(source: str) -> Iterable[Document]:
    path = Path(source).expanduser()
    if path.is_dir():
        paths = [p for p in sorted(path.rglob("*")) if p.is_file() and not _hidden(p.relative_to(path))]
        if not paths:
            raise ValueError(f"the folder {source} holds no files (hidden ones do not count)")
    elif path.is_file():
        paths = [path]
    else:
        paths = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
        if not paths:
            raise ValueError(f"{source} is no file or folder, and as a glob it matches no file")
    return [Document(str(p), _read(p)) for p in paths]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not text in UTF-8 ({error.reason} at byte {error.start}); convert it, or leave it out with a "
            "glob such as 'folder/**/*.txt'"
        ) from error
    if "\0" in text:
        raise ValueError(f"{path} holds NUL bytes, so it is no text; leave it out with a glob such as 'folder/*.txt'")
    return text


def hub_documents(
    dataset: str, config: str | None = None, split: str = "train", column: str = "text"
) -> list[Document]:
    """Every row of a data set of the Hub (or of a folder that `datasets.load_dataset` reads) is a document.

    Uses the network unless the set is in the cache; set HF_HUB_OFFLINE=1 to forbid it.
    """
    try:
        from datasets import load_dataset  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError:
        raise ImportError(
            'data sets of the Hub need datasets: pip install "hf_tfast[data]", or name local files with --text'
        ) from None
    rows = load_dataset(dataset, config, split=split)
    if column not in rows.column_names:
        raise ValueError(f"{dataset} has no column {column!r}; it has {', '.join(rows.column_names)}")
    texts = rows[column][:]
    wrong = next((n for n, text in enumerate(texts) if not isinstance(text, str)), None)
    if wrong is not None:
        raise ValueError(f"column {column!r} of {dataset} is not text: row {wrong} is {type(texts[wrong]).__name__}")
    return [Document(f"{dataset}/{split}/{n}", text) for n, text in enumerate(texts)]


def split_documents(found: Sequence[Document], share: float, seed: int = 0) -> tuple[list[Document], list[Document]]:
    """Training and validation documents, in a random order that depends on seed and names alone.

    share  of all characters that the validation documents reach at least; there is always one, and never all of them.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share of validation must lie between 0 and 1, got {share}")
    full = [document for document in found if document.text]
    if len(full) < 2:
        raise ValueError(
            f"a split by document needs at least two documents that are not empty, got {len(full)}: name more files, "
            "or the validation texts by themselves (--validation_text)"
        )
    order = shuffled(full, seed)
    wanted = share * sum(len(document.text) for document in full)
    aside, size = 0, 0
    while aside == 0 or (size < wanted and aside < len(order) - 1):
        size += len(order[aside].text)
        aside += 1
    return order[aside:], order[:aside]


def shuffled(found: Sequence[Document], seed: int) -> list[Document]:
    """In the order of a hash of seed and name: the same on every machine, whatever else is in the list."""
    return sorted(found, key=lambda document: hashlib.sha256(f"{seed}:{document.name}".encode()).digest())
