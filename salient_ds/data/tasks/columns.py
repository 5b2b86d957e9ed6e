"""Reads single values of a row: texts, labels, numbers. Errors name the column and what was expected. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from salient_ds.data.conversation import RowError
from salient_ds.strict import did_you_mean

UNLABELLED = -1
"""What the published files of GLUE hold in place of a label that is not published."""
_SHOWN = 60


def value_of(row: Mapping[str, Any], column: str) -> Any:
    """The value in a column. Raises RowError with the nearest name if there is no such column."""
    if column in row:
        return row[column]
    names = ", ".join(map(repr, list(row)[:12])) or "none"
    hint = did_you_mean(column, map(str, row), before="; ")
    raise RowError("missing column", f"there is no column {column!r}{hint} (columns: {names})")


def text_of(row: Mapping[str, Any], column: str, may_be_empty: bool = False) -> str:
    """The text in a column. Raises RowError if it is missing, of another type, or empty."""
    value = value_of(row, column)
    if not isinstance(value, str):
        what = "empty" if value is None else f"{type(value).__name__} ({shortened(value)})"
        raise RowError("no text", f"column {column!r} is {what}, expected text")
    if not value.strip() and not may_be_empty:
        raise RowError("empty text", f"column {column!r} is empty, expected text")
    return value


def label_of(row: Mapping[str, Any], column: str, names: Sequence[str], labelled: bool) -> int | None:
    """The number of the label in a column, which holds a name or a number; None if the row has no label.

    Args:
        labelled: a row without a label is an error.

    Raises:
        RowError: a label outside of ``names``, with the nearest name, or none although there has to be one.
    """
    value = _labelled_value(row, column, labelled)
    if value is None:
        return None
    if isinstance(value, str):
        if value in names:
            return names.index(value)
        if not _is_number(value):
            hint = did_you_mean(value, names, before="; ")
            known = ", ".join(map(repr, names))
            raise RowError("unknown label", f"label {shortened(value)} in column {column!r} is none of {known}{hint}")
    number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    if isinstance(value, bool) and len(names) == 2:
        number = float(value)
    if not math.isfinite(number) or number != int(number) or not 0 <= number < len(names):
        pairs = ", ".join(f"{index} ({name})" for index, name in enumerate(names))
        raise RowError("unknown label", f"label {shortened(value)} in column {column!r} is none of {pairs}")
    return int(number)


def number_of(row: Mapping[str, Any], column: str, labelled: bool, bounds: tuple[float, float] | None) -> float | None:
    """The number in a column; None if the row has no label.

    Raises:
        RowError: the value is no finite number or outside of ``bounds``.
    """
    value = _labelled_value(row, column, labelled, missing=bounds is not None and bounds[0] >= 0)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not _is_number(str(value)):
        raise RowError("no number", f"column {column!r} is {shortened(value)}, expected a number")
    number = float(value)
    if not math.isfinite(number):
        raise RowError("no number", f"column {column!r} is {number}, expected a finite number")
    if bounds is not None and not bounds[0] <= number <= bounds[1]:
        wanted = f"expected {bounds[0]:g} to {bounds[1]:g}"
        raise RowError("out of range", f"column {column!r} is {number:g}, {wanted} (data.task.bounds)")
    return number


def identifier(row: Mapping[str, Any], column: str | None, number: int) -> int | str:
    """The row's own identifier, or its number. Raises RowError if it is neither text nor a whole number."""
    if column is None:
        return number
    value = value_of(row, column)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        what = f"column {column!r} (data.task.id_column) is {shortened(value)}"
        raise RowError("no identifier", f"{what}, expected text or a whole number")
    return value


def parsed_json(value: Any, column: str) -> Any:
    """A list or object, which a table of texts holds as JSON. Raises RowError for text that is no JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise RowError("no JSON", f"column {column!r} is {shortened(value)}, expected JSON: {error.msg}") from None


def shortened(value: Any) -> str:
    """A value for a message, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _labelled_value(row: Mapping[str, Any], column: str, labelled: bool, missing: bool = True) -> Any:
    """The label as it stands there. None: the row has none.

    Args:
        missing: -1 means that there is no label.
    """
    value = value_of(row, column) if labelled else row.get(column)
    absent = value is None or value == "" or (missing and str(value) in ("-1", "-1.0"))
    if absent and labelled:
        shown = f"it is {shortened(value)}"
        remedy = "label it, or leave it out of training and evaluation"
        raise RowError("no label", f"the row has no label in column {column!r} ({shown}): {remedy}")
    return None if absent else value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
