"""The refresh of Replicate's signing secret, apart from what receives webhooks: that imports no client of Replicate."""

from collections.abc import Callable

from botocore.exceptions import BotoCoreError, ClientError

from predictions.net.signatures import SigningSecretUnavailable
from predictions.observability import logger
from predictions.upstream.errors import UpstreamError
from predictions.upstream.signing_secret import SigningSecrets

SECRET_REFRESH_SECONDS = 600


class SigningSecretRefresh:
    """Keeps the stored signing secret the same as Replicate's, once in `SECRET_REFRESH_SECONDS` for a warm function.

    Args:
        secrets: Where it is stored.
    """

    def __init__(self, secrets: SigningSecrets) -> None:
        self._secrets = secrets
        self._refreshed_at = 0.0

    def refresh(self, ask: Callable[[], str], now: float) -> None:
        """Store what Replicate says, if that is due. Where it fails, it is logged, and the next call does it again.

        Args:
            ask: Asks Replicate for the secret.
            now: The time, in seconds since 1970.
        """
        if now < self._refreshed_at + SECRET_REFRESH_SECONDS:
            return
        try:
            changed = self._secrets.store(ask(), now)
        except (UpstreamError, SigningSecretUnavailable, ClientError, BotoCoreError) as error:
            # Predictions end by poll without it, so the sweep goes on.
            logger.error("signing secret not refreshed", reason=str(error))
            return
        self._refreshed_at = now
        if changed:
            logger.info("signing secret changed")
