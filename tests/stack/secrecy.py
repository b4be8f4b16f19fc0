"""Where secrets may have got to: everything that the local cloud keeps, searched for all of them.

What is searched: the logs of functions and state machines, the items of the table and what its stream tells of all
those that were there before, the objects of all buckets with their names and metadata, the messages of all queues, the
events of the stack's bus, inputs and histories of all executions, the configuration of the functions, parameters of
Systems Manager, the stack's own parameters, and the answers of the API. Each secret is looked for as it is, in
hexadecimal, quoted for URLs or once or twice for JSON, and in base64 wherever in a text it begins.
"""

import base64
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import httpx

from local.cloud import LocalCloud

SIGNATURE = "X-Amz-Signature="
"""Of a presigned URL, which is a secret for as long as it works: only answers of the API and of a link have one."""


class WatchedCloud(LocalCloud):
    """A local cloud that knows its secrets, and hears all of its events.

    Attributes:
        access_tokens: Every access token that was made.
        answers: What the API answered, with the request it answered.
        canaries: Further secrets by name, of a test of the search itself.
        strangers: Requests with an `Authorization` header to what is not Replicate's API.
    """

    def __init__(self, *, parameters: Mapping[str, str]) -> None:
        super().__init__(parameters=parameters)
        self.access_tokens: list[str] = []
        self.answers: list[tuple[str, str]] = []
        self.canaries: dict[str, str] = {}
        self.strangers: list[str] = []

    def create_token(self, *args: Any, **options: Any) -> str:
        """Create an access token, and remember it."""
        self.access_tokens.append(super().create_token(*args, **options))
        return self.access_tokens[-1]

    def hear(self, response: httpx.Response) -> None:
        """Keep an answer of the API (an event hook of httpx)."""
        response.read()
        self.answers.append((f"{response.request.method} {response.request.url.path}", response.text))

    def look_at_record(self) -> None:
        """Look at what the stand-in was asked since it was last reset."""
        self.strangers += [
            f"{asked['method']} {asked['path']}"
            for asked in self.replicate.record()["requests"]
            if asked["authorization"] != "missing" and not asked["path"].startswith("/v1/")
        ]

    def hear_events(self) -> None:
        """Keep every event of the stack's bus in a queue, from now on."""
        queue = self.client("sqs").create_queue(QueueName="heard-events")["QueueUrl"]
        arn = self.client("sqs").get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])["Attributes"]
        bus, events = self.stack.event_bus_name, self.client("events")
        events.put_rule(Name="heard", EventBusName=bus, EventPattern='{"source": [{"prefix": ""}]}')
        events.put_targets(Rule="heard", EventBusName=bus, Targets=[{"Id": "queue", "Arn": arn["QueueArn"]}])


def secrets_of(cloud: WatchedCloud) -> dict[str, str]:
    """All secrets by what they are."""
    read = cloud.client("secretsmanager")
    found = cloud.canaries | {f"access token {n}": token for n, token in enumerate(cloud.access_tokens)}
    found |= {"Replicate's token": cloud.replicate.token, "its signing secret": cloud.replicate.signing_secret}
    for listed in read.list_secrets()["SecretList"]:
        text = read.get_secret_value(SecretId=listed["ARN"]).get("SecretString", "")
        value = json.loads(text) if text.startswith('{"') else text  # a generated one may begin like any text
        for name, part in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(part, str) and not name.endswith("_at"):
                found[f"{listed['Name']} {name}".strip()] = part
    # The base64 of a signing secret is the secret; what stands before it only says what it is.
    return {name: value.removeprefix("whsec_") for name, value in found.items() if len(value) >= 16}


def leaks(cloud: WatchedCloud) -> list[str]:
    """Each place where a secret is that must not be there, as `place: which secret`."""
    needles = [(name, needle) for name, value in secrets_of(cloud).items() for needle in _forms(value)]
    found = []
    for place, content in _places(cloud):
        hidden = [name for name, needle in needles if needle in content]
        if SIGNATURE.encode() in content and not place.startswith("answer"):
            hidden.append("a presigned URL")
        found += [f"{place}: {name}" for name in dict.fromkeys(hidden)]
    return found + [
        f"{asked}: an Authorization header went to what is not Replicate's API" for asked in cloud.strangers
    ]


def _forms(secret: str) -> Iterator[bytes]:
    raw = secret.encode()
    yield raw
    yield raw.hex().encode()
    in_json = json.dumps(secret)[1:-1]
    for written in (quote(secret), quote(secret, safe=""), in_json, json.dumps(in_json)[1:-1]):
        if written != secret:
            yield written.encode()
    for shift in range(3):
        # Characters at either end depend on what stands beside them.
        encoded = base64.b64encode(b"\0" * shift + raw).rstrip(b"=")
        inner = encoded[4 if shift else 0 : -3]
        yield inner
        if (url_safe := inner.translate(bytes.maketrans(b"+/", b"-_"))) != inner:
            yield url_safe


def _places(cloud: WatchedCloud) -> Iterator[tuple[str, bytes]]:
    for place in (_logs, _table, _stream, _objects, _queues, _executions, _configuration):
        yield from place(cloud.client, cloud)
    for asked, text in cloud.answers:
        yield f"answer to {asked}", text.encode()


Clients = Callable[[str], Any]


def _text(value: Any) -> bytes:
    return b"\n".join(_leaves(value))


def _leaves(value: Any) -> Iterator[bytes]:
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from (name.encode(errors="surrogatepass"), *_leaves(each))
    elif isinstance(value, list):
        for each in value:
            yield from _leaves(each)
    else:
        yield str(value).encode(errors="surrogatepass")


def _logs(client: Clients, _: LocalCloud) -> Iterator[tuple[str, bytes]]:
    logs = client("logs")
    for group in logs.describe_log_groups()["logGroups"]:
        for page in logs.get_paginator("filter_log_events").paginate(logGroupName=group["logGroupName"]):
            yield f"log {group['logGroupName']}", "\n".join(each["message"] for each in page["events"]).encode()


def _table(client: Clients, cloud: LocalCloud) -> Iterator[tuple[str, bytes]]:
    for page in client("dynamodb").get_paginator("scan").paginate(TableName=cloud.stack.table_name):
        for item in page["Items"]:
            yield f"item {item['pk']['S']} {item['sk']['S']}", _text(item)


def _stream(client: Clients, cloud: LocalCloud) -> Iterator[tuple[str, bytes]]:
    stream = client("dynamodb").describe_table(TableName=cloud.stack.table_name)["Table"]["LatestStreamArn"]
    streams = client("dynamodbstreams")
    for shard in streams.describe_stream(StreamArn=stream)["StreamDescription"]["Shards"]:
        begin = {"StreamArn": stream, "ShardId": shard["ShardId"], "ShardIteratorType": "TRIM_HORIZON"}
        following = streams.get_shard_iterator(**begin)["ShardIterator"]
        while following:
            page = streams.get_records(ShardIterator=following)
            for record in page["Records"]:
                yield f"stream's record of {record['dynamodb']['Keys']['pk']['S']}", _text(record)
            following = page.get("NextShardIterator") if page["Records"] else None


def _objects(client: Clients, _: LocalCloud) -> Iterator[tuple[str, bytes]]:
    s3 = client("s3")
    for bucket in s3.list_buckets()["Buckets"]:
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket["Name"]):
            for listed in page.get("Contents", []):
                place = {"Bucket": bucket["Name"], "Key": listed["Key"]}
                if listed["Key"].endswith((".zip", ".template")):
                    continue  # what was deployed
                there = s3.get_object(**place)
                told = {"key": listed["Key"], "metadata": there["Metadata"], "type": there.get("ContentType")}
                yield f"object {bucket['Name']}/{listed['Key']}", there["Body"].read() + _text(told)


def _queues(client: Clients, _: LocalCloud) -> Iterator[tuple[str, bytes]]:
    sqs = client("sqs")
    for queue in sqs.list_queues().get("QueueUrls", []):
        while messages := sqs.receive_message(
            QueueUrl=queue, MaxNumberOfMessages=10, MessageAttributeNames=["All"], VisibilityTimeout=600
        ).get("Messages", []):
            yield f"message of {queue.rpartition('/')[2]}", _text(messages)


def _executions(client: Clients, _: LocalCloud) -> Iterator[tuple[str, bytes]]:
    states = client("stepfunctions")
    for machine in states.list_state_machines()["stateMachines"]:
        for page in states.get_paginator("list_executions").paginate(stateMachineArn=machine["stateMachineArn"]):
            for execution in page["executions"]:
                arn = execution["executionArn"]
                yield f"execution {execution['name']}", _text(states.describe_execution(executionArn=arn))
                for history in states.get_paginator("get_execution_history").paginate(executionArn=arn):
                    yield f"history of {execution['name']}", _text(history["events"])


def _configuration(client: Clients, cloud: LocalCloud) -> Iterator[tuple[str, bytes]]:
    for name in cloud.functions.values():
        yield f"function {name}", _text(client("lambda").get_function_configuration(FunctionName=name))
    for page in client("ssm").get_paginator("describe_parameters").paginate():
        for parameter in page["Parameters"]:
            yield f"parameter {parameter['Name']}", _text(client("ssm").get_parameter(Name=parameter["Name"]))
    for stack in client("cloudformation").describe_stacks()["Stacks"]:
        yield f"stack {stack['StackName']}", _text(stack)


def told(found: Sequence[str]) -> str:
    """Leaks as a message: the first twenty, and how many there are."""
    return f"{len(found)} secrets where they must not be:\n" + "\n".join(found[:20])
