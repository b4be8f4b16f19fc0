"""File references in a prediction's output: find and replace them.

find_files(output)       list the files in an output
first_files(output)      list the files that are stored, and say how many are not
place_files(output)      replace every file by another value
replace_files(output)    replace the values at some JSON pointers
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from typing import Any, TypeAlias

JSON: TypeAlias = "dict[str, JSON] | list[JSON] | str | int | float | bool | None"

FILES_LIMIT = 1000
"""The most files of one output that are stored: each costs a download and a PUT, and a webhook of 6 MB has room for the
addresses of 300,000."""
ORIGIN_DEPTH = "origin-depth"
"""Metadata of a stored file: how many results of this stack the prediction that made it descends from."""

_URL = re.compile(
    r"(https?)://([a-z0-9.-]+)(?::([0-9]{1,5}))?(?=[/?#]|\Z)[^\s\x00-\x1f\x7f-\x9f\ud800-\udfff]*",
    re.IGNORECASE,
)
# A media type is required, although RFC 2397 has a default: `data:,` at the start of a text is no file.
_DATA_HEADER = re.compile(r"data:([a-z0-9!#$&^_.+-]+/[a-z0-9!#$&^_.+-]+)((?:;[!-+\--:<-~]+)*)", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}")
_NOT_IN_A_URL = re.compile(r"[^!-~]")


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file in an output.

    Attributes:
        index: Its number in the order of the output, from 0.
        path: Where it is: a JSON pointer (RFC 6901), `""` for an output that is the file.
        source: Its `https:` or `data:` URL. It gives access to the file, so it does not belong into logs.
    """

    index: int
    path: str
    source: str


@dataclass(frozen=True, slots=True)
class StoredFile:
    """The result of copying a file: an object in the bucket, or an error.

    Attributes:
        path: Where it is in the output (RFC 6901).
        index: Its number in the order of the output.
        key: The object's key.
        bytes: Its size.
        sha256: Of its bytes, in hexadecimal.
        content_type: As the bucket serves it.
        error: Why there is no object, for the person who asked for the prediction; all of the above but
            `path` and `index` are then None.
    """

    path: str
    index: int
    key: str | None = None
    bytes: int | None = None
    sha256: str | None = None
    content_type: str | None = None
    error: str | None = None

    def to_item(self) -> dict[str, Any]:
        """Return this as JSON, without fields that are None."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_item(cls, item: Mapping[str, Any]) -> "StoredFile":
        """Read what `to_item` returned; ignore unknown names."""
        return cls(**{field.name: item[field.name] for field in fields(cls) if field.name in item})


def find_files(output: JSON, is_file_url: Callable[[str], bool]) -> list[OutputFile]:
    """Find all files anywhere in an output.

    The order is that of lists, and of the sorted keys of objects: the order of keys may be another one in the
    next response about the same prediction, and a file keeps its index.

    Args:
        output: Parsed JSON of any depth and size.
        is_file_url: Whether an `https:` or `http:` URL is that of a file; see `is_file_url`.

    Returns:
        The files. A string is one if it is, as a whole, such a URL or a `data:` URL with a media type.
    """
    return [
        OutputFile(index, _pointer(place), source) for index, (place, source) in enumerate(_walk(output, is_file_url))
    ]


def first_files(output: JSON, is_file_url: Callable[[str], bool]) -> tuple[list[OutputFile], list[StoredFile]]:
    """Find the files of an output that are stored, at most `FILES_LIMIT`.

    Returns:
        The files; and one entry for all files beyond the limit, in the place of the first of them, with the reason
        why they are not stored. No entry if no file is beyond it.
    """
    found = _walk(output, is_file_url)
    files = [
        OutputFile(index, _pointer(place), source) for index, (place, source) in enumerate(islice(found, FILES_LIMIT))
    ]
    if (beyond := next(found, None)) is None:
        return files, []
    count = FILES_LIMIT + 1 + sum(1 for _ in found)
    error = f"the output has {count} files: the first {FILES_LIMIT} are stored, this one and those after it are not"
    return files, [StoredFile(_pointer(beyond[0]), FILES_LIMIT, error=error)]


def holds_files(output: JSON, is_file_url: Callable[[str], bool]) -> bool:
    """Return whether `find_files` would find any; stop at the first."""
    return next(_walk(output, is_file_url), None) is not None


def replace_files(output: JSON, values: Mapping[str, JSON]) -> JSON:
    """Return an output with other values in some places; the given one is not changed.

    Args:
        output: Parsed JSON.
        values: New values by the JSON pointers of `find_files`: our URL, or None for a file that was not
            stored.

    Returns:
        The new output, which shares what did not change with the given one.

    Raises:
        LookupError: A pointer leads nowhere in this output.
    """
    root: list[JSON] = [output]
    ours: dict[int, Any] = {}  # by id(); it also keeps the copies alive, so that no id is given twice

    for path, value in values.items():
        start, *steps = path.split("/")
        if start:
            raise LookupError(f"not a JSON pointer: {path[:200]!r}")
        parent: Any = root
        token: Any = 0
        for step in steps:
            child = parent[token]
            if id(child) not in ours:
                if not isinstance(child, dict | list):
                    raise LookupError(f"nothing is at {path[:200]!r}")
                child = child.copy()
                ours[id(child)] = child
                parent[token] = child
            parent, token = child, _token(child, step)
        parent[token] = value
    return root[0]


@dataclass(slots=True)
class _Level:
    """A container on the path to a value: source, names left, own name, copy."""

    source: Any
    names: Iterator[Any]
    name: str | int
    copy: Any = None


def place_files(output: JSON, values: Mapping[str, JSON], is_file_url: Callable[[str], bool]) -> JSON:
    """Return an output in which every file is replaced by its value, or by None.

    The work is that of one walk, however many files there are: only containers that hold files are copied, each once,
    and paths are written out only while values are left to place.

    Args:
        output: Parsed JSON of any depth and size.
        values: Values by the JSON pointers of `find_files`.
        is_file_url: As for `find_files`.

    Returns:
        The new output, which shares what holds no file with the given one.

    Raises:
        LookupError: The pointer of a value leads nowhere in this output.
    """
    root: list[JSON] = [output]
    left = dict(values)
    levels = [_Level([output], iter((0,)), "", root)]
    while levels:
        level = levels[-1]
        for name in level.names:
            value = level.source[name]
            if isinstance(value, str):
                if _is_file(value, is_file_url):
                    _copy_levels(levels)
                    path = "".join(f"/{_escaped(each)}" for each in (*(above.name for above in levels[2:]), name))
                    level.copy[name] = left.pop(path if len(levels) > 1 else "", None) if left else None
            elif isinstance(value, dict | list):
                names = sorted(value) if isinstance(value, dict) else range(len(value))
                levels.append(_Level(value, iter(names), name))
                break
        else:
            levels.pop()
    # An older release may have taken other texts for files.
    return replace_files(root[0], left) if left else root[0]


def _copy_levels(levels: Sequence[_Level]) -> None:
    """Copy the containers that lead to a file and are not copied yet."""
    first = len(levels)
    while levels[first - 1].copy is None:
        first -= 1
    for number in range(first, len(levels)):
        level = levels[number]
        level.copy = level.source.copy()
        levels[number - 1].copy[level.name] = level.copy


def _token(container: Any, step: str) -> str | int:
    """Resolve one step of a JSON pointer in a container.

    Raises:
        LookupError: It does not.
    """
    token: str | int = step.replace("~1", "/").replace("~0", "~")
    if isinstance(container, list):
        if not re.fullmatch(r"[0-9]{1,18}", step):
            raise LookupError(f"no index of a list: {step[:200]!r}")
        token = int(step)
    container[token]
    return token


def is_file_url(url: str, file_origins: Iterable[str] = ()) -> bool:
    """Return whether a URL is that of an output file, judged by its origin alone.

    "Output files are served by replicate.delivery and its subdomains":
    https://replicate.com/docs/topics/predictions/output-files

    Args:
        url: Any text.
        file_origins: Further origins, as `scheme://host[:port]`.
    """
    origin = _origin(url)
    if origin is None:
        return False
    scheme, host, port = origin
    if scheme == "https" and port == 443 and (host == "replicate.delivery" or host.endswith(".replicate.delivery")):
        return True
    return any(origin == _origin(allowed) for allowed in file_origins)


def _walk(output: JSON, is_file_url: Callable[[str], bool]) -> "Iterator[tuple[_Place, str]]":
    # An own stack, since a hostile output is nested deeper than Python recurses: of iterators, since all children of a
    # long list would take more memory than the list. Places are linked, not written out: text for each level would
    # take the square of the depth.
    stack: list[tuple[_Place, Iterator[tuple[str | int, Any]]]] = []
    place: _Place = None
    value: Any = output
    while True:
        if isinstance(value, str):
            if _is_file(value, is_file_url):
                yield place, value
        elif isinstance(value, dict):
            stack.append((place, _members(value)))
        elif isinstance(value, list):
            stack.append((place, enumerate(value)))
        while stack:
            above, children = stack[-1]
            if (child := next(children, None)) is not None:
                break
            stack.pop()
        else:
            return
        place, value = (above, child[0]), child[1]


def _members(container: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in sorted(container):
        yield name, container[name]


_Place: TypeAlias = "tuple[_Place, str | int] | None"


def _is_file(text: str, is_file_url: Callable[[str], bool]) -> bool:
    start = text[:5].lower()
    return _is_data_url(text) if start == "data:" else start in ("https", "http:") and is_file_url(text)


def _pointer(place: _Place) -> str:
    tokens = []
    while place is not None:
        place, token = place
        tokens.append(_escaped(token))
    return "".join(f"/{token}" for token in reversed(tokens))


def _escaped(token: str | int) -> str:
    return str(token).replace("~", "~0").replace("/", "~1")


def _origin(url: str) -> tuple[str, str, int] | None:
    # By a pattern instead of a URL parser: parsers differ on what is not plain, and nothing else passes here.
    match = _URL.fullmatch(url)
    if match is None:
        return None
    scheme = match[1].lower()
    return scheme, match[2].lower(), int(match[3] or {"https": 443, "http": 80}[scheme])


def _is_data_url(text: str) -> bool:
    comma = text.find(",", 0, 512)
    header = _DATA_HEADER.fullmatch(text, 0, comma) if comma > 0 else None
    if header is None:
        return False
    if header[2].lower().endswith(";base64"):
        return _BASE64.fullmatch(text, comma + 1) is not None
    return _NOT_IN_A_URL.search(text, comma + 1) is None
