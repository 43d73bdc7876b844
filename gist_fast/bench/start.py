"""The suite of cold starts: a fresh Python until a command or an import has answered."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from gist_fast.bench.cases import WrongResult
from gist_fast.bench.results import WHOLE
from gist_fast.bench.suite import Scope, Suite
from gist_fast.bench.timing import Parts

COMMANDS = {
    "gist-fast --version": (["-m", "gist_fast", "--version"], "gist-fast "),
    "gist-fast train --help": (["-m", "gist_fast", "train", "--help"], "Usage: "),
    "import gist_fast.losses": (["-c", "import gist_fast.losses as x; print(x.__name__)"], "gist_fast.losses"),
    "import sentence_transformers": (
        ["-c", "import sentence_transformers as x; print(x.__name__)"],
        "sentence_transformers",
    ),
    'python -c "print()"': (["-c", "print()"], ""),
}


_PEAK = """
import os, sys
quiet = os.open(os.devnull, os.O_WRONLY)
given = [(os.POSIX_SPAWN_DUP2, quiet, 1), (os.POSIX_SPAWN_DUP2, quiet, 2)]
_, status, usage = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=given), 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""


@dataclass(frozen=True)
class StartCase:
    """A start; there is one."""

    size: int = 0
    device: ClassVar[str] = "cpu"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class StartSuite(Suite):
    """Processes."""

    name = "start"
    title = "Cold start: a fresh process until it has answered"
    isolated = False
    grows = 0.0
    baseline = None
    looks_at = ()

    def cases(self, scope: Scope) -> Sequence[StartCase]:
        return [StartCase()]

    def competitors(self, case: StartCase) -> Sequence[str]:
        return list(COMMANDS)

    def check(self, case: StartCase, name: str) -> None:
        arguments, begins = COMMANDS[name]
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
        if done.returncode != 0 or not done.stdout.lstrip().startswith(begins):
            said = " ".join((done.stderr or done.stdout).split())[-200:]
            raise WrongResult(f"exit code {done.returncode}: {said}")

    def build(self, case: StartCase, name: str) -> Parts:
        arguments, _ = COMMANDS[name]
        command = [sys.executable, *arguments]
        quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return {WHOLE: lambda: subprocess.run(command, check=True, **quiet)}

    def memory(self, case: StartCase, name: str) -> int | None:
        """The peak of the process's resident memory, all of it."""
        if not hasattr(os, "wait4"):
            return None
        arguments, _ = COMMANDS[name]
        # By a small process: what its parent held when a process was forked counts as that process's own peak.
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PEAK, sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=False,
        )
        return int(done.stdout) * (1 if sys.platform == "darwin" else 1024) if done.returncode == 0 else None
