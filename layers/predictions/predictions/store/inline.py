"""Small payloads in the status item itself, where they cost less than items of their own.

A write is billed by the KB of its item. While an execution waits, its task token takes the item into the second KB, of
which most is empty: an input and a result that fit there cost no unit of their own. All others are items of their own
(see `store.payloads`).
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from predictions.aws.dynamodb import size_of
from predictions.store.records import Prediction

# https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/read-write-operations.html
_UNIT_BYTES = 1024

# AWS's samples show task tokens of up to 750 characters.
_TOKEN_BYTES = 1024

# What the attributes of the bind, the wait and the completion add; a long error or a long price takes a unit more.
_LATER_BYTES = 280


def input_fits(item: Mapping[str, Any], text: str) -> bool:
    """Return whether an input fits into the status item that an intent is about to write.

    Args:
        item: The status item without it.
        text: The input as JSON text.
    """
    return size_of({**item, "input_json": text}) + _TOKEN_BYTES + _LATER_BYTES <= 2 * _UNIT_BYTES


def result_fits(prediction: Prediction, changes: Mapping[str, Any], removed: Iterable[str], text: str) -> bool:
    """Return whether a result in the write of a terminal status takes no more units than an item of its own.

    The status item is hardly written again after that, and the call for the other item is saved.

    Args:
        prediction: The prediction before.
        changes: What the write sets besides.
        removed: The attributes that it removes.
        text: The output and logs as JSON text.
    """
    before = prediction.stored_bytes
    new = {name: value for name, value in changes.items() if getattr(prediction, name, None) is None}
    # `open` is no field of a prediction; its shortest value is that of earlier releases.
    known = {name: "open" if name == "open" else getattr(prediction, name, None) for name in removed}
    after = before + size_of(new) - size_of({name: value for name, value in known.items() if value is not None})
    return _units(max(before, after + size_of({"result_json": text}))) <= _units(max(before, after)) + 1


def _units(size: int) -> int:
    return math.ceil(size / _UNIT_BYTES)
