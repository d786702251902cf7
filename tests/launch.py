"""Run a script of the tests in processes of its own, alone or as the ranks of several.

torch, transformers, accelerate and PEFT take longer to import than most of these scripts take to run. So they are
imported once, by a server, which is forked for every process. The environment is that of torchrun.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from functools import cache
from pathlib import Path


def launch(script: Path, *arguments: str, processes: int = 1, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a script in one process, or in several as the ranks of a group, and return the output of all.

    If a rank fails, the others are ended.

    Raises:
        subprocess.TimeoutExpired: the script took more than ``timeout`` seconds.
    """
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps([str(script), arguments, processes, timeout, dict(os.environ), os.getcwd()]) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, "the server that starts processes has ended"
    code, out, err = json.loads(answer)
    if code is None:
        raise subprocess.TimeoutExpired([str(script), *arguments], timeout, out, err)
    return subprocess.CompletedProcess([str(script), *arguments], code, out, err)


@cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, *(["-P"] if sys.flags.safe_path else []), __file__], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    atexit.register(server.kill)
    return server


def _serve() -> None:
    import accelerate  # noqa: F401
    import peft  # noqa: F401

    import dmfast.training.trainer  # noqa: F401

    gc.collect()
    gc.freeze()
    # the ranks write to files, so standard output is free for answers
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        script, arguments, processes, timeout, environment, folder = json.loads(line)
        with tempfile.TemporaryDirectory() as outputs:
            out, err = Path(outputs) / "out", Path(outputs) / "err"
            ranks = _forked(script, arguments, processes, environment, folder, out, err)
            code = _ended(ranks, time.monotonic() + timeout)
            answers.write(json.dumps([code, out.read_text(), err.read_text()]) + "\n")
            answers.flush()


def _forked(
    script: str, arguments: list[str], processes: int, environment: dict[str, str], folder: str, out: Path, err: Path
) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    of_group = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = []
    for rank in range(processes):
        pid = os.fork()
        if pid:
            ranks.append(pid)
            continue
        code = 1
        try:
            for number, path in ((1, out), (2, err)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.setsid()
            # a shell's background jobs ignore SIGINT, and a rank must not
            signal.signal(signal.SIGINT, signal.default_int_handler)
            of_rank = {} if processes == 1 else {**of_group, "RANK": rank, "LOCAL_RANK": rank}
            os.environ.clear()
            os.environ.update(environment | {"OMP_NUM_THREADS": "1"} | {k: str(v) for k, v in of_rank.items()})
            os.chdir(folder)
            sys.argv = [script, *arguments]
            sys.path[0] = str(Path(script).parent)
            runpy.run_path(script, run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return ranks


def _ended(ranks: list[int], deadline: float) -> int | None:
    """Return the first exit status that is not 0, or else 0. Return None if the time was up."""
    waits, code, late = set(ranks), 0, False
    while waits:
        for pid in list(waits):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                waits.discard(pid)
                code = code or os.waitstatus_to_exitcode(status)
        late = late or time.monotonic() > deadline
        if code or late:
            for pid in waits:
                os.killpg(pid, signal.SIGKILL)
        time.sleep(0.02)
    return None if late else code


if __name__ == "__main__":
    _serve()
