"""The loss: backend x B x D x G x blocks x guide x type, forward, backward and both."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

from gist_fast.bench.cases import BLOCKS, LossCase
from gist_fast.bench.loss import LossSuite
from gist_fast.bench.peers import PEERS


class Sizes(NamedTuple):
    """What a scale crosses."""

    rows: tuple[int, ...]
    widths: tuple[tuple[int, int], ...]
    dtypes: tuple[str, ...]
    others: bool
    """Whether fewer blocks, no guide and a guide of itself are measured too."""


SCALES = {
    "tiny": Sizes((33,), ((24, 16),), ("float32",), False),
    "small": Sizes((512, 2048), ((384, 384),), ("float32",), True),
    "medium": Sizes((1024, 4096, 8192), ((384, 384), (768, 1024)), ("float32", "bfloat16"), True),
    "large": Sizes((8192, 32768, 131072), ((384, 1024), (768, 1024), (1024, 1024)), ("float32", "bfloat16"), True),
}
OTHERS: tuple[tuple[Any, tuple[str, ...]], ...] = (
    ("model", ("ap",)),
    ("none", ("ap",)),
    ("none", BLOCKS),
    ("self", BLOCKS),
)


def cases(scale: str, device: str) -> Iterator[tuple[str, tuple[LossCase, str, str]]]:
    sizes = SCALES[scale]
    kinds = (("model", BLOCKS), *(OTHERS if sizes.others else ()))
    for rows, (width, guide_width), dtype, (guide, blocks) in product(sizes.rows, sizes.widths, sizes.dtypes, kinds):
        case = LossCase(rows, width, guide_width, dtype, device, guide, blocks)
        for name, peer in PEERS.items():
            for part in ("both",) if peer.whole else ("forward", "backward", "both"):
                label = f"{name}-B{rows}-D{width}-G{guide_width}-{dtype}-{guide}-{'+'.join(blocks)}-{part}"
                yield label.replace(" ", "_"), (case, name, part)


def test_loss(measured, measure):
    case, name, part = measured
    measure(LossSuite(), case, name, part)
