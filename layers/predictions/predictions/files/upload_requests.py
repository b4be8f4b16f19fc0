"""Upload requests, checked before anything is stored.

`read_form` takes a file with its content (`POST /files`), `read_upload` the description of one that goes straight to
S3 (`POST /uploads`). Both are untrusted: every fault of theirs is a `Problem`.
"""

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from multipart import MultipartError, ParserLimitReached, PushMultipartParser, parse_options_header

from predictions.bodies import OBJECT, TEXT, Body, Checks, ValidationError, errors_of, optional, text, whole
from predictions.errors import Problem
from predictions.ids import random_id
from predictions.validation import field_problem, fields_refused, parse_json

CONTENT_LIMIT_BYTES = 4_400_000
"""The largest file in a request: Lambda takes 6 MB, in which the body is base64 with the event around it.
https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html"""

UPLOAD_LIMIT_BYTES = 5 * 1024**3
"""The largest file that goes straight to S3: 5 GiB in one PUT.
https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html"""

METADATA_LIMIT_BYTES = 16 * 1024
NAME_LIMIT_BYTES = 255

# The form around the content: four small fields, and room for the headers of each.
_FORM_LIMIT_BYTES = CONTENT_LIMIT_BYTES + 64 * 1024
_PARTS_LIMIT = 16
_OTHER_TYPE = "application/octet-stream"
# Parameters such as a charset stay out: nothing reads them, and a header is no place for free text.
_MEDIA_TYPE = re.compile(r"[a-z0-9!#$&^_.+-]{1,80}/[a-z0-9!#$&^_.+-]{1,80}", re.IGNORECASE | re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@dataclass(frozen=True)
class NewFile:
    """A file to be stored.

    Attributes:
        name: As its owner calls it: shown again, and used for nothing else.
        content_type: A media type without parameters.
        size: Its bytes, of an upload as announced.
        metadata_json: A JSON object.
        content: The file, or None if it is uploaded straight to S3.
        sha256: Of an upload, in hexadecimal, where its owner gives it.
    """

    name: str
    content_type: str
    size: int
    metadata_json: str = "{}"
    content: bytes | None = field(default=None, repr=False)
    sha256: str | None = None
    id: str = field(default_factory=random_id)

    @property
    def sha256_base64(self) -> str | None:
        """Return `sha256` as S3 writes it."""
        return base64.b64encode(bytes.fromhex(self.sha256)).decode() if self.sha256 else None


@dataclass(kw_only=True)
class UploadBody(Body):
    """The fields of `POST /uploads`."""

    filename: str
    size: int
    type: str = _OTHER_TYPE
    metadata: dict[str, Any] = field(default_factory=dict)
    sha256: str | None = None

    checks: ClassVar[Checks] = {
        "filename": TEXT, "size": whole(1, UPLOAD_LIMIT_BYTES), "type": TEXT, "metadata": OBJECT,
        "sha256": optional(text(pattern=r"^[0-9a-f]{64}$")),
    }  # fmt: skip


def read_form(body: bytes, headers: Mapping[str, str]) -> NewFile:
    """Read a form with `content` and optionally `filename`, `type` and `metadata`.

    Args:
        body: The body.
        headers: The request's headers, their names in lower case.

    Raises:
        Problem: 400 (no form, or a broken one), 413 (too large, with the way that takes it), 415 (another media type),
            422 (a field).
    """
    if len(body) > _FORM_LIMIT_BYTES:
        raise _too_large(len(body))
    media_type, options = parse_options_header(headers.get("content-type", ""))
    if media_type != "multipart/form-data":
        raise Problem(415, f"The body must be multipart/form-data with the file as `content`, not {media_type!a:.80}.")
    parts = _parts(body, options.get("boundary", ""))
    if "content" not in parts:
        raise fields_refused([{"field": "content", "detail": "This field is required: the file itself."}])
    sent = parts["content"]
    if len(sent.content) > CONTENT_LIMIT_BYTES:
        raise _too_large(len(sent.content))
    invalid: list[dict[str, str]] = []
    name = _text(parts, "filename", invalid) or sent.filename or "file"
    # MIME takes a part without a type for text; for an uploader it is a file of unknown type.
    content_type = _text(parts, "type", invalid) or sent.content_type or _OTHER_TYPE
    metadata: Any = {}
    if "metadata" in parts:
        try:
            metadata = parse_json(parts["metadata"].content, None)
        except Problem as problem:
            invalid.append({"field": "metadata", "detail": problem.detail.replace("The body", "It", 1)})
    return _checked(NewFile(name, content_type, len(sent.content), content=sent.content), metadata, invalid)


def read_upload(body: bytes, content_type: str | None) -> NewFile:
    """Read the JSON description of a file that its owner will upload to S3.

    Raises:
        Problem: 400, 413, 415 (see `parse_json`) or 422 (a field).
    """
    try:
        asked = UploadBody.of(parse_json(body, content_type))
    except ValidationError as error:
        fields = [(str((each["loc"] or ("body",))[0])[:200], each) for each in errors_of(error)]
        raise fields_refused([field_problem(name, each, UploadBody.names()) for name, each in fields]) from None
    new = NewFile(asked.filename, asked.type, asked.size, sha256=asked.sha256)
    return _checked(new, asked.metadata, [])


@dataclass(frozen=True)
class _Part:
    filename: str | None
    content_type: str | None
    content: bytes


def _parts(body: bytes, boundary: str) -> dict[str, _Part]:
    if not re.fullmatch(r"[ -~]{1,200}", boundary, re.ASCII):
        raise Problem(400, "The header Content-Type has no boundary. Let the HTTP library write this header.")
    parts: dict[str, _Part] = {}
    try:
        parser = PushMultipartParser(boundary, max_segment_count=_PARTS_LIMIT, strict=True)
        with parser:
            segment: Any = None
            chunks: list[bytes] = []
            for event in parser.parse(body):
                if event is None:
                    if segment.name in parts:
                        raise fields_refused(
                            [{"field": str(segment.name)[:200], "detail": "This field is given twice."}]
                        )
                    parts[segment.name] = _Part(segment.filename, segment.content_type, b"".join(chunks))
                elif isinstance(event, bytes | bytearray):
                    chunks.append(bytes(event))
                else:
                    segment, chunks = event, []
    except ParserLimitReached as error:
        raise Problem(400, f"The form has too many parts or too large headers: {error}.") from None
    except MultipartError as error:
        raise Problem(
            400, f"The body is not a readable form: {str(error.args[0] if error.args else '')[:200]}."
        ) from None
    return parts


def _text(parts: Mapping[str, _Part], name: str, invalid: list[dict[str, str]]) -> str | None:
    try:
        return parts[name].content.decode() if name in parts else None
    except UnicodeDecodeError:
        invalid.append({"field": name, "detail": "Must be UTF-8."})
        return None


def _checked(new: NewFile, metadata: Any, invalid: list[dict[str, str]]) -> NewFile:
    try:
        name_bytes = len(new.name.encode())
    except UnicodeEncodeError:
        name_bytes = 0
    if not 1 <= name_bytes <= NAME_LIMIT_BYTES or _CONTROL.search(new.name):
        detail = f"Must be 1 to {NAME_LIMIT_BYTES} bytes of UTF-8 without control characters."
        invalid.append({"field": "filename", "detail": detail})
    content_type = new.content_type.partition(";")[0].strip()
    if not _MEDIA_TYPE.fullmatch(content_type):
        invalid.append({"field": "type", "detail": "Must be a media type, such as `image/png`."})
    metadata_json = ""
    if not isinstance(metadata, dict):
        invalid.append({"field": "metadata", "detail": "Must be a JSON object."})
    else:
        metadata_json = json.dumps(metadata, separators=(",", ":"), allow_nan=False)
        if len(metadata_json) > METADATA_LIMIT_BYTES:
            invalid.append({"field": "metadata", "detail": f"Must be at most {METADATA_LIMIT_BYTES} bytes of JSON."})
    if invalid:
        raise fields_refused(invalid)
    return NewFile(new.name, content_type.lower(), new.size, metadata_json, new.content, new.sha256, new.id)


def _too_large(size: int) -> Problem:
    detail = (
        f"The file has about {size} bytes, which exceeds the limit of {CONTENT_LIMIT_BYTES} of POST /files. Send its "
        f"description to POST /uploads instead, which gives a URL for up to {UPLOAD_LIMIT_BYTES // 1024**3} GiB."
    )
    return Problem(413, detail)
