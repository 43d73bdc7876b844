"""Padding-free attention is taken where it can be had, and a model that does not know it is padded."""

from __future__ import annotations

import pytest
import torch
import transformers.utils

from gist_fast.pipeline.attention import FLASH, Attention, choose_attention
from gist_fast.pipeline.models import load_with_attention
from gist_fast.runtime.errors import InputError


@pytest.mark.parametrize(
    ("device", "half", "installed", "implementation", "reason"),
    [
        ("cpu", True, True, None, "runs on GPUs, not on cpu"),
        ("cuda", False, True, None, "half precision only; train with bf16"),
        ("cuda", True, False, None, r"not installed; run pip install 'gist_fast\[flash\]'"),
        ("cuda", True, True, FLASH, "is installed"),
    ],
)
def test_choice(device, half, installed, implementation, reason, monkeypatch):
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: installed)
    choice = choose_attention(device, half)
    assert choice.implementation == implementation
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(choice.reason)


def test_a_model_without_it_is_padded_and_says_so(tiny_student, caplog):
    caplog.set_level("INFO", "gist_fast")
    # Here flash-attn is not installed, so transformers refuses it as it does for a model that lacks it.
    model = load_with_attention(str(tiny_student), "student", Attention(FLASH, ""), device="cpu")
    assert model[0].auto_model.config._attn_implementation == "sdpa"
    assert f"does not know {FLASH}, so its texts are padded" in caplog.text


def test_what_the_user_asked_for_wins(tiny_student):
    model = load_with_attention(
        str(tiny_student),
        "student",
        Attention(FLASH, ""),
        device="cpu",
        model_kwargs={"attn_implementation": "eager", "dtype": torch.float64},
    )
    assert model[0].auto_model.config._attn_implementation == "eager"
    assert model.dtype == torch.float64


def test_another_failure_is_not_hidden(tmp_path):
    with pytest.raises(InputError, match="student"):
        load_with_attention(str(tmp_path / "nothing"), "student", Attention(FLASH, ""))
