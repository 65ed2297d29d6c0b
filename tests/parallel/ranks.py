"""Functions on several processes of one gloo group: `run(function, 2, *given)` returns what each rank returned.

    from tests.parallel.ranks import run

    def total(mine):                      # at the top of a module: ranks import it
        x = torch.tensor([mine + dist.get_rank()])
        dist.all_reduce(x)
        return x.item()

    def test_total():
        assert run(total, 2, 5) == [11, 11]

Ranks are forked from a server that has imported torch, Transformers and hf_tfast once for the whole session, so that
a rank begins in a tenth of a second. They find the variables that torchrun sets (RANK, WORLD_SIZE, MASTER_PORT, ...)
and, unless `group=False`, an initialised gloo group. A rank that raises ends all: `RankError` has its traceback and
what it wrote. So does a deadlock after `timeout` seconds, with the stack of every thread of every rank.
"""

import faulthandler
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch.distributed", "accelerate", "transformers.trainer", "hf_tfast.training.run"])


class RankError(RuntimeError):
    """A rank raised, died or hung. `ranks`: which; `signals`: {rank: signal} of those that a signal ended."""

    def __init__(self, message: str, ranks: list[int], signals: dict[int, int]) -> None:
        super().__init__(message)
        self.ranks, self.signals = ranks, signals


def run(
    function: Callable[..., Any],
    ranks: int,
    *given: Any,
    timeout: float = 100.0,
    env: Mapping[str, str] | None = None,
    group: bool = True,
    **named: Any,
) -> list[Any]:
    """[function(*given, **named) on rank 0, on rank 1, ...]; given and returned things are pickled.

    env    further variables of the ranks. group=False: no process group, for what makes its own (accelerate, Trainer).
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        processes, readers = [], {}
        try:
            for rank in range(ranks):
                reader, writer = _CONTEXT.Pipe(duplex=False)
                variables = {**_variables(rank, ranks, store.port), **(env or {})}
                task = pickle.dumps((function, given, named))
                # daemon: a rank never outlives the tests
                process = _CONTEXT.Process(
                    target=_rank, args=(task, variables, f"{folder}/{rank}", group, timeout, writer), daemon=True
                )
                process.start()
                writer.close()
                processes.append(process)
                readers[reader] = rank
            return _collect(processes, readers, folder, timeout)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """As torchrun sets them; the store is the caller's, so no port is guessed."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RUN_ID": "tests",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _rank(task: bytes, variables: dict[str, str], out: str, group: bool, timeout: float, writer: Any) -> None:
    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
    os.environ.update(variables)
    torch.set_num_threads(1)
    try:
        function, given, named = pickle.loads(task)
        if group:
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        answer = (True, function(*given, **named))
        if dist.is_initialized():
            dist.barrier()  # a rank that is done does not close connections that others still use
            dist.destroy_process_group()
    except BaseException:  # SystemExit too: whoever waits for this rank must hear of it
        answer = (False, traceback.format_exc())
    writer.send_bytes(pickle.dumps(answer))
    writer.close()


def _collect(processes: list[Any], readers: dict[Any, int], folder: str, timeout: float) -> list[Any]:
    answers: dict[int, Any] = {}
    failed: dict[int, str] = {}
    end, waiting = time.monotonic() + timeout, dict(readers)
    while waiting:
        ready = connection.wait(list(waiting), max(end - time.monotonic(), 0))
        if not ready:
            raise _hung(processes, list(waiting.values()), folder, timeout)
        for reader in ready:
            rank = waiting.pop(reader)
            try:
                well, answer = pickle.loads(reader.recv_bytes())
            except EOFError:
                processes[rank].join()
                well, answer = False, f"it ended with exit code {processes[rank].exitcode} and no answer\n"
            (answers if well else failed)[rank] = answer
        if failed:
            # the others fail a moment later, because this one left: wait for them no longer than it takes to tell
            end = min(end, time.monotonic() + 5)
            if not connection.wait(list(waiting), 5) if waiting else True:
                break
    if failed:
        signals = {n: -p.exitcode for n, p in enumerate(processes) if p.exitcode is not None and p.exitcode < 0}
        raise RankError(_words(failed, folder), sorted(failed), signals)
    return [answers[rank] for rank in range(len(processes))]


def _hung(processes: list[Any], ranks: list[int], folder: str, timeout: float) -> RankError:
    for rank in ranks:
        os.kill(processes[rank].pid, signal.SIGUSR1)
    time.sleep(1)
    words = dict.fromkeys(ranks, f"it had not ended after {timeout:g} seconds\n")
    return RankError(_words(words, folder), ranks, {})


def _words(failed: dict[int, str], folder: str) -> str:
    parts = []
    for rank, what in failed.items():
        written = Path(folder, str(rank)).read_text(errors="replace")[-3000:]
        parts.append(f"rank {rank}: {what}" + (f"it wrote:\n{written}" if written else ""))
    return "\n".join(parts)
