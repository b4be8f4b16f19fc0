"""The AWS account in memory: botocore's clients, answered here, with whatever goes wrong on the way.

The clients are botocore's own; only `_make_api_call`, through which each of their operations goes, is answered by the
world that runs now. A call costs a microsecond instead of the 200 of botocore's serializing, which a test does with
moto instead (`test_dynamodb.py`).
"""

import hashlib
import io
import json
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ReadTimeoutError, UnseekableStreamError
from botocore.response import StreamingBody
from predictions.aws.s3 import SourceFailed
from predictions.errors import OutputsToCopy

from tests.simulation.machine import Refused, Told
from tests.simulation.queues import names_by_url
from tests.support.aws_clients import AwsError, raise_client_error
from tests.support.dynamodb import ConditionFailed, NotModelled, TransactionCanceled
from tests.support.scheduler import Died

if TYPE_CHECKING:
    from tests.simulation.world import World


class Account:
    """What is in the account, and what its operations do: at once, and well."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self.objects: dict[str, tuple[bytes, str]] = {}
        self.secrets: dict[str, str] = {}
        self.parameters: dict[str, str] = {}

    def do(self, service: str, operation: str, asked: dict[str, Any]) -> dict[str, Any]:
        """Does one operation.

        Raises:
            AwsError: It is refused.
        """
        if service == "dynamodb":
            try:
                return self._world.table.call(operation, asked)
            except ConditionFailed as error:
                raise AwsError("ConditionalCheckFailedException", error.item) from None
            except TransactionCanceled as canceled:
                raise AwsError("TransactionCanceledException", reasons=canceled.reasons) from None
        found: Callable[[dict[str, Any]], dict[str, Any]] | None = getattr(self, f"_{service}_{operation}", None)
        if found is None:
            raise NotModelled(f"{service}.{operation}")
        return found(asked)

    # -- Step Functions ---------------------------------------------------------------------------------------

    def _stepfunctions_StartExecution(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802  # the operation's name
        machine = self._world.machines[asked["stateMachineArn"].rpartition(":")[2]]
        self._states(lambda: machine.start(asked["name"], asked["input"]))
        return {"executionArn": asked["name"], "startDate": datetime.fromtimestamp(0)}  # noqa: DTZ006  # nobody reads it

    def _stepfunctions_DescribeExecution(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        machine, name = self._execution(asked["executionArn"])
        return {"status": self._states(lambda: machine.describe(name))}

    def _stepfunctions_StopExecution(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        machine, name = self._execution(asked["executionArn"])
        self._states(lambda: machine.describe(name))
        machine.stop(name)
        return {"stopDate": datetime.fromtimestamp(0)}  # noqa: DTZ006

    def _stepfunctions_ListMapRuns(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        machine, name = self._execution(asked["executionArn"])
        self._states(lambda: machine.describe(name))
        return {"mapRuns": [{"mapRunArn": name}] if name in machine.map_runs else []}

    def _stepfunctions_DescribeMapRun(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        machine: Any = self._world.machines["run-batch"]
        return {"itemCounts": machine.map_runs[asked["mapRunArn"]].counts()}

    def _stepfunctions_SendTaskSuccess(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        self._states(lambda: self._world.tokens.tell(asked["taskToken"], Told(asked["output"])))
        return {}

    def _stepfunctions_SendTaskFailure(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        told = Told(error=asked["error"], cause=asked["cause"])
        if asked["error"] == OutputsToCopy.__name__ and self._world.wakes_by_success():
            told = Told("{}")
        self._states(lambda: self._world.tokens.tell(asked["taskToken"], told))
        return {}

    def _execution(self, arn: str) -> tuple[Any, str]:
        """The machine and the name of an execution's ARN."""
        machine, _, name = arn.partition(":execution:")[2].partition(":")
        return self._world.machines[machine], name

    def _states(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Refused as refused:
            raise AwsError(str(refused)) from None

    # -- S3 ---------------------------------------------------------------------------------------------------

    def _s3_PutObject(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        body = asked["Body"]
        if not isinstance(body, bytes):
            try:
                body.seek(0)
            except io.UnsupportedOperation:
                # As botocore, before it repeats a request whose body came from a connection.
                raise UnseekableStreamError(stream_object=body) from None
        if asked.get("IfNoneMatch") and asked["Key"] in self.objects:
            raise AwsError("PreconditionFailed")
        if not isinstance(body, bytes):
            body = body.read()
        self._world.stored(asked["Key"], body)
        self.objects[asked["Key"]] = body, asked["ContentType"]
        return {"ETag": _etag(body)}

    def _s3_HeadObject(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        if asked["Key"] not in self.objects:
            raise AwsError("404")
        body = self.objects[asked["Key"]][0]
        return {"ContentLength": len(body), "ETag": _etag(body), "Metadata": {}}

    def _s3_GetObject(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        if asked["Key"] not in self.objects:
            raise AwsError("NoSuchKey")
        body, content_type = self.objects[asked["Key"]]
        if asked.get("IfMatch", _etag(body)) != _etag(body):
            raise AwsError("PreconditionFailed")
        if "Range" in asked:
            first, last = asked["Range"].removeprefix("bytes=").split("-")
            body = body[int(first) : int(last) + 1]
        return {"Body": StreamingBody(io.BytesIO(body), len(body)), "ContentType": content_type}

    def _s3_DeleteObject(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        self.objects.pop(asked["Key"], None)
        return {}

    def _s3_ListObjectsV2(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        keys = [key for key in self.objects if key.startswith(asked["Prefix"])]
        return {"Contents": [{"Key": key} for key in keys], "IsTruncated": False}

    def _s3_ListMultipartUploads(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"IsTruncated": False}

    # -- the rest ---------------------------------------------------------------------------------------------

    def _lambda_Invoke(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        assert asked["InvocationType"] == "Event"
        function, event = asked["FunctionName"].replace("-", "_"), json.loads(asked["Payload"])
        self._world.scheduler.spawn("asynchronous", lambda: self._world.invoke(function, event), 0.1)
        return {"StatusCode": 202}

    def _ssm_GetParameter(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"Parameter": {"Value": self.parameters[asked["Name"]]}}

    def _secretsmanager_GetSecretValue(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"SecretString": self.secrets[asked["SecretId"]]}

    def _secretsmanager_PutSecretValue(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        self.secrets[asked["SecretId"]] = asked["SecretString"]
        return {}

    # -- queues and the bus -----------------------------------------------------------------------------------

    def _sqs_SendMessage(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        message = self._queue(asked).send(
            asked["MessageBody"],
            delay=asked.get("DelaySeconds", 0),
            group=asked.get("MessageGroupId"),
            attributes=asked.get("MessageAttributes"),
        )
        return {"MessageId": message.id}

    def _sqs_ChangeMessageVisibility(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        self._queue(asked).change_visibility(asked["ReceiptHandle"], asked["VisibilityTimeout"])
        return {}

    def _sqs_DeleteMessage(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        self._queue(asked).delete(asked["ReceiptHandle"])
        return {}

    def _queue(self, asked: dict[str, Any]) -> Any:
        return self._world.queues[names_by_url()[asked["QueueUrl"]]]

    def _events_PutEvents(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        answers: list[dict[str, str]] = []
        for entry in asked["Entries"]:
            if self._world.faults.of_bus():
                answers.append({"ErrorCode": "ThrottlingException", "ErrorMessage": "too many"})
            else:
                self._world.events.append((self._world.scheduler.now, entry))
                answers.append({"EventId": "event"})
        return {"FailedEntryCount": sum("ErrorCode" in each for each in answers), "Entries": answers}


def _etag(body: bytes) -> str:
    return f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'


def call(world: "World", service: str, operation: str, asked: dict[str, Any], client: Any) -> Any:
    """One call of the library's, with the attempts that botocore makes and what the schedule has in store for it.

    Raises:
        ClientError: AWS refused, for good or four times.
        ReadTimeoutError: No answer came, four times; it may have been done.
        Died: The function's process ended before it, after it, or at its timeout.
    """
    faults = world.faults
    world.step(f"{service}.{operation}", faults.aws_seconds())
    fault = faults.of_aws(service, operation)
    for scenario in world.scenarios:
        if operation == "PutItem" and scenario.writes(asked["Item"].get("json", {}).get("S", "")):
            world.die()
        if seconds := scenario.tells(asked.get("taskToken", "")):
            world.step("tells", seconds)
    if fault == "died before":
        world.die()
    process = world.scheduler.current
    if fault in ("refused", "answer lost") and operation in ("PutItem", "GetItem") and process is not None:
        process.unanswered.add((operation, asked["Item" if operation == "PutItem" else "Key"]["pk"]["S"]))
    if fault in ("refused", "answer lost") and operation == "TransactWriteItems" and process is not None:
        process.unanswered |= {("PutItem", w["Put"]["Item"]["pk"]["S"]) for w in asked["TransactItems"] if "Put" in w}
    if fault == "refused":
        raise_client_error(client, operation, AwsError("ThrottlingException"))
    try:
        answer = world.account.do(service, operation, asked)
        if world.recorder is not None:
            world.recorder(service, operation, asked, answer)
        if fault in ("repeated", "answer lost"):
            world.step("repeated", 5.1)
            answer = world.account.do(service, operation, asked)
            if world.recorder is not None:
                world.recorder(service, operation, asked, answer)
    except AwsError as error:
        if world.recorder is not None and service == "dynamodb":
            world.recorder(service, operation, asked, error)
        if fault == "died after":
            world.die()
        raise_client_error(client, operation, error)
    except (SourceFailed, UnseekableStreamError):
        raise  # the file host broke off, or the upload would have been repeated
    except Exception as error:
        # The library would take it for a fault of AWS's, and bear it.
        world.broken = error
        raise Died from error
    if fault == "died after":
        world.die()
    if fault == "answer lost":
        raise ReadTimeoutError(endpoint_url="https://aws.example")
    return answer
