"""A result folder that appears whole or not at all, and never in place of something else."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path


def fresh_name(kind: str, under: str | Path = "runs") -> Path:
    """A folder that does not exist yet, named after the time: runs/bench-20260131-093000."""
    stem = Path(under) / f"{kind}-{datetime.now():%Y%m%d-%H%M%S}"
    number, name = 1, stem
    while name.exists():
        number, name = number + 1, stem.with_name(f"{stem.name}-{number}")
    return name


def check_new(target: Path, overwrite: bool, mark: str) -> None:
    """FileExistsError unless `target` is free, or `overwrite` is said and it is a folder that holds `mark`.

    The mark, a file that every result folder of this kind has, keeps a mistyped path from deleting something else.
    """
    if not target.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists; name another folder with --out, or replace it with --overwrite")
    if not (target / mark).is_file():
        raise FileExistsError(f"{target} holds no {mark}, so it is no earlier result; it is not overwritten")


@contextmanager
def new_folder(target: str | Path, *, overwrite: bool = False, mark: str) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; it takes that name when the block ends well and goes away when not."""
    target = Path(target)
    check_new(target, overwrite, mark)
    target.parent.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        working.chmod(0o755)  # mkdtemp makes it private
        yield working
        if not (working / mark).is_file():
            raise FileNotFoundError(f"the result folder {target} was left without its {mark}")
        check_new(target, overwrite, mark)
        if target.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
            target.rename(replaced / target.name)
            working.rename(target)
            shutil.rmtree(replaced)
        else:
            working.rename(target)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(working, ignore_errors=True)
        raise
