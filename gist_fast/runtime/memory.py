"""Memory: how much of it is free, how much this process holds, and what a call adds at its peak.

Resident memory is the system's count of a CPU process, torch's tensors that of a card. Linux keeps a high-water mark
of the former that can be set back (``VmHWM``); elsewhere samples stand in for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MIB, GIB = 2**20, 2**30
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_LIMITS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Of a control group, of version 2 and 1: the files of its limit and of what is used of it, and the line of
``memory.stat`` with what is cached of files, which is used too and given up when memory is asked for."""


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that can still be had: of a card, what torch holds of it for later included; or of main memory, by the
    machine and by the limits of the job or container."""
    if str(device).startswith("cuda"):
        import torch

        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    import psutil

    free = psutil.virtual_memory().available
    for folder in _control_groups():
        for limit_name, used_name, cached_name in _LIMITS:
            with contextlib.suppress(OSError, ValueError):  # no such limit, or "max"
                limit, used = (int((folder / name).read_text()) for name in (limit_name, used_name))
                free = min(free, limit - used + (_number(folder / "memory.stat", cached_name) or 0))
    return max(0, free)


def processes_here() -> int:
    """Processes of this job on this machine, which share its main memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def process_memory_mib() -> float:
    """Memory that this process holds now (resident set)."""
    import psutil

    return psutil.Process().memory_info().rss / MIB


def gpu_memory_mib(device: torch.device) -> dict[str, float]:
    """The most that torch's tensors took on a CUDA device since the process began, and that torch reserved."""
    import torch

    return {
        "gpu_allocated_peak_mib": torch.cuda.max_memory_allocated(device) / MIB,
        "gpu_reserved_peak_mib": torch.cuda.max_memory_reserved(device) / MIB,
    }


def peak_memory(function: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that a call adds at its peak: of torch's tensors on a GPU, of resident memory on a CPU.

    What an earlier call left with a CPU's allocator is handed back first, as far as glibc can. What it keeps is used
    again without being counted, so the figure is surest for the first large call of a process.
    """
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    give_back_free_memory()
    try:
        _CLEAR.write_text("5")  # the kernel's own high-water mark starts again
        exact = _status("VmHWM") is not None
    except OSError:
        exact = False
    if not exact:
        return _sampled_peak(function)
    before = _status("VmRSS") or 0
    function()
    return max(0, (_status("VmHWM") or 0) - before)


def own_peak() -> int:
    """The most resident memory that this process has had (Linux; 0 elsewhere), its parent's not counted."""
    return _status("VmHWM") or 0


def limit_memory(more: int) -> None:
    """Let this process take `more` bytes at most, beyond what it has; asking for more then fails in an orderly way.

    Does nothing where the system knows no such limit (it counts private memory on Linux alone).
    """
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        data = _status("VmData")
        if data is not None:
            _, hard = resource.getrlimit(resource.RLIMIT_DATA)
            soft = data + more
            resource.setrlimit(resource.RLIMIT_DATA, (soft if hard < 0 else min(soft, hard), hard))


def give_back_free_memory() -> None:
    """Hand what is free to the system, so that it is counted when it is taken again."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc's


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in said or "not enough memory" in said)


def _control_groups(processes: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[Path]:
    """The folders of the control groups, of either version, that bound this process's memory: its own and those
    above."""
    try:
        lines = processes.read_text().splitlines()
    except OSError:  # no Linux
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            top = root / controllers
            own = top / path.lstrip("/")
            folders += [folder for folder in (own, *own.parents) if folder.is_relative_to(top)]
    return folders


def _sampled_peak(function: Callable[[], object]) -> int:
    """By a look every few milliseconds, where the kernel keeps no mark."""
    import psutil

    process = psutil.Process()
    before = peak = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        function()
        return max(peak, process.memory_info().rss) - before
    finally:
        done.set()
        watcher.join()


def _status(name: str) -> int | None:
    """Bytes, as Linux tells about this process."""
    kilobytes = _number(_STATUS, f"{name}:")
    return None if kilobytes is None else kilobytes * 1024


def _number(file: Path, name: str) -> int | None:
    """What stands behind a name, each on a line of its own, in a file of the system; None where it does not."""
    with contextlib.suppress(OSError):
        for line in file.read_text().splitlines():
            words = line.split()
            if words[:1] == [name]:
                return int(words[1])
    return None
