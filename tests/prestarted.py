"""``gist-fast`` in a process of its own that is forked from one which has imported torch and transformers already.

Importing them takes longer than all else that a command does with tiny models. To a test the process is like any other:
it has its signals, its session, its streams, its folder, its environment and its exit code. What it is forked from, one
for each process of pytest, has computed nothing, and ends with pytest.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any


class Command:
    """``gist-fast`` with these arguments, begun; with what the tests use of `subprocess.Popen`."""

    def __init__(self, *arguments: object, folder: Path | None = None, first: str = "") -> None:
        """`first` is Python that its process runs before the command."""
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        self._keeper, keeper_end = socket.socketpair()
        socket.send_fds(_server(), [b"!"], [out_end, err_end, keeper_end.fileno()])
        for end in (out_end, err_end):
            os.close(end)
        keeper_end.close()
        given: dict[str, Any] = {"arguments": list(map(str, arguments)), "folder": str(folder or Path.cwd())}
        given |= {"first": first, "environment": {**os.environ, "OMP_NUM_THREADS": "1"}}
        self._keeper.sendall(json.dumps(given).encode() + b"\n")
        self._told = self._keeper.makefile("rb")
        self.pid = int(self._told.readline())
        self.returncode: int | None = None
        self.stdout, self.stderr = os.fdopen(out, "rb"), os.fdopen(err, "rb")
        self._waiting = threading.Thread(target=self._wait, daemon=True)
        self._waiting.start()

    def _wait(self) -> None:
        self.returncode = int(self._told.readline())

    def poll(self) -> int | None:
        """Its exit code, or minus the number of the signal that ended it; None while it runs."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._waiting.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(f"gist-fast, process {self.pid}", timeout or 0.0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[bytes, bytes]:
        """The rest of both streams, once the command has ended."""
        found: dict[Any, bytes] = {}
        readers = [
            threading.Thread(target=lambda stream=stream: found.update({stream: stream.read()}), daemon=True)
            for stream in (self.stdout, self.stderr)
        ]
        for reader in readers:
            reader.start()
        try:
            self.wait(timeout)
            for reader in readers:
                reader.join(10)
            return found[self.stdout], found[self.stderr]
        finally:
            self.kill()

    def kill(self) -> None:
        """End it, with what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait(60)


def on_ranks(world: int, module: str) -> str:
    """Python for a command's `first` that calls ``main()`` of a module on so many ranks, in the command's place.

    What ``torchrun`` does, by what is behind it, but for the ranks: they are forked too.
    """
    return f"""
import importlib, sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

sys.path.insert(0, {str(Path(__file__).parent)!r})
ranks = LaunchConfig(1, 1, {world}, run_id="test", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
                     start_method="fork")
elastic_launch(ranks, importlib.import_module({module!r}).main)()
sys.exit()
"""


@functools.cache
def _server() -> socket.socket:
    """The way to the process that the commands are forked from; it ends when this end is closed."""
    ours, theirs = socket.socketpair()
    subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    theirs.close()
    return ours


def _serve(control: socket.socket) -> dict[str, Any] | None:
    """Fork for each request. Returns in a command's process: what it is to do; and at the end: None."""
    while True:
        message, streams, _, _ = socket.recv_fds(control, 1, 3)
        if not message:
            return None
        if os.fork() == 0:
            control.close()
            return _keep(*streams)
        for stream in streams:
            os.close(stream)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _keep(out: int, err: int, request: int) -> dict[str, Any]:
    """Wait for the command, which returns from here, and tell how it ended."""
    with socket.socket(fileno=request) as told, told.makefile("rb") as lines:
        given = json.loads(lines.readline())
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.dup2(out, 1)
            os.dup2(err, 2)
        else:
            told.sendall(b"%d\n" % pid)
        os.close(out)
        os.close(err)
        if pid == 0:
            return given
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(BrokenPipeError):
            told.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
        os._exit(0)


def main() -> None:
    import datasets  # noqa: F401
    import sentence_transformers  # noqa: F401
    from transformers import BertModel, BertTokenizerFast  # noqa: F401

    import gist_fast
    import gist_fast.losses

    assert all(getattr(gist_fast, name) for name in gist_fast.__all__)  # imports their modules
    gc.freeze()  # as in pytest
    atexit.register(gc.unfreeze)
    given = _serve(socket.socket(fileno=int(sys.argv[1])))
    if given is None:
        return
    os.chdir(given["folder"])
    os.environ.clear()
    os.environ.update(given["environment"])
    tempfile.tempdir = None  # where temporary files lie may have changed
    sys.path[0] = given["folder"]
    sys.argv = ["gist-fast", *given["arguments"]]
    exec(given["first"], {})
    runpy.run_module("gist_fast", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
