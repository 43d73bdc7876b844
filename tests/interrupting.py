"""Ctrl-C as a terminal sends it: to a command in a session of its own, and to all that it started."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from prestarted import Command


@dataclass(frozen=True)
class Interrupted:
    """What an interrupted command left on its streams."""

    code: int
    out: str
    err: str


def interrupt(
    arguments: Sequence[str],
    folder: Path,
    when: str,
    after: float = 0.0,
    limit: float = 240.0,
    number: signal.Signals = signal.SIGINT,
    computing: float = 0.0,
) -> Interrupted:
    """Start ``gist-fast`` in `folder`; send a signal to its group `after` seconds after `when` stands on stderr.

    Args:
        computing: seconds of the processor that its own process, not one that it started, takes before that.
    """
    process = Command(*arguments, folder=folder)
    said: list[str] = []

    def read() -> None:
        # A bar's every state ends in a carriage return, and is a line of its own.
        said.extend(io.TextIOWrapper(process.stderr))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    end = time.monotonic() + limit
    try:
        own = psutil.Process(process.pid)
        begun = 0.0
        while not begun or own.cpu_times().user < begun + computing:
            assert process.poll() is None and time.monotonic() < end, f"{when!r} was never said: {''.join(said)}"
            time.sleep(0.02)
            if not begun and any(when in line for line in said):
                begun = own.cpu_times().user
        time.sleep(after)
        os.killpg(process.pid, number)
        process.wait(max(1.0, end - time.monotonic()))
        # Whoever still holds the stream is a process that outlived the command.
        reader.join(10)
        assert not reader.is_alive(), "a process that the command started still runs"
        return Interrupted(process.returncode, process.stdout.read().decode(), "".join(said))
    finally:
        process.kill()
