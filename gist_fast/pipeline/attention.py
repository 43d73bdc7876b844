"""Which attention the models compute: padding-free where it can be had.

With flash-attn, sentence-transformers flattens a batch into one row without padding (its ``can_flatten_inputs``).
Elsewhere the texts of a mini-batch, which are of like length, are padded to the longest of them, and torch's scaled
dot-product attention takes them.
"""

from __future__ import annotations

from dataclasses import dataclass

FLASH = "flash_attention_2"


@dataclass(frozen=True)
class Attention:
    """What to ask of transformers, and why."""

    implementation: str | None
    """``flash_attention_2``, or None for the choice of transformers, which is SDPA for most models."""
    reason: str

    @property
    def padding_free(self) -> bool:
        return self.implementation is not None


def choose_attention(device_type: str, half: bool) -> Attention:
    """The attention for a model.

    Args:
        device_type: where it runs.
        half: whether it computes in float16 or bfloat16, by its weights or by autocast.
    """
    from transformers.utils import is_flash_attn_2_available

    if device_type != "cuda":
        return Attention(None, f"flash-attn runs on GPUs, not on {device_type}")
    if not half:
        return Attention(None, "flash-attn computes in half precision only; train with bf16")
    if not is_flash_attn_2_available():
        return Attention(None, "flash-attn is not installed; run pip install 'gist_fast[flash]'")
    return Attention(FLASH, "flash-attn is installed, and the model computes in half precision")
