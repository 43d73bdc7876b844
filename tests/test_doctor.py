"""The report says what is really there, and what is missing is reported instead of raised."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import types

import pytest
import torch

import gist_fast
from gist_fast.functional.backends import explain_choice
from gist_fast.pipeline import doctor
from gist_fast.runtime import environment


def test_versions_are_those_installed():
    report = doctor.examine()
    assert report.gist_fast == gist_fast.__version__
    assert report.python == platform.python_version()
    for name in ("torch", "sentence-transformers", "transformers", "datasets", "accelerate"):
        assert report.packages[name] == importlib.metadata.version(name)
    assert json.loads(json.dumps(report.as_dict()))["packages"] == report.packages


def test_choices_are_those_of_the_function():
    report = doctor.examine()
    assert {choice.device for choice in report.choices} == ({"cuda", "cpu"} if torch.cuda.is_available() else {"cpu"})
    for choice in report.choices:
        dtype = getattr(torch, choice.dtype)
        assert (choice.backend, choice.reason) == explain_choice(choice.device, dtype)
        assert choice.reason


def test_a_package_that_is_not_there(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert set(doctor.examine().packages.values()) == {None}


def fake_torch(available: bool, cuda: str | None = "13.0", hip: str | None = None):
    properties = types.SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=140 * 2**30)
    return types.SimpleNamespace(
        version=types.SimpleNamespace(cuda=cuda, hip=hip),
        cuda=types.SimpleNamespace(
            is_available=lambda: available, device_count=lambda: 2, get_device_properties=lambda _: properties
        ),
    )


def test_gpus_as_torch_tells_them():
    assert (
        environment.gpus(fake_torch(True))
        == [{"name": "NVIDIA H200", "architecture": "sm_90", "memory_gib": 140.0}] * 2
    )
    assert environment.gpus(fake_torch(False)) == []


@pytest.mark.parametrize(
    ("torch_", "says"),
    [
        (fake_torch(True), "CUDA 13.0"),
        (fake_torch(True, cuda=None, hip="7.0"), "ROCm 7.0"),
        (fake_torch(False), "none: torch is built for CUDA 13.0, but no GPU or driver was found"),
        (fake_torch(False, cuda=None), "none: this torch is built for the CPU alone"),
    ],
)
def test_why_there_is_no_gpu(torch_, says):
    assert environment.gpu_runtime(torch_) == says


def test_bf16_of_the_cpu_in_newer_and_older_torch():
    newer = types.SimpleNamespace(cpu=types.SimpleNamespace(get_capabilities=lambda: {"avx512_bf16": True}))
    older = types.SimpleNamespace(cpu=types.SimpleNamespace(_is_amx_tile_supported=lambda: True))
    assert environment.cpu_capabilities(newer) == {"avx512_bf16": True}
    assert environment.cpu_capabilities(older) == {"avx512_bf16": False, "amx_bf16": True}
