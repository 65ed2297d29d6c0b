"""Bytes that the C library has handed out, and their peak.

The resident set of a process also holds what was handed out before and came back: tensors of many sizes leave holes in
the heap of glibc, which keeps them for the next ones. What a training needs is what is handed out at its fullest
moment. glibc tells that (mallinfo2), for all threads; a thread asks it again and again, so that the peak of a short
operation may be missed, and that of a step, which lasts, is not.
"""

import ctypes
import gc
import threading
import time

__all__ = ["Sampler", "allocated_bytes"]

_FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS]


def allocated_bytes() -> int:
    """By malloc, in heaps and in mappings of their own. OSError where the C library does not tell."""
    try:
        ask = ctypes.CDLL("libc.so.6").mallinfo2
    except (OSError, AttributeError) as error:
        raise OSError("only glibc 2.33 or later tells what it has allocated") from error
    ask.restype = _Info
    info = ask()
    return int(info.uordblks + info.hblkhd)


class Sampler:
    """The most that was allocated above what was when it was made, from `start` to `stop`."""

    def __init__(self, pause: float = 0.0005) -> None:
        gc.collect()
        self.before, self.most, self.pause = allocated_bytes(), 0, pause
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self.most

    def _watch(self) -> None:
        while not self._done.is_set():
            self.most = max(self.most, allocated_bytes() - self.before)
            time.sleep(self.pause)
