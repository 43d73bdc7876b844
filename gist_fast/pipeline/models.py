"""Loading models by folder or hub name, with errors that a user can act on."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gist_fast.data.per_column import guide_prompt
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
MARKERS = ("modules.json", "config.json")


def check_model(path: str, role: str) -> str:
    """Whether there is such a model, as far as can be told without loading it.

    Args:
        role: what to call the model in an error: ``student``, ``guide``.

    Returns:
        Where it is: ``folder``, ``cache`` or ``hub`` (not seen yet).

    Raises:
        InputError: no folder of a model, nor a name that the hub could have.
    """
    folder = expanded(path)
    if folder.exists():
        if not folder.is_dir() or not any((folder / marker).is_file() for marker in MARKERS):
            raise InputError(f"{role}: {path} holds no model; a folder with {' or '.join(MARKERS)} is needed.")
        return "folder"
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path):
        raise InputError(f"{role}: {path}: no such folder{nearest_file(folder)}.")
    from huggingface_hub import try_to_load_from_cache

    return "cache" if any(isinstance(try_to_load_from_cache(path, marker), str) for marker in MARKERS) else "hub"


def load_configured(model: ModelConfig, role: str, attention: Attention) -> SentenceTransformer:
    """`load_with_attention`, with the options of a section ``student`` or ``guide``."""
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code, "revision": model.revision}
    return load_with_attention(model.path, role, attention, model_kwargs=dict(model.model_kwargs or {}), **options)


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


def load_model(path: str, role: str, **options: Any) -> SentenceTransformer:
    """The model of that folder or hub name.

    Raises:
        InputError: it cannot be loaded.
    """
    place = check_model(path, role)
    import torch
    from sentence_transformers import SentenceTransformer

    try:
        return SentenceTransformer(str(Path(path).expanduser()) if place == "folder" else path, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # Each part of a model has its own loader with its own errors; the next step is the same for all.
        reason = first_line(error)
        where = "the folder" if place == "folder" else "neither a folder here nor found as a model of the hub"
        raise InputError(f"{role}: {path} cannot be loaded as a model ({where}: {reason})") from error


def reader(
    path: str,
    role: str,
    prompt: str | None,
    *,
    max_length: int | None = None,
    device: str | None = None,
    before_forward: Callable[..., None] | None = None,
) -> Encode:
    """What a model makes of texts, as it reads them in training. It is loaded at its first use.

    Args:
        prompt: put before each text; None for the model's own.
        max_length: tokens of a text that are read; None for the model's own maximum.
        before_forward: called before each forward pass, with whatever it gets.
    """

    @functools.cache
    def model() -> SentenceTransformer:
        from gist_fast.losses.guide import refuse_without_tokens

        loaded = load_model(path, role, device=device)
        loaded.register_forward_pre_hook(refuse_without_tokens)
        if before_forward is not None:
            loaded.register_forward_pre_hook(before_forward)
        if max_length is not None:
            loaded.max_seq_length = max_length
        return loaded

    def encode(texts: list[str], column: str, position: int) -> Any:
        # An empty prompt, not None, for which encode would take the model's default one.
        read = guide_prompt(model(), column, position, prompt) if role == "guide" else prompt
        return model().encode(texts, prompt=read, convert_to_tensor=True, show_progress_bar=len(texts) > MANY)

    return encode


def check_lora() -> None:
    """Refuse an adapter before anything is loaded where peft is missing.

    Raises:
        InputError: it is.
    """
    from transformers.utils import is_peft_available

    if not is_peft_available():
        raise InputError("student.lora: peft is not installed; run pip install peft.")


def add_lora(student: SentenceTransformer, lora: LoraConfig) -> None:
    """Freeze the student and put an adapter on it, which alone is trained, in float32 where the student is in half.

    Raises:
        InputError: peft finds no such layers in this model.
    """
    from peft import LoraConfig as PeftLoraConfig

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
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
