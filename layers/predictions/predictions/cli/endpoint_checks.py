"""Checks from outside: the API and its authorizer, Replicate's webhooks, Replicate itself, and the clocks.

All requests go to the address that the functions read, and that Replicate is given for its webhooks.
"""

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx
from botocore.exceptions import BotoCoreError, ClientError

from predictions.api.access_tokens import AccessTokens, Scope
from predictions.aws.s3 import error_code
from predictions.cli.checks import Check, CheckFailed, CheckUnclear, Deployed, date_of
from predictions.cli.stack import line
from predictions.errors import PredictionsError
from predictions.net.signatures import TOLERANCE_SECONDS, SigningSecretUnavailable
from predictions.upstream.credentials import token_of
from predictions.upstream.errors import TokenUnreadable
from predictions.upstream.signing_secret import SigningSecrets

TOKEN_VARIABLE = "REPLICATE_SERVERLESS_TOKEN"  # noqa: S105  # the variable's name
"""Holds an access token of the API, for callers that may not write to the table."""

OWNER = "doctor"
"""The owner of the token that the checks make for themselves, and of the prediction that they run."""

# Left by a run that was killed. The longest run is shorter: see `prediction_checks`.
_LEFT_SECONDS = 3600
# AWS refuses a request, and the stack a webhook, whose time is five minutes off: half of it is left as a margin.
# https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv.html
_CLOCK_LIMIT_SECONDS = TOLERANCE_SECONDS / 2
_DEPLOY = "Deploy this version of the stack again."
_SHOWN_CHARACTERS = 160


@dataclass(frozen=True)
class GivenToken:
    """An access token of the API for the checks.

    Attributes:
        value: The token; None if there is no token.
        source: Where it comes from, or why there is no token.
    """

    value: str | None
    source: str


@contextmanager
def access_token(
    deployed: Deployed, environment: Mapping[str, str], scopes: tuple[Scope, ...], say: Callable[[str], None]
) -> Iterator[GivenToken]:
    """Give the token of the environment; without one, make a token that is revoked at the end.

    If the process is killed before the end, the next run revokes the token that is left.
    """
    if given := environment.get(TOKEN_VARIABLE):
        yield GivenToken(given, f"the token in {TOKEN_VARIABLE}")
        return
    tokens = AccessTokens(deployed.id("PredictionsTable"), deployed.client("dynamodb"))
    try:
        value, access = tokens.create(OWNER, scopes, f"{OWNER} {int(time.time())}")
    except ClientError as error:
        yield GivenToken(None, f"a token could not be made ({error_code(error)}), and {TOKEN_VARIABLE} is not set")
        return
    try:
        yield GivenToken(value, f"a token of its own, {access.id}, revoked at the end")
    finally:
        try:
            tokens.revoke(access.id)
            for left in tokens.list():
                made = left.name.removeprefix(f"{OWNER} ")
                if left.owner == OWNER and made.isdigit() and time.time() - int(made) > _LEFT_SECONDS:
                    tokens.revoke(left.id)
        except (ClientError, BotoCoreError, PredictionsError) as error:
            say(f"A token of these checks may be left ({error}): {deployed.command(f'tokens revoke {access.id}')}")


class EndpointChecks:
    """The checks of everything that is reached by HTTP.

    Args:
        deployed: The stack.
        token: An access token of the API.
        http: The client to use; it must not follow redirects, since tokens go with its requests.
        now: The time.
    """

    def __init__(self, deployed: Deployed, token: GivenToken, http: httpx.Client, now: Callable[[], float]) -> None:
        self._deployed = deployed
        self._token = token
        self._http = http
        self._now = now

    def checks(self) -> Iterator[Check]:
        """List the checks."""
        yield Check("api.unknown-path", self._unknown_path)
        yield Check("api.no-token", self._no_token)
        yield Check("api.wrong-token", self._wrong_token)
        yield Check("api.valid-token", self._valid_token)
        yield Check("api.openapi", self._openapi)
        yield Check("webhooks.route", self._webhook_route)
        yield Check("replicate.token", self._account)
        yield Check("replicate.signing-secret", self._signing_secret)
        yield Check("clock.caller", self._caller_clock)
        yield Check("clock.replicate", self._replicate_clock)

    @cached_property
    def api_url(self) -> str:
        """The API's URL, as the functions read it."""
        name = self._deployed.outputs.get("ApiUrlParameterName", f"/{self._deployed.stack.name}/api_url")
        parameter = self._deployed.client("ssm").get_parameter(Name=name)
        return str(parameter["Parameter"]["Value"]).rstrip("/")

    @property
    def replicate_url(self) -> str:
        """The URL of Replicate's API."""
        return self._deployed.parameter("ReplicateApiUrl").rstrip("/")

    @cached_property
    def replicate_token(self) -> str:
        """The stack's Replicate token.

        Raises:
            CheckFailed: The secret does not exist, or holds no token.
        """
        arn = self._deployed.outputs.get("ReplicateTokenSecretArn", "")
        action = f"{self._deployed.command('secrets rotate replicate-token')} < FILE"
        try:
            return token_of(self._deployed.client("secretsmanager").get_secret_value(SecretId=arn)["SecretString"])
        except ClientError as error:
            if error_code(error) != "ResourceNotFoundException":
                raise
            raise CheckFailed(
                f"the secret {arn} does not exist, or has no value",
                f"{action}, if the secret exists; else deploy with ReplicateTokenSecretArn of one that does.",
            ) from error
        except (TokenUnreadable, KeyError) as error:
            raise CheckFailed(f"the secret {arn} holds no token", action) from error

    def _ask(self, method: str, url: str, action: str, **request: Any) -> httpx.Response:
        try:
            return self._http.request(method, url, **request)
        except httpx.HTTPError as error:
            raise CheckFailed(f"{method} {url} got no response ({type(error).__name__}: {error})", action) from error

    # -- API ----------------------------------------------------------------------------------------------------------

    def _api(self, path: str, token: str | None = None) -> httpx.Response:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        action = "Check the DNS record of DomainName, a WAF or a resource policy in front, and this network."
        return self._ask("GET", f"{self.api_url}{path}", action, headers=headers)

    def _unknown_path(self) -> str:
        response = self._api("/there-is-no-such-path")
        return _expect(response, 404, f"The stage does not serve this stack's API. {_DEPLOY}")

    def _no_token(self) -> str:
        return _expect(self._api("/predictions"), 401, f"The API is open to everybody, or refuses otherwise. {_DEPLOY}")

    def _wrong_token(self) -> str:
        wrong = f"rs_{secrets.token_urlsafe(32)}"
        action = f"The authorizer accepts unknown tokens, or fails: read the log of authorize_request. {_DEPLOY}"
        return _expect(self._api("/predictions", wrong), 401, action)

    def _valid(self, path: str) -> httpx.Response:
        if self._token.value is None:
            raise CheckUnclear(self._token.source, f"Set {TOKEN_VARIABLE} to an access token with the scope read.")
        return self._api(path, self._token.value)

    def _valid_token(self) -> str:
        response = self._valid("/predictions")
        action = f"A token in {TOKEN_VARIABLE} needs the scope read. See the log of authorize_request."
        return f"{_expect(response, 200, action, kind='application/json')}, with {self._token.source}"

    def _openapi(self) -> str:
        response = self._valid("/openapi.json")
        seen = _expect(response, 200, f"Read the log of read_predictions. {_DEPLOY}", kind="application/json")
        try:
            return f"{seen}, OpenAPI {response.json()['openapi']}, {len(response.json()['paths'])} paths"
        except (ValueError, KeyError, TypeError) as error:
            raise CheckFailed(f"{seen}, but not an OpenAPI document", _DEPLOY) from error

    # -- webhooks -----------------------------------------------------------------------------------------------------

    def _webhook_route(self) -> str:
        url = f"{self.api_url}/webhooks/replicate/{'0' * 26}"
        if self.replicate_url.startswith("https://") and not url.startswith("https://"):
            raise CheckFailed(f"Replicate is given {url}", f"Replicate accepts https URLs only. {_DEPLOY}")
        response = self._ask(
            "POST", url, "Replicate cannot reach this address either: results come late, by polls. Check the DNS"
            " record and certificate of DomainName, a WAF, and a resource policy.", json={},
        )  # fmt: skip
        if response.status_code == 503:
            raise CheckFailed(
                f"503 at {url}: {_detail(response)}",
                f"{self._deployed.command('secrets refresh')}; then see replicate.token.",
            )
        action = (
            "This is not the stack's webhook route, or it accepts unsigned webhooks: check the custom domain or the WAF"
            f" in front of the API. {_DEPLOY}"
        )
        seen = _expect(response, 401, action)
        if "not a webhook that Replicate signed" not in _detail(response):
            raise CheckFailed(f"{seen} by something other than receive_webhook: {_detail(response)}", action)
        return f"{seen} for an unsigned webhook, at {url}"

    # -- Replicate ----------------------------------------------------------------------------------------------------

    def _replicate(self, path: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.replicate_token}"}
        try:
            response = self._http.get(f"{self.replicate_url}{path}", headers=headers)
        except httpx.HTTPError as error:
            raise CheckUnclear(
                f"Replicate did not respond ({type(error).__name__})",
                "See replicatestatus.com, and this network; then try again.",
            ) from error
        if response.status_code in (401, 403):
            raise CheckFailed(
                f"Replicate refuses the stack's token ({response.status_code})",
                f"{self._deployed.command('secrets rotate replicate-token')} < FILE",
            )
        if response.status_code != 200:
            raise CheckUnclear(
                f"Replicate responded {response.status_code}", "See replicatestatus.com, then try again."
            )
        return response

    def _account(self) -> str:
        try:
            account = self._replicate("/account").json()
            name, kind = str(account["username"]), str(account["type"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckFailed(
                f"{self.replicate_url} does not respond as Replicate's API does", "Deploy with another ReplicateApiUrl."
            ) from error
        return f"accepted: {line(kind, 40)} {line(name, 80)}"

    def _signing_secret(self) -> str:
        arn, refresh = (
            self._deployed.outputs.get("SigningSecretArn", ""),
            (f"{self._deployed.command('secrets refresh')}; then see sweep-schedule, whose function does the same."),
        )
        try:
            stored = SigningSecrets(arn, self._deployed.client("secretsmanager")).current(self._now())
        except SigningSecretUnavailable as error:
            cause = error.__cause__
            if isinstance(cause, ClientError) and error_code(cause) != "ResourceNotFoundException":
                raise cause from None
            raise CheckFailed("no signing secret is stored: webhooks get 503", refresh) from error
        try:
            current = self._replicate("/webhooks/default/secret").json()["key"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckUnclear("Replicate's response has no signing secret", "Try again later.") from error
        if current not in stored:
            raise CheckFailed("the stored signing secret is not Replicate's: webhooks get 401", refresh)
        return "stored, and the one that Replicate signs with"

    # -- clocks -------------------------------------------------------------------------------------------------------

    def _caller_clock(self) -> str:
        aws = _off(self._deployed.answered_at, self._deployed.described_at)
        if aws is None:
            raise CheckUnclear("AWS's response has no Date", "Compare this machine's clock with another one.")
        off = -aws
        if abs(off) > _CLOCK_LIMIT_SECONDS:
            raise CheckFailed(
                f"this machine's clock is {off:+.0f} s off AWS's, which accepts {TOLERANCE_SECONDS}",
                "Set this machine's clock (NTP): AWS will refuse its requests.",
            )
        return f"this machine's clock is {off:+.0f} s off AWS's"

    def _replicate_clock(self) -> str:
        try:
            # Without the token: a refusal has a Date as well.
            response = self._http.get(f"{self.replicate_url}/account")
        except httpx.HTTPError as error:
            raise CheckUnclear(f"Replicate did not respond ({type(error).__name__})", "Try again later.") from error
        off = _off(date_of(response.headers), self._now())
        aws = _off(self._deployed.answered_at, self._deployed.described_at)
        if off is None or aws is None:
            raise CheckUnclear("a response has no Date", "Nothing: this compares clocks that the stack does not set.")
        # Functions, whose clock is AWS's, compare it with the time in a webhook.
        off -= aws
        if abs(off) > _CLOCK_LIMIT_SECONDS:
            raise CheckFailed(
                f"Replicate's clock is {off:+.0f} s off AWS's: webhooks {TOLERANCE_SECONDS} s off are refused",
                "Nothing in the stack is wrong: polls bring the results meanwhile. Ask Replicate's support.",
            )
        return f"Replicate's clock is {off:+.0f} s off AWS's"


def _off(date: float | None, at: float) -> float | None:
    """Return by how much the clock that made a `Date` is ahead of this machine's."""
    return None if date is None else date - at


def _detail(response: httpx.Response) -> str:
    try:
        text = str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        text = response.text
    return line(text, _SHOWN_CHARACTERS)


def _expect(response: httpx.Response, status: int, action: str, *, kind: str = "application/problem+json") -> str:
    found = response.headers.get("content-type", "").partition(";")[0]
    if (response.status_code, found) != (status, kind):
        raise CheckFailed(
            f"{response.status_code} {found or 'without a type'} instead of {status} {kind}: {_detail(response)}",
            action,
        )
    return str(status)
