"""Loading models by folder or hub name, with errors that a user can act on."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gist_fast.data.per_column import check_positions, guide_prompt, positions
from gist_fast.pipeline.saved_model import MARKERS, SavedModel, check_tokenizer
from gist_fast.runtime.errors import InputError, first_line, nearest_file
from gist_fast.runtime.files import expanded

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from gist_fast.config.schema import LoraConfig, ModelConfig
    from gist_fast.inspection import Encode
    from gist_fast.pipeline.attention import Attention

logger = logging.getLogger(__name__)

MANY = 1000
"""Texts from which on encoding them shows its progress."""


def check_model(
    path: str,
    role: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    switch: str = "--trust-remote-code",
    tokenizer: bool = True,
) -> str:
    """Whether there is such a model, and whether it can be loaded, as far as can be told without its weights.

    Args:
        role: what to call the model in an error: ``student``, ``guide``.
        trust_remote_code: whether code that comes with the model may run.
        switch: how the user says so.
        tokenizer: whether to read its tokenizer, which takes longest and loading does too.

    Returns:
        Where it is: ``folder``, ``cache`` or ``hub`` (not seen yet).

    Raises:
        InputError: no folder of a model, nor a name that the hub could have; or as `SavedModel.check` says.
    """
    folder = expanded(path)
    if folder.exists():
        if not folder.is_dir() or not any((folder / marker).is_file() for marker in MARKERS):
            raise InputError(f"{role}: {path} holds no model; a folder with {' or '.join(MARKERS)} is needed.")
        place = "folder"
    elif not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path):
        raise InputError(f"{role}: {path}: no such folder{nearest_file(folder)}.")
    else:
        from huggingface_hub import try_to_load_from_cache

        found = (try_to_load_from_cache(path, marker, revision=revision) for marker in MARKERS)
        place = "cache" if any(isinstance(file, str) for file in found) else "hub"
    saved = SavedModel(path, role, revision)
    saved.check(trust_remote_code=trust_remote_code, switch=switch, tokenizer=tokenizer)
    if saved.pooling is not None:
        _say_once(f"{role}: {path} has no modules.json, so its tokens are pooled as is usual ({saved.pooling}).")
    if saved.adapter_base is not None:
        check_peft(role)
        base = f"{role}: {path} is an adapter, and its base model"
        trusted: dict[str, Any] = {"trust_remote_code": trust_remote_code, "switch": switch}
        check_model(saved.adapter_base, base, tokenizer=tokenizer, **trusted)
    return place


@functools.cache
def _say_once(message: str) -> None:
    logger.warning("%s", message)


def load_configured(model: ModelConfig, role: str, attention: Attention) -> SentenceTransformer:
    """`load_with_attention`, with the options of a section ``student`` or ``guide``; a student that is an adapter on a
    base is ready to train that adapter."""
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code, "revision": model.revision}
    options |= {"model_kwargs": dict(model.model_kwargs or {}), "switch": f"{role}.trust_remote_code: true"}
    loaded = load_with_attention(model.path, role, attention, **options)
    if role == "student":
        train_own_adapter(loaded)
    return loaded


def load_with_attention(path: str, role: str, attention: Attention, **options: Any) -> SentenceTransformer:
    """`load_model`, with that attention where the model knows it; an ``attn_implementation`` among the options wins."""
    asked = options.get("model_kwargs") or {}
    if attention.implementation is None or "attn_implementation" in asked:
        return load_model(path, role, **options)
    wanted = {**asked, "attn_implementation": attention.implementation}
    try:
        return load_model(path, role, **{**options, "model_kwargs": wanted})
    except InputError as error:
        model = load_model(path, role, **options)
        told = "%s: %s does not know %s, so its texts are padded (%s)."
        logger.info(told, role, path, attention.implementation, error.__cause__)
        return model


def load_model(path: str, role: str, switch: str = "--trust-remote-code", **options: Any) -> SentenceTransformer:
    """The model of that folder or hub name.

    Args:
        switch: how the user lets code run that comes with the model (``trust_remote_code`` among the options).

    Raises:
        InputError: it cannot be loaded.
    """
    trusted = {name: options[name] for name in ("revision", "trust_remote_code") if options.get(name)}
    place = check_model(path, role, switch=switch, tokenizer=False, **trusted)
    check_device(options.get("device"))
    import torch
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(str(Path(path).expanduser()) if place == "folder" else path, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # Each part of a model has its own loader with its own errors; the next step is the same for all.
        reason = first_line(error)
        if "trust_remote_code" in str(error) and not options.get("trust_remote_code"):
            # The remedy of transformers stands in a later line, and names what only its own callers can give.
            reason += f" Read that code, and if you trust it, set {switch}."
        where = "the folder" if place == "folder" else "neither a folder here nor found as a model of the hub"
        raise InputError(f"{role}: {path} cannot be loaded as a model ({where}: {reason})") from error
    check_tokenizer(getattr(model, "tokenizer", None), path, role)
    return model


def load_to_encode(
    path: str, role: str, before_forward: Callable[..., None] | None, **options: Any
) -> SentenceTransformer:
    """`load_model`, for texts that sentence-transformers reads by itself.

    Args:
        before_forward: called before each forward pass, with whatever it gets.
    """
    from gist_fast.losses.guide import refuse_without_tokens

    model = load_model(path, role, **options)
    for hook in (refuse_without_tokens, before_forward):
        if hook is not None:
            model.register_forward_pre_hook(hook)
    return model


def check_device(device: str | None) -> None:
    """Refuse a device that torch does not know, or that is not here.

    Raises:
        InputError: naming it.
    """
    if device is None:
        return
    import torch

    try:
        torch.empty(0, device=device)
    except Exception as error:  # each kind of device has its own
        raise InputError(
            f"--device: expected a device that is here, such as cpu, got {device} ({first_line(error)})."
        ) from None


def fit_positions(model: SentenceTransformer, role: str) -> None:
    """Let a model that says that it reads more tokens than it has positions for read as many as it can, and say so."""
    most, said = positions(model), model.max_seq_length
    if most is not None and said is not None and said > most:
        logger.warning("%s: reads %d tokens of a text, not %s: it has positions for no more.", role, most, said)
        model.max_seq_length = most


def reader(
    path: str,
    role: str,
    prompt: str | None,
    *,
    max_length: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    before_forward: Callable[..., None] | None = None,
) -> Encode:
    """What a model makes of texts, as it reads them in training. It is loaded at its first use.

    Args:
        prompt: put before each text; None for the model's own.
        max_length: tokens of a text that are read; None for the model's own maximum.
        trust_remote_code: whether code that comes with the model may run.
        before_forward: called before each forward pass, with whatever it gets.
    """

    @functools.cache
    def model() -> SentenceTransformer:
        from gist_fast.losses.guide import check_one_route

        loaded = load_to_encode(path, role, before_forward, device=device, trust_remote_code=trust_remote_code)
        if role == "guide":
            check_one_route(loaded)
        if max_length is not None:
            check_positions(f"--{role}-max-length", max_length, loaded, role)
            loaded.max_seq_length = max_length
        fit_positions(loaded, role)
        return loaded

    def encode(texts: list[str], column: str, position: int) -> Any:
        from sentence_transformers.base.modules import Router

        # An empty prompt, not None, for which encode would take the model's default one.
        read = guide_prompt(model(), column, position, prompt) if role == "guide" else prompt
        routed = any(isinstance(module, Router) for module in model())
        # Without a task, a Router would take its default route for queries too.
        task: dict[str, Any] = {"task": "query" if position == 0 else "document"} if routed else {}
        shown = len(texts) > MANY
        return model().encode(texts, prompt=read, convert_to_tensor=True, show_progress_bar=shown, **task)

    return encode


def check_peft(name: str = "student.lora") -> None:
    """Refuse an adapter before anything is loaded where peft is missing.

    Args:
        name: what asks for the adapter.

    Raises:
        InputError: it is.
    """
    from transformers.utils import is_peft_available

    if not is_peft_available():
        raise InputError(f"{name}: peft is not installed; run pip install peft.")


def add_lora(student: SentenceTransformer, lora: LoraConfig) -> None:
    """Freeze the student and put an adapter on it, which alone is trained, in float32 where the student is in half.

    Raises:
        InputError: peft finds no such layers in this model.
    """
    from peft import LoraConfig as PeftLoraConfig

    check_no_adapter(student.has_peft_compatible_model() and bool(_adapters(student)))
    adapter = PeftLoraConfig(
        task_type="FEATURE_EXTRACTION",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
    )
    student.requires_grad_(False)
    try:
        student.add_adapter(adapter)
    except (ValueError, re.error) as error:  # a text for target_modules is a pattern
        named = "target" in str(error).lower() or isinstance(error, re.error)
        raise InputError(f"student.lora{'.target_modules' if named else ''}: {first_line(error)}") from error
    _train_in_float32(student)


def check_no_adapter(has_one: bool) -> None:
    """Refuse ``student.lora`` on a student that is an adapter itself.

    Raises:
        InputError: it is.
    """
    if has_one:
        raise InputError(
            "student.lora: expected none, because the student is an adapter already, which is trained on as it is; "
            "leave lora out, or name its base model as the student to train a new adapter."
        )


def train_own_adapter(student: SentenceTransformer) -> None:
    """Let the adapter train with which a student was saved; loading leaves it frozen, as its base is."""
    if not student.has_peft_compatible_model() or not _adapters(student):
        return
    student.set_adapter(student.active_adapters())
    for config in _adapters(student).values():
        config.inference_mode = False
    _train_in_float32(student)


def _adapters(student: SentenceTransformer) -> dict[str, Any]:
    return getattr(student.transformers_model, "peft_config", None) or {}


def _train_in_float32(student: SentenceTransformer) -> None:
    """An adapter's small steps are lost in half precision."""
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
