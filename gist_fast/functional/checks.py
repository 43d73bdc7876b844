"""Which tensors `gist_fast.guided_contrastive_loss` accepts, and what it says to all others.

Each message names the argument, what was expected and what came. Values are looked at only where that does not make an
accelerator's host wait; shapes, types and devices always. Settings that are no tensors check themselves
(`gist_fast.functional.loss_config`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gist_fast.functional.loss_config import check_setting
from gist_fast.runtime.errors import InputError, InputTypeError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")
# A gradient by an embedding goes as 1 / (temperature * norm): float16 ends at 65,504, and float32's logits at 3e38.
_LEAST_TEMPERATURE = {torch.float16: 1e-6, torch.bfloat16: 1e-30, torch.float32: 1e-30}


def check_embeddings(
    anchors: Tensor,
    positives: Tensor,
    negatives: Sequence[Tensor] | None,
    guide_anchors: Tensor | None,
    guide_positives: Tensor | None,
    guide_negatives: Sequence[Tensor] | None,
    rows: int | None,
    offset: int,
    mask_negatives: bool,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], int]:
    """The student's and the guide's embeddings as two tuples (anchors, positives, *negatives), the guide's may be ();
    and how many of the anchors the loss is of.

    Args:
        rows: how many of the anchors the loss is of; None for all.
        mask_negatives: False where the guide has nothing to say of negatives, and only its others are returned.

    Raises:
        TypeError: an argument is no tensor, or not of a floating type.
        ValueError: shapes, widths, devices or numbers of columns do not go together.
    """
    for name, columns in (("negatives", negatives), ("guide_negatives", guide_negatives)):
        if isinstance(columns, Tensor) or not isinstance(columns, Sequence | None):
            got = f"one tensor of shape {_shape(columns)}" if isinstance(columns, Tensor) else type(columns).__name__
            raise InputTypeError(f"{name}: expected a tuple of [N, D] tensors, one for each column, got {got}.")
    negatives = tuple(negatives or ())
    student = _check_family("", anchors, positives, negatives)
    rows = anchors.shape[0] if rows is None else _check_count("rows", rows, anchors.shape[0], "the number of anchors")
    if not isinstance(offset, int) or isinstance(offset, bool):
        raise InputTypeError(f"offset: expected an int, got {offset!r} ({type(offset).__name__}).")
    if offset < 0:
        raise InputError(f"offset: expected an int of at least 0, got {offset}.")
    if positives.shape[0] < offset + rows:
        raise InputError(
            f"positives: expected at least {offset + rows} rows for {rows} anchors at offset {offset} (anchor i's "
            f"positive is row offset + i), got shape {_shape(positives)}."
        )
    if guide_anchors is None and guide_positives is None:
        if guide_negatives:
            raise InputError("guide_negatives: given without guide_anchors and guide_positives. Give all or none.")
        return student, (), rows
    if guide_anchors is None or guide_positives is None:
        missing, given = ("anchors", "positives") if guide_anchors is None else ("positives", "anchors")
        raise InputError(f"guide_{missing}: missing, though guide_{given} came. Give both, or neither for no guide.")
    if not mask_negatives:
        guide_negatives = ()
    elif len(guide_negatives or ()) != len(negatives):
        raise InputError(
            f"guide_negatives: expected {len(negatives)}, one for each column of negatives, got "
            f"{len(guide_negatives or ())}."
        )
    guide = _check_family("guide_", guide_anchors, guide_positives, guide_negatives or ())
    for k, (ours, theirs) in enumerate(zip(student, guide, strict=mask_negatives)):
        if ours.shape[0] != theirs.shape[0]:
            name = _names("", len(student))[k]
            raise InputError(f"guide_{name}: expected {ours.shape[0]} rows, as {name} have, got {theirs.shape[0]}.")
    if guide[0].device != anchors.device:
        raise InputError(f"guide_anchors: expected on {anchors.device}, as the anchors, got on {guide[0].device}.")
    return student, guide, rows


def check_other_anchors(rows: int, anchors: int, positives: int, gathers_anchors: bool) -> None:
    """Raise where there are more anchors than rows, and they are not those of all positives, or no candidates.

    Args:
        gathers_anchors: whether other anchors are candidates.
    """
    if rows < anchors and not gathers_anchors:
        raise InputError(
            f"rows: expected {anchors}, the number of anchors, got {rows}: without 'query_to_query' or 'doc_to_query' "
            "in directions the others are compared with nothing."
        )
    if rows < anchors and anchors != positives:
        raise InputError(
            f"anchors: expected {rows} rows, as rows says, or {positives}, as positives have, got {anchors}."
        )


def check_temperature(temperature: float | Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise unless `temperature` is a positive finite number or a 0-d floating tensor (its value unseen on a GPU).

    Args:
        dtype: of the embeddings, where it is known.
    """
    if isinstance(temperature, Tensor):
        if temperature.ndim != 0 or not temperature.is_floating_point():
            raise InputError(
                "temperature: expected a float above 0, or a 0-d floating tensor, got a tensor of shape "
                f"{_shape(temperature)} and type {temperature.dtype}."
            )
        # Reading a value would make the host wait for a GPU, and would break a compiled graph.
        if temperature.device.type != "cpu" or torch.compiler.is_compiling():
            return
        temperature = temperature.item()
    check_setting("temperature", temperature)
    least = 0.0 if dtype is None else _LEAST_TEMPERATURE.get(dtype, 0.0)
    if temperature < least:
        raise InputError(
            f"temperature: expected at least {least}, below which gradients of {dtype} embeddings overflow, got "
            f"{temperature}. Raise it, or use another type."
        )


def check_row_margins(margins: Tensor, rows: int) -> None:
    """Raise unless there is a finite number for each row."""
    if tuple(margins.shape) != (rows,) or not margins.is_floating_point():
        raise InputError(
            f"margin: expected a float, or a floating tensor [{rows}] with one for each anchor, got a tensor of shape "
            f"{_shape(margins)} and type {margins.dtype}."
        )
    look = margins.device.type == "cpu" and not torch.compiler.is_compiling()
    if look and len(bad := torch.nonzero(~torch.isfinite(margins))):
        raise InputError(f"margin: expected finite numbers, got {margins[bad[0, 0]].item()} in row {int(bad[0, 0])}.")


def check_groups(
    groups: Tensor | Sequence[Tensor] | None,
    negative_groups: Sequence[Tensor] | None,
    anchors: Tensor,
    candidates: int,
    negatives: Sequence[Tensor],
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The groups of the positives, two at most, and those of each column of negatives; either may be ().

    Raises:
        TypeError: one is no tensor of whole numbers.
        ValueError: their number, shapes or devices are not those of the embeddings.
    """
    wanted = "the group of each row of positives"
    several: tuple[Tensor, ...] = ()
    if isinstance(groups, list | tuple) and all(isinstance(each, Tensor) for each in groups):
        several = tuple(groups)
    elif groups is not None:
        several = (groups,)  # type: ignore[assignment]  # or so it should be
    if groups is not None and not 1 <= len(several) <= 2:
        raise InputError(f"groups: expected a tensor, or two, of which one in common is enough, got {len(several)}.")
    for k, each in enumerate(several):
        name = "groups" if several[0] is groups else f"groups[{k}]"
        _check_whole(name, each, candidates, wanted, anchors)
    if negative_groups is None:
        return several, ()
    if not several:
        raise InputError("negative_groups: given without groups, those of the rows. Give both, or leave it out.")
    if not isinstance(negative_groups, list | tuple) or len(negative_groups) != len(negatives):
        got = len(negative_groups) if isinstance(negative_groups, list | tuple) else type(negative_groups).__name__
        raise InputError(f"negative_groups: expected {len(negatives)}, one for each column of negatives, got {got}.")
    for k, (each, column) in enumerate(zip(negative_groups, negatives, strict=True)):
        _check_whole(
            f"negative_groups[{k}]", each, column.shape[0], f"the group of each row of negatives[{k}]", anchors
        )
    return several, tuple(negative_groups)


def check_scopes(scope: str | Sequence[str], negatives: int) -> tuple[str, ...]:
    """Whose negatives each column's are, ``"all"`` or ``"own"``; see `LossConfig`, which has checked the values.

    Raises:
        ValueError: there is another number of columns, or none that could be own.
    """
    if isinstance(scope, str):
        if scope == "own" and not negatives:
            raise InputError("negatives_scope: expected 'all' without a column of negatives, got 'own'.")
        return (scope,) * negatives
    if len(scope) != negatives:
        raise InputError(
            f"negatives_scope: expected {negatives}, one for each column of negatives, got {len(scope)}: {list(scope)}."
        )
    return tuple(scope)


def check_negative_rows(
    negative_rows: Sequence[Tensor | None] | None,
    negatives: Sequence[Tensor],
    scopes: Sequence[str],
    anchors: Tensor,
    batch: int,
) -> tuple[Tensor | None, ...]:
    """For each column of negatives the anchor, of a batch of so many, of each of its rows; None where row i is anchor
    i's, or everyone's.

    Raises:
        TypeError: one is no tensor of whole numbers.
        ValueError: they are not those of the embeddings, or of a column that is everyone's; on a CPU, where one is no
            anchor's, or two are the same one's.
    """
    if not isinstance(negative_rows, list | tuple | None):
        raise InputTypeError(
            f"negative_rows: expected a list of one tensor, or None, for each column of negatives, got "
            f"{type(negative_rows).__name__}."
        )
    rows = (None,) * len(negatives) if negative_rows is None else tuple(negative_rows)
    if len(rows) != len(negatives):
        raise InputError(
            f"negative_rows: expected {len(negatives)}, one for each column of negatives, got {len(rows)}."
        )
    for k, (each, column, scope) in enumerate(zip(rows, negatives, scopes, strict=True)):
        if scope == "all":
            if each is not None:
                raise InputError(f"negative_rows[{k}]: expected None for negatives of all anchors, got a tensor.")
            continue
        if each is None:
            if column.shape[0] != batch:
                raise InputError(
                    f"negatives[{k}]: expected {batch} rows with negatives_scope 'own', one for each anchor, got "
                    f"{column.shape[0]}. Say with negative_rows whose they are."
                )
            continue
        _check_whole(f"negative_rows[{k}]", each, column.shape[0], f"the anchor of each row of negatives[{k}]", anchors)
        if each.device.type == "cpu" and not torch.compiler.is_compiling():
            counts = torch.bincount(each.clamp(0, batch - 1), minlength=batch)
            if int(each.min()) < 0 or int(each.max()) >= batch or int(counts.max()) > 1:
                raise InputError(
                    f"negative_rows[{k}]: expected different numbers from 0 to {batch - 1}, got {each.tolist()[:20]}."
                )
    return rows


def check_own_negatives(
    hardness_mode: str | None, doc_to_doc: bool, negatives: Sequence[Tensor], scopes: Sequence[str], needed: int
) -> None:
    """Raise unless the modes that look for an anchor's own negatives can find them.

    Args:
        doc_to_doc: whether that direction is compared with all columns of negatives, which leaves out a row's own.
        needed: rows that a column of everyone's negatives has at least where each anchor's own are among them.
    """
    if hardness_mode == "hard_negatives" and not negatives:
        raise InputError(
            "hardness_mode: expected 'in_batch_negatives' without a column of negatives, got 'hard_negatives'."
        )
    who, remedy = "", ""
    if hardness_mode in ("hard_negatives", "in_batch_negatives"):
        who, remedy = f"hardness_mode {hardness_mode!r}", "'all_negatives' needs none."
    elif doc_to_doc:
        who, remedy = "'doc_to_doc' in directions", "Or leave that direction out."
    for k, (column, scope) in enumerate(zip(negatives, scopes, strict=True)):
        if who and scope == "all" and column.shape[0] < needed:
            raise InputError(
                f"negatives[{k}]: expected at least {needed} rows with {who}, which takes row offset + i for anchor "
                f"i's own negative, got {column.shape[0]}. {remedy}"
            )


def _check_count(name: str, value: object, most: int, what: str) -> int:
    """The value, an int from 1 to `most`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputTypeError(f"{name}: expected an int or None, got {value!r} ({type(value).__name__}).")
    if not 1 <= value <= most:
        raise InputError(f"{name}: expected from 1 to {most}, {what}, got {value}.")
    return value


def _check_whole(name: str, x: object, rows: int, what: str, anchors: Tensor) -> None:
    """Raise unless it is a whole number for each of some rows."""
    wanted = f"expected a tensor [{rows}] of int64 or int32, {what}"
    if not isinstance(x, Tensor):
        raise InputTypeError(f"{name}: {wanted}, got {type(x).__name__}.")
    if x.dtype not in (torch.int64, torch.int32):
        raise InputTypeError(f"{name}: {wanted}, got type {x.dtype}.")
    if tuple(x.shape) != (rows,):
        raise InputError(f"{name}: {wanted}, got shape {_shape(x)}.")
    if x.device != anchors.device:
        raise InputError(f"{name}: expected on {anchors.device}, as the anchors, got on {x.device}.")


def _check_family(prefix: str, anchors: Tensor, positives: Tensor, negatives: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Embeddings of one model: matrices of one width, type and device."""
    family = (anchors, positives, *negatives)
    if _all_alike(family):
        return family
    for name, x in zip(_names(prefix, len(family)), family, strict=True):
        if not isinstance(x, Tensor):
            raise InputTypeError(f"{name}: expected a floating tensor [N, D], got {type(x).__name__}.")
        if x.dtype not in FLOATS:
            raise InputTypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {x.dtype}.")
        if x.layout != torch.strided:
            raise InputTypeError(f"{name}: expected a dense tensor, as of {name}.to_dense(), got layout {x.layout}.")
        if x.ndim != 2:
            raise InputError(f"{name}: expected a matrix [N, D], got shape {_shape(x)}.")
        if x.shape[0] == 0 or x.shape[1] == 0:
            raise InputError(f"{name}: expected at least one row and one column, got shape {_shape(x)}.")
        if x.shape[1] != anchors.shape[1]:
            raise InputError(f"{name}: expected width {anchors.shape[1]}, as {prefix}anchors have, got {x.shape[1]}.")
        if x.dtype != anchors.dtype:
            raise InputTypeError(f"{name}: expected {anchors.dtype}, as {prefix}anchors have, got {x.dtype}.")
        if x.device != anchors.device:
            raise InputError(f"{name}: expected on {anchors.device}, as {prefix}anchors, got on {x.device}.")
    return family


def _all_alike(family: Sequence[Tensor]) -> bool:
    """Whether nothing speaks against them: one look at each, where a small batch takes microseconds in all."""
    first = family[0]
    if not isinstance(first, Tensor) or first.ndim != 2 or first.dtype not in FLOATS:
        return False
    dtype, width, device = first.dtype, first.shape[1], first.device
    return width > 0 and all(
        isinstance(x, Tensor)
        and x.dtype == dtype
        and x.layout == torch.strided
        and x.ndim == 2
        and x.shape[1] == width
        and x.shape[0] > 0
        and x.device == device
        for x in family
    )


def _names(prefix: str, count: int) -> list[str]:
    return [prefix + n for n in ("anchors", "positives", *(f"negatives[{k}]" for k in range(count - 2)))]


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
