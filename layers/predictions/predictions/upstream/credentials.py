"""The stack's Replicate token, kept in Secrets Manager."""

import json
import re
import time

from botocore.exceptions import BotoCoreError, ClientError

from predictions.aws.secrets import CachedSecret
from predictions.upstream.errors import TokenUnreadable

_CACHE_SECONDS = 60


def token_of(secret: str) -> str:
    """Return the token in a secret: the bare token, or JSON with a key `token`.

    Raises:
        TokenUnreadable: The value holds no token. It is not repeated.
    """
    text = secret.strip()
    if text.startswith("{"):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        text = str(value.get("token", "")).strip() if isinstance(value, dict) else ""
    if not re.fullmatch(r"[!-~]+", text):
        raise TokenUnreadable("this stack's secret holds no Replicate token")
    return text


class Token:
    """The stack's Replicate token, read from Secrets Manager at most once a minute."""

    def __init__(self, secret_arn: str) -> None:
        # A monotonic clock may stop in a frozen sandbox. A token that was revoked meanwhile would be refused,
        # which pauses all submissions.
        self._secret = CachedSecret(secret_arn, cache_seconds=_CACHE_SECONDS, clock=time.time)

    def value(self) -> str:
        """Return the token, at most a minute old.

        A change in Secrets Manager is seen within that time, or at once after `forget`.

        Raises:
            TokenUnreadable: Secrets Manager does not give it, or its value is no token. The value is not repeated.
        """
        try:
            return token_of(self._secret.current_value())
        except (BotoCoreError, ClientError) as error:
            raise TokenUnreadable("Secrets Manager does not give this stack's Replicate token") from error

    def forget(self) -> None:
        """Read the secret again at the next call: this token was refused."""
        self._secret.forget()
