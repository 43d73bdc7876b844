"""What a model's embeddings depend on, in one digest: weights, modules, their settings and code, tokenizer, width.

Prompt and maximum length are not in it: who uses the digest knows by which of them a text was read.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version")
_ADAPTER_SETTINGS = ("scaling", "active_adapters", "disable_adapters", "merged_adapters", "use_dora", "use_rslora")
"""Of peft's layers: what becomes of their weights, which the weights do not show."""
_LIBRARIES = (
    "sentence_transformers",
    "transformers",
    "torch",
    "peft",
    "gist_fast",
    "builtins",
    "abc",
    "collections",
    "typing",
)
"""Their modules are described by configuration and printed form; the code of others is part of the model."""
_PLACES = ("path", "model_path", "model_save_dir")
"""Where a backend without weights of torch says which file it runs."""
_SIMPLE = (str, int, float, bool, type(None), torch.dtype)


def model_fingerprint(model: SentenceTransformer) -> str:
    """The same for the same model, wherever it was loaded from and on whatever device it is."""
    digest = hashlib.blake2b(digest_size=16)
    state = sorted(_entries("", model.state_dict()), key=lambda entry: entry[0])
    tensors = [(name, value) for name, value in state if isinstance(value, Tensor)]
    # hashlib lets go of the interpreter's lock, so that large models are read by several cores.
    with ThreadPoolExecutor() as pool:
        for (name, tensor), of_tensor in zip(tensors, pool.map(_of_tensor, (t for _, t in tensors)), strict=True):
            digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode() + of_tensor)
    digest.update(repr((model, model.truncate_dim)).encode())
    for module in model.modules():
        # What a module's printed form may leave out, as a transformer's rotary base.
        config: Any = getattr(module, "config", None)
        if hasattr(config, "to_dict"):
            kept = {name: value for name, value in config.to_dict().items() if name not in _NOT_OF_THE_MODEL}
            digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
    digest.update(tokenizer_rules(getattr(model, "tokenizer", None)).encode())
    # Nothing more of most models, whose stores of embeddings therefore stay what they were.
    others = [(name, repr(value)) for name, value in state if not isinstance(value, Tensor)]
    for more in (others, list(adapter_settings(model)), list(_own_code(model)), list(_files(model))):
        if more:
            digest.update(repr(more).encode())
    return digest.hexdigest()


def state_now(model: nn.Module) -> tuple[Any, ...]:
    """What tells in a moment whether a model in memory was changed since: no contents, but each tensor's place and
    count of writes."""
    tensors = [*model.parameters(), *model.buffers()]
    # What was made in inference mode counts no writes.
    of_tensors = [(id(t), t.data_ptr(), None if t.is_inference() else t._version, t.dtype) for t in tensors]
    settings = getattr(model, "truncate_dim", None), getattr(model, "max_seq_length", None)
    return of_tensors, settings, list(adapter_settings(model))


def adapter_settings(model: nn.Module) -> Iterator[tuple[str, str]]:
    """How each of peft's layers uses its adapters now: scaling, which are active, disabled or merged."""
    for name, module in model.named_modules():
        # A property of peft's layers, a method of whole models.
        if isinstance(getattr(module, "disable_adapters", None), bool):
            # Sets and dictionaries may come in another order.
            told = {setting: getattr(module, setting, None) for setting in _ADAPTER_SETTINGS}
            yield name, json.dumps(told, sort_keys=True, default=str)


def _entries(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The tensors and other values of a state; quantised modules keep several together."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _entries(f"{name}.{key}" if name else str(key), item)
    elif isinstance(value, (list, tuple)):
        for place, item in enumerate(value):
            yield from _entries(f"{name}.{place}", item)
    elif isinstance(value, Tensor) and value.is_quantized:
        yield name, value.int_repr()
        per_channel = value.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
        scale = (value.q_per_channel_scales(), value.q_per_channel_zero_points()) if per_channel else None
        yield f"{name}.scale", str(scale or (value.q_scale(), value.q_zero_point()))
    else:
        yield name, value


def _of_tensor(tensor: Tensor) -> bytes:
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(content, digest_size=16).digest()  # type: ignore[arg-type]


def _own_code(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The code of modules that are of no library, and the simple attributes that they hold."""
    for name, module in model.named_modules():
        classes = [cls for cls in type(module).__mro__ if cls.__module__.partition(".")[0] not in _LIBRARIES]
        yield from ((f"{name}: {cls.__qualname__}", source) for cls in classes if (source := _source(cls)))
        if type(module) in classes:
            held = {key: value for key, value in vars(module).items() if key[:1] != "_" and key != "training"}
            yield name, sorted((key, repr(value)) for key, value in held.items() if _is_simple(value))


@functools.cache
def _source(cls: type) -> str:
    """A digest of a class's code: of its whole file where that came with a model, since helpers stand beside it."""
    try:
        if cls.__module__.startswith("transformers_modules."):
            written = Path(inspect.getfile(cls)).read_text(encoding="utf-8")
        else:
            written = inspect.getsource(cls)
    except (OSError, TypeError):  # built in, or typed into an interpreter
        return ""
    return hashlib.blake2b(written.encode(), digest_size=16).hexdigest()


def _is_simple(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_simple(item) for item in (*value, *value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_simple, value))
    return isinstance(value, _SIMPLE)


def _files(model: nn.Module) -> Iterator[tuple[str, str]]:
    """The files that modules without weights of torch run, as those of ONNX and OpenVINO."""
    for name, module in model.named_modules():
        runner = getattr(module, "model", None)
        if runner is None or isinstance(runner, nn.Module):
            continue
        for place in (value for key in _PLACES if isinstance(value := getattr(runner, key, None), (str, Path))):
            root = Path(place)
            for file in sorted(root.rglob("*")) if root.is_dir() else [root]:
                if file.is_file() and (file == root or file.suffix in (".onnx", ".bin", ".xml")):
                    with file.open("rb") as opened:
                        yield f"{name}: {file.name}", hashlib.file_digest(opened, "sha256").hexdigest()


def tokenizer_rules(tokenizer: Any) -> str:
    """How a tokenizer cuts a text. Only the fast ones can be written down whole; of others, what they print."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "to_str"):
        return repr((tokenizer, sorted(tokenizer.get_vocab().items()))) if hasattr(tokenizer, "get_vocab") else ""
    rules = json.loads(backend.to_str())
    # Left over from the last call; the maximum length has its own place in the key.
    written = {name: rule for name, rule in rules.items() if name not in ("padding", "truncation")}
    sides = [getattr(tokenizer, side, None) for side in ("padding_side", "truncation_side")]
    return json.dumps([written, sides])
