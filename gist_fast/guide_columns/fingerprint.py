"""What a guide's embeddings depend on, in one digest: weights, modules, their settings, tokenizer, width."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version")


def guide_fingerprint(guide: SentenceTransformer) -> str:
    """The same for the same guide, wherever it was loaded from and on whatever device it is."""
    digest = hashlib.blake2b(digest_size=16)
    tensors = sorted(guide.state_dict().items())
    # hashlib lets go of the interpreter's lock, so that large guides are read by several cores.
    with ThreadPoolExecutor() as pool:
        for (name, tensor), of_tensor in zip(tensors, pool.map(_of_tensor, (t for _, t in tensors)), strict=True):
            digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode() + of_tensor)
    digest.update(repr((guide, guide.truncate_dim)).encode())
    for module in guide.modules():
        # What a module's printed form may leave out, as a transformer's rotary base.
        config: Any = getattr(module, "config", None)
        if hasattr(config, "to_dict"):
            kept = {name: value for name, value in config.to_dict().items() if name not in _NOT_OF_THE_MODEL}
            digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
    digest.update(_tokenizer_rules(guide.tokenizer).encode())
    return digest.hexdigest()


def _of_tensor(tensor: Tensor) -> bytes:
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(content, digest_size=16).digest()  # type: ignore[arg-type]


def _tokenizer_rules(tokenizer: Any) -> str:
    """How a tokenizer cuts a text. Only the fast ones can be written down whole; of others, what they print."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "to_str"):
        return repr((tokenizer, sorted(tokenizer.get_vocab().items()))) if hasattr(tokenizer, "get_vocab") else ""
    rules = json.loads(backend.to_str())
    # Left over from the last call; the maximum length has its own place in the key.
    written = {name: rule for name, rule in rules.items() if name not in ("padding", "truncation")}
    sides = [getattr(tokenizer, side, None) for side in ("padding_side", "truncation_side")]
    return json.dumps([written, sides])
