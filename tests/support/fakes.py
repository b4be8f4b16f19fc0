"""What stands outside the stack, in process: Replicate behind `httpx.MockTransport`, and calls to Step Functions."""

import base64
import json
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import format_datetime
from enum import StrEnum
from types import TracebackType
from typing import Any

import httpx
from botocore.exceptions import ReadTimeoutError
from predictions.aws import clients
from predictions.intents.model import Attempt

from tests.support.quick_aws import account

API_URL = "https://api.example.com/v1"
VERSION = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa"
SCHEMA = {
    "components": {
        "schemas": {
            "Input": {
                "type": "object",
                "required": ["prompt"],
                "properties": {
                    "prompt": {"type": "string", "x-order": 0},
                    "aspect_ratio": {"allOf": [{"$ref": "#/components/schemas/aspect_ratio"}], "default": "1:1"},
                    "num_outputs": {"type": "integer", "default": 1, "minimum": 1, "maximum": 4},
                },
            },
            "aspect_ratio": {"type": "string", "enum": ["1:1", "16:9"]},
        }
    }
}
# Published with Standard Webhooks' libraries and with Svix's: https://github.com/standard-webhooks/standard-webhooks
# and by Replicate: https://replicate.com/docs/topics/webhooks/verify-webhook
WEBHOOK_VECTORS = [
    (
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        1614265330,
        b'{"test": 2432232314}',
        "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    ),
    (
        "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD",
        "msg_27UH4WbU6Z5A5EzD8u03UvzRbpk",
        1649367553,
        b'{"email":"test@example.com","username":"test_user"}',
        "v1,tZ1I4/hDygAJgO5TYxiSd6Sd0kDW6hPenDe+bTa3Kkw=",
    ),
]
PNG = b"\x89PNG\r\n\x1a\n" + b"pixels" * 100


class Clock:
    """Time that moves only when a test says so, or when somebody sleeps."""

    def __init__(self) -> None:
        self.moment = 1_750_000_000.0

    def now(self) -> float:
        return self.moment

    def sleep(self, seconds: float) -> None:
        self.moment += seconds

    def advance(self, seconds: float) -> None:
        self.moment += seconds


def attempt(clock: Clock, number: int) -> Attempt:
    """An attempt of an SDK's that comes now."""
    return Attempt(number, int(clock.now() * 1000))


_CREATES = ("/predictions", "/trainings")

Answer = Callable[[httpx.Request, "ReplicateInMemory"], httpx.Response]


class ReplicateInMemory:
    """Replicate's API and file host, as far as the protocol sees them.

    `models` and `deployments` are described by `owner/name`, `versions` by `owner/name/versions/{id}`.
    `faults` answers the next creates in its order, instead of or around `accept`; everything asked is in `asked`.
    `others` answers what the protocol does not ask, by method and path.
    """

    URL = "https://api.replicate.com/v1"
    TOKEN = "r8_of_the_stack"
    SECRET = "whsec_" + base64.b64encode(b"the signing secret of Replicate!").decode()

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.predictions: dict[str, dict[str, Any]] = {}
        self.asked: list[httpx.Request] = []
        self.faults: list[Answer] = []
        self.read_faults: list[Answer] = []
        self.files: dict[str, Callable[[], httpx.Response]] = {}
        # Where the webhook of a create is shown: in the `list`, by `get`.
        self.shows_webhook: set[str] = set()
        self.webhooks: dict[str, str] = {}
        self.others: dict[tuple[str, str], Callable[[], httpx.Response]] = {}
        self.models: dict[str, dict[str, Any]] = {
            "meta/llama": {"is_official": True, "latest_version": None},
            "stability-ai/sdxl": {"is_official": False, "latest_version": {"id": VERSION}},
            "black-forest-labs/flux-schnell": {
                "is_official": True,
                "latest_version": {"id": VERSION, "openapi_schema": SCHEMA},
            },
        }
        self.deployments: dict[str, dict[str, Any]] = {}
        self.versions: dict[str, dict[str, Any]] = {}
        self._clients: list[httpx.Client] = []

    def __enter__(self) -> "ReplicateInMemory":
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        for client in self._clients:
            client.close()

    def client(self) -> httpx.Client:
        """A client that reaches this Replicate and nothing else."""
        client = httpx.Client(transport=httpx.MockTransport(self._answer))
        self._clients.append(client)
        return client

    @property
    def creates(self) -> list[dict[str, Any]]:
        """The bodies of all creates that were asked, accepted or not."""
        return [json.loads(r.content) for r in self.asked if r.method == "POST" and r.url.path.endswith(_CREATES)]

    @property
    def canceled(self) -> list[str]:
        """The ids that were asked to be canceled."""
        return [r.url.path.split("/")[-2] for r in self.asked if r.url.path.endswith("/cancel")]

    def accept(self, request: httpx.Request, **told: Any) -> dict[str, Any]:
        """Makes the prediction that a create asks for."""
        body = json.loads(request.content)
        path = request.url.path.removeprefix("/v1/")
        kind, _, name = path.removesuffix("/predictions").partition("/")
        training = re.fullmatch(r"models/(.+)/versions/(.+)/trainings", path)
        if training:
            name, body = training[1], body | {"version": training[2]}
        prediction_id = secrets.token_hex(13)
        prediction = {
            "id": prediction_id,
            "model": name if kind == "models" else "stability-ai/sdxl",
            "version": body.get("version", "hidden"),
            "input": body["input"],
            "output": None,
            "logs": "",
            "error": None,
            "status": "starting",
            "created_at": self.timestamp(),
            "data_removed": False,
            "urls": {"get": f"{self.URL}/predictions/{prediction_id}"},
            **({"deployment": name} if kind == "deployments" else {}),
            **({"destination": body["destination"]} if training else {}),
            **told,
        }
        self.predictions[prediction_id] = prediction
        if "webhook" in body:
            self.webhooks[prediction_id] = body["webhook"]
        return prediction

    def finish(self, prediction_id: str, status: str = "succeeded", **told: Any) -> dict[str, Any]:
        """Ends a prediction there."""
        self.predictions[prediction_id] |= {
            "status": status,
            "completed_at": self.timestamp(),
            "metrics": {"predict_time": 1.5},
            **told,
        }
        return self.predictions[prediction_id]

    def timestamp(self) -> str:
        return datetime.fromtimestamp(self._clock.now(), UTC).isoformat().replace("+00:00", "Z")

    def _answer(self, request: httpx.Request) -> httpx.Response:
        answered = self._answer_of(request)
        answered.headers.setdefault(
            "date", format_datetime(datetime.fromtimestamp(self._clock.now(), UTC), usegmt=True)
        )
        return answered

    def _answer_of(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.asked.append(request)
        if request.url.host != "api.replicate.com":
            assert "authorization" not in request.headers, "the token went to a file host"
            found = self.files.get(str(request.url))
            return found() if found else httpx.Response(404)
        if request.headers.get("authorization") != f"Bearer {self.TOKEN}":
            return httpx.Response(401, json={"title": "Unauthenticated", "detail": "no", "status": 401})
        path = request.url.path.removeprefix("/v1")
        if (request.method, path) in self.others:
            return self.others[request.method, path]()
        create = request.method == "POST" and path.endswith(_CREATES)
        if create:
            if self.faults:
                return self.faults.pop(0)(request, self)
            return httpx.Response(201, json=self.accept(request))
        if self.read_faults:
            return self.read_faults.pop(0)(request, self)
        return self._read(request, path)

    def _read(self, request: httpx.Request, path: str) -> httpx.Response:
        collection = path.split("/")[1]
        of_it = [p for p in self.predictions.values() if ("destination" in p) == (collection == "trainings")]
        if path == f"/{collection}" and collection in ("predictions", "trainings"):
            newest_first = sorted(of_it, key=lambda p: str(p["created_at"]), reverse=True)
            listed = [self._with_webhook({k: v for k, v in p.items() if k != "webhook"}, "list") for p in newest_first]
            return httpx.Response(200, json={"previous": None, "next": None, "results": listed})
        if path == "/webhooks/default/secret":
            return httpx.Response(200, json={"key": self.SECRET})
        if "/versions/" in path or path.startswith("/deployments/"):
            described = {**self.versions, **self.deployments}.get(path.partition("s/")[2])
            return httpx.Response(200, json=described) if described else httpx.Response(404, json={"detail": "none"})
        if path.startswith("/models/"):
            model = self.models.get(path.removeprefix("/models/"))
            return httpx.Response(200, json=model) if model else httpx.Response(404, json={"detail": "no model"})
        prediction = self.predictions.get(path.split("/")[2])
        if prediction not in of_it:
            return httpx.Response(404, json={"detail": "not found", "status": 404})
        if path.endswith("/cancel") and prediction["status"] in ("starting", "processing"):
            prediction["status"] = "canceled"
            prediction["completed_at"] = self.timestamp()
        return httpx.Response(200, json=self._with_webhook(prediction, "get"))

    def _with_webhook(self, prediction: dict[str, Any], where: str) -> dict[str, Any]:
        webhook = self.webhooks.get(prediction["id"]) if where in self.shows_webhook else None
        return {**prediction, "webhook": webhook} if webhook and "webhook" not in prediction else prediction


def answer(status: int, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
    """A create that is not accepted."""
    return lambda _request, _replicate: httpx.Response(status, json=body or {"detail": "no"}, headers=headers)


def fail(error: type[httpx.HTTPError]) -> Answer:
    """A create that breaks off before Replicate had it."""

    def broken(request: httpx.Request, _: ReplicateInMemory) -> httpx.Response:
        raise error("broken")

    return broken


def accept_then(error: type[httpx.HTTPError] | int) -> Answer:
    """A create that Replicate accepts, and whose answer is lost, or a 5xx."""

    def lost(request: httpx.Request, replicate: ReplicateInMemory) -> httpx.Response:
        replicate.accept(request)
        if isinstance(error, int):
            return httpx.Response(error, json={"detail": "bad gateway"})
        raise error("lost")

    return lost


class Executed:
    """State machines whose executions only exist: moto starts, describes and stops them."""

    def __init__(self, name: str = "track-prediction") -> None:
        self.machine_arn = self._made(name)
        self.submitted_machine_arn = self._made("track-submitted") if name == "track-prediction" else None
        self.batch_machine_arn = self._made("run-batch")

    def _made(self, name: str) -> str:
        """Make a state machine; not through a client, which would cost a test more than what it starts."""
        definition = json.dumps({"StartAt": "End", "States": {"End": {"Type": "Succeed"}}})
        role_arn = "arn:aws:iam::123456789012:role/track"
        return str(account("stepfunctions").create_state_machine(name, definition, role_arn).arn)

    @property
    def inputs(self) -> dict[str, Any]:
        """The input of each execution by its name; of predictions also `submit`, which is what its machine begins with.

        No name is in both machines of predictions.
        """
        stepfunctions = clients.client("stepfunctions")
        found: dict[str, Any] = {}
        for arn in filter(None, (self.machine_arn, self.submitted_machine_arn)):
            for e in stepfunctions.list_executions(stateMachineArn=arn)["executions"]:
                assert e["name"] not in found, "two machines run one execution of this name"
                told = json.loads(stepfunctions.describe_execution(executionArn=e["executionArn"])["input"])
                found[e["name"]] = told | ({"submit": arn == self.machine_arn} if self.submitted_machine_arn else {})
        return found

    def running(self, name: str) -> bool | None:
        """Whether a running execution of a prediction began by submitting it; None where it does not run."""
        for arn, submits in ((self.machine_arn, True), (self.submitted_machine_arn, False)):
            if arn and self._status(arn, name) == "RUNNING":
                return submits
        return None

    def arn(self, name: str) -> str:
        """The ARN of an execution that exists."""
        machines = filter(None, (self.machine_arn, self.submitted_machine_arn))
        (found,) = [self._execution_arn(arn, name) for arn in machines if self._status(arn, name)]
        return found

    def _status(self, machine_arn: str, name: str) -> str | None:
        stepfunctions = clients.client("stepfunctions")
        try:
            return stepfunctions.describe_execution(executionArn=self._execution_arn(machine_arn, name))["status"]
        except stepfunctions.exceptions.ExecutionDoesNotExist:
            return None

    def _execution_arn(self, machine_arn: str, name: str) -> str:
        return f"{machine_arn.replace(':stateMachine:', ':execution:')}:{name}"

    def stop(self, name: str) -> None:
        """Ends an execution, as by hand."""
        clients.client("stepfunctions").stop_execution(executionArn=self.arn(name))


# The services by boto's names, and by those of their events.
_SERVICES = {
    "cloudformation": "cloudformation",
    "dynamodb": "dynamodb",
    "events": "eventbridge",
    "s3": "s3",
    "scheduler": "scheduler",
    "secretsmanager": "secrets-manager",
    "sqs": "sqs",
    "ssm": "ssm",
    "stepfunctions": "sfn",
}


@contextmanager
def refusing(
    operation: str,
    code: str,
    when: Callable[[Any], bool] = lambda _: True,
    *,
    service: str = "stepfunctions",
    message: str = "",
) -> Iterator[None]:
    """AWS refuses calls of one operation whose body, parsed where it is JSON, fulfils `when`."""

    def refuse(params: dict[str, Any], **_: Any) -> tuple[Any, dict[str, Any]] | None:
        body = params["body"]
        parsed = json.loads(body) if service not in ("cloudformation", "s3") else body
        return refusal_of(code, message) if when(parsed) else None

    event = f"before-call.{_SERVICES[service]}.{operation}"
    answered: Any = refuse  # the stubs do not know that a handler may answer in AWS's place
    events = _events(service)
    events.register_first(event, answered)
    try:
        yield
    finally:
        events.unregister(event, answered)


@contextmanager
def answers_lost(*services: str) -> Iterator[list[str]]:
    """The first answer of every call does not arrive, so botocore sends each call again.

    Args:
        services: Of which services; by default DynamoDB's.

    Yields:
        The operations whose answer was lost.
    """
    lost: list[str] = []

    def lose(attempts: int, operation: Any, **_: Any) -> int | None:
        if attempts != 1:
            return None
        lost.append(operation.name)
        return 0  # wait so long, then send it again

    answered: Any = lose  # the stubs do not know that a handler may answer
    for service in services or ("dynamodb",):
        _events(service).register_first(f"needs-retry.{_SERVICES[service]}", answered)
    try:
        yield lost
    finally:
        for service in services or ("dynamodb",):
            _events(service).unregister(f"needs-retry.{_SERVICES[service]}", answered)


@contextmanager
def meanwhile(operation: str, act: Callable[[], Any], *, service: str = "dynamodb") -> Iterator[None]:
    """Another process acts right before the next call of an operation of AWS."""
    acts = [act]

    def interrupt(**_: Any) -> None:
        while acts:
            acts.pop()()

    event = f"before-call.{_SERVICES[service]}.{operation}"
    _events(service).register_first(event, interrupt)
    try:
        yield
    finally:
        _events(service).unregister(event, interrupt)


class Died(BaseException):
    """A function's process ends here, as at its timeout or with its host: no `except` of ours sees it."""


class Fault(StrEnum):
    """What becomes of one call to AWS."""

    DIED_BEFORE = "the caller died before it"
    DIED_AFTER = "the caller died after it"
    REFUSED = "AWS refused it"
    ANSWER_LOST = "AWS did it, and no answer arrived"


@contextmanager
def faulty(fault: Fault, n: int) -> Iterator[list[str]]:
    """The nth call to AWS, whatever it is, does not go well.

    Yields:
        The calls made, as `dynamodb.PutItem`: the fault struck where there are more than `n`.
    """
    made: list[str] = []

    def before(model: Any, **_: Any) -> tuple[Any, dict[str, Any]] | None:
        made.append(f"{model.service_model.service_name}.{model.name}")
        if len(made) == n + 1 and fault is Fault.DIED_BEFORE:
            raise Died
        return refusal_of("ThrottlingException") if len(made) == n + 1 and fault is Fault.REFUSED else None

    def after(**_: Any) -> None:
        if len(made) == n + 1 and fault is Fault.DIED_AFTER:
            raise Died
        if len(made) == n + 1 and fault is Fault.ANSWER_LOST:
            raise ReadTimeoutError(endpoint_url="https://aws.example")

    answered: Any = before  # the stubs do not know that a handler may answer in AWS's place
    for service, name in _SERVICES.items():
        _events(service).register_first(f"before-call.{name}", answered)
        _events(service).register(f"after-call.{name}", after)
    try:
        yield made
    finally:
        for service, name in _SERVICES.items():
            _events(service).unregister(f"before-call.{name}", answered)
            _events(service).unregister(f"after-call.{name}", after)


def _events(service: Any) -> Any:
    client: Any = clients.client(service)
    return client.meta.events


def refusal_of(code: str, message: str = "") -> tuple[Any, dict[str, Any]]:
    return type("Http", (), {"status_code": 400})(), {"Error": {"Code": code, "Message": message}}


class Queued:
    """The messages that were sent to a queue, delayed ones too; moto's delays are those of the system's clock."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.delays: list[int] = []
        self.bodies: list[str] = []
        answered: Any = self._see  # the stubs do not know that a handler may answer
        # Not first: what a fault refuses is not sent.
        _events("sqs").register("before-call.sqs.SendMessage", answered)

    def take(self) -> list[dict[str, Any]]:
        """All since the last time, as Lambda passes them."""
        bodies, self.bodies = self.bodies, []
        return [{"messageId": str(n), "body": body, "eventSource": "aws:sqs"} for n, body in enumerate(bodies)]

    def _see(self, params: dict[str, Any], **_: Any) -> None:
        sent = json.loads(params["body"])
        if sent["QueueUrl"].endswith(f"/{self._name}"):
            self.delays.append(sent.get("DelaySeconds", 0))
            self.bodies.append(sent["MessageBody"])


class Wakes:
    """The tokens that were sent to Step Functions; those in `stale` are answered as timed out.

    `tokens` are those of successes, `copies` those of states that were woken to copy files; `told` holds all calls:
    token, and the output or the pair of error and cause.
    """

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.copies: list[str] = []
        self.told: list[tuple[str, Any]] = []
        self.stale: set[str] = set()
        answered: Any = self._send  # the stubs do not know that a handler may answer in AWS's place
        # Not by the operation's name, and not first: botocore would ask this before any fault.
        _events("stepfunctions").register("before-call.sfn", answered)

    def _send(self, params: dict[str, Any], model: Any, **_: Any) -> tuple[Any, dict[str, Any]] | None:
        if model.name not in ("SendTaskSuccess", "SendTaskFailure"):
            return None
        body = json.loads(params["body"])
        token = body["taskToken"]
        if model.name == "SendTaskSuccess":
            self.tokens.append(token)
            self.told.append((token, json.loads(body["output"])))
        else:
            self.told.append((token, (body["error"], body["cause"])))
            if body["error"] == "OutputsToCopy":
                self.copies.append(token)
        status, answer = 200, {}
        if token in self.stale:
            status, answer = 400, {"Error": {"Code": "TaskTimedOut", "Message": "the task timed out"}}
        return type("Http", (), {"status_code": status})(), answer


def served(body: bytes, status: int = 200, content_type: str = "image/png") -> Callable[[], httpx.Response]:
    """A file as its host serves it, each time anew."""
    headers = {"content-type": content_type, "content-length": str(len(body))}
    return lambda: httpx.Response(status, headers=headers, stream=httpx.ByteStream(body))
