"""The peak of memory that a call adds, and how much there is to be had."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def peak_memory(function: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that a call adds at its peak: of torch's tensors on a GPU, of resident memory on a CPU.

    What an earlier call left with a CPU's allocator is handed back first, as far as glibc can; what it keeps is used
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
    with _resident_peak() as added:
        function()
    return added()


def own_peak() -> int:
    """The most resident memory that this process has had (Linux; 0 elsewhere), its parent's not counted."""
    return _status("VmHWM") or 0


def available_memory(device: str = "cpu") -> int:
    """Bytes that may still be taken: of the card, or of main memory within the limit of the container.

    What torch holds of the card for later is handed back first: to whoever asks next it is as good as free.
    """
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    free = psutil.virtual_memory().available
    for limit, used in _CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # absent, or "max"
            free = min(free, int(limit.read_text()) - int(used.read_text()))
    return max(0, free)


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


@contextlib.contextmanager
def _resident_peak() -> Iterator[Callable[[], int]]:
    try:
        _CLEAR.write_text("5")  # the kernel's own high-water mark starts again
        exact = _status("VmHWM") is not None
    except OSError:
        exact = False
    if exact:
        before = _status("VmRSS") or 0
        yield lambda: max(0, (_status("VmHWM") or 0) - before)
        return
    with _sampled() as added:
        yield added


@contextlib.contextmanager
def _sampled() -> Iterator[Callable[[], int]]:
    """Every few milliseconds, where the kernel keeps no mark."""
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
        yield lambda: max(peak, process.memory_info().rss) - before
    finally:
        done.set()
        watcher.join()


def _status(name: str) -> int | None:
    """Bytes, as Linux tells about this process."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None
