"""`GISTTrainer`: sentence-transformers' trainer, with a guide."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.base.losses.gradcache import has_static_embedding_input
from sentence_transformers.base.sampler import BatchSamplers
from torch import Tensor, nn

from gist_fast.data.embedded_rows import read_as_stored, with_name, without_embeddings
from gist_fast.data.named import by_name, columns_by_dataset
from gist_fast.data.names import GUIDE_SUFFIX, holds_texts
from gist_fast.data.per_column import check_lengths, check_names, check_positions
from gist_fast.functional.loss_config import LossConfig
from gist_fast.losses import CachedGISTEmbedLoss, GISTEmbedLoss, GuidedLoss
from gist_fast.losses.guide import OURS, check_model, students_own
from gist_fast.losses.mini_batches import default_tokens
from gist_fast.losses.temperature import LOG_TEMPERATURE, as_float
from gist_fast.runtime.errors import InputError
from gist_fast.runtime.profiler_regions import OPTIMIZER, WAITING, named
from gist_fast.training.arguments import GISTTrainingArguments
from gist_fast.training.batches import check_loader, check_sampler
from gist_fast.training.callbacks import (
    DeviceCallback,
    LogSource,
    ThroughputCallback,
    gathered_figures,
    mean_over_processes,
    rounded,
    show_on_bar,
)
from gist_fast.training.collator import GISTDataCollator, GuideTokenizer
from gist_fast.training.column_checks import LABELS, check_columns
from gist_fast.training.distributed_checks import check_batches, check_parallelism, check_settings
from gist_fast.training.loss_checks import check_datasets, check_self_guiding
from gist_fast.training.no_duplicates_sampler import NoDuplicatesBatchSampler
from gist_fast.training.resume import LongRunMixin
from gist_fast.training.student_checks import check_trainable, warn_of_half
from gist_fast.training.temperature_schedule import TemperatureCallback, check_schedule

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset
    from sentence_transformers.base.evaluation import BaseEvaluator
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import BatchSampler
    from transformers import EvalPrediction, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback

logger = logging.getLogger(__name__)


class GISTTrainer(LongRunMixin, SentenceTransformerTrainer):
    """Trains a student under a guide.

    All that ``SentenceTransformerTrainer`` takes and does stays: datasets, samplers, evaluators, callbacks, resuming,
    the best model, the model card. On top of it,

    - without a `loss`, it builds the guided one from its arguments (`GISTTrainingArguments`), gradient-cached: any
      batch size fits, and while memory lasts no text is forwarded twice;
    - the guide reads the *raw* texts with its own tokenizer, prompt and maximum length, or is not run at all where the
      dataset carries its embeddings (`gist_fast.embed_guide`);
    - every log of the training loss carries the share of pairs masked in each block (``masked_ap`` and so on), the
      mean similarity of the positives and that of the hardest negatives, the speed, and what the run takes of the
      machine (`gist_fast.training.callbacks`);
    - a run that is cut off at any moment and resumed ends in the same weights (`gist_fast.training.resume`).

    Args:
        guide: the guide of the loss built here. None with a dataset that carries guide embeddings, or to train without
            a guide. A `loss` that is passed brings its own.
        guided: False trains without a guide, also where the dataset carries embeddings of one. None: with one, if there
            is a guide or its embeddings.
        All others: those of ``SentenceTransformerTrainer``.

    Raises:
        ValueError: both a `loss` and a `guide` were given, or a `guide` and a dataset with a guide's embeddings; only
            part of the text columns has guide embeddings, or the student is to be distributed in a way that guided
            losses do not know (`gist_fast.training.distributed_checks`).

    Example:
        >>> arguments = GISTTrainingArguments("run", max_steps=2, learning_rate=1e-5, disable_tqdm=True)
        >>> trainer = GISTTrainer(student, arguments, pairs, guide=guide)
        >>> result = trainer.train()  # doctest: +ELLIPSIS
        {...}
        >>> result.global_step
        2
    """

    args: GISTTrainingArguments
    data_collator_class = GISTDataCollator
    training_args_class = GISTTrainingArguments

    def __init__(
        self,
        model: SentenceTransformer | None = None,
        args: GISTTrainingArguments | None = None,
        train_dataset: Dataset | DatasetDict | IterableDataset | dict[str, Dataset] | None = None,
        eval_dataset: Dataset | DatasetDict | IterableDataset | dict[str, Dataset] | None = None,
        loss: nn.Module | dict[str, nn.Module] | Callable | dict[str, Callable] | None = None,
        evaluator: BaseEvaluator | list[BaseEvaluator] | None = None,
        data_collator: Callable | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        model_init: Callable[[], SentenceTransformer] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        guide: SentenceTransformer | None = None,
        guided: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if loss is not None and (guide is not None or guided is not None):
            name = "guide" if guide is not None else "guided"
            raise InputError(f"{name}: a loss was given too, and it brings its own guide. Give one of the two.")
        if loss is not None and isinstance(args, GISTTrainingArguments) and (changed := args.changed_loss_settings()):
            logger.warning(
                "args: %s: of the loss that the trainer would build, and not looked at, since a loss was given.",
                ", ".join(changed),
            )
        if guide is not None and guided is False:
            raise InputError("guided: expected True with a guide, got False. Leave out one of the two.")
        if guide is not None:
            check_model("guide", guide)
        for name in (
            ("router_mapping", "prompts", "max_length", "guide_prompts", "guide_max_length") if args is not None else ()
        ):
            check_names(name, getattr(args, name, None), columns_by_dataset(train_dataset, eval_dataset))
        check_lengths("max_length", getattr(args, "max_length", None), getattr(model, "max_seq_length", None))
        check_lengths("guide_max_length", getattr(args, "guide_max_length", None))
        # A collator of another kind may take columns of any kind.
        labels = LABELS if data_collator is None else getattr(data_collator, "valid_label_columns", None)
        for argument, source in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if labels is not None:
                check_columns(argument, source, labels)
        if model is not None:
            check_positions("model.max_seq_length", getattr(model, "max_seq_length", None), model, "student")
        self._guide = guide
        self._guided = guided
        self._makes_loss = loss is None
        self._carries_embeddings = _all_carry_embeddings(
            loss, getattr(args, "mask_negatives", True), train_dataset=train_dataset, eval_dataset=eval_dataset
        )
        if guide is not None and self._carries_embeddings:
            raise InputError(
                f"guide: the dataset carries embeddings of a guide already (columns ending in {GUIDE_SUFFIX}), perhaps "
                "of another one; leave the guide out, or remove those columns."
            )
        self._tokenizing_guide = None if self._carries_embeddings else guide or _only_guide(loss)
        check_settings(args)
        if processing_class is not None:  # an older name of it may be among kwargs
            kwargs["processing_class"] = processing_class
        super().__init__(
            model, args, train_dataset, eval_dataset, loss, evaluator, data_collator, model_init=model_init,
            compute_metrics=compute_metrics, callbacks=callbacks, optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics, **kwargs,
        )  # fmt: skip
        check_trainable(self.model)
        warn_of_half(self.model)
        losses = [guided for _, guided in _guided_losses(self.loss)]
        if losses:
            gathers = any(guided.gather_across_devices for guided in losses)
            check_parallelism(self, gathers, caches=any(hasattr(guided, "uses_gradient_cache") for guided in losses))
        for source in (ThroughputCallback, DeviceCallback):
            if not any(isinstance(callback, source) for callback in self.callback_handler.callbacks):
                self.add_callback(source())
        if self.accelerator.dataloader_config.dispatch_batches:
            raise InputError(
                "accelerator_config.dispatch_batches: a batch that one process hands out cannot be cut into rows, as "
                "distinct texts are tokenised once for the guide; leave it out, and each process reads its own rows."
            )
        # None would mean True for streams.
        self.accelerator.dataloader_config.dispatch_batches = False
        if self._tokenizing_guide is None and not self._carries_embeddings:
            # A loss that was given as a function of the model exists only now.
            self._tokenizing_guide = _only_guide(self.loss)
        if self._makes_loss and self.args.temperature_schedule is not None:
            self.add_callback(TemperatureCallback(self))
        # Only now is it known whether the loss remembers texts; and the collator may be the caller's own.
        if isinstance(self.data_collator, GISTDataCollator):
            self._take_rows(self.data_collator, losses)
            check_datasets(self.train_dataset, self.eval_dataset, self._configs_of)
            names = {*by_name(self.train_dataset), *by_name(self.eval_dataset)}
            of_guided = frozenset(name for name in names if self._configs_of(name))
            self.data_collator.unequal = of_guided if isinstance(self.loss, dict) else len(losses) > 0
            reader = self._tokenizing_guide
            if reader is not None and self.data_collator.tokenize_for_guide is None:
                check_positions("guide_max_length", self.args.guide_max_length, reader)
                if self.args.guide_max_length is None and reader is not self.model:
                    check_positions("guide.max_seq_length", reader.max_seq_length, reader)
                self.data_collator.tokenize_for_guide = GuideTokenizer(
                    reader,
                    self.args.guide_prompts,
                    self.args.guide_max_length,
                    with_keys=any(each.guide_cache for each in losses),
                )
        elif self._tokenizing_guide is not None:
            logger.warning(
                "The data collator is no GISTDataCollator, so the guide reads the student's tokens, decoded where its "
                "vocabulary differs, instead of the raw texts."
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the parents do; a student that was frozen since is refused."""
        if self.model is not None:
            check_trainable(self.model)
        return super().train(*args, **kwargs)

    def call_model_init(self, trial: Any = None) -> Any:
        """A new student; and a new loss, if this trainer makes it, since a search may have changed its arguments."""
        model: Any = super().call_model_init(trial)
        if self._makes_loss and hasattr(self, "loss"):
            self.loss = self.prepare_loss(self.get_default_loss(model), model)
        return model

    def get_default_loss(self, model: SentenceTransformer) -> nn.Module:  # type: ignore[override]
        """The guided loss that the arguments describe."""
        args = self.args
        check_schedule(args)
        check_self_guiding(args, carries_embeddings=self._carries_embeddings, without_guide=self._guided is False)
        known = self._guide is not None or self._carries_embeddings or args.self_guided
        guided = known if self._guided is None else self._guided
        if not guided and self._guided is None:
            logger.warning("No guide, and no guide embeddings in the dataset: training on all in-batch negatives.")
        settings = {**args.loss_settings(), "guided": guided}
        rows, tokens = args.mini_batch_size, args.mini_batch_num_tokens
        if rows is not None and tokens is not None:
            raise InputError(f"mini_batch_num_tokens: expected None with mini_batch_size {rows}, got {tokens}.")
        if rows is None and tokens is None:
            if has_static_embedding_input(model):
                return GISTEmbedLoss(model, self._guide, **settings)
            tokens = default_tokens(args.device)
        return CachedGISTEmbedLoss(
            model,
            self._guide,
            mini_batch_size=32 if rows is None else rows,
            mini_batch_num_tokens=tokens,
            activation_memory=args.activation_memory,  # type: ignore[arg-type]  # the loss checks it
            **settings,
        )

    def prepare_loss(self, loss: Any, model: Any) -> Any:
        """The loss on the right device; a guided one in the type that this trainer's mixed precision computes in."""
        prepared = super().prepare_loss(loss, model)
        for _, guided in _guided_losses(prepared):
            guided.compute_dtype = guided.compute_dtype or self.args.half_precision
        return prepared

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss of a batch, where each dataset may have its own."""
        self._dataset_name = inputs.get("dataset_name", "")
        return super().compute_loss(model, inputs, *args, **kwargs)

    def collect_features(self, inputs: dict[str, Any]) -> tuple[list[dict[str, Any]], Tensor | None]:
        """The features of each column: those of sentence-transformers, though no key of ``negative_1`` comes into
        ``negative`` too, nor of ``x_guide`` into ``x``; what is there for the guide, only where the loss is a guided
        one."""
        features, labels = super().collect_features(inputs)
        prefixes = [k[: -len("input_ids")] for k in inputs if k.endswith("_input_ids")]
        if len(prefixes) == len(features):
            for prefix, column in zip(prefixes, features, strict=True):
                for key in [k for k in column if _column_of(prefix + k, prefixes) != prefix]:
                    del column[key]
        # sentence-transformers takes the dataset's name out of the inputs before it asks for the features.
        loss = self.loss[self._dataset_name] if isinstance(self.loss, dict) else self.loss
        if not any(_guided_losses(loss)):
            features = [students_own(f) for f in features]
        return features, labels

    @staticmethod
    def _take_rows(collator: GISTDataCollator, losses: list[GuidedLoss]) -> None:
        """Let the collator bring what the losses want to know of each row beside its texts."""
        for setting in ("groups", "row_margins", "mask_negatives"):
            wanted = {getattr(each.config, setting) for each in losses}
            if len(wanted) > 1:
                raise InputError(
                    f"{setting}: expected the same for all losses, which one collator serves, got "
                    f"{', '.join(sorted(map(repr, wanted)))}."
                )
            if wanted and getattr(collator, setting) == getattr(GISTDataCollator, setting):
                setattr(collator, setting, wanted.pop())

    def _configs_of(self, dataset: str) -> list[LossConfig]:
        """Those of the guided losses that a dataset of that name has."""
        loss = self.loss.get(dataset) if isinstance(self.loss, dict) else self.loss
        return [each.config for _, each in _guided_losses(loss)]

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The parent's, without a learnt temperature, which a decay would draw to 1."""
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith(LOG_TEMPERATURE)]

    def get_train_dataloader(self) -> Any:
        """sentence-transformers' dataloader, which must give every rank a batch in every step."""
        loader = super().get_train_dataloader()
        check_batches(loader)
        check_loader(self, loader)
        return loader

    def get_batch_sampler(self, dataset: Dataset, *args: Any, **kwargs: Any) -> BatchSampler | None:  # type: ignore[override]
        """sentence-transformers' samplers, and for ``no_duplicates`` the fast `NoDuplicatesBatchSampler`.

        Raises:
            InputError: the dataset has no batch.
        """
        if self.args.batch_sampler == BatchSamplers.NO_DUPLICATES:
            sampler: Any = NoDuplicatesBatchSampler(dataset, *args, **kwargs)
        else:
            sampler = super().get_batch_sampler(dataset, *args, **kwargs)
        check_sampler(self, dataset, sampler, args[0] if args else kwargs["batch_size"])
        return sampler

    def should_dataset_name_column_be_added(self, dataset: Any, args: Any, loss: Any) -> bool:
        """Whether the collator needs to know which of several datasets a batch is of."""
        by_dataset = (args.max_length, args.guide_prompts, args.guide_max_length)
        return bool(
            super().should_dataset_name_column_be_added(dataset, args, loss)
            or (isinstance(dataset, dict) and any(isinstance(setting, dict) for setting in by_dataset))
        )

    def add_dataset_name_column(self, dataset: Any, dataset_name: str | None = None) -> Any:
        """As sentence-transformers, but for guide embeddings, which its transform would make Python lists of."""
        embeddings = not isinstance(dataset, dict) and any(c.endswith(GUIDE_SUFFIX) for c in dataset.column_names or ())
        if dataset_name and embeddings and getattr(dataset, "format", {}).get("type") == "numpy":
            return with_name(dataset, dataset_name)
        return super().add_dataset_name_column(dataset, dataset_name)

    def preprocess_dataset(self, dataset: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The parent's; guide embeddings are read as they are stored, whatever format the dataset came in."""
        if not hasattr(dataset, "_sentence_transformers_preprocessed"):
            dataset = read_as_stored(dataset)
        return super().preprocess_dataset(dataset, *args, **kwargs)

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """The parent's, which looks at the datasets: without the guide's embeddings, which are nothing to show."""
        train, evaluation = self.train_dataset, self.eval_dataset
        self.train_dataset, self.eval_dataset = without_embeddings(train), without_embeddings(evaluation)
        try:
            super().add_model_card_callback(default_args_dict)
        finally:
            self.train_dataset, self.eval_dataset = train, evaluation

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the guide did since the last log of the training loss, the speed, and what the machine says."""
        if "loss" in logs:
            callbacks, processes = self.callback_handler.callbacks, self.args.world_size
            # What tells logs apart is the dataset's name, where each has a loss of its own.
            losses = [(f"{name}_" if name else "", loss) for name, loss in _guided_losses(self.loss)]
            done = {prefix + name: value for prefix, loss in losses for name, value in loss.statistics.pop().items()}
            logs.update(rounded(mean_over_processes(done, processes)))
            for prefix, loss in losses:
                if loss.config.learn_temperature or self.args.temperature_schedule is not None:
                    logs[f"{prefix}temperature"] = as_float(loss.temperature)
            logs.update(gathered_figures(callbacks, processes))
            show_on_bar(callbacks, logs)
        super().log(logs, start_time)

    @named(WAITING)
    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's: the batches of one step."""
        return super().get_batch_samples(*args, **kwargs)

    @named(OPTIMIZER)
    def _clip_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        return super()._clip_grad_norm(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The parent's step, once the callbacks have counted the batch."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, LogSource):
                callback.count(inputs)
        return super().training_step(model, inputs, *args, **kwargs)


def _guided_losses(losses: Any) -> Iterator[tuple[str, GuidedLoss]]:
    """The guided losses in a loss, which a decorator such as ``MatryoshkaLoss`` may wrap, or in several by the names of
    their datasets; each with that name, empty for one alone. What is a function yet holds none."""
    for name, loss in by_name(losses).items():
        for module in loss.modules() if isinstance(loss, nn.Module) else ():
            if isinstance(module, GuidedLoss):
                yield name, module


def _only_guide(losses: Any) -> SentenceTransformer | None:
    """The guide of the losses that are already built, where there is exactly one."""
    guides = {id(loss.guide): loss.guide for _, loss in _guided_losses(losses) if loss.guide is not None}
    if len(guides) > 1:
        logger.warning(
            "The losses have %d guides; each reads the student's tokens, decoded where its vocabulary differs, instead "
            "of the raw texts.",
            len(guides),
        )
    return next(iter(guides.values())) if len(guides) == 1 else None


def _all_carry_embeddings(loss: Any, mask_negatives: bool, **sources: Any) -> bool:
    """Whether the datasets carry the guide's embeddings of every text column that it judges; those whose loss is a
    guided one.

    Args:
        loss: one for all, by the dataset's name, or None for the guided one that is built here.
        mask_negatives: of that one.
        sources: datasets, or dictionaries of them, by the argument that they came as.

    Raises:
        ValueError: some text columns have them and some do not.
    """
    having, lacking = [], []
    for argument, source in sources.items():
        for name, dataset in by_name(source).items():
            of_dataset = loss.get(name) if isinstance(loss, dict) else loss
            if not _is_guided(of_dataset):
                continue
            judges = [each.mask_negatives for _, each in _guided_losses(of_dataset)] or [mask_negatives]
            where = f" of {argument}[{name!r}]" if name else f" of {argument}"
            columns = dataset.column_names or []
            embeddings = [c for c in columns if c.endswith(GUIDE_SUFFIX)]
            texts = [c for c in columns if c not in (*embeddings, "dataset_name") and holds_texts(dataset, c)]
            texts = texts if any(judges) else texts[:2]
            having += [(c, where) for c in texts if c + GUIDE_SUFFIX in embeddings]
            lacking += [(c, where) for c in texts if c + GUIDE_SUFFIX not in embeddings]
    if having and lacking:
        several = len({where for _, where in having + lacking}) > 1
        with_them, without = ([c + where if several else c for c, where in found] for found in (having, lacking))
        raise InputError(
            f"dataset: columns {', '.join(with_them)} have guide embeddings, but {', '.join(without)} do not; every "
            "text column of the training and evaluation datasets with a guided loss needs them "
            "(gist_fast.embed_guide), or none."
        )
    return bool(having)


def _is_guided(loss: Any) -> bool:
    """Whether a loss reads a guide's embeddings; one that is yet to be made, None or a function, may."""
    return not isinstance(loss, nn.Module) or any(guided.guided for _, guided in _guided_losses(loss))


def _column_of(key: str, prefixes: list[str]) -> str:
    """Which column's prefix a key of a batch belongs to: ``x_guide_rows`` is the guide's of ``x``, even beside a column
    ``x_guide``, whose tokens are ``x_guide_input_ids``."""
    fitting = [prefix for prefix in prefixes if key.startswith(prefix)]
    ours = [prefix for prefix in fitting if key[len(prefix) :] in OURS]
    return max(ours or fitting, key=len)
