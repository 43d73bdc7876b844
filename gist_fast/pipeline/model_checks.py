"""What a configuration asks of its models, held to what is known of them before they are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gist_fast.data.named import by_name
from gist_fast.data.names import GUIDE_SUFFIX, MARGIN, group_columns, holds_texts
from gist_fast.data.per_column import check_lengths, guide_prompt, value_for
from gist_fast.losses.guide import refuse_routes
from gist_fast.pipeline.models import check_model, check_no_adapter, check_peft
from gist_fast.pipeline.saved_model import SavedModel
from gist_fast.runtime.errors import InputError

if TYPE_CHECKING:
    from gist_fast.config.load import TrainConfig
    from gist_fast.config.schema import ModelConfig, StudentConfig
    from gist_fast.data.named import Loaded
    from gist_fast.training.arguments import GISTTrainingArguments


def check_models(config: TrainConfig, arguments: GISTTrainingArguments) -> dict[str, str]:
    """Where student and guide are: ``folder``, ``cache`` or ``hub``.

    Raises:
        InputError: one cannot be loaded, or does not read as many tokens as it is to.
    """
    student = config.student
    places = {"student": _check_model(student, "student")}
    saved = _saved(student, "student")
    if student.lora:
        check_peft()
        check_no_adapter(saved.adapter_base is not None)
    if saved.routes and not arguments.router_mapping:
        raise InputError(
            f"training.router_mapping: expected which route ({', '.join(saved.routes)}) each column takes, because the "
            "student has a Router; give it, as {anchor: query, positive: document}."
        )
    check_length("student.max_seq_length", student.max_seq_length, saved)
    check_lengths("max_length", arguments.max_length, student.max_seq_length or saved.max_seq_length)
    if config.guide:
        places["guide"] = _check_model(config.guide, "guide")
        guide = _saved(config.guide, "guide")
        refuse_routes(guide.routes)
        check_length("guide.max_seq_length", arguments.guide_max_length, guide)
    return places


def check_length(name: str, length: Any, saved: SavedModel) -> None:
    """Refuse a maximum length above the positions that a saved model has, and one of its own that is.

    Args:
        name: of the setting.
        length: one number, or numbers by column or dataset; None for the model's own.

    Raises:
        InputError: naming both.
    """
    most = saved.positions
    check_lengths(name, length, most, f"the positions that the {saved.role} has")
    own = saved.max_seq_length
    if length is None and most is not None and own is not None and own > most:
        raise InputError(
            f"{saved.role}: {saved.path} says that it reads {own} tokens of a text, but has positions for {most}; set "
            f"{name} to at most {most}."
        )


def adapter_of(student: StudentConfig) -> str | None:
    """The adapter that is trained; None where all weights are."""
    if student.lora:
        return f"LoRA of rank {student.lora.r}"
    base = _saved(student, "student").adapter_base
    return None if base is None else f"the student's own, on {base}"


def column_prompts(config: TrainConfig, arguments: GISTTrainingArguments, data: Loaded) -> dict[str, Any]:
    """Before which prompt each column's texts are read, by model; by dataset, where there are several."""
    columns = {name: _text_columns(dataset) for name, dataset in by_name(data).items()}

    def told(prompt: Any) -> Any:
        found = {n: {c: prompt(c, k, n or None) for k, c in enumerate(names)} for n, names in columns.items()}
        return found.get("", found)

    prompts: dict[str, Any] = {
        "student prompts": told(lambda column, _, dataset: value_for(arguments.prompts, column, dataset) or "")
    }
    if config.guide:
        saved, given = _saved(config.guide, "guide"), arguments.guide_prompts
        if given is None and not saved.is_here:
            prompts["guide prompts"] = "its own, not known before it is loaded"
        else:
            prompts["guide prompts"] = told(lambda c, k, dataset: guide_prompt(saved, c, k, given, dataset))
    return prompts


def _check_model(model: ModelConfig, role: str) -> str:
    trusted: dict[str, Any] = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    return check_model(model.path, role, switch=f"{role}.trust_remote_code: true", **trusted)


def _saved(model: ModelConfig, role: str) -> SavedModel:
    return SavedModel(model.path, role, model.revision)


def _text_columns(dataset: Any) -> list[str]:
    """A stream may not know its columns' types."""
    names = [name for name in dataset.column_names or [] if not name.endswith(GUIDE_SUFFIX)]
    beside = [MARGIN, *group_columns(names)]
    return [n for n in names if (holds_texts(dataset, n) if dataset.features else n not in beside)]
