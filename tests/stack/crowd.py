"""A crowd of callers at a deployed stack in which everything goes wrong, and what is left behind by it.

Real time is dear: what on AWS takes minutes comes within seconds here. `Crowd` runs the sweep every second, and lets
the minutes pass for what nobody has moved meanwhile (`_let_time_pass`); everything else is as deployed.
"""

import contextlib
import hashlib
import json
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import httpx
from predictions.aws.dynamodb import deserialize, serialize
from predictions.store.keys import READING_LEASE

from local.cloud import LocalCloud
from tests.stack.audit import ENDS, Evidence, Request, verdict
from tests.support.aws_proxy import AwsProxy

OWNER = "crowd"
CALLERS = 6
"""Callers at the same time: each more is a process of each function."""

PARAMETERS = {"FirstPollSeconds": "3", "PollSeconds": "2", "SubmitGraceSeconds": "30"}
UNMOVED_SECONDS = 2.0
"""An item that nobody has moved for so long is due for the sweep: on AWS after a minute or two."""
UNKNOWN_SECONDS = 20.0
"""A submission whose outcome nobody knows for so long is past its grace, and whoever made it dead, also on a busy
machine: on AWS after `SubmitGraceSeconds`."""
LEASE_SECONDS = 8.0
"""Whoever has had the lease on copying for so long is dead: on AWS after 17 minutes."""
WAIT_SCALE = 0.2
"""What `Wait` and `Retry` of state machines take of their time."""


class Crowd:
    """Callers, and all that is needed to see what becomes of their requests.

    Args:
        cloud: The deployed stack.
        proxy: Where its functions call AWS.
        seed: Decides all that is left to chance.
    """

    def __init__(self, cloud: LocalCloud, proxy: AwsProxy, seed: int = 0) -> None:
        self.cloud = cloud
        self.proxy = proxy
        self.seed = seed
        self.requests: list[Request] = []
        self._random = random.Random(seed)  # noqa: S311  # not for secrets
        self._dynamodb = cloud.client("dynamodb")
        self._table = cloud.stack.table_name
        self._owners = {
            owner: httpx.Client(
                base_url=cloud.stack.api_url, headers={"Authorization": f"Bearer {cloud.create_token(owner)}"},
                timeout=60, trust_env=False,
            )
            for owner in (OWNER, cloud.owner)
        }  # fmt: skip
        self._http = self._owners[OWNER]
        self._unmoved: dict[tuple[str, str], tuple[Any, float]] = {}
        self._events: list[tuple[str, str, str, str]] = []
        self._pool = ThreadPoolExecutor(CALLERS)
        self._waiting: list[Future[None]] = []
        self.sweeps = 0

    def __enter__(self) -> Self:
        """Makes the stack's minutes short, and listens to what it tells."""
        answer = httpx.post(
            f"{self.cloud.endpoint_url}/_ministack/config",
            json={"stepfunctions._SFN_WAIT_SCALE": WAIT_SCALE}, trust_env=False,
            timeout=60,
        )  # fmt: skip
        assert answer.json()["applied"], answer.text
        sqs, events = self.cloud.client("sqs"), self.cloud.client("events")
        for name in ("RequestsQueueUrl", "DeliveriesQueueUrl", "ChangesRetryQueueUrl"):
            # On AWS three minutes; and the fifth time in a row a message would go to the dead-letter queue.
            url = self.cloud.outputs.get(name) or self.cloud.resources[name.removesuffix("Url")]
            attributes = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["RedrivePolicy"])["Attributes"]
            redrive = {**json.loads(attributes["RedrivePolicy"]), "maxReceiveCount": 1000}
            sqs.set_queue_attributes(
                QueueUrl=url, Attributes={"VisibilityTimeout": "4", "RedrivePolicy": json.dumps(redrive)}
            )
        self._rule, self._bus = f"crowd-{uuid.uuid4().hex[:8]}", self.cloud.outputs["EventBusName"]
        self._heard = sqs.create_queue(QueueName=self._rule)["QueueUrl"]
        arn = sqs.get_queue_attributes(QueueUrl=self._heard, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
        pattern = json.dumps({"source": [{"prefix": ""}]})
        events.put_rule(Name=self._rule, EventBusName=self._bus, EventPattern=pattern)
        events.put_targets(Rule=self._rule, EventBusName=self._bus, Targets=[{"Id": "queue", "Arn": arn}])
        self.receiver = Receiver()
        self._over = threading.Event()
        self._sweeper = threading.Thread(target=self._sweep_until_over, name="sweep")
        self._sweeper.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops callers and the sweep."""
        self._over.set()
        self._pool.shutdown(cancel_futures=True)
        self._sweeper.join()
        self.receiver.close()
        for client in self._owners.values():
            client.close()
        events = self.cloud.client("events")
        events.remove_targets(Rule=self._rule, EventBusName=self._bus, Ids=["queue"])
        events.delete_rule(Name=self._rule, EventBusName=self._bus)

    # -- asking -----------------------------------------------------------------------------------------------

    def ask(self, request: Request) -> None:
        """Has a caller make a request; returns at once."""
        self.requests.append(request)
        self._waiting.append(self._pool.submit(self._call, request))

    def asked(self) -> int:
        """How many requests have had their answer."""
        return sum(future.done() for future in self._waiting)

    def mark(self) -> str:
        """Text for the next request's input."""
        return f"request-{self.seed}-{len(self.requests)}"

    def _call(self, request: Request) -> None:
        if request.door == "queue":
            self._send(request)
        else:
            self._create(request)
        if request.again:
            request.answers.append("and asked again")
            self._send(request) if request.door == "queue" else self._create(request)
        if request.cancel_after_seconds is not None and request.ids:
            time.sleep(request.cancel_after_seconds)
            self._cancel(request, next(iter(request.ids)))

    def stop_execution(self, prediction_id: str) -> bool:
        """Stops a prediction's first execution by hand, if it still runs; False where there is none yet."""
        machine = self.cloud.client("stepfunctions")
        for arn in self._machine_arns():
            try:
                executions = arn.replace(":stateMachine:", ":execution:")
                machine.stop_execution(executionArn=f"{executions}:{prediction_id}-1")
            except machine.exceptions.ExecutionDoesNotExist:
                continue
            except machine.exceptions.ClientError as error:
                if "not running" not in str(error):
                    raise
            return True
        return False

    def make_cold(self, functions: Iterable[str]) -> None:
        """Has new processes run these functions from now on."""
        client = self.cloud.client("lambda")
        for function in functions:
            client.update_function_configuration(FunctionName=self.cloud.functions[function], Description="")

    def _send(self, request: Request) -> None:
        body = {**request.body, **({"idempotency_key": request.key} if request.key else {})}
        sqs = self.cloud.client("sqs")
        url = self.cloud.outputs["RequestsQueueUrl"]
        message = sqs.send_message(QueueUrl=url, MessageBody=json.dumps(body))["MessageId"]
        request.answers.append(f"message {message}")
        request.taken = True

    def _create(self, request: Request) -> None:
        headers = dict(request.headers)
        if request.key:
            headers["Idempotency-Key"] = request.key
        for attempt in range(request.tries):
            if request.door == "http of an SDK":
                headers["x-stainless-retry-count"] = str(attempt)
            answer = self._ask_api("POST", "/predictions", request, json=request.body, headers=headers)
            if answer is not None and answer.status_code < 500:
                if answer.status_code == 201:
                    request.ids.add(answer.json()["id"])
                    request.taken = True
                return
            time.sleep(0.2)

    def _cancel(self, request: Request, prediction_id: str) -> None:
        for _ in range(20):
            answer = self._ask_api("POST", f"/predictions/{prediction_id}/cancel", request)
            if answer is not None and answer.status_code < 500:
                return
            time.sleep(0.2)

    def _ask_api(self, method: str, path: str, request: Request, **options: Any) -> httpx.Response | None:
        began = time.time()
        try:
            answer = self._http.request(method, path, **options)
        except httpx.TransportError as error:
            request.answers.append(f"{error!r} to {method} {path}")
            return None
        told = answer.json() if answer.headers.get("content-type", "").startswith("application/") else {}
        what = f"{told.get('id', '')} {told.get('status', '')}" if answer.is_success else answer.text[:200]
        request.answers.append(f"{answer.status_code} after {time.time() - began:.1f} s to {method} {path}: {what}")
        return answer

    # -- time ---------------------------------------------------------------------------------------------------

    def _sweep_until_over(self) -> None:
        functions = self.cloud.client("lambda")
        while not self._over.wait(0.7):
            self._let_time_pass()
            # One that is killed is followed by the next one, as on AWS in a minute.
            try:
                functions.invoke(FunctionName=self.cloud.functions["sweep_predictions"], Payload=b"{}")
            except functions.exceptions.TooManyRequestsException:
                continue  # as the schedule's next event
            self.sweeps += 1

    def _let_time_pass(self) -> None:
        """Makes due what stands still, and lets the deadline pass of what was submitted and is not known of."""
        now = time.time()
        for item in self._open_items():
            moved: dict[str, Any] = {}
            if item["next_check_at"] > now and self._unmoved_seconds(item, "next_check_at", now) > UNMOVED_SECONDS:
                moved["next_check_at"] = 1
            unknown = "claimed" in item and "upstream_id" not in item and item["rank"] < 9
            # One whose holder was killed is not registered: nobody else reads the list for it.
            over = "submit_over" if "submit_over" in item else "submit_until"
            if unknown and now - item["claimed"] > UNKNOWN_SECONDS and item.get(over, 0) > item["claimed"] - 60:
                # The list here is never late: the grace is over.
                moved[over] = item["claimed"] - 60
            if item.get("copy_until", 0) > now and self._unmoved_seconds(item, "copy_until", now) > LEASE_SECONDS:
                moved["copy_until"] = 1
            if moved:
                self._move(item, moved)
        self._end_reading(now)

    def _end_reading(self, now: float) -> None:
        """Ends the lease on reading Replicate's list, once whoever had it was killed."""
        key = serialize(READING_LEASE._asdict())
        found = self._dynamodb.get_item(TableName=self._table, Key=key, ConsistentRead=True)
        lease = deserialize(found.get("Item", {}))
        if lease.get("until", 0) > now and self._unmoved_seconds(lease, "until", now) > LEASE_SECONDS:
            with contextlib.suppress(self._dynamodb.exceptions.ConditionalCheckFailedException):
                self._dynamodb.update_item(
                    TableName=self._table, Key=key, UpdateExpression="SET #until = :over, used_ms = :over",
                    ConditionExpression="#until = :seen", ExpressionAttributeNames={"#until": "until"},
                    ExpressionAttributeValues=serialize({":over": 1, ":seen": lease["until"]}),
                )  # fmt: skip

    def _unmoved_seconds(self, item: dict[str, Any], name: str, now: float) -> float:
        """For how long an attribute has been seen to have this value."""
        value, since = self._unmoved.get((item["pk"], name), (None, now))
        if value != item[name]:
            self._unmoved[item["pk"], name] = (item[name], now)
            return 0.0
        return now - since

    def _move(self, item: dict[str, Any], moved: dict[str, Any]) -> None:
        names = {f"#{name}": name for name in [*moved, "next_check_at"]}
        values = {f":{name}": value for name, value in moved.items()} | {":seen": item["next_check_at"]}
        with contextlib.suppress(self._dynamodb.exceptions.ConditionalCheckFailedException):
            self._dynamodb.update_item(
                TableName=self._table, Key=serialize({"pk": item["pk"], "sk": "status"}),
                UpdateExpression="SET " + ", ".join(f"#{name} = :{name}" for name in moved),
                ConditionExpression="#next_check_at = :seen",
                ExpressionAttributeNames=names, ExpressionAttributeValues=serialize(values),
            )  # fmt: skip

    def _items(self, **options: Any) -> Iterator[dict[str, Any]]:
        pages = self._dynamodb.get_paginator("scan").paginate(TableName=self._table, ConsistentRead=True, **options)
        for page in pages:
            yield from map(deserialize, page["Items"])

    def _status_items(self) -> Iterator[dict[str, Any]]:
        for item in self._items():
            if item["pk"].startswith("prediction#") and item["sk"] == "status":
                yield item

    def _open_items(self) -> list[dict[str, Any]]:
        return [item for item in self._status_items() if "open" in item]

    # -- the end ------------------------------------------------------------------------------------------------

    def settle(self, seconds: float, say: Callable[[str], None] = lambda _: None) -> None:
        """Waits until everything has ended and been told.

        Args:
            seconds: How long at most.
            say: Called now and then with what is left.

        Raises:
            AssertionError: It did not end in time; the message says what is left, and its story.
        """
        if left := self.left(seconds, say):
            self.proxy.calm()
            raise AssertionError(f"not ended within {seconds:.0f} s: {left}\n\n{verdict(self.evidence())}")
        for future in self._waiting:
            future.result()

    def left(self, seconds: float, say: Callable[[str], None] = lambda _: None) -> str:
        """Waits so long for the end, and returns what has not ended by then."""
        deadline = time.monotonic() + seconds
        while left := self._left():
            say(left)
            if time.monotonic() > deadline:
                return left
            time.sleep(0.4)
        return ""

    def _left(self) -> str:
        """What has not ended yet; empty where all has."""
        if unanswered := len(self._waiting) - self.asked():
            return f"{unanswered} callers without an answer"
        items = list(self._status_items())
        if still_open := [item for item in items if "open" in item]:
            return f"{len(still_open)} predictions, such as {still_open[0]}"
        counts = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        for name in ("RequestsQueue", "DeliveriesQueue", "ChangesRetryQueue"):
            attributes = self.cloud.client("sqs").get_queue_attributes(
                QueueUrl=self.cloud.resources[name], AttributeNames=counts
            )["Attributes"]
            if waiting := sum(int(attributes[count]) for count in counts):
                return f"{waiting} messages in {name}"
        if running := self._executions("RUNNING"):
            return f"{len(running)} executions, such as {next(iter(running))}"
        self._listen()
        told = {id_ for id_, _, _, status in self._events if status in ENDS}
        if untold := {item["id"] for item in items} - told:
            return f"{len(untold)} ends that the bus was not told, such as {untold.pop()}"
        return ""

    def _listen(self) -> None:
        sqs = self.cloud.client("sqs")
        while messages := sqs.receive_message(QueueUrl=self._heard, MaxNumberOfMessages=10).get("Messages"):
            for message in messages:
                event = json.loads(message["Body"])
                detail = event["detail"]
                self._events.append(
                    (detail["id"], event["detail-type"], str(detail.get("event_id")), str(detail.get("status")))
                )
            sqs.delete_message_batch(
                QueueUrl=self._heard,
                Entries=[{"Id": str(n), "ReceiptHandle": m["ReceiptHandle"]} for n, m in enumerate(messages)],
            )

    def _machine_arns(self) -> tuple[str, str]:
        """The two machines that track predictions."""
        return self.cloud.stack.state_machine_arn, self.cloud.stack.submitted_state_machine_arn

    def _executions(self, status: str = "") -> dict[str, str]:
        """The status of each execution by its name; `TWICE` where both machines have it."""
        listing = self.cloud.client("stepfunctions").get_paginator("list_executions")
        chosen: Any = {"statusFilter": status} if status else {}
        found: dict[str, str] = {}
        for arn in self._machine_arns():
            for page in listing.paginate(stateMachineArn=arn, **chosen):
                for each in page["executions"]:
                    found[each["name"]] = "TWICE" if each["name"] in found else each["status"]
        return found

    # -- evidence -----------------------------------------------------------------------------------------------

    def evidence(self) -> Evidence:
        """Gathers everything there is; nothing may go wrong any more meanwhile."""
        all_items = list(self._items())
        items = {item["id"]: item for item in all_items if item["sk"] == "status" and item["pk"][:11] == "prediction#"}
        self._listen()
        with ThreadPoolExecutor(CALLERS) as pool:
            shown = dict(pool.map(self._show, items.values()))
        s3, bucket = self.cloud.client("s3"), self.cloud.stack.outputs_bucket
        keys = [
            each["Key"]
            for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket)
            for each in page.get("Contents", [])
        ]
        return Evidence(
            requests=self.requests,
            items=items,
            shown={id_: each for id_, each in shown.items() if each},
            changes=list(self._changes()),
            objects={key: _digest(s3.get_object(Bucket=bucket, Key=key)["Body"].read()) for key in keys},
            payloads={str(item["s3_key"]) for item in all_items if "s3_key" in item},
            uploads=[each["Key"] for each in s3.list_multipart_uploads(Bucket=bucket).get("Uploads", [])],
            executions=self._executions(),
            upstream=[{**run, "files": self._files(run)} for run in self.cloud.replicate.record()["predictions"]],
            told=list(self.receiver.told),
            events=list(self._events),
            strikes={id_: [str(strike) for strike in self.proxy.about(id_)] for id_ in items},
        )

    def _show(self, item: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        for _ in range(50):
            answer = self._owners[item["owner"]].get(f"/predictions/{item['id']}")
            if answer.status_code < 500:  # else Lambda throttled it
                break
            time.sleep(0.2)
        return item["id"], answer.json() if answer.status_code == 200 else {}

    def _files(self, run: dict[str, Any]) -> list[str]:
        """The digests of a run's output files, as Replicate serves them."""
        urls = list(_urls(run.get("output"), f"{self.cloud.replicate.origin}/files/"))
        return [_digest(httpx.get(url, trust_env=False, timeout=60).raise_for_status().content)[1] for url in urls]

    def _changes(self) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        streams = self.cloud.client("dynamodbstreams")
        arn = self._dynamodb.describe_table(TableName=self._table)["Table"]["LatestStreamArn"]
        for shard in streams.describe_stream(StreamArn=arn)["StreamDescription"]["Shards"]:
            at = streams.get_shard_iterator(
                StreamArn=arn, ShardId=shard["ShardId"], ShardIteratorType="TRIM_HORIZON"
            )["ShardIterator"]  # fmt: skip
            while at:
                page = streams.get_records(ShardIterator=at, Limit=1000)
                for record in page["Records"]:
                    change = deserialize(record["dynamodb"]["Keys"])
                    if change["sk"] == "status" and change["pk"].startswith("prediction#"):
                        before, after = (
                            deserialize(record["dynamodb"].get(image, {})) for image in ("OldImage", "NewImage")
                        )
                        yield change["pk"].partition("#")[2], before, after
                at = page.get("NextShardIterator") if page["Records"] else None


class Receiver:
    """A caller's server: keeps what it is told, as (id, event, webhook-id, status)."""

    def __init__(self) -> None:
        told: list[tuple[str, str, str, str]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                name = self.headers["webhook-id"]
                told.append((body["id"], name.split("-")[1], name, body["status"]))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.told = told
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/told"

    def close(self) -> None:
        """Ends the server."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


# -- what is asked for ------------------------------------------------------------------------------------------------


def sleeper(mark: str, seconds: float = 0.0) -> dict[str, Any]:
    """A prediction without files."""
    return {"version": "local/sleeper", "input": {"seconds": seconds, "text": mark}}


def blob(mark: str, size_bytes: int = 3000) -> dict[str, Any]:
    """A prediction with one file."""
    return {"version": "local/blob", "input": {"size_bytes": size_bytes, "name": f"{mark}.bin"}}


def album(mark: str) -> dict[str, Any]:
    """A prediction with several files."""
    return {"version": "local/album", "input": {"title": mark, "pages": 2}}


def crasher(mark: str) -> dict[str, Any]:
    """A prediction that fails."""
    return {"version": "local/crasher", "input": {"message": mark}}


def storyteller(mark: str) -> dict[str, Any]:
    """A prediction whose output grows."""
    return {"version": "local/storyteller", "input": {"prompt": mark}}


def mixed(crowd: Crowd) -> Request:
    """The crowd's next request, by chance: any door, any model, with files or without, canceled, slow, failing."""
    rng = crowd._random
    mark = crowd.mark()
    door = rng.choice(["http", "http with key", "http with key", "http of an SDK", "queue", "queue"])
    kind = rng.choice(["quick", "quick", "blob", "blob", "blob", "album", "slow", "fails", "canceled"])
    body = {
        "quick": lambda: sleeper(mark, rng.choice([0.0, 0.3])),
        "blob": lambda: blob(mark, rng.choice([0, 500, 5000, 60_000])),
        "album": lambda: album(mark),
        "slow": lambda: sleeper(mark, 4.5),
        "fails": lambda: crasher(mark),
        "canceled": lambda: sleeper(mark, 600),
    }[kind]()
    request = Request(mark, door, body)
    if rng.random() < 0.25:
        body["webhook"] = crowd.receiver.url
    if door == "queue":
        body["model"] = body.pop("version")
        request.again = rng.random() < 0.3
        request.key = f"key-{mark}" if request.again or rng.random() < 0.3 else None
        if kind == "canceled":
            body["lifetime"] = "5s"
        return request
    request.tries = {"http": 1, "http with key": 12, "http of an SDK": 3}[door]
    if door == "http with key":
        request.key = f"key-{mark}"
        request.again = rng.random() < 0.2
    if kind == "canceled":
        request.cancel_after_seconds = rng.choice([0.0, 0.4])
        # For a caller who is told of an error, and can cancel nothing.
        request.headers["Cancel-After"] = "6s"
    elif rng.random() < 0.15:
        request.headers["Prefer"] = "wait=3"
    return request


REPLICATES_FAULTS: Sequence[dict[str, Any]] = (
    {"name": "create_accepted_then_reset"},
    {"name": "create_accepted_then_reset"},
    {"name": "create_accepted_then_error", "status": 502},
    {"name": "create_answer_late", "seconds": 1.5},
    {"name": "create_answer_late", "seconds": 6, "until_webhook": True},
    {"name": "create_throttled", "retry_after_seconds": 1, "header": True},
    {"name": "create_refused", "status": 500},
    {"name": "start_late", "seconds": 1.5},
    {"name": "get_error"},
    {"name": "get_error", "status": 404},
    {"name": "list_error"},
    {"name": "cancel_error"},
    {"name": "other_error"},
    {"name": "other_reset"},
    {"name": "webhook_lost"},
    {"name": "webhook_lost", "events": ["completed"]},
    {"name": "webhook_lost", "events": ["completed"]},
    {"name": "webhook_late", "seconds": 2},
    {"name": "webhook_duplicated"},
    {"name": "webhook_duplicated", "events": ["completed"]},
    {"name": "webhook_reordered"},
    {"name": "file_error"},
    {"name": "file_truncated"},
    {"name": "file_slow", "bytes_per_second": 20_000},
)
"""What goes wrong at Replicate, one of them with about every second request."""


def throttled(cloud: LocalCloud) -> int:
    """How many invocations were refused because all of the account's concurrency was in use."""
    now, total = datetime.now(UTC), 0.0
    for name in cloud.functions.values():
        found = cloud.client("cloudwatch").get_metric_statistics(
            Namespace="AWS/Lambda", MetricName="Throttles", Statistics=["Sum"], Period=86400,
            Dimensions=[{"Name": "FunctionName", "Value": name}],
            StartTime=now - timedelta(days=1), EndTime=now + timedelta(days=1),
        )  # fmt: skip
        total += sum(each["Sum"] for each in found["Datapoints"])
    return round(total)


def figures(crowd: Crowd, evidence: Evidence) -> dict[str, int]:
    """What happened, counted."""
    counted: Counter[str] = Counter()
    counted["requests"] = len(evidence.requests)
    counted["predictions"] = len(evidence.items)
    counted["runs at Replicate"] = len(evidence.upstream)
    counted["objects"] = len(evidence.objects)
    counted["executions"] = len(evidence.executions)
    counted["executions that failed"] = sum(status == "FAILED" for status in evidence.executions.values())
    counted["sweeps"] = crowd.sweeps
    counted["invocations that Lambda throttled"] = throttled(crowd.cloud)
    counted["calls of AWS"] = sum(crowd.proxy.seen.values())
    counted["webhooks told"] = len(evidence.told)
    counted["events told"] = len(evidence.events)
    for item in evidence.items.values():
        counted[f"predictions that ended {item['visible']}"] += 1
    for strike in crowd.proxy.strikes:
        counted[f"faults of AWS: {strike.fault}"] += 1
    return dict(sorted(counted.items()))


def _digest(content: bytes) -> tuple[int, str]:
    return len(content), hashlib.sha256(content).hexdigest()


def _urls(value: Any, prefix: str) -> Iterator[str]:
    if isinstance(value, str) and value.startswith(prefix):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _urls(each, prefix)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _urls(each, prefix)
