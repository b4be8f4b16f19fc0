"""Secrets Manager: secrets cached in memory."""

import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from predictions.aws.clients import client
from predictions.errors import PredictionsError

if TYPE_CHECKING:
    from mypy_boto3_secretsmanager import SecretsManagerClient

_KEY_LEAST_CHARACTERS = 32


class SecretTooShort(PredictionsError):
    """The stack's own fault: a secret that signs is too short to be one."""


class CachedSecret:
    """A secret, read when it is needed first and again when it was cached long enough.

    Args:
        arn: The secret.
        secretsmanager: The client to read it with; by default the one of this process.
        cache_seconds: For how long a value that was read is used.
        clock: The seconds by which the cache expires.
    """

    def __init__(
        self,
        arn: str,
        secretsmanager: "SecretsManagerClient | None" = None,
        *,
        cache_seconds: float = 300,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._arn = arn
        self._secretsmanager = secretsmanager
        self._cache_seconds = cache_seconds
        self._clock = clock
        self._value = ""
        self._read_at = -math.inf

    def current_value(self) -> str:
        """Return the secret's text, as it was `cache_seconds` ago at most.

        Raises:
            botocore.exceptions.ClientError: Secrets Manager does not give it.
            botocore.exceptions.BotoCoreError: Secrets Manager cannot be reached.
        """
        if self._clock() - self._read_at >= self._cache_seconds:
            secretsmanager = self._secretsmanager or client("secretsmanager")
            found: Mapping[str, Any] = secretsmanager.get_secret_value(SecretId=self._arn)
            text = found.get("SecretString")
            self._value = found["SecretBinary"].decode("utf-8", "replace") if text is None else text
            self._read_at = self._clock()
        return self._value

    def signing_key(self) -> bytes:
        """Return the secret as a key to sign with.

        Raises:
            SecretTooShort: It has fewer than 32 characters.
        """
        key = self.current_value().encode()
        if len(key) < _KEY_LEAST_CHARACTERS:
            raise SecretTooShort(f"The secret {self._arn} must hold at least {_KEY_LEAST_CHARACTERS} characters.")
        return key

    def forget(self) -> None:
        """Read the secret again at the next call, for example after it was refused."""
        self._read_at = -math.inf
