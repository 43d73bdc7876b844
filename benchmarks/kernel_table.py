"""What the compiler makes of the kernels, as ``docs/kernels.md`` shows it: ``python -m benchmarks.kernel_table``.

Compiles them for bf16 and the dims below, which takes some minutes and no card, keeps the figures in
``benchmarks/results/compiler/kernels.json`` and writes both tables into the document. Nothing in them is measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gist_fast.kernels.compile_report import Compiled
from gist_fast.kernels.config import HALF

from benchmarks.loss_cpu import RESULTS
from benchmarks.machine import machine
from benchmarks.marks import put
from gist_fast.bench.tables import markdown
from gist_fast.functional.backends.kernel_variants import report

DOCS = Path(__file__).parent.parent / "docs" / "kernels.md"
FILE = RESULTS / "compiler" / "kernels.json"
DIM, GUIDE_DIM = 384, 1024
GENERATIONS = {"sm_90": "HGMMA", "sm_80": "HMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
"""Those of the first table, with the name of their matrix instructions."""
KERNELS = {
    "masks guide, counted": "masks",
    "masks_symmetric guide, counted": "masks, symmetric",
    "forward": "forward",
    "forward_symmetric": "forward, symmetric",
    "dlogits": "dlogits",
    "dlogits_symmetric": "dlogits, symmetric",
}
"""Those of the first table, by the report's name."""
VARIANTS = {
    "masks, decided again": ("masks", " guide"),
    "masks, after groups": ("masks", " guide, initial mask, counted"),
    "masks, student thresholds, decided again": ("masks", " student, student thresholds"),
    "masks, a student that guides itself, decided again": ("masks", " student"),
    "forward, no mask": ("forward", " no mask"),
    "forward, student thresholds": ("forward", " student thresholds, counted"),
    "forward, the same after a guide or groups": ("forward", " student thresholds, initial mask, counted"),
    "forward, a student that guides itself": ("forward", " self-guided, counted"),
    "forward, the same after groups": ("forward", " self-guided, initial mask, counted"),
    "forward, logits scaled": ("forward", " scaled"),
    "dlogits, no mask": ("dlogits", " no mask"),
    "dlogits, weights of mixed signs": ("dlogits", " mixed signs"),
    "dlogits, logits scaled": ("dlogits", " scaled"),
    "distil, two products": ("distil", ""),
    "distil_dlogits, two products": ("distil_dlogits", ""),
    "distil_reduce, no product": ("distil_reduce", " first"),
    "groups, no product": ("groups", ""),
    "unpack, no product": ("unpack", ""),
    "units, no product": ("units", " student"),
    "thresholds, no product": ("thresholds", " student and guide"),
    "reduce, no product": ("reduce", " first, last"),
    "weights, no product": ("weights", ""),
    "gradients, no product": ("gradients", ""),
}
"""Those of the second table: kernel and variant by the report's names. A symmetric rectangle's stands beside."""
VARIANTS_OF = "sm_90"


def compiled() -> Iterator[Compiled]:
    """All kernels of all variants for the generation of the second table; the plain ones for the others."""
    for generation in GENERATIONS:
        every = generation == VARIANTS_OF
        yield from report(generation, dim=DIM, guide_dim=GUIDE_DIM, every=every, size=HALF)


def tables(results: Mapping[str, Any]) -> dict[str, str]:
    """Both, by the names of their marks."""
    found = {(kernel["target"], kernel["kernel"]): kernel for kernel in results["kernels"]}
    about = (
        f"bf16, D {DIM}, G {GUIDE_DIM}; triton {results['triton']}, gist_fast {results['gist_fast']} at "
        f"{results['commit']}; `python -m benchmarks.kernel_table`. Compiled, not measured."
    )
    heads = [f"{target}: registers, programs, {name}, bound, by" for target, name in GENERATIONS.items()]
    plain = [
        [name, *(_cell(found[target, kernel], matrix=True) for target in GENERATIONS)]
        for kernel, name in KERNELS.items()
    ]
    sides = [f"variant on {VARIANTS_OF}", "plain rectangle: registers, programs", "symmetric rectangle"]
    others = []
    for name, (kernel, variant) in VARIANTS.items():
        both = [found.get((VARIANTS_OF, f"{kernel}{side}{variant}")) for side in ("", "_symmetric")]
        others.append([name, *("" if side is None else _cell(side) for side in both)])
    return {
        "compiled": f"{markdown(['kernel', *heads], plain)}\n\n{about}",
        "compiled variants": markdown(sides, others),
    }


def _cell(kernel: Mapping[str, Any], *, matrix: bool = False) -> str:
    figures = [str(kernel["registers"]), str(kernel["programs"])]
    if matrix:
        instructions = sum(kernel["matrix_instructions"].values())
        figures += [str(instructions), f"{kernel['roofline']:.0%}", kernel["bound_by"]]
    if kernel["spills"]:
        figures.append(f"**spills {kernel['spills']} bytes**")
    return ", ".join(figures)


def written(text: str, results: Mapping[str, Any]) -> str:
    """The document with its tables as the results have them."""
    return put(text, tables(results))


def main() -> None:
    kernels = []
    for one in compiled():
        print(f"{one.target}: {one.kernel}", flush=True)
        kernels.append(one.as_dict())
    about = machine()
    results = {**{name: about[name] for name in ("triton", "gist_fast", "commit")}, "kernels": kernels}
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(json.dumps(results, indent=1) + "\n")
    DOCS.write_text(written(DOCS.read_text(encoding="utf-8"), results), encoding="utf-8")
    print(f"{DOCS.name} and {FILE.name}: written")


if __name__ == "__main__":
    main()
