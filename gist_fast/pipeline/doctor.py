"""What this machine offers: packages, GPUs, number types, the backend ``auto`` takes, whether texts are padded."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from typing import Any

from gist_fast.runtime import environment
from gist_fast.version import __version__

PACKAGES = (
    *("torch", "triton", "sentence-transformers", "transformers", "datasets", "accelerate"),
    *("pyarrow", "flash-attn", "tensorboard"),
)


@dataclass(frozen=True)
class Choice:
    """Which backend ``auto`` takes for embeddings of a type on a device, and why."""

    device: str
    dtype: str
    backend: str
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
    choices: list[Choice]
    attention: list[dict[str, Any]]
    """Whether models that compute in a type on a device need no padding, and why."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> Report:
    """Look around; nothing is changed, and a part that is missing is reported, not raised."""
    import torch

    from gist_fast.functional.backends import explain_choice
    from gist_fast.pipeline.attention import choose_attention

    gpus = environment.gpus(torch)
    choices, attention = [], []
    for device in ("cuda", "cpu") if gpus else ("cpu",):
        for dtype in (torch.float32, torch.bfloat16):
            place = {"device": device, "dtype": str(dtype).removeprefix("torch.")}
            backend, reason = explain_choice(device, dtype)
            choices.append(Choice(**place, backend=backend, reason=reason))
            attended = choose_attention(device, half=dtype is not torch.float32)
            attention.append({**place, "padding_free": attended.padding_free, "reason": attended.reason})
    return Report(
        gist_fast=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        packages=environment.versions(PACKAGES),
        gpus=gpus,
        gpu_runtime=environment.gpu_runtime(torch),
        cpu=environment.cpu(torch),
        choices=choices,
        attention=attention,
    )
