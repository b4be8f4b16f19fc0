"""The trace that a request belongs to, as W3C's Trace Context has it in `traceparent`.

https://www.w3.org/TR/trace-context-1/#traceparent-header
"""

import re
from typing import Any

_FORM = re.compile(r"(?!ff)([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
_LONGEST = 512


def read_traceparent(value: Any) -> str | None:
    """Return a valid `traceparent` in the form of version 00, or None: an invalid one is ignored, as W3C has it."""
    found = _FORM.fullmatch(value) if isinstance(value, str) and len(value) <= _LONGEST else None
    if found is None:
        return None
    version, trace, parent, flags, more = found.groups()
    if not trace.strip("0") or not parent.strip("0") or (version == "00" and more):
        return None
    # Of a later version only what version 00 has is known: the ids, and whether the trace is sampled.
    return f"00-{trace}-{parent}-{flags if version == '00' else f'{int(flags, 16) & 1:02x}'}"
