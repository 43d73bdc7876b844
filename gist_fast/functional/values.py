"""Checks of single values. Without torch, so that a configuration can be checked before torch is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

from gist_fast.runtime.errors import InputError, InputTypeError


def is_number(value: object) -> bool:
    """Whether it is a real number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def one_of(choices: Sequence[str]) -> str:
    """``"'a', 'b' or 'c'"``."""
    *others, last = map(repr, choices)
    return f"{', '.join(others)} or {last}" if others else last


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise InputError(f"{name}: expected {one_of(choices)}, got {value!r}.")


def check_flags(**flags: object) -> None:
    """Raise TypeError unless each is True or False: ``"no"`` would count as yes."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise InputTypeError(f"{name}: expected True or False, got {value!r} ({type(value).__name__}).")


def check_number(
    name: str,
    value: object,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    whole: bool = False,
) -> None:
    """Raise unless `value` is a finite number within the bounds.

    Raises:
        TypeError: it is no number, or no int where `whole`.
        ValueError: it is not finite, or out of bounds.
    """
    bounds = [f"above {above}"] if above > -math.inf else []
    bounds += [f"of at least {at_least}"] if at_least > -math.inf else []
    bounds += [f"below {below}"] if below < math.inf else []
    wanted = " ".join(["an int" if whole else "a finite float", " and ".join(bounds)]).strip()
    if not is_number(value) or (whole and not isinstance(value, int)):
        raise InputTypeError(f"{name}: expected {wanted}, got {value!r} ({type(value).__name__}).")
    # Not isfinite, which torch.compile cannot trace for a float that changes.
    if not (above < value < below and at_least <= value < math.inf):  # type: ignore[operator]
        raise InputError(f"{name}: expected {wanted}, got {value}.")
