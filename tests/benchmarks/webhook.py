"""A webhook of Replicate on a warm function: CPU of a call, and its requests to AWS.

    python -m tests.benchmarks.webhook

The handler runs in a process of its own, as the template configures it, with botocore's own clients; the table is in
memory and answers in the place of HTTP, so CPU is that of the function without its connections. It is shown beside one
GetItem through the same client.
"""

import copy
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest

from local.terminal import Terminal
from tests.benchmarks.report import BenchmarkFailed, note, table
from tests.support.fixtures import ENVIRONMENT

RUNS = 60
CASES = ("start", "completed, no file", "completed, one file", "completed again", "an older one again")
_UPSTREAM_ID = "u" * 26
_REFERENCE = "(one GetItem)"


@dataclass(frozen=True)
class Webhook:
    """One kind of webhook: CPU milliseconds of each call, and requests to AWS of a call, by operation."""

    cpu_ms: tuple[float, ...]
    requests: dict[str, int]


def measure(say: Callable[[str], None]) -> dict[str, Webhook]:
    """Run each kind of webhook, in a process of its own.

    Raises:
        BenchmarkFailed: One was not accepted.
    """
    say(f"receiving {RUNS} webhooks of each kind")
    ran = subprocess.run(  # this module
        [sys.executable, "-m", "tests.benchmarks.webhook", "--measure"],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
    )
    if ran.returncode:
        raise BenchmarkFailed(f"webhooks were not received:\n{ran.stderr[-3000:]}")
    found = json.loads(ran.stdout.splitlines()[-1])
    return {name: Webhook(tuple(each["cpu_ms"]), each["requests"]) for name, each in found.items()}


def show(terminal: Terminal, found: dict[str, Webhook]) -> None:
    """Show CPU and requests of each kind."""
    operations = sorted({name for each in found.values() for name in each.requests})
    one = median(found[_REFERENCE].cpu_ms)
    rows = [
        (
            name,
            f"{median(each.cpu_ms):.2f}",
            f"{median(each.cpu_ms) / one:.1f} x",
            str(sum(each.requests.values())),
            *(str(each.requests.get(operation, "")) for operation in operations),
        )
        for name, each in found.items()
    ]
    terminal.write()
    terminal.write(table(("webhook", "CPU ms", "of one GetItem", "requests", *operations), rows))
    terminal.write(
        note(
            f"The median of {RUNS} calls of the warm handler, without HTTP and TLS between it and AWS. The signing "
            "secret is read every five minutes and not counted. An older one is a webhook that says less "
            "than the item does."
        )
    )


def _measure() -> dict[str, Any]:
    from predictions.aws import clients
    from predictions.files.outputs_bucket import OutputsBucket
    from predictions.net.signatures import sign
    from predictions.store.predictions import PredictionsTable

    from tests.support.apps import SAMPLE_SIGNING_SECRET, Context, load_app, sample
    from tests.support.fakes import Clock
    from tests.support.predictions import put, told
    from tests.support.quick_aws import QUICK, QuickTable, account, mocked

    made: Counter[str] = Counter()

    def record(model: Any, **_: Any) -> Any:
        made[f"{model.service_model.service_name} {model.name}"] += 1
        if model.service_model.service_name == "stepfunctions":
            return SimpleNamespace(status_code=200), {"ResponseMetadata": {}}
        return None

    with pytest.MonkeyPatch.context() as patches, mocked(), QUICK.lent(QuickTable()):
        secret = json.dumps({"current": SAMPLE_SIGNING_SECRET, "previous": None, "rotated_at": None})
        account("secretsmanager").create_secret("signing-secret", secret, None, "", [], None, None, [], False)
        dynamodb = clients.client("dynamodb")
        app = load_app("receive_webhook", patches)
        predictions = PredictionsTable("predictions", OutputsBucket("outputs"), dynamodb)
        for name in ("dynamodb", "s3", "lambda", "sqs", "stepfunctions"):
            client: Any = clients.client(name)
            client.meta.events.register_first("before-call", record)
        clock = Clock()
        patches.setattr(app, "time", SimpleNamespace(time=clock.now))
        template = sample("receive_webhook", "succeeded")

        def event_of(id_: str, **body: Any) -> dict[str, Any]:
            raw = json.dumps({"id": _UPSTREAM_ID, "input": {"n": 1}, "logs": "", **body})
            signed = sign(raw.encode(), webhook_id="msg_1", timestamp=int(clock.now()), secrets=[SAMPLE_SIGNING_SECRET])
            event = copy.deepcopy(template)
            event |= {"path": f"/webhooks/replicate/{id_}", "pathParameters": {"id": id_}, "body": raw}
            event["headers"] |= {name.title(): value for name, value in signed.items()}
            event["multiValueHeaders"] = {name: [value] for name, value in event["headers"].items()}
            return event

        def receive(event: dict[str, Any]) -> float:
            made.clear()
            began = time.process_time()
            answer = app.handler(event, Context())
            took = (time.process_time() - began) * 1000
            assert answer["statusCode"] == 200, answer
            return took

        found: dict[str, dict[str, Any]] = {name: {"cpu_ms": [], "requests": {}} for name in (_REFERENCE, *CASES)}

        def note_case(name: str, took: float) -> None:
            found[name]["cpu_ms"].append(took)
            found[name]["requests"] = dict(made)

        silence = os.open(os.devnull, os.O_WRONLY)
        stdout = os.dup(1)
        os.dup2(silence, 1)
        for _ in range(RUNS + 1):
            for kind, output in (("no file", "text"), ("one file", "https://replicate.delivery/a/out.png")):
                prediction = put(predictions, clock)
                key = {"pk": {"S": f"prediction#{prediction.id}"}, "sk": {"S": "status"}}
                predictions.merge(prediction.id, told("starting", _UPSTREAM_ID), clock.now())
                dynamodb.update_item(
                    TableName="predictions", Key=key, UpdateExpression="SET task_token = :token",
                    ExpressionAttributeValues={":token": {"S": "t" * 1000}},
                )  # fmt: skip
                made.clear()
                began = time.process_time()
                dynamodb.get_item(TableName="predictions", Key=key)
                note_case(_REFERENCE, (time.process_time() - began) * 1000)
                start = event_of(prediction.id, status="processing")
                completed = event_of(prediction.id, status="succeeded", output=output)
                note_case("start", receive(start))
                note_case(f"completed, {kind}", receive(completed))
                note_case("completed again", receive(completed))
                note_case("an older one again", receive(start))
        sys.stdout.flush()
        os.dup2(stdout, 1)
    for each in found.values():
        each["cpu_ms"] = each["cpu_ms"][2:]
    return found


def main() -> int:
    """Run this part alone, or measure in this process; return the exit status."""
    if "--measure" in sys.argv:
        print(json.dumps(_measure()))  # noqa: T201  # a program's answer
        return 0
    terminal = Terminal(sys.stdout)
    try:
        show(terminal, measure(terminal.step))
    except BenchmarkFailed as error:
        terminal.refuse(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
