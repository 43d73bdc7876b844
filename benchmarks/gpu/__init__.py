"""What only a card can say. ``benchmarks/gpu.sh`` runs all of it; ``python -m benchmarks.gpu PART`` runs one part.

A checkout is enough: where the package is not installed, its kernels are made known here.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from gist_fast.bench import isolated

ROOT = Path(__file__).resolve().parent.parent.parent

if importlib.util.find_spec("gist_fast.kernels") is None:
    # setup.py is what puts kernels/ there otherwise.
    _spec = importlib.util.spec_from_file_location(
        "gist_fast.kernels", ROOT / "kernels" / "__init__.py", submodule_search_locations=[str(ROOT / "kernels")]
    )
    assert _spec is not None and _spec.loader is not None
    sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_spec.name])
    # To the processes that a server forks, too.
    isolated.PRELOAD.insert(0, __name__)
