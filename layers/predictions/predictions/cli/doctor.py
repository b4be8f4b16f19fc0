"""The command that checks a deployed stack from outside, and each check's remedy."""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Annotated

import typer
from botocore.exceptions import ClientError

from predictions.api.access_tokens import Scope
from predictions.aws.s3 import error_code
from predictions.cli.checks import Deployed, Finding, Result, run
from predictions.cli.endpoint_checks import EndpointChecks, access_token
from predictions.cli.prediction_checks import PredictionChecks, wanted_of
from predictions.cli.resource_checks import ResourceChecks
from predictions.cli.stack import JsonObject, NotDone, Stack, command, group, line, second

app = group()

# Cold functions, and Replicate's create behind them, take seconds; the API itself ends a call after 29.
_HTTP_SECONDS = 35
_SEEN_CHARACTERS = 600
# With these codes AWS refuses a request whose time is too far from its own.
# https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html and
# https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/CommonErrors.html
_SKEWED = ("RequestTimeTooSkewed", "RequestExpired", "InvalidSignatureException", "SignatureDoesNotMatch")


@command(app, "doctor", example="doctor --predict black-forest-labs/flux-schnell --stack NAME")
def doctor(
    stack: Stack,
    predict: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Also run one prediction of this model, which Replicate bills, to its stored files."
        ),
    ] = None,
    model_input: Annotated[
        str | None,
        typer.Option("--input", metavar="JSON", help='Input of that prediction (default: {"prompt": "…"}).'),
    ] = None,
    as_json: JsonObject = False,
) -> None:
    """Check from outside that a deployed stack is as it has to be.

    Each check is ok, failed or unknown; what is not ok says what to do. The exit code is 1 if one failed. For the API
    it uses the access token in REPLICATE_SERVERLESS_TOKEN, or makes one that it revokes at the end.
    """

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    findings: list[Finding] = []
    for finding in examine(stack, predict, model_input, os.environ, say):
        findings.append(finding)
        # At once, since the checks take a minute.
        (say if as_json else _show)(shown(finding))
    counts = Counter(finding.result for finding in findings)
    if as_json:
        report = {"stack": stack.name, "at": second(int(time.time())), **_counted(counts)}
        print(json.dumps({**report, "checks": [asdict(finding) for finding in findings]}, indent=2))
    else:
        print(", ".join(f"{count} {name}" for name, count in _counted(counts).items()))
    if counts[Result.FAILED]:
        raise typer.Exit(1)


def examine(
    stack: Stack,
    model: str | None,
    model_input: str | None,
    environment: Mapping[str, str],
    say: Callable[[str], None],
    now: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Finding]:
    """Run all checks of a stack, one after the other.

    Args:
        stack: The stack.
        model: The model of a prediction to run; None to run no prediction.
        model_input: Its input as JSON.
        environment: May hold an access token of the API.
        say: Called with each step of a prediction.
        now: The time.
        sleep: Waits some seconds.

    Raises:
        NotDone: The input is no JSON object, or the stack cannot be described.
        StackUnusable: The stack does not exist.
    """
    import httpx  # only this command needs it

    try:
        wanted = wanted_of(model, model_input) if model else None
    except ValueError as error:
        raise NotDone(f'--input must be a JSON object, such as {{"prompt": "a fox"}} ({error}).') from error
    try:
        deployed = Deployed(stack, now)
    except ClientError as error:
        if error_code(error) in _SKEWED:
            raise NotDone(
                f"AWS refuses this machine's requests: check its clock and its credentials. {error}"
            ) from error
        raise
    for check in ResourceChecks(deployed, now).checks():
        yield run(check)
    scopes = (Scope.PREDICT, Scope.READ) if wanted else (Scope.READ,)
    with (
        access_token(deployed, environment, scopes, say) as token,
        httpx.Client(timeout=_HTTP_SECONDS, follow_redirects=False) as http,
    ):
        endpoints = EndpointChecks(deployed, token, http, now)
        for check in endpoints.checks():
            yield run(check)
        if wanted:
            trial = PredictionChecks(deployed, endpoints, wanted, token, http, say=say, now=now, sleep=sleep)
            for check in trial.checks():
                yield run(check)


def shown(finding: Finding) -> str:
    """Write a finding as lines of a terminal."""
    mark = finding.result.upper() if finding.result is Result.FAILED else finding.result
    text = f"{mark:8} {finding.name:34} {line(finding.seen, _SEEN_CHARACTERS)}"
    return f"{text}\n{'':8} -> {finding.action}" if finding.action else text


def _show(text: str) -> None:
    print(text, flush=True)


def _counted(counts: Mapping[Result, int]) -> dict[str, int]:
    return {str(result): counts.get(result, 0) for result in Result}
