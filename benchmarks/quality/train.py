"""One run: a student trained one way on one study's rows, and judged on texts of families that it never saw."""

from __future__ import annotations

import copy
import math
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers.base.sampler import DefaultBatchSampler

from benchmarks.quality.arms import Arm, Setting
from benchmarks.quality.data import Row
from gist_fast import GISTTrainer, GISTTrainingArguments, embed_guide, mine_negatives
from gist_fast.data.embedded_rows import without_embeddings
from gist_fast.data.names import GUIDE_SUFFIX
from gist_fast.evaluation.evaluators import Retrieval

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer

COLUMNS = ("anchor", "positive")
_WIDTH = 256  # of the perfect guide's embeddings: no two of a batch come near the threshold


class InOrder(DefaultBatchSampler):
    """Batches of consecutive rows: which rows stand together is the data's matter."""

    def __init__(self, dataset: Dataset, batch_size: int, drop_last: bool, **_: Any) -> None:
        super().__init__(range(len(dataset)), batch_size=batch_size, drop_last=drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Every epoch is the same."""


class FrozenLower(torch.nn.Module):
    """Embeddings and lower layers of a BERT, frozen; what comes out of them is kept for each text.

    Stands in the place of the embeddings of a BERT that has lost those layers. Frozen layers give a text the same
    states in every step, arm and seed, so they are computed once, and a run costs what its upper layers cost.
    """

    def __init__(self, bert: torch.nn.Module, layers: int) -> None:
        super().__init__()
        lower = copy.deepcopy(bert).eval().requires_grad_(False)
        lower.encoder.layer = lower.encoder.layer[:layers]
        self._lower = [lower]  # no child: neither copied, nor trained, nor in the weights
        self._states: dict[tuple[int, ...], torch.Tensor] = {}

    def __deepcopy__(self, memo: dict) -> FrozenLower:
        return self  # copies of the student share what is known

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        """States ``[B, L, D]`` for ids ``[B, L]``, padded with 0 at the end."""
        lengths = (input_ids != 0).sum(1).tolist()
        keys = [tuple(ids[:n]) for ids, n in zip(input_ids.tolist(), lengths, strict=True)]
        missing = [k for k, key in enumerate(keys) if key not in self._states]
        if missing:
            ids = input_ids[missing]
            with torch.no_grad():
                states = self._lower[0](input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
            for k, state in zip(missing, states, strict=True):
                self._states[keys[k]] = state[: lengths[k]].clone()
        return torch.nn.utils.rnn.pad_sequence([self._states[key] for key in keys], batch_first=True)


def freeze_lower(student: SentenceTransformer, trained_layers: int) -> None:
    """Leave only the upper `trained_layers` of a student to train."""
    bert = student[0].auto_model
    layers = len(bert.encoder.layer)
    if not 1 <= trained_layers <= layers:
        raise ValueError(f"trained_layers: expected at most {layers}, which the student has, got {trained_layers}.")
    if trained_layers < layers:
        bert.embeddings = FrozenLower(bert, layers - trained_layers)
        bert.encoder.layer = bert.encoder.layer[layers - trained_layers :]


class Workshop:
    """What every run needs: student, guide, and a place for the guide's embeddings."""

    def __init__(self, student: Path, guide: Path, folder: Path) -> None:
        from sentence_transformers import SentenceTransformer

        self._path, self.folder = str(student), folder
        self.guide = SentenceTransformer(str(guide), device="cpu", local_files_only=True)
        self._students: dict[int, SentenceTransformer] = {}

    def student(self, trained_layers: int, dropout: float = 0.0) -> SentenceTransformer:
        """A fresh copy, of which the upper layers are to be trained."""
        from sentence_transformers import SentenceTransformer

        if trained_layers not in self._students:
            student = SentenceTransformer(self._path, device="cpu", local_files_only=True)
            freeze_lower(student, trained_layers)
            self._students[trained_layers] = student
        student = copy.deepcopy(self._students[trained_layers])
        for module in student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        return student

    def guided(self, rows: Sequence[Row]) -> Dataset:
        """The rows with the guide's embeddings, in full precision: a margin of 0 hangs on small differences."""
        return embed_guide(
            plain(rows), self.guide, columns=COLUMNS, cache_dir=self.folder, dtype="float32", show_progress_bar=False
        )

    def dataset(self, arm: Arm, rows: Sequence[Row], seed: int) -> Dataset:
        """The rows with what the arm's guide says of them."""
        if arm.guide == "perfect":
            return perfectly_guided(rows, seed)
        guided_by_columns = arm.guide == "model" and arm.library == "gist_fast"
        if arm.mined:
            mined = mine_negatives(self.guided(rows), negatives=arm.mined)
            return mined if guided_by_columns else without_embeddings(mined)
        return self.guided(rows) if guided_by_columns else plain(rows)


def plain(rows: Sequence[Row]) -> Dataset:
    """The texts alone."""
    from datasets import Dataset

    return Dataset.from_dict({name: [getattr(row, name) for row in rows] for name in COLUMNS})


def perfectly_guided(rows: Sequence[Row], seed: int) -> Dataset:
    """The rows with embeddings of a guide that knows the concepts: one random direction each."""
    from datasets import Dataset

    of_concept: dict[str, np.ndarray] = {}
    rng = np.random.default_rng(seed)
    for row in rows:
        if row.concept not in of_concept:
            drawn = rng.standard_normal(_WIDTH).astype(np.float32)
            of_concept[row.concept] = drawn / np.linalg.norm(drawn)
    embeddings = np.stack([of_concept[row.concept] for row in rows])
    texts = {name: [getattr(row, name) for row in rows] for name in COLUMNS}
    return Dataset.from_dict({**texts, **{name + GUIDE_SUFFIX: list(embeddings) for name in COLUMNS}})


def train(
    workshop: Workshop, arm: Arm, setting: Setting, dataset: Dataset, seed: int
) -> tuple[SentenceTransformer, dict[str, float]]:
    """The trained student, and what the log says on average: ``masked_ap`` and so on, and the ``loss``."""
    from sentence_transformers import SentenceTransformerTrainer
    from transformers.trainer_callback import PrinterCallback

    student = workshop.student(setting.trained_layers, setting.dropout)
    with tempfile.TemporaryDirectory() as folder:
        arguments = GISTTrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=setting.batch_size,
            dataloader_drop_last=True,
            batch_sampler=InOrder,  # type: ignore[arg-type]
            learning_rate=setting.learning_rate,
            warmup_steps=math.ceil(setting.warmup * setting.steps),
            seed=seed,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **{"temperature": setting.temperature, **arm.arguments},
        )
        if arm.library == "gist_fast":
            guided = False if arm.guide == "none" else None
            trainer: SentenceTransformerTrainer = GISTTrainer(student, arguments, dataset, guided=guided)
        else:
            from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss

            loss = GISTEmbedLoss(student, workshop.guide, temperature=arguments.temperature)
            trainer = SentenceTransformerTrainer(student, arguments, dataset, loss=loss)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    logged: dict[str, list[float]] = {}
    for entry in trainer.state.log_history:
        for name, value in entry.items():
            if name == "loss" or name.startswith("masked_"):
                logged.setdefault(name, []).append(value)
    return student, {name: sum(values) / len(values) for name, values in logged.items()}


def ndcg_by_query(model: SentenceTransformer, task: Retrieval, k: int = 10) -> dict[str, float]:
    """nDCG at `k` of each query by cosine similarity, as ``InformationRetrievalEvaluator`` has it on average."""
    with torch.inference_mode():
        queries, documents = (
            model.encode(list(texts.values()), batch_size=128, normalize_embeddings=True, convert_to_numpy=True)
            for texts in (task.queries, task.corpus)
        )
    identities = list(task.corpus)
    discounts = 1 / np.log2(np.arange(2, k + 2))
    best = np.argsort(-(queries @ documents.T), axis=1, kind="stable")[:, :k]
    scores = {}
    for query, ranking in zip(task.queries, best, strict=True):
        gains = np.array([identities[document] in task.relevant[query] for document in ranking])
        ideal = discounts[: len(task.relevant[query])].sum()
        scores[query] = float((gains * discounts[: len(gains)]).sum() / ideal)
    return scores


def mask_quality(dataset: Dataset, rows: Sequence[Row], batch_size: int, margin: float = 0.0) -> dict[str, float]:
    """What the guide drops of the anchor-positive block, against what is known to be a false negative.

    Returns:
        ``masked``: share of the pairs that are dropped. ``found``: share of the false negatives among them that are
        dropped. ``right``: share of what is dropped that is a false negative. ``ties``: share of the false negatives
        that are as near to the anchor as its positive is, which a strict comparison keeps.
    """
    anchors, positives = (unit(np.asarray(dataset[name + GUIDE_SUFFIX])) for name in COLUMNS)
    concepts = np.unique([row.concept for row in rows], return_inverse=True)[1]
    totals = np.zeros(5)
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        similarity = anchors[part] @ positives[part].T
        threshold = np.diag(similarity)[:, None] - margin
        false = concepts[part][:, None] == concepts[part][None]
        other = ~np.eye(len(similarity), dtype=bool)
        # One text has one embedding, but a product of matrices may round the same one differently.
        tied = np.abs(similarity - threshold) < 1e-6
        dropped = (similarity > threshold) & ~tied & other
        false &= other
        totals += [other.sum(), dropped.sum(), false.sum(), (dropped & false).sum(), (tied & false).sum()]
    pairs, dropped, false, both, tied = totals.tolist()
    return {
        "masked": dropped / pairs,
        "found": both / false if false else math.nan,
        "right": both / dropped if dropped else math.nan,
        "ties": tied / false if false else math.nan,
    }


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1, in double precision."""
    rows = rows.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def run_arm(
    workshop: Workshop, arm: Arm, setting: Setting, rows: Sequence[Row], task: Retrieval, seed: int
) -> dict[str, Any]:
    """Train and judge: ``ndcg`` (mean), ``by_query`` (in the task's order), ``log`` and ``seconds``."""
    torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
    start = time.perf_counter()
    student, log = train(workshop, arm, setting, workshop.dataset(arm, rows, seed), seed)
    seconds = time.perf_counter() - start
    scores = list(ndcg_by_query(student, task).values())
    return {
        "ndcg": round(float(np.mean(scores)), 6),
        "by_query": [round(score, 4) for score in scores],
        "log": {name: round(value, 6) for name, value in log.items()},
        "seconds": round(seconds, 1),
    }
