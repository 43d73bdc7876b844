"""Suites with models in them: the mini-batch engine, the guide columns, and a whole training step."""

from __future__ import annotations

import functools
import importlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gist_fast.bench.cases import TEMPERATURE, hold_to
from gist_fast.bench.models import about, build_model, texts
from gist_fast.bench.results import WHOLE
from gist_fast.bench.suite import Scope, Suite
from gist_fast.bench.timing import Parts
from gist_fast.data.names import GUIDE_SUFFIX

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import Tensor

OURS = "gist_fast"
COLUMNS = ("anchor", "positive")
_QUIET: Any = {"show_progress_bar": False}
CHECKED_PAIRS = 23
MINI_BATCH = 32
GRADIENT_TOLERANCE = 1e-3
"""Of a float32 model's gradient against its float64 copy's, by its norm."""
EMBEDDING_TOLERANCE = 2e-3
"""Of float16 columns against the guide's float32."""


@dataclass(frozen=True)
class TextCase:
    """Texts and models."""

    size: int
    """Pairs."""
    device: str = "cpu"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "models": about(self.device)}

    def columns(self, count: int | None = None) -> list[list[str]]:
        return [texts(count or self.size, role) for role in COLUMNS]


class _ModelSuite(Suite):
    cpu_sizes: Sequence[int]
    cuda_sizes: Sequence[int]

    def cases(self, scope: Scope) -> Sequence[TextCase]:
        own = self.cuda_sizes if scope.device.startswith("cuda") else self.cpu_sizes
        return [TextCase(size, scope.device) for size in scope.sizes_of(own, 3)]


class EngineSuite(_ModelSuite):
    """Gradient caching: tokens to the student's gradients, the guide as small as it can be."""

    name = "engine"
    title = "The mini-batch engine: tokens to the student's gradients"
    cpu_sizes, cuda_sizes = (16, 32, 64, 128), (64, 256, 1024, 4096)

    def competitors(self, case: TextCase) -> Sequence[str]:
        return [OURS, "gist_fast, data order", "gist_fast, two passes", "st CachedGISTEmbed"]

    def check(self, case: TextCase, name: str) -> None:
        columns = case.columns(min(case.size, CHECKED_PAIRS))
        exact, model = (build_model(device=case.device) for _ in range(2))
        _check_gradients(exact, model, columns, lambda: self._loss(name, model, _small_guide(case.device), 7))

    def build(self, case: TextCase, name: str) -> Parts:
        model = build_model(device=case.device)
        loss = self._loss(name, model, _small_guide(case.device), MINI_BATCH)
        features = _features(model, case.columns())

        def iteration() -> None:
            model.zero_grad(set_to_none=True)
            loss([dict(f) for f in features], None).backward()

        return {WHOLE: iteration}

    @staticmethod
    def _loss(name: str, model: SentenceTransformer, guide: SentenceTransformer, rows: int) -> Any:
        memory = 0.0 if name == "gist_fast, two passes" else "auto"
        return _loss(name, model, guide, rows, sort_by_length=name != "gist_fast, data order", activation_memory=memory)


class GuideSuite(_ModelSuite):
    """The guide's embeddings of a data set, none of them known, and all of them known."""

    name = "guide"
    title = "Guide columns: texts to embeddings on disk"
    cpu_sizes, cuda_sizes = (32, 64, 128, 256), (256, 1024, 4096, 16384)

    def competitors(self, case: TextCase) -> Sequence[str]:
        return [OURS, "gist_fast, known texts", "st encode"]

    def check(self, case: TextCase, name: str) -> None:
        import torch

        columns = case.columns(min(case.size, CHECKED_PAIRS))
        guide = build_model(seed=1, device=case.device)
        wanted = torch.cat([guide.encode(column, **_QUIET, convert_to_tensor=True).cpu() for column in columns])
        if name.startswith("st "):
            return
        with tempfile.TemporaryDirectory() as cache:
            for _ in range(1 + (name != OURS)):
                made = _embed(columns, guide, cache)
            found = torch.cat([torch.tensor(made[f"{name}{GUIDE_SUFFIX}"][:]) for name in COLUMNS])
        hold_to("the embeddings", found, wanted, EMBEDDING_TOLERANCE)

    def build(self, case: TextCase, name: str) -> Parts:
        columns = case.columns()
        guide = build_model(seed=1, device=case.device)
        if name.startswith("st "):
            return {WHOLE: lambda: [guide.encode(column, **_QUIET) for column in columns]}
        if name == OURS:
            return {WHOLE: lambda: _embed(columns, guide)}
        kept = tempfile.TemporaryDirectory()
        _embed(columns, guide, kept.name)
        # The folder lives as long as the call that uses it.
        return {WHOLE: lambda folder=kept: _embed(columns, guide, folder.name)}  # type: ignore[misc]


class StepSuite(_ModelSuite):
    """A training step: texts to updated weights, with tokenising, student, guide, loss, backward pass and AdamW."""

    name = "step"
    title = "The whole training step: texts to updated weights"
    cpu_sizes, cuda_sizes = (32, 64, 128, 256), (128, 512, 2048, 8192)

    def competitors(self, case: TextCase) -> Sequence[str]:
        return [OURS, "gist_fast, guide columns", "st CachedGISTEmbed"]

    def check(self, case: TextCase, name: str) -> None:
        columns = case.columns(min(case.size, CHECKED_PAIRS))
        exact, model = (build_model(device=case.device) for _ in range(2))
        guide = build_model(seed=1, device=case.device)
        known = _known(name, guide, columns)
        _check_gradients(exact, model, columns, lambda: self._loss(name, model, guide, 7), guide=guide, known=known)

    def build(self, case: TextCase, name: str) -> Parts:
        import torch

        model, guide = build_model(device=case.device), build_model(seed=1, device=case.device)
        columns = case.columns()
        known = _known(name, guide, columns)
        loss = self._loss(name, model, guide, MINI_BATCH)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

        def iteration() -> None:
            optimizer.zero_grad(set_to_none=True)
            loss(_features(model, columns, known), None).backward()
            optimizer.step()

        return {WHOLE: iteration}

    @staticmethod
    def _loss(name: str, model: SentenceTransformer, guide: SentenceTransformer, rows: int) -> Any:
        return _loss(name, model, None if "columns" in name else guide, rows, activation_memory="auto")


def _loss(name: str, model: SentenceTransformer, guide: SentenceTransformer | None, rows: int, **options: Any) -> Any:
    """Ours with these options, or sentence-transformers' as it comes."""
    library = "sentence_transformers.sentence_transformer" if name.startswith("st ") else "gist_fast"
    kind = importlib.import_module(f"{library}.losses").CachedGISTEmbedLoss
    options = options if library == "gist_fast" else {}
    return kind(model, guide, temperature=TEMPERATURE, mini_batch_size=rows, **options)


@functools.cache
def _small_guide(device: str) -> SentenceTransformer:
    """With the student's tokenizer, so that nobody decodes and tokenises again."""
    return build_model(layers=1, width=16, heads=1, seed=2, device=device)


def _features(
    model: SentenceTransformer, columns: Sequence[list[str]], known: Sequence[Tensor] | None = None
) -> list[dict[str, Any]]:
    import torch

    from gist_fast.losses.guide import EMBEDDING

    features = []
    for place, column in enumerate(columns):
        made = model.preprocess(column)
        features.append({k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in made.items()})
        if known is not None:
            features[-1][EMBEDDING] = known[place].to(model.device)
    return features


def _known(name: str, guide: SentenceTransformer, columns: Sequence[list[str]]) -> list[Tensor] | None:
    """The guide's embeddings, as a data set carries them."""
    if "columns" not in name:
        return None
    import torch

    return [torch.from_numpy(guide.encode(column, show_progress_bar=False)) for column in columns]


def _embed(columns: Sequence[list[str]], guide: SentenceTransformer, cache: str | None = None) -> Any:
    """The columns with the guide's embeddings, which are kept in `cache`, or nowhere."""
    from datasets import Dataset

    from gist_fast.guide_columns import embed_guide

    if cache is None:
        with tempfile.TemporaryDirectory() as folder:
            return _embed(columns, guide, folder)
    data = Dataset.from_dict(dict(zip(COLUMNS, columns, strict=True)))
    return embed_guide(data, guide, cache_dir=cache, show_progress_bar=False)


def _check_gradients(
    exact: SentenceTransformer,
    model: SentenceTransformer,
    columns: Sequence[list[str]],
    make: Callable[[], Any],
    *,
    guide: SentenceTransformer | None = None,
    known: Sequence[Tensor] | None = None,
) -> None:
    """The gradient of every parameter against that of a float64 copy with all activations in memory and no tiles."""
    import torch

    from gist_fast.losses import GISTEmbedLoss

    guide = guide or _small_guide(str(model.device))
    with torch.no_grad():
        embedded = [guide(f)["sentence_embedding"] for f in _features(guide, columns)]
    GISTEmbedLoss(exact.double(), None, temperature=TEMPERATURE, backend="reference")(
        _features(exact, columns, embedded), None
    ).backward()
    make()(_features(model, columns, known), None).backward()
    wanted = torch.cat([p.grad.flatten() for p in exact.parameters() if p.grad is not None])
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    hold_to("the student's gradient", found, wanted, GRADIENT_TOLERANCE)
