"""The deployed stack, told what to do over HTTP, against the stand-in for Replicate and its faults."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from predictions.files.outputs_bucket import OutputsBucket
from predictions.ids import derived_id
from predictions.net.signatures import sign
from predictions.status import Status
from predictions.store.predictions import PredictionsTable
from predictions.upstream.prediction import UpstreamPrediction

from local.cloud import CREDENTIALS, REGION, STACK_NAME, LocalCloud
from local.replicate.process import LocalReplicate
from tests.reliability import Recorded

Api = Callable[..., httpx.Client]
WaitUntil = Callable[..., Any]

PAINTER = {"version": "local/painter", "input": {"prompt": "a lighthouse at dusk"}}


def create(client: httpx.Client, body: dict[str, Any] | None = None, **headers: str) -> dict[str, Any]:
    answer = client.post("/predictions", json=body or PAINTER, headers=headers)
    assert answer.status_code == 201, answer.text
    shown: dict[str, Any] = answer.json()
    return shown


def sleeper(seconds: float) -> dict[str, Any]:
    return {"version": "local/sleeper", "input": {"seconds": seconds}}


class Stack:
    """What the tests ask of the deployed stack."""

    def __init__(self, cloud: LocalCloud, api: Api, wait_until: WaitUntil) -> None:
        self.cloud = cloud
        self.alice = api("alice")
        self._wait_until = wait_until
        self.table = PredictionsTable(
            cloud.stack.table_name,
            OutputsBucket(cloud.stack.outputs_bucket, [cloud.replicate.origin]),
            cloud.client("dynamodb"),
        )

    def wait(self, condition: Callable[[], Any], seconds: float = 30, what: str = "") -> Any:
        return self._wait_until(condition, seconds, what)

    def ended(self, prediction_id: str, seconds: float = 30) -> dict[str, Any]:
        """The prediction as soon as callers see it ended."""

        def shown() -> dict[str, Any] | None:
            prediction: dict[str, Any] = self.alice.get(f"/predictions/{prediction_id}").raise_for_status().json()
            return prediction if prediction["status"] in ("succeeded", "failed", "canceled") else None

        found: dict[str, Any] = self.wait(shown, seconds, f"prediction {prediction_id} to end")
        return found

    def item(self, prediction_id: str) -> Any:
        return self.table.get(prediction_id)

    def bound(self, prediction_id: str) -> str:
        found: str = self.wait(lambda: self.item(prediction_id).upstream_id, what="an upstream id")
        return found

    def execution_arn(self, prediction_id: str, n: int = 0) -> str:
        """The ARN of the nth execution, in the machine that has it; of the one that the item names without `n`."""
        there = self.item(prediction_id)
        if n in (0, there.execution_n):
            return str(there.execution_arn)
        stepfunctions = self.cloud.client("stepfunctions")
        machines = (self.cloud.stack.state_machine_arn, self.cloud.stack.submitted_state_machine_arn)
        listed = [each for arn in machines for each in stepfunctions.list_executions(stateMachineArn=arn)["executions"]]
        (found,) = [each["executionArn"] for each in listed if each["name"] == f"{prediction_id}-{n}"]
        return str(found)

    def execution_ended(self, prediction_id: str, n: int = 0) -> str:
        stepfunctions = self.cloud.client("stepfunctions")

        def status() -> str | None:
            told: str = stepfunctions.describe_execution(executionArn=self.execution_arn(prediction_id, n))["status"]
            return told if told != "RUNNING" else None

        found: str = self.wait(status, what=f"execution {prediction_id}-{n} to end")
        return found

    def states(self, prediction_id: str, n: int = 0) -> list[str]:
        """The states that an execution entered, in order."""
        history = self.cloud.client("stepfunctions").get_execution_history(
            executionArn=self.execution_arn(prediction_id, n), maxResults=1000
        )["events"]
        return [e["stateEnteredEventDetails"]["name"] for e in history if "stateEnteredEventDetails" in e]

    def sweep(self) -> None:
        answer = self.cloud.client("lambda").invoke(
            FunctionName=self.cloud.functions["sweep_predictions"], Payload=json.dumps({})
        )
        assert "FunctionError" not in answer, answer["Payload"].read()

    def make_due(self, prediction_id: str) -> None:
        """Lets the time pass that the sweep waits for: a test does not wait minutes."""
        self.cloud.client("dynamodb").update_item(
            TableName=self.cloud.stack.table_name,
            Key={"pk": {"S": f"prediction#{prediction_id}"}, "sk": {"S": "status"}},
            UpdateExpression="SET next_check_at = :then",
            ConditionExpression="attribute_exists(#open)",
            ExpressionAttributeNames={"#open": "open"},
            ExpressionAttributeValues={":then": {"N": "1"}},
        )


@pytest.fixture(scope="session")
def stack(cloud: LocalCloud, api: Api, wait_until: WaitUntil) -> Stack:
    return Stack(cloud, api, wait_until)


class TestAccess:
    @pytest.mark.parametrize(
        "authorization", [None, "Bearer", "Bearer rs_forged", "Basic YTpi", "Bearer " + "x" * 3000]
    )
    def test_without_a_valid_token_nothing_is_answered(self, cloud: LocalCloud, authorization: str | None) -> None:
        headers = {"Authorization": authorization} if authorization else {}
        for method, path in (("GET", "/predictions"), ("POST", "/predictions"), ("GET", "/predictions/" + "a" * 26)):
            answer = httpx.request(method, cloud.stack.api_url + path, headers=headers, timeout=30, trust_env=False)
            assert answer.status_code == 401
            assert answer.headers["content-type"].startswith("application/problem+json")
            assert answer.json() == {
                "title": "Unauthenticated",
                "detail": "You did not pass a valid authentication token",
                "status": 401,
            }

    def test_token_without_the_scope_is_refused(self, cloud: LocalCloud) -> None:
        headers = {"Authorization": f"Bearer {cloud.create_token('carol', ['read'])}"}
        answer = httpx.post(
            cloud.stack.api_url + "/predictions", json=PAINTER, headers=headers, trust_env=False, timeout=60
        )
        assert (answer.status_code, answer.json()["status"]) == (403, 403)
        assert "predict" in answer.json()["detail"]

    def test_token_of_the_command_line_works_until_it_is_revoked(self, cloud: LocalCloud) -> None:
        def tokens(*arguments: str) -> str:
            command = [sys.executable, "-m", "predictions", "tokens", *arguments, "--stack", STACK_NAME]
            environment = {**os.environ, **CREDENTIALS, "AWS_ENDPOINT_URL": cloud.endpoint_url, "AWS_REGION": REGION}
            ran = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)  # noqa: S603  # ours
            return ran.stdout.strip()

        def status_with(token: str) -> int:
            headers = {"Authorization": f"Token {token}"}
            return httpx.get(
                cloud.stack.api_url + "/predictions", headers=headers, trust_env=False, timeout=60
            ).status_code

        kept, revoked = (tokens("create", "--owner", "dave", "--scopes", "read", "--name", n) for n in ("kept", "gone"))
        listed = {token["name"]: token for token in json.loads(tokens("list", "--json")) if token["owner"] == "dave"}
        assert kept not in json.dumps(listed)
        tokens("revoke", listed["gone"]["id"])
        # An authorizer's answer is cached for a minute: the revoked one was never used, so none is.
        assert (status_with(kept), status_with(revoked)) == (200, 401)

    def test_owners_never_see_each_others_predictions(self, stack: Stack, api: Api, replicate: LocalReplicate) -> None:
        mine = create(stack.alice, sleeper(0))["id"]
        bob = api("bob")
        for method, path in (("GET", f"/predictions/{mine}"), ("POST", f"/predictions/{mine}/cancel")):
            assert bob.request(method, path).status_code == 404
        assert mine not in [p["id"] for p in bob.get("/predictions").json()["results"]]
        assert mine in [p["id"] for p in stack.alice.get("/predictions").json()["results"]]
        same_key = {"Idempotency-Key": "shared-by-chance"}
        assert create(stack.alice, sleeper(0), **same_key)["id"] != create(bob, sleeper(0), **same_key)["id"]
        assert stack.ended(mine)["status"] == "succeeded"

    def test_unknown_routes_and_methods_are_problems(self, stack: Stack) -> None:
        for method, path in (("GET", "/nothing"), ("PUT", "/predictions"), ("DELETE", "/models/a/b/predictions")):
            answer = stack.alice.request(method, path)
            assert answer.status_code == 404
            assert answer.json()["status"] == 404

    @pytest.mark.parametrize(
        ("body", "content_type", "status"),
        [
            ("{", "application/json", 400),
            ("[" * 100_000, "application/json", 400),
            ('{"input": {"n": NaN}}', "application/json", 400),
            ('{"version": "local/painter"}', "application/json", 422),
            ('{"version": "local/painter", "input": {}, "prompt": "x"}', "application/json", 422),
            ('{"version": "x", "input": {}}', "application/json", 422),
            ('{"version": "local/nothing", "input": {}}', "application/json", 404),
            (
                '{"version": "local/painter", "input": {}, "webhook": "http://169.254.169.254/"}',
                "application/json",
                422,
            ),
            ('{"version": "local/painter", "input": {"a": "' + "x" * 5_500_000 + '"}}', "application/json", 413),
            ("prompt=x", "application/x-www-form-urlencoded", 415),
        ],
    )
    def test_bad_input_is_a_problem_before_anything_is_spent(
        self, stack: Stack, replicate: LocalReplicate, body: str, content_type: str, status: int
    ) -> None:
        answer = stack.alice.post("/predictions", content=body, headers={"Content-Type": content_type})
        assert answer.status_code == status, answer.text
        assert answer.headers["content-type"].startswith("application/problem+json")
        assert answer.json()["detail"]
        assert replicate.creates() == []


class TestWebhookPath:
    def test_image_is_stored_before_its_end_is_seen(self, stack: Stack, replicate: LocalReplicate) -> None:
        created = create(stack.alice)
        assert created["status"] == "starting"
        prediction = stack.ended(created["id"])
        assert prediction["status"] == "succeeded"
        (file,) = prediction["output_files"]
        stored = stack.cloud.client("s3").get_object(Bucket=file["bucket"], Key=file["key"])["Body"].read()
        assert (len(stored), hashlib.sha256(stored).hexdigest()) == (file["bytes"], file["sha256"])
        shown = prediction["output"] if isinstance(prediction["output"], str) else prediction["output"][0]
        assert replicate.origin not in json.dumps(prediction["output"])
        assert httpx.get(shown, trust_env=False, timeout=60).content == stored
        assert stack.execution_ended(created["id"]) == "SUCCEEDED"
        # On a busy machine a poll may come before the webhook.
        entered = [each for each in stack.states(created["id"]) if each not in ("PollPrediction", "AwaitWebhookAgain")]
        assert entered == ["AwaitWebhook", "CopyOutputs"]
        assert len(replicate.creates(created["id"])) == 1

    def test_end_without_files_is_the_end_of_the_one_state_that_waits(
        self, stack: Stack, replicate: LocalReplicate
    ) -> None:
        entered = []
        # On a busy machine a completion may come before the wait, or after the first poll.
        for seconds in (1.5, 2, 2.5, 3, 3.5):
            created = create(stack.alice, sleeper(seconds))
            assert stack.ended(created["id"])["status"] == "succeeded"
            assert stack.execution_ended(created["id"]) == "SUCCEEDED"
            entered.append(stack.states(created["id"]))
            if entered[-1] == ["AwaitWebhook"]:
                return
        pytest.fail(f"more states than the one that waits: {entered}")

    @pytest.mark.parametrize("model", ["album", "series", "storyteller", "blob"])
    def test_outputs_of_every_shape_are_stored(self, stack: Stack, replicate: LocalReplicate, model: str) -> None:
        described = replicate_get(replicate, f"/models/local/{model}")
        properties = described["latest_version"]["openapi_schema"]["components"]["schemas"]["Input"]
        given = dict.fromkeys(properties.get("required", []), "a quiet sea")
        prediction = stack.ended(create(stack.alice, {"version": f"local/{model}", "input": given})["id"], 60)
        assert prediction["status"] == "succeeded", prediction["error"]
        assert prediction["output"]
        assert replicate.origin not in json.dumps(prediction["output"])
        for file in prediction["output_files"]:
            stored = stack.cloud.client("s3").get_object(Bucket=file["bucket"], Key=file["key"])["Body"].read()
            assert hashlib.sha256(stored).hexdigest() == file["sha256"]
        assert bool(prediction["output_files"]) == (model != "storyteller")

    def test_failure_of_the_model_is_seen_with_its_error_and_logs(
        self, stack: Stack, replicate: LocalReplicate
    ) -> None:
        prediction = stack.ended(create(stack.alice, {"version": "local/crasher", "input": {}})["id"])
        assert prediction["status"] == "failed"
        assert prediction["error"]
        assert prediction["logs"]

    def test_wait_answers_with_the_end_or_with_starting(self, stack: Stack, replicate: LocalReplicate) -> None:
        answer = stack.alice.post("/predictions", json=sleeper(0), headers={"Prefer": "wait=20"})
        assert answer.json()["status"] == "succeeded"
        assert answer.headers["preference-applied"] == "wait=20"
        answer = stack.alice.post("/predictions", json=sleeper(600), headers={"Prefer": "wait=1"})
        assert (answer.status_code, answer.json()["status"], "output" in answer.json()) == (201, "starting", False)
        stack.alice.post(f"/predictions/{answer.json()['id']}/cancel")

    @pytest.mark.parametrize("fault", ["webhook_duplicated", "webhook_reordered"])
    def test_webhooks_that_come_twice_or_in_another_order_change_nothing(
        self, stack: Stack, replicate: LocalReplicate, fault: str
    ) -> None:
        replicate.fault(fault, times=2)
        created = create(stack.alice)
        assert stack.ended(created["id"])["status"] == "succeeded"
        assert len(replicate.creates(created["id"])) == 1

    def test_forged_webhook_changes_nothing(self, stack: Stack, replicate: LocalReplicate) -> None:
        created = create(stack.alice, sleeper(600))
        upstream_id = stack.bound(created["id"])
        before = stack.wait(lambda: (i := stack.item(created["id"])).status == "processing" and i)
        forged = {"id": upstream_id, "status": "succeeded", "output": "forged"}
        url = f"{stack.cloud.stack.api_url}/webhooks/replicate/{created['id']}"
        signed = {"webhook-id": "msg_1", "webhook-timestamp": "1700000000", "webhook-signature": "v1,Zm9yZ2Vk"}
        for headers in ({}, signed):
            answer = httpx.post(url, json=forged, headers=headers, trust_env=False, timeout=30)
            assert answer.status_code == 401
            assert answer.json()["status"] == 401
        assert stack.item(created["id"]).status == before.status
        stack.alice.post(f"/predictions/{created['id']}/cancel")


class TestLostWebhooks:
    def test_poll_finds_the_end_that_no_webhook_told(self, stack: Stack, replicate: LocalReplicate) -> None:
        replicate.fault("webhook_lost", times=None)
        created = create(stack.alice)
        # Nobody looks at it: a live read would see the end before the poll.
        assert stack.execution_ended(created["id"]) == "SUCCEEDED"
        prediction = stack.ended(created["id"])
        assert prediction["status"] == "succeeded"
        assert prediction["output_files"][0]["sha256"]
        assert "PollPrediction" in stack.states(created["id"])

    def test_webhook_whose_receiver_died_before_it_sent_the_token_is_repaired_by_the_next_one(
        self, stack: Stack, replicate: LocalReplicate
    ) -> None:
        # The stand-in's terminal webhook is lost; its write is made here, without the message to the execution.
        replicate.fault("webhook_lost", times=None, events=["completed"])
        created = create(stack.alice, {"version": "local/sleeper", "input": {"seconds": 0}})
        upstream_id = stack.bound(created["id"])
        stack.wait(lambda: replicate_get(replicate, f"/predictions/{upstream_id}")["status"] == "succeeded")
        told = replicate_get(replicate, f"/predictions/{upstream_id}")
        stack.table.merge(created["id"], UpstreamPrediction.parse(told), 1_900_000_000)
        webhook = signed_webhook(replicate, stack, created["id"], told)
        assert (webhook.status_code, webhook.json()) == (200, {"received": "nothing new"})
        assert stack.execution_ended(created["id"]) == "SUCCEEDED"

    def test_execution_that_an_old_function_wakes_without_its_files_is_followed_by_one_that_copies(
        self, stack: Stack, replicate: LocalReplicate
    ) -> None:
        replicate.fault("webhook_lost", times=None, events=["completed"])
        created = create(stack.alice)
        upstream_id = stack.bound(created["id"])
        stack.wait(lambda: replicate_get(replicate, f"/predictions/{upstream_id}")["status"] == "succeeded")
        told = UpstreamPrediction.parse(replicate_get(replicate, f"/predictions/{upstream_id}"))
        ended = stack.table.merge(created["id"], told, int(time.time())).prediction
        assert ended
        assert (ended.awaits_copy, ended.wake) == (True, "v2")
        # As functions of the release before woke each execution.
        stack.cloud.client("stepfunctions").send_task_success(taskToken=ended.task_token, output="{}")
        assert stack.execution_ended(created["id"]) == "SUCCEEDED"
        assert stack.states(created["id"]) == ["AwaitWebhook"]
        # Three minutes after the end at most the sweep looks, and the next execution copies at once.
        assert 0 < (ended.next_check_at or 0) - time.time() <= 180
        stack.make_due(created["id"])
        stack.sweep()
        assert stack.ended(created["id"])["output_files"][0]["sha256"]
        assert stack.item(created["id"]).execution_n == 2


class TestSameRequest:
    def test_same_key_at_the_same_time_starts_one_prediction(self, stack: Stack, replicate: LocalReplicate) -> None:
        key = {"Idempotency-Key": f"order-{hashlib.sha256(replicate.token.encode()).hexdigest()[:8]}"}
        with ThreadPoolExecutor(6) as pool:
            ids = {p["id"] for p in pool.map(lambda _: create(stack.alice, sleeper(0), **key), range(6))}
        assert len(ids) == 1
        assert len(replicate.creates(ids.pop())) == 1
        answer = stack.alice.post("/predictions", json=sleeper(1), headers=key)
        assert (answer.status_code, answer.json()["invalid_fields"][0]["field"]) == (422, "Idempotency-Key")


class TestCancel:
    def test_cancel_after_the_bind(self, stack: Stack, replicate: LocalReplicate) -> None:
        created = create(stack.alice, sleeper(60))
        stack.bound(created["id"])
        assert stack.alice.post(f"/predictions/{created['id']}/cancel").status_code == 200
        assert stack.ended(created["id"])["status"] == "canceled"
        assert stack.execution_ended(created["id"]) == "SUCCEEDED"

    def test_cancel_before_the_bind(self, stack: Stack, replicate: LocalReplicate) -> None:
        replicate.fault("create_answer_late", seconds=20)
        replicate.fault("start_late", seconds=600)
        with ThreadPoolExecutor(1) as pool:
            key = {"Idempotency-Key": "cancel-before-bind"}
            creating = pool.submit(create, stack.alice, sleeper(60), **key)
            prediction_id = stack.wait(lambda: open_intent(stack), what="the intent to be written")
            assert stack.alice.post(f"/predictions/{prediction_id}/cancel").status_code == 200
            replicate.release()  # Replicate answers now
            assert creating.result()["id"] == prediction_id
        assert stack.ended(prediction_id)["status"] == "canceled"
        assert [c["status"] for c in replicate.record()["predictions"] if c["id"] == stack.bound(prediction_id)] == [
            "canceled"
        ]

    def test_deadline_ends_a_prediction(self, stack: Stack, replicate: LocalReplicate) -> None:
        created = create(stack.alice, sleeper(60), **{"Cancel-After": "5s"})
        assert stack.ended(created["id"])["status"] == "canceled"


class TestSubmission:
    def test_throttled_create_runs_at_its_time(self, stack: Stack, replicate: LocalReplicate) -> None:
        # Longer than until the execution submits, also on a busy machine.
        replicate.fault("create_throttled", retry_after_seconds=12, header=True)
        created = create(stack.alice, sleeper(0))
        assert created["status"] == "starting"
        assert stack.ended(created["id"])["status"] == "succeeded"
        assert [c["status"] for c in replicate.creates(created["id"])] == [429, 201]
        assert "WaitForTurn" in stack.states(created["id"])
        assert stack.item(created["id"]).execution_n == 2, "the first number is the other machine's"

    @pytest.mark.parametrize(
        "fault",
        [
            {"name": "create_accepted_then_reset"},
            {"name": "create_accepted_then_error", "status": 502},
        ],
    )
    def test_accepted_create_whose_answer_is_lost_is_bound_by_the_webhook(
        self, stack: Stack, replicate: LocalReplicate, fault: dict[str, Any]
    ) -> None:
        replicate.fault(**fault)
        created = create(stack.alice, sleeper(1))
        assert stack.ended(created["id"])["status"] == "succeeded"
        assert len(replicate.creates(created["id"])) == 1

    def test_accepted_create_whose_answer_and_webhooks_are_lost_is_reconciled(
        self, stack: Stack, replicate: LocalReplicate
    ) -> None:
        replicate.fault("create_accepted_then_reset")
        replicate.fault("webhook_lost", times=None)
        body = {"version": "local/sleeper", "input": {"seconds": 0.125}}
        created = create(stack.alice, body)
        # Neither the list nor a GET shows webhooks here: its likeness tells, after the grace.
        assert stack.ended(created["id"], 90)["status"] == "succeeded"
        assert len(replicate.creates(created["id"])) == 1

    def test_create_that_was_answered_5xx_and_not_accepted_is_submitted_again(
        self, stack: Stack, replicate: LocalReplicate
    ) -> None:
        replicate.fault("create_refused", status=502)
        created = create(stack.alice, {"version": "local/sleeper", "input": {"seconds": 0.25}})
        assert created["status"] == "starting"
        assert stack.ended(created["id"], 120)["status"] == "succeeded"
        assert [c["status"] for c in replicate.creates(created["id"])] == [502, 201]

    def test_third_of_the_creates_failing_in_each_way_costs_a_minute_and_no_second_run(
        self, stack: Stack, replicate: LocalReplicate, record_property: Recorded
    ) -> None:
        nothing_made = ["create_refused", "create_reset", "create_silence"]
        ways = [
            *nothing_made,
            "create_accepted_then_error",
            "create_accepted_then_reset",
            "create_accepted_then_silence",
        ]
        number, run, began, created = 18, f"third-{time.time()}", {}, []
        for n in range(number):
            key = f"{run}-{n}"
            if n % 3 == 0:
                # Of this one only: an earlier one may be submitted again at this moment.
                replicate.fault(ways[n // 3], webhook=derived_id("alice", key))
            asked_at = time.monotonic()
            body = {"version": "local/sleeper", "input": {"seconds": 0.3 + n / 1000}}
            started = create(stack.alice, body, **{"Idempotency-Key": key})
            began[started["id"]] = asked_at
            created.append(started["id"])
        seconds = []
        for prediction_id in created:
            assert stack.ended(prediction_id, 240)["status"] == "succeeded"
            seconds.append(time.monotonic() - began[prediction_id])
        p95 = sorted(seconds)[int(number * 0.95)]
        assert p95 < 240
        record_property("creates without a clear answer", len(ways))
        record_property("seconds until 95 of 100 had ended", round(p95))
        creates = [len(replicate.creates(prediction_id)) for prediction_id in created]
        # Those of which nothing was made were sent again, and no other.
        assert creates == [2 if n % 3 == 0 and n // 3 < len(nothing_made) else 1 for n in range(number)]

    def test_webhook_before_the_create_answer_is_kept(self, stack: Stack, replicate: LocalReplicate) -> None:
        replicate.fault("create_answer_late", seconds=20, until_webhook=True)
        created = create(stack.alice, sleeper(0))
        assert stack.ended(created["id"])["status"] == "succeeded"
        assert len(replicate.creates(created["id"])) == 1

    def test_refusal_of_replicate_is_the_callers_answer(self, stack: Stack, replicate: LocalReplicate) -> None:
        # Only Replicate knows that there is no such version.
        answer = stack.alice.post("/predictions", json={"version": "0" * 64, "input": {"prompt": "a fox"}})
        assert answer.status_code == 422
        assert answer.headers["content-type"].startswith("application/problem+json")
        assert [c["status"] for c in replicate.creates()] == [422]

    def test_refused_token_is_a_502(self, stack: Stack, replicate: LocalReplicate) -> None:
        replicate.fault("create_refused", status=401)
        answer = stack.alice.post("/predictions", json=sleeper(0))
        assert (answer.status_code, answer.json()["status"]) == (502, 502)


class TestFiles:
    def test_truncated_file_is_copied_again_and_never_seen(self, stack: Stack, replicate: LocalReplicate) -> None:
        replicate.fault("file_truncated", times=2)
        prediction = stack.ended(create(stack.alice)["id"], 60)
        (file,) = prediction["output_files"]
        stored = stack.cloud.client("s3").get_object(Bucket=file["bucket"], Key=file["key"])["Body"].read()
        assert hashlib.sha256(stored).hexdigest() == file["sha256"]

    def test_file_that_is_gone_ends_succeeded_with_the_reason_visible(
        self, stack: Stack, replicate: LocalReplicate
    ) -> None:
        replicate.fault("file_error", status=404, times=None)
        prediction = stack.ended(create(stack.alice)["id"], 60)
        assert prediction["status"] == "succeeded"
        assert "404" in prediction["output_files"][0]["error"]
        assert "404" in prediction["error"]


class TestExecutions:
    def test_waiting_execution_tells_the_sweep_to_look_after_its_wait(
        self, stack: Stack, replicate: LocalReplicate
    ) -> None:
        created = create(stack.alice, sleeper(8))
        item = stack.wait(lambda: (i := stack.item(created["id"])).task_token and i, what="a task token")
        assert 60 < item.next_check_at - time.time() < 130
        assert stack.ended(created["id"])["status"] == "succeeded"

    def test_execution_stopped_by_hand_is_followed_by_the_next_one(
        self, stack: Stack, replicate: LocalReplicate
    ) -> None:
        replicate.fault("webhook_lost", times=None)
        created = create(stack.alice, sleeper(8))  # longer than until it is stopped, also on a busy machine
        stack.bound(created["id"])
        stepfunctions = stack.cloud.client("stepfunctions")
        stepfunctions.stop_execution(executionArn=stack.execution_arn(created["id"]))
        stack.make_due(created["id"])
        stack.sweep()
        # Unless the sweep of the schedule was there first, and has not written it yet.
        stack.wait(lambda: stack.item(created["id"]).execution_n == 2, what="the next execution")
        assert stack.ended(created["id"])["status"] == "succeeded"
        assert stack.execution_ended(created["id"], 2) == "SUCCEEDED"

    def test_orphan_is_canceled_by_the_sweep(self, stack: Stack, replicate: LocalReplicate) -> None:
        created = create(stack.alice, sleeper(0))
        stack.ended(created["id"])
        orphan = httpx.post(
            f"{replicate.url}/models/local/storyteller/predictions",
            json={"input": {"prompt": "x"}},
            headers=replicate.headers,
            trust_env=False,
            timeout=60,
        ).json()
        told = UpstreamPrediction.parse({**orphan, "status": Status.PROCESSING})
        stack.table.merge(created["id"], told, 1)
        assert stack.item(created["id"]).orphans == {orphan["id"]}
        stack.sweep()
        # By this sweep, or by that of the schedule, which may still be at it.
        path = f"/v1/predictions/{orphan['id']}/cancel"
        stack.wait(lambda: path in [r["path"] for r in replicate.record()["requests"]], what="the orphan's cancel")
        stack.wait(lambda: not stack.item(created["id"]).orphans, what="the orphan to be forgotten")
        assert stack.item(created["id"]).visible == "succeeded"


class TestSecrecy:
    def test_no_token_or_input_is_in_any_log(self, stack: Stack, replicate: LocalReplicate) -> None:
        body = {"version": "local/painter", "input": {"prompt": "CANARY-PROMPT"}}
        stack.ended(create(stack.alice, body)["id"])
        logs = stack.cloud.client("logs")
        text = ""
        for group in logs.describe_log_groups()["logGroups"]:
            for page in logs.get_paginator("filter_log_events").paginate(logGroupName=group["logGroupName"]):
                text += "".join(event["message"] for event in page["events"])
        assert "submitted" in text
        for secret in ("CANARY-PROMPT", replicate.token, replicate.signing_secret, "rs_"):
            assert secret not in text


def open_intent(stack: Stack) -> str | None:
    """The id of alice's newest prediction, while it is claimed and not bound."""
    newest = next(stack.table.list("alice", None, older=True, size=1).predictions).prediction
    return newest.id if newest.claimed and not newest.upstream_id else None


def replicate_get(replicate: LocalReplicate, path: str) -> dict[str, Any]:
    answer = httpx.get(replicate.url + path, headers=replicate.headers, trust_env=False, timeout=60)
    told: dict[str, Any] = answer.raise_for_status().json()
    return told


def signed_webhook(replicate: LocalReplicate, stack: Stack, prediction_id: str, told: dict[str, Any]) -> httpx.Response:
    body = json.dumps(told).encode()
    headers = sign(body, webhook_id="msg_again", timestamp=int(time.time()), secrets=[replicate.signing_secret])
    url = f"{stack.cloud.stack.api_url}/webhooks/replicate/{prediction_id}"
    return httpx.post(url, content=body, headers=headers, trust_env=False, timeout=30)
