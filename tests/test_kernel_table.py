"""The tables of docs/kernels.md are those of the results on file; whether the compiler still makes that of the kernels
is in `test_kernels_report`."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from gist_fast.kernels.compile_report import Compiled

from benchmarks import kernel_table

RESULTS = json.loads(kernel_table.FILE.read_text(encoding="utf-8"))


def test_the_document_is_the_one_that_the_results_make() -> None:
    text = kernel_table.DOCS.read_text(encoding="utf-8")
    assert kernel_table.written(text, RESULTS) == text


def test_every_kernel_of_every_target_has_its_figures() -> None:
    tables = kernel_table.tables(RESULTS)
    forward = next(k for k in RESULTS["kernels"] if (k["target"], k["kernel"]) == ("sm_90", "forward"))
    cell = f"{forward['registers']}, {forward['programs']}, {forward['matrix_instructions']['HGMMA']}, "
    assert f"| forward | {cell}{forward['roofline']:.0%}, {forward['bound_by']} |" in tables["compiled"]
    rows = [line for line in tables["compiled"].splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(kernel_table.KERNELS)
    assert all(row.count("|") == 2 + len(kernel_table.GENERATIONS) for row in rows)
    variants = tables["compiled variants"].splitlines()
    assert len(variants) == 2 + len(kernel_table.VARIANTS)
    assert not any(row.split("|")[2].strip() == "" for row in variants), "a name that no kernel has"


def test_a_spill_is_shown() -> None:
    results = copy.deepcopy(RESULTS)
    assert "spills" not in str(kernel_table.tables(results))
    next(k for k in results["kernels"] if k["kernel"] == "masks guide, counted")["spills"] = 24
    assert "**spills 24 bytes**" in kernel_table.tables(results)["compiled"]


def test_it_writes_what_it_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = tmp_path / "kernels.md"
    document.write_text("".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in kernel_table.tables(RESULTS)))
    monkeypatch.setattr(kernel_table, "DOCS", document)
    monkeypatch.setattr(kernel_table, "FILE", tmp_path / "results" / "kernels.json")
    monkeypatch.setattr(kernel_table, "compiled", lambda: (Compiled(**kernel) for kernel in RESULTS["kernels"]))
    kernel_table.main()
    written = json.loads(kernel_table.FILE.read_text())
    assert written["kernels"] == RESULTS["kernels"]
    assert kernel_table.tables(written)["compiled variants"] in document.read_text()
    assert "\nold\n" not in document.read_text()


def test_what_a_card_measured_is_told_as_the_results_have_it() -> None:
    from benchmarks import gpu_table

    text = gpu_table.DOCS.read_text(encoding="utf-8")
    assert gpu_table.written(text) == text
    parts = json.loads((gpu_table.FOLDER / "results.json").read_text(encoding="utf-8"))
    row = parts["kernels"]["D 384, keep"]["forward"]
    assert f"| forward | {1e3 * row['seconds']:.2f} ({row['flops'] / row['seconds'] / 1e12:.0f}) |" in text
    shown = gpu_table._kernels({"D 384, keep": {"forward": {**row, "share": 0.8}, gpu_table.STEP: row}})
    assert "share of the library's rate" in shown and ", 80%) |" in shown
    assert not parts["check"]["wrong"] and parts["tests"]["exit_code"] == 0 and parts["memory"]["keep_as_promised"]
