"""Presigned URLs of S3.

The emulator verifies their signatures and their time, but lets a request pass that brings other credentials as well.
"""

import functools
from collections.abc import Callable
from typing import Any

from ministack.services import s3

MESSAGE = (
    "Only one auth mechanism allowed; only the X-Amz-Algorithm query parameter, Signature query string parameter or "
    "the Authorization header should be specified"
)


def with_one_mechanism(validate: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse a request that brings two kinds of credentials.

    https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html (InvalidArgument)
    """

    @functools.wraps(validate)
    def run(method: str, path: str, headers: dict[str, Any], query: dict[str, Any]) -> Any:
        signed = {name.lower() for name in query} & {"x-amz-algorithm", "signature"}
        if signed and headers.get("authorization"):
            return s3._error("InvalidArgument", MESSAGE, 400, path)
        return validate(method, path, headers, query)

    return run


def patch() -> None:
    """Change the emulator."""
    s3.validate_object_request = with_one_mechanism(s3.validate_object_request)
