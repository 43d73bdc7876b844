"""What this machine offers: packages, GPUs, number types, the backend ``auto`` takes, whether texts are padded."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict, dataclass, field
from typing import Any

from gist_fast.version import __version__

PACKAGES = (
    "torch",
    "triton",
    "sentence-transformers",
    "transformers",
    "datasets",
    "accelerate",
    "pyarrow",
    "flash-attn",
    "tensorboard",
)


@dataclass(frozen=True)
class Choice:
    """Which backend ``auto`` takes for embeddings of a type on a device, and why."""

    device: str
    dtype: str
    backend: str
    reason: str


@dataclass(frozen=True)
class AttentionChoice:
    """Whether models that compute in a type on a device need no padding, and why."""

    device: str
    dtype: str
    padding_free: bool
    reason: str


@dataclass(frozen=True)
class Report:
    """What was found."""

    gist_fast: str
    python: str
    platform: str
    packages: dict[str, str | None]
    """Versions; None where not installed."""
    gpus: list[dict[str, Any]]
    """Name, compute capability or architecture, and memory of each."""
    gpu_runtime: str
    """``CUDA 13.0``, ``ROCm 7.0``, or why there is none."""
    cpu: dict[str, Any]
    choices: list[Choice] = field(default_factory=list)
    attention: list[AttentionChoice] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> Report:
    """Look around; nothing is changed, and a part that is missing is reported, not raised."""
    import torch

    from gist_fast.functional.backends import explain_choice
    from gist_fast.pipeline.attention import choose_attention

    gpus = _gpus(torch)
    choices, attention = [], []
    for device in ("cuda", "cpu") if gpus else ("cpu",):
        for dtype in (torch.float32, torch.bfloat16):
            backend, reason = explain_choice(device, dtype)
            name = str(dtype).removeprefix("torch.")
            choices.append(Choice(device, name, backend, reason))
            attended = choose_attention(device, half=dtype is not torch.float32)
            attention.append(AttentionChoice(device, name, attended.padding_free, attended.reason))
    return Report(
        gist_fast=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        packages={name: _version(name) for name in PACKAGES},
        gpus=gpus,
        gpu_runtime=_runtime(torch),
        cpu=_cpu(torch),
        choices=choices,
        attention=attention,
    )


def _version(package: str) -> str | None:
    for name in (package, f"pytorch-{package}", f"{package}-rocm"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _runtime(torch: Any) -> str:
    built = (
        f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}" if torch.version.cuda else ""
    )
    if not built:
        return "none: this torch is built for the CPU alone"
    return built if torch.cuda.is_available() else f"none: torch is built for {built}, but no GPU or driver was found"


def _gpus(torch: Any) -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "architecture": getattr(properties, "gcnArchName", None) or f"sm_{properties.major}{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return found


def _cpu(torch: Any) -> dict[str, Any]:
    capabilities = _capabilities(torch)
    instructions = [name for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16") if capabilities.get(name)]
    return {
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_instructions": instructions,
        "bf16": (
            f"fast ({', '.join(instructions)})" if instructions else "works, but this CPU has no instructions for it"
        ),
    }


def _capabilities(torch: Any) -> dict[str, Any]:
    try:
        return dict(torch.cpu.get_capabilities())
    except (AttributeError, RuntimeError):
        # Older torch: private questions, each absent in some version.
        asked = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_bf16": "_is_amx_tile_supported"}
        return {name: getattr(torch.cpu, method, bool)() for name, method in asked.items()}
