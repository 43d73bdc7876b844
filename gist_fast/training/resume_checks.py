"""What a run was started with, kept in its checkpoints, and what becomes of a change when it is resumed.

A change of what a step sees or minimises (data, batch, seed, loss, guide) makes another run of it and is refused. Other
changes that move the weights (steps, learning rate, precision) are named in a warning. What has no bearing on them is
left alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gist_fast.data.named import by_name
from gist_fast.functional.loss_config import LossConfig
from gist_fast.losses.fingerprint import model_fingerprint
from gist_fast.runtime.errors import InputError

logger = logging.getLogger(__name__)

FILE = "gist_fast_run.json"
SAMPLED_ROWS = 256
"""Rows of a dataset, evenly spread, that are compared; all would take long where it is large."""

REFUSED = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed", "batch_sampler"),
    *("multi_dataset_batch_sampler", "dataloader_drop_last", "prompts", "max_length", "guide_prompts"),
    *("guide_max_length", "temperature_schedule", "temperature_end", "temperature_decay"),
)
"""Arguments whose change is refused, beside the loss, the data, the guide, the student and the number of processes."""
WITHOUT_EFFECT = (
    *("output_dir", "run_name", "project", "trackio_space_id", "report_to", "disable_tqdm", "local_rank", "do_train"),
    *("do_eval", "do_predict", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_accumulation_steps"),
    *("per_device_eval_batch_size", "prediction_loss_only", "load_best_model_at_end", "metric_for_best_model"),
    *("greater_is_better", "dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers"),
    *("dataloader_pin_memory", "resume_from_checkpoint", "resume_with_changes", "overwrite_output_dir"),
    *("skip_memory_metrics", "include_num_input_tokens_seen", "ddp_timeout", "debug", "enable_jit_checkpoint"),
    *("train_sampling_strategy", "fp16_full_eval", "bf16_full_eval", "batch_eval_metrics", "backend", "mask_bits"),
)
_OF_MODELS = ("guide", "max_length", "guide_max_length", "matryoshka_dims", "matryoshka_weights")
"""Settings that a trainer with another student has not."""
_OF_NO_ADAPTER = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version")
"""Settings of peft that say where an adapter came from."""
_PREFIXES_WITHOUT_EFFECT = ("log_", "logging_", "save_", "push_to_hub", "hub_", "include_")
_HARMLESS_LOSS_CHANGES = ("mini_batch_size", "mini_batch_num_tokens")
"""Equal to rounding, but for dropout, which is drawn mini-batch by mini-batch."""
_OF_THE_LOSS = (*LossConfig().recorded(), *_HARMLESS_LOSS_CHANGES)
"""What every loss lists itself."""


def run_settings(trainer: Any) -> dict[str, Any]:
    """The settings of a trainer's run: strings, numbers, and digests of what is too large to keep."""
    arguments = {
        name: _plain(value)
        for name, value in trainer.args.to_dict().items()
        if name not in WITHOUT_EFFECT and name not in _OF_THE_LOSS and not name.startswith(_PREFIXES_WITHOUT_EFFECT)
    }
    settings = {
        "processes": trainer.args.world_size,
        **arguments,
        "student.max_seq_length": getattr(trainer.model, "max_seq_length", None),
        "student.parameters": sum(p.numel() for p in trainer.model.parameters()),
    }
    settings |= {f"student.{name}": value for name, value in _adapters(trainer.model)}
    for name, dataset in by_name(trainer.train_dataset).items():
        settings[f"data.train{'.' if name else ''}{name}"] = _digest_of_rows(dataset)
    # Several losses mostly have one guide, whose weights are read whole.
    fingerprint = functools.cache(model_fingerprint)
    for prefix, loss in _losses(trainer.loss):
        settings[prefix] = type(loss).__name__
        config = loss.get_config_dict() if hasattr(loss, "get_config_dict") else {}
        for name, value in config.items():
            if isinstance(value, (str, int, float, bool, list, tuple, type(None))):
                settings[f"{prefix}.{name}"] = _plain(value)
        guide = getattr(loss, "guide", None)
        if guide is not None:
            settings[f"{prefix}.guide"] = fingerprint(guide)
            settings["guide.max_seq_length"] = _plain(getattr(guide, "max_seq_length", None))
            settings["guide.prompts"] = _plain([getattr(guide, n, None) for n in ("prompts", "default_prompt_name")])
    return settings


def known_early(settings: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """The settings of a trainer with another student and guide, as far as they are those of the run to come; of the
    rest what a checkpoint says."""
    file = checkpoint / FILE
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    known = {}
    for name, value in settings.items():
        section, _, setting = name.partition(".")
        of_loss = section == "loss" and name in before and setting not in _OF_MODELS
        if section in ("data", "processes") or of_loss or (name in REFUSED and name not in _OF_MODELS):
            known[name] = value
    return {**{n: v for n, v in before.items() if not n.startswith("data.")}, **known}


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Keep the settings in a checkpoint."""
    (folder / FILE).write_text(json.dumps(settings, indent=1, sort_keys=True), encoding="utf-8")


def check_settings(checkpoint: Path, now: dict[str, Any], accept: bool) -> None:
    """Compare with what a checkpoint was made with.

    Args:
        accept: whether to go on with changes that are refused otherwise.

    Raises:
        InputError: naming each setting that makes another run of it, its old value and its new one.
    """
    file = checkpoint / FILE
    if not file.is_file():
        logger.warning("%s: does not say what its run was started with; nothing could be compared.", checkpoint)
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    old = [name for name, value in before.items() if name.endswith(".guide") and _is_old_digest(value)]
    if old:
        logger.warning(
            "%s: made by an earlier version, whose digest of a guide cannot be compared: make sure that it is "
            "the same guide.", checkpoint,
        )  # fmt: skip
        before |= {name: now[name] for name in old if name in now}
    # A setting that only one of the two versions of the program knows tells nothing.
    changed = {name: (before[name], now[name]) for name in before if name in now and before[name] != now[name]}
    one_sided = {name for name in before.keys() ^ now.keys() if name.startswith(("data.", "loss"))}
    changed |= {name: (before.get(name, "none"), now.get(name, "none")) for name in one_sided}
    if not changed:
        return
    refused = {name: values for name, values in changed.items() if _is_refused(name)}
    if refused and not accept:
        raise InputError(
            f"{checkpoint}: was made with other settings: {_listed(refused)}. Resumed so, it would be neither run; "
            "give the old ones, start anew, or set resume_with_changes to go on all the same."
        )
    logger.warning("%s: resumed with other settings: %s.", checkpoint, _listed(changed))


def _is_old_digest(value: Any) -> bool:
    """Whether a guide was told by the first numbers of its tensors, in 16 digits; a fingerprint has 32."""
    return isinstance(value, str) and len(value) == 16


def _is_refused(name: str) -> bool:
    section, _, rest = name.partition(".")
    if section.startswith("loss"):
        return rest.rpartition(".")[2] not in _HARMLESS_LOSS_CHANGES
    return name in REFUSED or section in ("data", "student", "guide") or name == "processes"


def _listed(changed: dict[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in sorted(changed.items()))


def _adapters(model: Any) -> Iterator[tuple[str, Any]]:
    """The settings of peft's adapters on a model, which its parameters do not show, by name."""
    for module in model.modules():
        adapters = getattr(module, "peft_config", None)
        for adapter, config in adapters.items() if isinstance(adapters, dict) else ():
            for name, value in config.to_dict().items():
                if name not in _OF_NO_ADAPTER:
                    yield f"adapter[{adapter}].{name}", _plain(value)


def _losses(loss: Any) -> Iterator[tuple[str, Any]]:
    """The losses, those inside a decorator such as ``MatryoshkaLoss`` too, by name."""
    for key, outer in by_name(loss).items():
        prefix = f"loss[{key}]" if key else "loss"
        inner = outer
        while inner is not None:
            yield prefix, inner
            inner, prefix = getattr(inner, "loss", None), f"{prefix}.inner"


def _plain(value: Any) -> Any:
    """What JSON gives back equal, without addresses in memory."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(item) for item in value)
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


def _digest_of_rows(dataset: Any) -> str:
    """Columns, the number of rows, and a digest of some of them; of a stream only the columns."""
    columns = list(getattr(dataset, "column_names", None) or [])
    if not hasattr(dataset, "__len__"):
        return f"a stream of {', '.join(columns) or 'unnamed columns'}"
    rows = len(dataset)
    plain = dataset.with_format(None) if hasattr(dataset, "with_format") else dataset
    digest = hashlib.sha256()
    for place in sorted({k * (rows - 1) // max(SAMPLED_ROWS - 1, 1) for k in range(SAMPLED_ROWS)}) if rows else []:
        digest.update(json.dumps(plain[place], default=str, sort_keys=True).encode())
    return f"{rows} rows of {', '.join(columns)} ({digest.hexdigest()[:16]})"
