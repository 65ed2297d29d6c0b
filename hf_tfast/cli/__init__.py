"""The command line: one verb a file, found in this folder. What a verb needs is imported inside its function, so that
`tfast --help` is quick.

Exit codes   0 done; 2 the input cannot be used, said in one line (HF_TFAST_DEBUG=1 shows where); 130 interrupted.
Output       results on standard output, progress on standard error; --json prints JSON and nothing else.
"""

import os
import sys
from importlib import import_module
from pkgutil import iter_modules

from ._app import app

for _file in sorted(iter_modules(__path__), key=lambda file: file.name):
    import_module(f"{__name__}.{_file.name}")


def main() -> None:
    """Entry point of `tfast`: errors of the input become one line and exit code 2."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("HF_TFAST_DEBUG"):
            raise
        print(f"tfast: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("tfast: interrupted; nothing was left half-written", file=sys.stderr)
        raise SystemExit(130) from None
