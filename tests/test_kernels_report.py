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
from gist_fast.kernels import (
    compile_report,
    dlogits,
    forward,
    gradients,
    groups,
    launch,
    layout,
    masks,
    reduce,
    rows,
    unpack,
)
from gist_fast.kernels import config as table
from gist_fast.kernels.compile_report import Compiled, compile_variant
from gist_fast.kernels.compile_variants import Variant, variants_of
from gist_fast.kernels.config import HALF, SINGLE, TABLE, Config, Launch
from gist_fast.kernels.targets import TARGETS
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks import kernel_table
from gist_fast.functional.backends import kernel_passes, kernel_variants, kernel_work
from gist_fast.functional.backends.kernel_variants import recorded, report
from gist_fast.functional.loss_config import LossConfig

SM_90 = TABLE["sm_90", HALF]
PLAIN = {"masks": "masks guide, counted", "masks_symmetric": "masks_symmetric guide, counted"}
"""The kernels of the plain loss whose name says more than what they do."""


@functools.cache
def variants(config: Config = SM_90, *, every: bool = False) -> dict[str, Variant]:
    """The kernels that a configuration starts for bf16, by name."""
    found = recorded(config, torch.bfloat16, torch.bfloat16, every=every)
    by_name = {v.name: v for v in found}
    assert len(by_name) == len(found), "no two of them share a name"
    return by_name


@functools.cache
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
    if compiled.flops:
        assert compiled.matrix_instructions, f"{what} uses no matrix instructions"


def test_every_kernel_has_one_product_on_the_matrix_units() -> None:
    """Those of a tile, whoever decides what counts: a guide's product is not beside the student's."""
    assert len(variants(every=True)) > 80
    names = ("forward", "forward self-guided, counted", "masks guide, counted", "dlogits")
    found = [compiled(variants(every=True)[name]) for name in names]
    for one in found:
        hold(one)
        # A step of 64 columns in instructions of 64 x 128 x 16, for two halves of a tile.
        assert one.matrix_instructions == {"HGMMA": 8}


def test_who_guides_itself_multiplies_nothing_for_its_mask() -> None:
    """Its own scores decide, in the forward pass; a guide's do in a launch of their own."""

    def kernels(loss: LossConfig, *, guided: bool) -> set[str]:
        problem = kernel_variants._problem(
            loss, torch.bfloat16, torch.bfloat16 if guided else None, 130, 64, nested=False
        )
        with launch.record_launches() as launches:
            kernel_passes.forward_with(SM_90, problem, True)
        return {variant.name for variant in variants_of(launches) if variant.multiplies}

    plain = LossConfig(contrast_positives=False)
    both = {"masks guide, counted", "masks_symmetric guide, counted", "forward", "forward_symmetric"}
    assert kernels(plain, guided=True) == both
    assert kernels(replace(plain, self_guided=True), guided=False) == {
        "forward self-guided, counted", "forward_symmetric self-guided, counted",
    }  # fmt: skip
    assert kernels(plain, guided=False) == {"forward no mask", "forward_symmetric no mask"}


def test_figures_of_a_tile_follow_from_its_dims() -> None:
    one, guide = compiled(variants()["forward"]), compiled(variants()["masks guide, counted"])
    assert (one.flops, guide.flops) == (2 * 128 * 128 * 384, 2 * 128 * 128 * 1024)
    assert one.programs == 65536 // ((one.registers + 7) // 8 * 8 * 128) == 2
    across = 2 * 132 // 8
    operands = [128 * width * 2 * (8 + across) // (8 * across) for width in (384, 1024)]
    assert one.bytes == operands[0] + 128 * 128 // 8 + 8 * 128
    assert guide.bytes == operands[1] + 128 * 128 // 8
    half = compiled(variants()["dlogits_symmetric"])
    assert half.flops == one.flops / 2
    across = half.programs * 132 // 8
    assert half.bytes == 384 * 2 * (128 * 8 + 64 * across) // (8 * across) + 128 * 64 * (2 + 2 / 8)


def test_what_bounds_a_kernel_is_what_needs_longest() -> None:
    def bound_by(name: str, dim: int = 384, target: str = "sm_90") -> str:
        one = compile_variant(TARGETS[target], variants()[name], dim=dim, guide_dim=1024)
        assert (one.roofline > 0.995) == (one.bound_by == "matrix units" or one.flops == 0)
        return one.bound_by

    # Shared memory moves 128 bytes a clock: a step of 16 columns takes 160 clocks, its product 128.
    assert bound_by("forward") == bound_by("masks guide, counted") == "shared memory"
    # A warp of sm_80 has half of the rows and of the columns: 12 clocks a column, the product 16.
    assert bound_by("forward", target="sm_80") == "matrix units"
    # An exponential takes as long as the products of 32 columns of the operands: 989e12 / (16 * 132 * 1.83e9) FLOPs.
    assert bound_by("forward", dim=64) == "exponentials"
    assert bound_by("forward_symmetric", dim=128) == "exponentials"
    assert bound_by("dlogits", dim=64) == "memory"
    assert bound_by("units student") == bound_by("gradients") == "memory"


def test_what_a_tile_moves_of_its_operands() -> None:
    """From L2 to shared memory once, and from there as often as the instructions read it."""
    one, half = compiled(variants()["forward"]), compiled(variants()["dlogits_symmetric"])
    assert (one.l2_bytes, half.l2_bytes) == (256 * 384 * 2, 192 * 384 * 2)
    # Instructions of 64 rows read the columns twice.
    assert (one.shared_bytes, half.shared_bytes) == ((256 + 128 + 2 * 128) * 384 * 2, (192 + 128 + 2 * 64) * 384 * 2)
    seconds = one.shared_bytes / (128 * 1.83e9)
    assert one.l2_rate == pytest.approx(one.l2_bytes / seconds * 132 / 1e12)
    by_waves = compile_variant(TARGETS["gfx942"], variants()["forward"], dim=384, guide_dim=1024)
    assert by_waves.shared_bytes in {(256 + 128 * (a + b)) * 384 * 2 for a, b in ((1, 4), (2, 2), (4, 1))}
    single = recorded(TABLE["sm_90", SINGLE], torch.float32, torch.float32, every=False)
    exact = {v.name: v for v in single}["forward"]
    # What multiplies on no matrix units reads as it likes, and is not counted.
    assert compiled(exact).shared_bytes == 0 < compiled(exact).l2_bytes


def test_a_configuration_that_spills_is_seen() -> None:
    config = replace(SM_90, dlogits_symmetric=Launch(64, 4, 3))
    one = compiled(variants(config)["dlogits_symmetric"])
    assert one.spills > 0
    with pytest.raises(AssertionError, match="spills"):
        hold(one)


def test_an_unknown_target_is_named() -> None:
    with pytest.raises(ValueError, match=r"target: expected one of sm_80, .*, got 'sm_70'"):
        next(report("sm_70"))


@pytest.mark.parametrize("descriptors", [False, True])
def test_what_is_compiled_is_what_triton_s_own_launcher_would_compile(
    monkeypatch: pytest.MonkeyPatch, descriptors: bool
) -> None:
    """Types, constants and alignment, for tensors that are in memory."""
    backend, seen, kinds = make_backend(TARGETS["sm_90"].gpu), set(), set()

    def spy(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        with launch.record_launches() as launches:
            launch.start(kernel, grid, **arguments)
        (variant,) = variants_of(launches)
        options = {name for name, _ in variant.options}
        _, found, rest = bind(**arguments)
        assert set(rest) == options
        for parameter, (kind, value) in zip(kernel.params, found, strict=True):
            name, places = parameter.name, [(parameter.name, kind, value)]
            if isinstance(kind, tuple):
                assert dict(variant.types)[name] == kind, f"{kernel.__name__}: {name}"
                places = [((name, k), *each) for k, each in enumerate(zip(kind, value, strict=True))]
            for place, each, specialised in places:
                if each == "constexpr":
                    assert dict(variant.constants)[place] == specialised, f"{kernel.__name__}: {place}"
                else:
                    assert isinstance(kind, tuple) or dict(variant.types)[place] == each, f"{kernel.__name__}: {place}"
                    assert (place in variant.aligned) == (specialised == "D"), f"{kernel.__name__}: {place}"
                kinds.add((each, specialised == "D"))
        seen.add(kernel.__name__)

    for module in (dlogits, forward, gradients, groups, masks, reduce, rows, unpack):
        monkeypatch.setattr(module, "start", spy)
    monkeypatch.setattr(kernel_variants, "_empty", lambda *shape, dtype: torch.ones(shape, dtype=dtype))
    # Several batches of chunks, and a guide that is not held whole, of a size that is soon in memory.
    monkeypatch.setattr(layout, "CHUNK_TILES", 1)
    monkeypatch.setattr(kernel_work, "HELD_BYTES", 0)
    launches = {name: replace(x, descriptors=descriptors) for name, x in SM_90.launches().items()}
    config, types = replace(SM_90, **launches), (torch.bfloat16, torch.float32)
    loss = LossConfig(hardness_mode="in_batch_negatives", hardness_strength=1.0, contrast_positives=False)
    for grouped in (False, True):
        plain = LossConfig(contrast_positives=False, hard=grouped)
        kernel_variants._run(config, torch.bfloat16, torch.bfloat16, plain, groups=int(grouped), by_row=True)
        kernel_variants._run(config, *types, loss, groups=2 * grouped, nested=True)
    kernel_variants._run(config, *types, LossConfig(self_guided=True, margin_strategy="relative"), guided=False)
    kernel_variants._run_in_batches(config, *types, guided=True)
    assert seen == {
        f"{name}_kernel"
        for name in (
            "units", "thresholds", "weights", "gradients", "reduce", "groups", "masks", "forward", "dlogits", "unpack",
        )
    }  # fmt: skip
    assert {("constexpr", False), ("fp32", False), ("i32", True), ("i32", False)} <= kinds
    assert {("*bf16", True), ("*fp32", True), ("*fp32", False), ("*i64", False)} <= kinds
    assert any(kind.startswith("tensordesc<") for kind, _ in kinds) == descriptors


def test_a_batch_of_another_size_takes_the_same_kernels() -> None:
    """Of 128 rows, of 97, or of one: none is compiled in the middle of a run, at the end of an epoch."""
    found = []
    for count in (128, 97, 1):
        problem = kernel_variants._problem(LossConfig(), torch.bfloat16, torch.bfloat16, count, 64, nested=False)
        with launch.record_launches() as launches:
            kept = kernel_passes.forward_with(SM_90, problem, True)
            kernel_passes.backward_with(SM_90, problem, kept.loss, kept.lse2, kept.mask_bits)
        found.append(variants_of(launches))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("mode", ["joint", "per_direction"])
def test_directions_take_no_kernel_that_others_do_not(mode: str) -> None:
    """Which of them are compared, and in how many softmaxes: what is compiled and held beforehand is all there is."""
    every = ["query_to_doc", "doc_to_query"] + ["query_to_query", "doc_to_doc"] * (mode == "joint")
    ways: dict[str, Any] = {"directions": every, "partition_mode": mode}
    weighted: dict[str, Any] = {"hardness_mode": "in_batch_negatives", "hardness_strength": 1.0}
    with launch.record_launches() as launches:
        for guided, options, more in (
            (True, {}, {}),
            (True, {"hard": True}, {"groups": 2}),
            (True, {"mask_negatives": False}, {}),
            (True, weighted, {"nested": True}),
            (False, {}, {}),
            (False, {"self_guided": True}, {"groups": 1, "negatives": 0}),
        ):
            kernel_variants._run(
                SM_90, torch.bfloat16, torch.bfloat16, LossConfig(**ways, **options), guided=guided, **more
            )
    assert set(variants_of(launches)) <= set(variants(every=True).values())


@pytest.mark.slow
@pytest.mark.longest
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("size", [SINGLE, HALF])
def test_every_shipped_configuration_holds(size: int, target: str) -> None:
    found = list(report(target, every=True, size=size))
    for compiled in found:
        hold(compiled)
    assert {c.kernel.split(" ")[0] for c in found} == {
        "units", "thresholds", "weights", "gradients", "reduce",
        "groups", "groups_symmetric", "unpack", "unpack_symmetric",
        "masks", "masks_symmetric", "forward", "forward_symmetric", "dlogits", "dlogits_symmetric",
        "distil", "distil_symmetric", "distil_dlogits", "distil_dlogits_symmetric", "distil_reduce",
    }  # fmt: skip
    by_name = {(c.kernel, c.element): c for c in found}
    assert len(by_name) == len(found)
    for (kernel, element), one in by_name.items():
        # No variant has more on the matrix units than another: each multiplies one pair of operands.
        family = kernel.split(" ")[0]
        if family.removesuffix("_symmetric") in ("masks", "forward", "dlogits"):
            plain = PLAIN.get(family, family)
            assert one.matrix_instructions == by_name[plain, element].matrix_instructions, f"{kernel} ({element})"
    # What docs/kernels.md shows is what this compiler makes of the kernels as they stand.
    on_file = json.loads(kernel_table.FILE.read_text(encoding="utf-8"))
    if on_file["triton"] == triton.__version__ and size == HALF:
        shown = {k["kernel"]: k for k in on_file["kernels"] if k["target"] == target}
        now = {
            kernel: c.as_dict()
            for (kernel, element), c in by_name.items()
            if element in ("bf16", "any") and kernel in shown
        }
        assert now == shown, "python -m benchmarks.kernel_table writes the tables anew"


@pytest.mark.slow
def test_tensor_descriptors_spill_nothing_on_sm_90() -> None:
    launches = {name: replace(x, descriptors=True) for name, x in SM_90.launches().items()}
    found = {name: v for name, v in variants(replace(SM_90, **launches), every=True).items() if v.multiplies}
    distilling = {"distil", "distil_symmetric", "distil_dlogits", "distil_dlogits_symmetric"}
    assert {name.split(" ")[0] for name in found} == set(launches) | distilling
    for name, variant in found.items():
        assert name.endswith("descriptors")
        hold(compiled(variant))
    loads = compile_report._compile(TARGETS["sm_90"], found["forward descriptors"]).asm["ptx"]
    assert "cp.async.bulk.tensor" in loads, "the operands come by tensor memory accesses"


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
    assert {
        "registers",
        "spills",
        "shared",
        "programs",
        "matrix_instructions",
        "flops",
        "bytes",
        "roofline",
        "bound_by",
    } <= set(printed["kernels"][0])


def test_the_command_refuses_an_unknown_target() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "gist_fast.cli.main", "kernels", "--target", "h100"], capture_output=True, text=True
    )
    assert run.returncode == 2
    assert "--target: expected one of sm_80" in run.stderr and "got 'h100'" in run.stderr
