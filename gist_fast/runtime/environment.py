"""On what something runs: the machine, its cards, the versions of packages, the commit of a checkout.

A part that is missing is None or said in words, never raised.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gist_fast.version import __version__

MEASURED = ("torch", "triton", "sentence-transformers", "transformers", "memeff", "inf-cl")
"""Packages on whose versions a measured figure depends."""


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """The installed version of each package, None where it is not installed."""
    return {name: _version(name) for name in packages}


def _version(package: str) -> str | None:
    for name in (package, f"pytorch-{package}", f"{package}-rocm"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a measured figure depends on."""
    import torch

    about = {
        "device": device_name(device),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "gist_fast": __version__,
        "commit": commit(),
    }
    if device.startswith("cuda"):
        about["gpu"] = torch.cuda.get_device_name(device)
        about["gpu_memory"] = torch.cuda.get_device_properties(device).total_memory
    return {**about, **versions(MEASURED)}


def best_device() -> str:
    """``cuda`` where there is a card, else ``cpu``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: str = "cpu") -> str:
    """A folder's name: ``cpu-2-threads``, or the card's."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device).lower().replace(" ", "-").replace("/", "-")
    return f"cpu-{torch.get_num_threads()}-threads"


def commit(package: Path = Path(__file__).parent.parent) -> str | None:
    """The commit of the checkout that this package is part of, marked where what is measured or measures was changed;
    None elsewhere."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(package.parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # Installed under some other project's folder, it is that project whose commit git would tell.
    if git("ls-files", "--error-unmatch", f"{package.name}/__init__.py") is None:
        return None
    found = git("rev-parse", "--short", "HEAD")
    # Results of earlier runs change with every run, and no figure depends on them.
    measured = (package.name, "kernels", "benchmarks", ":(exclude)benchmarks/results")
    return f"{found} with changes" if found and git("status", "--porcelain", "--", *measured) else found


def _cpu_name() -> str:
    return _cpu_info("model name") or platform.machine()


def cpu_family() -> tuple[str, int]:
    """Who made the processor, and its family: ``("AuthenticAMD", 26)``; ``("", 0)`` where nothing says so."""
    vendor, family = _cpu_info("vendor_id"), _cpu_info("cpu family")
    if vendor and family and family.isdecimal():
        return vendor, int(family)
    found = re.search(r"Family (\d+).*, (\w+)$", platform.processor())  # as Windows has it
    return (found[2], int(found[1])) if found else ("", 0)


def _cpu_info(key: str) -> str | None:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


def gpu_runtime(torch: Any) -> str:
    """``CUDA 13.0``, ``ROCm 7.0``, or why there is none."""
    built = (
        f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}" if torch.version.cuda else ""
    )
    if not built:
        return "none: this torch is built for the CPU alone"
    return built if torch.cuda.is_available() else f"none: torch is built for {built}, but no GPU or driver was found"


def gpus(torch: Any) -> list[dict[str, Any]]:
    """Name, architecture (compute capability) and memory of each card."""
    if not torch.cuda.is_available():
        return []
    return [
        {
            "name": properties.name,
            "architecture": getattr(properties, "gcnArchName", None) or f"sm_{properties.major}{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
        for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]


def cpu(torch: Any) -> dict[str, Any]:
    """Threads, vector instructions, and what this CPU has for bfloat16."""
    known = cpu_capabilities(torch)
    instructions = [name for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16") if known.get(name)]
    return {
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_instructions": instructions,
        "bf16": (
            f"fast ({', '.join(instructions)})" if instructions else "works, but this CPU has no instructions for it"
        ),
    }


def cpu_capabilities(torch: Any) -> dict[str, Any]:
    """What torch knows of this CPU's instructions, by name."""
    try:
        return dict(torch.cpu.get_capabilities())
    except (AttributeError, RuntimeError):
        # Older torch: private questions, each absent in some version.
        asked = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_bf16": "_is_amx_tile_supported"}
        return {name: getattr(torch.cpu, method, bool)() for name, method in asked.items()}
