"""``gist-fast demo``: the main job on the embedded default, without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gist_fast.cli.output import expanded


def demo(
    output_dir: Annotated[
        Path, typer.Option("--output-dir", callback=expanded, help="Where the model and the pictures are put.")
    ] = Path("demo-run"),
    quick: Annotated[bool, typer.Option("--quick", help="A much smaller run, to see that everything works.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the order of the training pairs.")] = 0,
) -> None:
    """Fine-tune a small real model under a real guide and show it before and after."""
    from rich.console import Console

    from gist_fast.demo.run import run_demo

    run_demo(output_dir, quick=quick, seed=seed, console=Console())
