"""What the compiler makes of the kernels, as ``docs/kernels.md`` shows it: ``python -m benchmarks.kernel_table``.

Compiles them for bf16 and the widths below, which takes some minutes and no card, keeps the figures in
``benchmarks/results/compiler/kernels.json`` and writes both tables into the document. Nothing in them is measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gist_fast.kernels.config import HALF
from gist_fast.kernels.report import Compiled, report

from benchmarks.loss_cpu import RESULTS
from benchmarks.machine import machine
from benchmarks.marks import put
from gist_fast.bench.tables import markdown

DOCS = Path(__file__).parent.parent / "docs" / "kernels.md"
FILE = RESULTS / "compiler" / "kernels.json"
WIDTH, GUIDE_WIDTH = 384, 1024
GENERATIONS = {"sm_90": "HGMMA", "sm_80": "HMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
"""Those of the first table, with the name of their matrix instructions."""
KERNELS = {
    "forward": "forward",
    "forward_symmetric": "forward, symmetric",
    "masks": "masks",
    "masks_symmetric": "masks, symmetric",
    "staged": "coefficients",
    "staged_symmetric": "coefficients, symmetric",
    "owned_rows": "owned rows",
    "owned_columns": "owned columns",
    "owned_symmetric": "owned, symmetric",
}
"""Those of the first table, by the report's name."""
VARIANTS = {
    "forward, groups": ("forward", " grouped"),
    "forward, hard": ("forward", " hard"),
    "forward, groups without a guide": ("forward", " of groups"),
    "forward, a student that guides itself": ("forward", " self-guided"),
    "forward, the same with groups": ("forward", " self-guided grouped"),
    "forward, no guide": ("forward", " unguided"),
    "forward, no guide, all logits boosted": ("forward", " unguided boosted"),
    "forward, an own negative otherwise, guide": ("forward", " differently boosted"),
    "forward, an own negative otherwise, hard": ("forward", " hard, differently boosted"),
    "forward, an own negative otherwise, no guide": ("forward", " unguided, differently boosted"),
    "forward, a narrower width that reads bits": ("forward", " given"),
    "masks, groups": ("masks", " grouped"),
    "masks, floors": ("masks", " hard"),
    "groups, no product": ("groups", ""),
    "coefficients, all boosted": ("staged", " boosted"),
    "coefficients, an own negative otherwise": ("staged", " differently boosted"),
    "owned rows, boosted": ("owned_rows", " boosted"),
    "owned columns, boosted": ("owned_columns", " boosted"),
    "unpack, no product": ("unpack", ""),
    "fold, no product": ("fold", ""),
}
"""Those of the second table: kernel and variant by the report's names. A symmetric part's stands beside."""
VARIANTS_OF = "sm_90"


def compiled() -> Iterator[Compiled]:
    """All kernels of all variants for the generation of the second table; the plain ones for the others."""
    for generation in GENERATIONS:
        every = generation == VARIANTS_OF
        yield from report(generation, width=WIDTH, guide_width=GUIDE_WIDTH, every=every, size=HALF)


def tables(results: Mapping[str, Any]) -> dict[str, str]:
    """Both, by the names of their marks."""
    found = {(kernel["target"], kernel["kernel"]): kernel for kernel in results["kernels"]}
    about = (
        f"bf16, D {WIDTH}, G {GUIDE_WIDTH}; triton {results['triton']}, gist_fast {results['gist_fast']} at "
        f"{results['commit']}; `python -m benchmarks.kernel_table`. Compiled, not measured."
    )
    heads = [f"{target}: registers, programs, {name}, bound" for target, name in GENERATIONS.items()]
    plain = [
        [name, *(_cell(found[target, kernel], matrix=True) for target in GENERATIONS)]
        for kernel, name in KERNELS.items()
    ]
    sides = [f"variant on {VARIANTS_OF}", "plain part: registers, programs", "symmetric part"]
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
        figures += [str(sum(kernel["matrix_instructions"].values())), f"{kernel['roofline']:.0%}"]
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
