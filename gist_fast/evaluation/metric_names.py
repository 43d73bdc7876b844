"""Which metrics the evaluations of a training run report, by name, and which of them chooses the best checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from gist_fast.config.schema import EvaluationConfig
from gist_fast.runtime.errors import InputError, nearest

if TYPE_CHECKING:
    from gist_fast.training.arguments import GISTTrainingArguments

RETRIEVAL_METRICS = ("ndcg@10", "mrr@10", "accuracy@1", "recall@10", "map@100")
_OTHER_METRICS = ("triplet_accuracy", "sts_spearman", "sts_pearson", "pair_accuracy", "pair_f1", "pair_ap")
METRICS = (*RETRIEVAL_METRICS, *_OTHER_METRICS)
"""Short names, which tables and summaries have."""
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
_PAIR_METRICS = ("ap", "accuracy", "accuracy_threshold", "f1", "f1_threshold", "precision", "recall", "mcc")


def short_name(name: str) -> str:
    """The short name: ``cosine_ndcg@10`` is ``ndcg@10``, ``sts_pearson_cosine`` is ``sts_pearson``."""
    kind, _, rest = name.partition("_")
    if kind == "sts":
        return f"sts_{rest.partition('_')[0]}"
    last = name.rpartition("_")[2]
    if kind == "pair":
        return f"pair_{last}"
    return "triplet_accuracy" if last == "accuracy" else last


def metrics_of(kind: str, similarity: str) -> list[str]:
    """What the evaluator of a kind reports; the metric that it is judged by comes first.

    Args:
        kind: ``retrieval``, ``triplet``, ``sts`` or ``pair_classification``.
        similarity: of `SIMILARITIES`, the model's own.
    """
    return {
        "retrieval": [f"{similarity}_{name}" for name in (*RETRIEVAL_METRICS, "precision@10")],
        "triplet": [f"{similarity}_accuracy"],
        "sts": [f"sts_{name}_{similarity}" for name in ("spearman", "pearson")],
        "pair_classification": [f"pair_{similarity}_{name}" for name in _PAIR_METRICS],
    }[kind]


def reported_metrics(config: EvaluationConfig | None, datasets: Iterable[str] | None, similarity: str) -> list[str]:
    """The names in the log, without their ``eval_``.

    Args:
        config: the section ``evaluation`` of a configuration.
        datasets: the names of the evaluation datasets, or one empty name where there is one dataset without a name.
        similarity: of `SIMILARITIES`, the student's own.
    """
    names = [f"{name}_loss" if name else "loss" for name in datasets or ()]
    if config is None:
        return names
    kinds = ["retrieval"] if config.pairs or config.queries else []
    kinds += [kind for kind in ("triplet", "sts", "pair_classification") if getattr(config, kind)]
    names += [name for kind in kinds for name in metrics_of(kind, similarity)]
    return [*names, "sequential_score"] if len(kinds) > 1 else names


def choose_best_metric(
    arguments: GISTTrainingArguments,
    config: EvaluationConfig | None,
    datasets: Iterable[str] | None,
    similarity: str | None,
) -> None:
    """Write the whole name of ``metric_for_best_model`` into the arguments, where a part of it was given.

    Args:
        config, datasets: see `reported_metrics`.
        similarity: None where it is not known yet: then a name that any similarity has will pass, and is left as it is.

    Raises:
        InputError: nothing reports such a metric, or several do; or ``greater_is_better`` would choose the worst model.
    """
    asked = arguments.metric_for_best_model
    wanted = [name for name in ("load_best_model_at_end",) if getattr(arguments, name)]
    wanted += ["save_strategy: best"] if arguments.save_strategy == "best" else []
    if arguments.eval_strategy == "no":
        if wanted:
            raise InputError(
                f"training.{wanted[0]}: nothing is evaluated, so that no model is the best; give data.eval or "
                "evaluation, and an eval_strategy other than 'no'."
            )
        return
    names = {one: reported_metrics(config, datasets, one) for one in ([similarity] if similarity else SIMILARITIES)}
    if not any(names.values()):
        raise InputError(
            "training.eval_strategy: expected data.eval or evaluation to go with it, got neither; add one, or leave "
            "it out."
        )
    if asked is None:
        if wanted:
            raise InputError(f"training.metric_for_best_model is missing, which {wanted[0]} needs; {_known(names)}.")
        return
    found = {one: _matches(asked, of) for one, of in names.items()}
    matches = next((of for of in found.values() if len(of) == 1), None)
    if matches is None:
        several = next((of for of in found.values() if of), None)
        if several:
            raise InputError(f"training.metric_for_best_model: {asked!r} could be {' or '.join(several)}; write which.")
        known = sorted({name for of in names.values() for name in of})
        default = " (the default)" if asked == "loss" else nearest(asked.removeprefix("eval_"), known)
        raise InputError(
            f"training.metric_for_best_model: expected a metric that is measured, got {asked!r}{default}; "
            f"{_known(names)}."
        )
    (metric,) = matches
    greater = not metric.endswith("loss")
    if arguments.greater_is_better is not None and arguments.greater_is_better != greater:
        raise InputError(
            f"training.greater_is_better: expected {str(greater).lower()} for {metric}, or nothing, got "
            f"{str(arguments.greater_is_better).lower()}, which would keep the worst model."
        )
    if similarity:
        arguments.metric_for_best_model = metric


def _matches(asked: str, names: list[str]) -> list[str]:
    """The whole names that a name could mean: itself, else those of which it is the short name, or the end."""
    # mteb writes ndcg_at_10, papers nDCG@10.
    asked = asked.lower().replace("_at_", "@").removeprefix("eval_")
    lower = {name.lower(): name for name in names}
    if asked in lower:
        return [lower[asked]]
    found = []
    for name in lower:
        without = "_".join(part for part in name.split("_") if part not in SIMILARITIES)
        if asked in (without, short_name(name)) or any(one.endswith(f"_{asked}") for one in (name, without)):
            found.append(lower[name])
    return found


def _known(names: dict[str, list[str]]) -> str:
    # Of the similarities that the model could have the usual one.
    known = next(iter(names.values()))
    return f"there are {', '.join(known)}"
