"""The suite of cold starts: a fresh Python until a command or an import has answered."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gist_fast.bench.cases import WrongResult
from gist_fast.bench.results import WHOLE
from gist_fast.bench.suite import Plan
from gist_fast.bench.timing import Parts

COMMANDS = {
    "gist-fast --version": (["-m", "gist_fast", "--version"], "gist-fast "),
    "gist-fast train --help": (["-m", "gist_fast", "train", "--help"], "Usage: "),
    "import gist_fast.losses": (["-c", "import gist_fast.losses as x; print(x.__name__)"], "gist_fast.losses"),
    "import sentence_transformers": (
        ["-c", "import sentence_transformers as x; print(x.__name__)"],
        "sentence_transformers",
    ),
    "python -c pass": (["-c", "print()"], ""),
}


@dataclass(frozen=True)
class StartCase:
    """A start; there is one."""

    size: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class StartSuite:
    """Processes."""

    name = "start"
    title = "Cold start: a fresh process until it has answered"
    isolated = False
    baseline: str | None = None

    def cases(self, plan: Plan) -> Sequence[StartCase]:
        return [StartCase()]

    def competitors(self, case: StartCase) -> Sequence[str]:
        return list(COMMANDS)

    def obstacle(self, case: StartCase, name: str) -> str | None:
        return None

    def least_memory(self, case: StartCase, name: str) -> float:
        return 0.0

    def device_of(self, case: StartCase) -> str:
        return "cpu"

    def check(self, case: StartCase, name: str) -> None:
        arguments, begins = COMMANDS[name]
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
        if done.returncode != 0 or not done.stdout.lstrip().startswith(begins):
            said = " ".join((done.stderr or done.stdout).split())[-200:]
            raise WrongResult(f"exit code {done.returncode}: {said}")

    def build(self, case: StartCase, name: str) -> Parts:
        arguments, _ = COMMANDS[name]
        command = [sys.executable, *arguments]
        return {WHOLE: lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)}

    def memory(self, case: StartCase, name: str) -> int | None:
        """The peak of the process's resident memory, all of it."""
        if not hasattr(os, "wait4"):
            return None
        arguments, _ = COMMANDS[name]
        process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
