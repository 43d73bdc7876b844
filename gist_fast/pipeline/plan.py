"""A configuration to a plan in which all is checked, and the plan to a trainer that is ready."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gist_fast.data.named import carries_guide
from gist_fast.data.per_column import check_positions
from gist_fast.evaluation.evaluators import configured_evaluator, evaluator_names
from gist_fast.evaluation.metric_names import choose_best_metric
from gist_fast.functional.combinations import check_dims
from gist_fast.guide_columns.files import cache_folder
from gist_fast.pipeline.attention import Attention, choose_attention
from gist_fast.pipeline.datasets import check_run, describe, load_sources, with_guide_columns
from gist_fast.pipeline.model_checks import adapter_of, check_models, column_prompts
from gist_fast.pipeline.models import add_lora, load_configured
from gist_fast.pipeline.rehearsal import blamed, rehearse, stand_in, unnoticed
from gist_fast.pipeline.run_folder import check_sources, prepare_folder
from gist_fast.pipeline.saved_model import SavedModel
from gist_fast.profiling.run import profiling_arguments
from gist_fast.runtime.errors import InputError
from gist_fast.runtime.files import try_to_write
from gist_fast.training.batches import steps_of
from gist_fast.training.loss_checks import check_loss_settings, check_self_guiding
from gist_fast.training.trainer import GISTTrainer

if TYPE_CHECKING:
    from sentence_transformers.base.evaluation import BaseEvaluator

    from gist_fast.config.load import TrainConfig
    from gist_fast.config.schema import ModelConfig
    from gist_fast.data.named import Loaded
    from gist_fast.training.arguments import GISTTrainingArguments

logger = logging.getLogger(__name__)


@dataclass
class RunPlan:
    """All that a training run needs short of the models: read and checked, nothing written.

    Example:
        >>> from gist_fast.config import load_config
        >>> from gist_fast.pipeline import make_trainer, prepare, train_and_save
        >>> for name, model in {"student": student, "guide": guide}.items():
        ...     model.save(name)
        >>> pairs.save_to_disk("pairs")
        >>> run = "{student: student, guide: guide, data: {train: pairs}, training: {output_dir: run}}"
        >>> _ = Path("config.yaml").write_text(run)
        >>> plan = prepare(load_config("config.yaml", ["--max_steps", "4"]))
        >>> plan.describe()["steps"]
        4
        >>> trainer = make_trainer(plan)  # trainer.train() now trains alone
        >>> summary = train_and_save(plan, trainer)  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        >>> summary["steps"], Path(summary["model"]) == plan.output_dir / "final"
        (4, True)
    """

    config: TrainConfig
    arguments: GISTTrainingArguments
    checkpoint: Path | None
    """The checkpoint to continue from."""
    train: Loaded
    eval: Loaded | None
    evaluator: BaseEvaluator | None
    models: dict[str, str]
    """Where student and guide are: ``folder``, ``cache`` or ``hub``."""
    batches: int | None = None
    """Of an epoch, in each process; None of a stream."""

    @property
    def output_dir(self) -> Path:
        return self.config.output_dir

    def describe(self) -> dict[str, Any]:
        """The models, the data and the size of the run, by name."""
        config, arguments = self.config, self.arguments
        batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        guide = f"{config.guide.path} ({self.models['guide']})" if config.guide else "none"
        if arguments.self_guided:
            guide = "the student itself"
        elif config.guide is None and not config.unguided:
            guide = "its embeddings in the data"
        return {
            "student": f"{config.student.path} ({self.models['student']})",
            "adapter": adapter_of(config.student),
            "guide": guide,
            **column_prompts(config, arguments, self.train),
            "train": describe(config.data.train, self.train),
            "eval": "none" if self.eval is None or config.data.eval is None else describe(config.data.eval, self.eval),
            "evaluator": "none" if self.evaluator is None else evaluator_names(self.evaluator),
            "rows a step": batch,
            "steps": steps_of(arguments, self.batches),
            "device": str(arguments.device),
            "output_dir": str(self.output_dir),
        }


def prepare(config: TrainConfig, *, resume: bool = False, overwrite: bool = False) -> RunPlan:
    """Load and check all that a configuration names, its models excepted; nothing is written.

    Args:
        config: as `gist_fast.config.load_config` reads it.
        resume: continue from the last checkpoint in ``output_dir``.
        overwrite: ``output_dir`` may hold a run, which `train_and_save` then replaces.

    Raises:
        InputError: a file, a model, a setting, or some of these together cannot be used.
    """
    checkpoint = prepare_folder(config.output_dir, resume=resume, overwrite=overwrite)
    if overwrite:
        check_sources(config.output_dir, _sources(config))
    if config.arguments.get("resume_from_checkpoint"):
        raise InputError("training.resume_from_checkpoint: the command continues a run with --resume instead.")
    try:
        arguments = _training_arguments(config)
    except InputError as error:
        raise blamed(config, error, _training_arguments) from error
    _check_logging(arguments)
    models = check_models(config, arguments)
    saved = SavedModel(config.student.path, "student", config.student.revision)
    _choose_best_metric(config, arguments, saved.similarity)
    if config.guide and config.guide.columns:
        cache_folder(None)
    train_set = load_sources(config.data.train, "data.train", arguments.seed, endless=True)
    eval_set = None if config.data.eval is None else load_sources(config.data.eval, "data.eval", arguments.seed)
    _check_guide(config, arguments, carries_guide(train_set))
    check_run(arguments, train_set, eval_set)
    evaluator = None if config.evaluation is None else configured_evaluator(config.evaluation)

    def start(config: TrainConfig) -> int | None:
        with unnoticed():  # what there is to say was said
            arguments = _training_arguments(config)
        return rehearse(
            arguments,
            train_set,
            eval_set,
            evaluator,
            guide=config.guide is not None,
            unguided=config.unguided,
            # With guide.columns the data are others by then, so they are compared later.
            checkpoint=None if config.guide and config.guide.columns else checkpoint,
        )

    stand_in()  # what fails here is no setting's fault
    try:
        batches = start(config)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise blamed(config, error, start) from error
    steps = steps_of(arguments, batches)
    if arguments.get_warmup_steps(steps) >= steps > 1:
        logger.warning(
            "training.warmup_steps: %s of %s steps, so that the learning rate never comes down from its rise.",
            arguments.get_warmup_steps(steps),
            steps,
        )
    return RunPlan(
        config=config,
        arguments=arguments,
        checkpoint=checkpoint,
        train=train_set,
        eval=eval_set,
        evaluator=evaluator,
        models=models,
        batches=batches,
    )


def _sources(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """All that a configuration may read, by its key."""
    yield "the configuration", str(config.source)
    for section in ("student", "guide", "data", "evaluation"):
        yield from _texts(section, getattr(config, section))
    if base := SavedModel(config.student.path, "student", config.student.revision).adapter_base:
        yield "student.path (the base of its adapter)", base


def _texts(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, (str, Path)):
        yield key, str(Path(value).expanduser())
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _texts(f"{key}.{field.name}", getattr(value, field.name))
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from _texts(f"{key}.{name}", each)


def _check_logging(arguments: GISTTrainingArguments) -> None:
    """Raise `InputError` where TensorBoard could not write; by default it writes into the run's own folder."""
    folder = os.environ.get("TENSORBOARD_LOGGING_DIR")
    if folder and "tensorboard" in (arguments.report_to or ()):
        try_to_write(Path(folder).expanduser(), "TENSORBOARD_LOGGING_DIR", "set another folder, or unset it")


def _training_arguments(config: TrainConfig) -> GISTTrainingArguments:
    # Where it was given what to evaluate on, evaluate.
    unsaid = (config.data.eval or config.evaluation) and "eval_strategy" not in config.arguments
    return config.training_arguments(**({"eval_strategy": "epoch"} if unsaid else {}))


def prepare_profile(config: TrainConfig, *, steps: int, warmup: int, folder: Path) -> RunPlan:
    """As `gist_fast.pipeline.prepare`, for `gist_fast.profiling.profile_training`: nothing is evaluated or saved.

    Args:
        folder: where the trainer may write, an empty one. The run's own folder is not even looked at: it may hold a
            run, or not exist.

    Raises:
        InputError: several processes were started, or as `prepare` says.
    """
    config = dataclasses.replace(config, arguments={**config.arguments, "output_dir": str(folder)})
    # What a profile leaves out (pushing to the hub, reports, the best model) need not be possible here.
    changes = profiling_arguments(steps, warmup, folder)
    plan = prepare(dataclasses.replace(config, arguments={**config.arguments, **changes}))
    if plan.arguments.world_size > 1:
        raise InputError(f"profile: expected one process, got {plan.arguments.world_size}; start it without torchrun.")
    return dataclasses.replace(plan, config=config, eval=None, evaluator=None)


def make_trainer(plan: RunPlan) -> GISTTrainer:
    """Load the models, embed the texts where ``guide.columns`` asks for it, and make the trainer.

    Raises:
        InputError: a model cannot be loaded, or does not go with the settings.
    """
    config, arguments = plan.config, plan.arguments
    attention = choose_attention(arguments.device.type, half=arguments.half_precision is not None)
    student = load_configured(config.student, "student", attention)
    if config.student.max_seq_length:
        student.max_seq_length = config.student.max_seq_length
    check_positions("student.max_seq_length", student.max_seq_length, student, "student")
    if config.student.lora:
        add_lora(student, config.student.lora)
    # Before any text is embedded.
    _choose_best_metric(config, arguments, student.similarity_fn_name)
    check_dims(arguments.matryoshka_dims, arguments.matryoshka_weights, student.get_embedding_dimension())
    guide, train_set, eval_set = None, plan.train, plan.eval
    if config.guide:
        # Outside of the trainer's autocast, flash-attn would meet float32.
        guide = load_configured(config.guide, "guide", Attention(None, "") if config.guide.columns else attention)
        if config.guide.columns:
            train_set = with_guide_columns(train_set, guide, arguments, "data.train")
            if eval_set is not None:
                eval_set = with_guide_columns(eval_set, guide, arguments, "data.eval")
            guide = None
    return GISTTrainer(
        model=student,
        args=arguments,
        train_dataset=train_set,
        eval_dataset=eval_set,
        guide=guide,
        guided=False if config.unguided else None,
        evaluator=plan.evaluator,
    )


def _choose_best_metric(config: TrainConfig, arguments: GISTTrainingArguments, similarity: str | None) -> None:
    sources = config.data.eval
    datasets = sources if isinstance(sources, dict) else None if sources is None else [""]
    choose_best_metric(arguments, config.evaluation, datasets, similarity)


def _check_guide(config: TrainConfig, arguments: GISTTrainingArguments, carried: bool) -> None:
    """Raise `InputError` unless exactly one guide is named, or none is wanted, and the loss can be computed with it.

    Args:
        carried: whether the training data carry a guide's embeddings.
    """
    guided = bool(config.guide) or arguments.self_guided or (carried and not config.unguided)
    try:
        check_self_guiding(arguments, carries_embeddings=carried, without_guide=config.unguided)
        width = SavedModel(config.student.path, "student", config.student.revision).width
        check_loss_settings(arguments, guided=guided, guide=config.guide is not None, width=width)
    except (ValueError, TypeError) as error:
        raise InputError(f"{config.source}: loss.{error}") from error
    if config.guide and arguments.hard and _same_model(config.guide, config.student):
        raise InputError(
            f"{config.source}: loss.hard: expected a guide other than the student, got {config.guide.path} for both. "
            "They give the same scores, so hardly a negative would be left; name another guide, or set hard: false."
        )
    if config.guide and carried:
        raise InputError(
            f"guide: {config.guide.path}, but the training data carry embeddings of a guide already, perhaps of "
            "another one; leave out 'guide', or train on data without those columns."
        )
    if not guided and not config.unguided:
        raise InputError(
            f"{config.source}: 'guide' is missing, and the training data carry no embeddings of one; name a guide, or "
            "write 'guide: null' to train without, or 'self_guided: true'."
        )


def _same_model(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether both are the same files; a folder may be written in two ways."""
    paths = [Path(model.path).expanduser() for model in (one, other)]
    if all(path.exists() for path in paths):
        return paths[0].samefile(paths[1])
    return (one.path, one.revision) == (other.path, other.revision)
