"""What the compiler made of every shipped configuration. No GPU is needed for any of it."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from gist_fast.functional.backends.triton import MINIMUM_TRITON, interpreted

if interpreted():
    pytest.skip("kernels are interpreted in this process, and nothing compiles", allow_module_level=True)

import torch
import triton
from gist_fast.kernels import config as table
from gist_fast.kernels import dlogits, forward, groups, launch, masks, unpack
from gist_fast.kernels.compile_report import Compiled, compile_variant
from gist_fast.kernels.compile_variants import Variant, variants_of
from gist_fast.kernels.config import HALF, SINGLE, TABLE, Config, Dlogits
from gist_fast.kernels.targets import TARGETS
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks import kernel_table
from gist_fast.functional.backends import kernel_variants
from gist_fast.functional.backends.kernel_variants import recorded, report
from gist_fast.functional.loss_config import LossConfig

SM_90 = TABLE["sm_90", HALF]


@functools.cache
def variants(config: Config = SM_90, *, every: bool = False) -> dict[str, Variant]:
    """The kernels that a configuration starts for bf16, by name."""
    return {v.name: v for v in recorded(config, torch.bfloat16, torch.bfloat16, every=every)}


def compiled(variant: Variant) -> Compiled:
    """What becomes of a kernel for sm_90."""
    return compile_variant(TARGETS["sm_90"], variant, dim=384, guide_dim=1024)


def hold(compiled: Compiled) -> None:
    """A shipped configuration fits, spills nothing, and multiplies on the matrix units."""
    card = TARGETS[compiled.target]
    what = f"{compiled.kernel} ({compiled.element}) for {compiled.target}"
    assert compiled.spills == 0, f"{what} spills {compiled.spills} bytes a thread"
    assert compiled.shared <= card.shared_program, f"{what} needs {compiled.shared} bytes of shared memory"
    # Operands of a product pass through shared memory; what multiplies nothing may have none.
    assert compiled.shared > 0 or compiled.flops == 0, f"{what} has no shared memory"
    assert compiled.programs >= 1, f"{what} fits no multiprocessor with {compiled.registers} registers"
    assert 0 < compiled.roofline <= 1
    if compiled.element == "fp32 ieee" and compiled.target != "gfx942":
        # No NVIDIA card multiplies float32 in full on its matrix units.
        assert not compiled.matrix_instructions
        return
    if compiled.kernel.startswith("masks") and compiled.element.endswith("guide fp32 ieee"):
        # All that is multiplied is the guide.
        return
    if compiled.flops:
        assert compiled.matrix_instructions, f"{what} uses no matrix instructions"


def test_the_forward_pass_multiplies_student_and_guide_on_the_matrix_units() -> None:
    def multiplies(what: str) -> int:
        one = compiled(variants(every=True)[f"forward_symmetric {what}".strip()])
        hold(one)
        return one.matrix_instructions["HGMMA"] * one.warps

    # Both products, one, one: a student that guides itself is multiplied once, and so is a dim that reads its mask.
    both = multiplies("")
    assert both == 2 * multiplies("self-guided") == 2 * multiplies("unguided, no mask, not counted") > 0
    assert both == 2 * multiplies("unguided, initial mask, not counted")
    assert both == multiplies("initial mask")
    # Student thresholds go on from an initial mask, so that the guide has been multiplied before.
    assert both == 2 * multiplies("unguided, initial mask, student thresholds")


def test_figures_of_a_tile_follow_from_its_dims() -> None:
    one = compiled(variants()["forward"])
    assert one.flops == 2 * 128 * 128 * (384 + 1024)
    assert one.programs == 65536 // ((one.registers + 7) // 8 * 8 * 128) == 2
    across = 2 * 132 // 8
    operands = 128 * 1408 * 2 * (8 + across) // (8 * across)
    assert one.bytes == operands + 128 * 128 // 8 + 8 * 128


def test_a_configuration_that_spills_is_seen() -> None:
    config = replace(SM_90, dlogits_symmetric=Dlogits(64, 4, 3))
    one = compiled(variants(config)["dlogits_symmetric"])
    assert one.spills > 0
    with pytest.raises(AssertionError, match="spills"):
        hold(one)


def test_an_unknown_target_is_named() -> None:
    with pytest.raises(ValueError, match=r"target: expected one of sm_80, .*, got 'sm_70'"):
        next(report("sm_70"))


def test_what_is_compiled_is_what_triton_s_own_launcher_would_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Types, constants and alignment, for tensors that are in memory."""
    backend, seen = make_backend(TARGETS["sm_90"].gpu), set()

    def spy(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        with launch.record_launches() as launches:
            launch.start(kernel, grid, **arguments)
        (variant,) = variants_of(launches)
        options = {name for name, _ in variant.options}
        _, found, rest = bind(**arguments)
        assert set(rest) == options
        for parameter, (kind, value) in zip(kernel.params, found, strict=True):
            name = parameter.name
            if kind == "constexpr":
                assert dict(variant.constants)[name] == value, f"{kernel.__name__}: {name}"
            else:
                assert dict(variant.types)[name] == kind, f"{kernel.__name__}: {name}"
                assert (name in variant.aligned) == (value == "D"), f"{kernel.__name__}: {name}"
        seen.add(kernel.__name__)

    for module in (dlogits, forward, groups, masks, unpack):
        monkeypatch.setattr(module, "start", spy)
    monkeypatch.setattr(kernel_variants, "_empty", lambda *shape, dtype: torch.ones(shape, dtype=dtype))
    loss = LossConfig(hardness_mode="in_batch_negatives", hardness_strength=1.0, contrast_positives=False)
    for grouped in (False, True):
        plain = LossConfig(contrast_positives=False)
        kernel_variants._run(SM_90, torch.bfloat16, torch.bfloat16, plain, grouped=grouped)
        kernel_variants._run(SM_90, torch.bfloat16, torch.float32, loss, grouped=grouped, nested=True)
    assert seen == {f"{name}_kernel" for name in ("forward", "reduce", "groups", "masks", "dlogits", "unpack")}


@pytest.mark.slow
@pytest.mark.longest
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("size", [SINGLE, HALF])
def test_every_shipped_configuration_holds(size: int, target: str) -> None:
    found = list(report(target, every=True, size=size))
    for compiled in found:
        hold(compiled)
    assert {c.kernel.split(" ")[0] for c in found} == {
        "forward", "forward_symmetric", "masks", "masks_symmetric", "dlogits", "dlogits_symmetric",
        "unpack", "unpack_symmetric",
        "groups", "groups_symmetric", "reduce",
    }  # fmt: skip
    # Student and guide of one type come first; beside a guide of another a student's kernels have the same names.
    first = {(c.kernel, c.element): c for c in reversed(found)}
    for (kernel, element), compiled in first.items():
        if kernel in ("forward", "forward_symmetric") and ", guide" not in element:
            # The guide's product is one more on the matrix units, and neither is left to others.
            one = first[f"{kernel} unguided, no mask, not counted", element].matrix_instructions
            assert compiled.matrix_instructions == {name: 2 * count for name, count in one.items()}
    # What docs/kernels.md shows is what this compiler makes of the kernels as they stand.
    on_file = json.loads(kernel_table.FILE.read_text(encoding="utf-8"))
    if on_file["triton"] == triton.__version__ and size == HALF:
        shown = {k["kernel"]: k for k in on_file["kernels"] if k["target"] == target}
        now = {
            kernel: c.as_dict()
            for (kernel, element), c in first.items()
            if element in ("bf16", "any") and kernel in shown
        }
        assert now == shown, "python -m benchmarks.kernel_table writes the tables anew"


@pytest.mark.slow
def test_the_oldest_triton_that_is_supported_spills_nothing_either(tmp_path: Path) -> None:
    version = ".".join(map(str, MINIMUM_TRITON))
    packages = tmp_path / "packages"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages)]
    done = subprocess.run([*install, f"triton=={version}.*"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"Triton {version} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    environment = {**os.environ, "PYTHONPATH": str(packages), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    found = subprocess.run(
        [sys.executable, "-c", OLDEST, "sm_90"], env=environment, capture_output=True, text=True, check=True
    )
    used, compiled = json.loads(found.stdout)
    assert used.startswith(f"{version}.")
    assert len(compiled) > 60
    for one in compiled:
        hold(Compiled(**one))


OLDEST = """\
import json, sys, triton
from gist_fast.kernels.config import HALF
from gist_fast.functional.backends.kernel_variants import report
print(json.dumps([triton.__version__, [c.as_dict() for c in report(sys.argv[1], every=True, size=HALF)]]))
"""


@pytest.mark.slow
def test_the_command_prints_json() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "gist_fast.cli.main", "kernels", "--target", "sm_90", "--json"],
        capture_output=True, text=True, check=True, env=os.environ,
    )  # fmt: skip
    printed = json.loads(run.stdout)
    assert printed["target"] == "sm_90"
    assert printed["notes"] == table.notes("sm_90")
    assert {"registers", "spills", "shared", "programs", "matrix_instructions", "flops", "bytes", "roofline"} <= set(
        printed["kernels"][0]
    )


def test_the_command_refuses_an_unknown_target() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "gist_fast.cli.main", "kernels", "--target", "h100"], capture_output=True, text=True
    )
    assert run.returncode == 2
    assert "--target: expected one of sm_80" in run.stderr and "got 'h100'" in run.stderr
