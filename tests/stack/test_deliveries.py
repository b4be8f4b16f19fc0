"""Webhooks to callers, from the deployed stack to a receiver on this machine."""

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from local.cloud import CREDENTIALS, REGION, STACK_NAME, LocalCloud
from local.replicate.process import LocalReplicate

Api = Callable[..., httpx.Client]
WaitUntil = Callable[..., Any]

PAINTER = {"version": "local/painter", "input": {"prompt": "a lighthouse at dusk"}}
EVERY_EVENT = ["start", "output", "logs", "completed"]


class Receiver:
    """A caller's server: keeps what it is sent, and answers as it is told to, else 200."""

    def __init__(self) -> None:
        receiver = self
        self.received: list[tuple[str, dict[str, str], bytes]] = []
        self.answers: list[tuple[int, dict[str, str], bytes]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.received.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                status, headers, answer = receiver.answers.pop(0) if receiver.answers else (200, {}, b"thanks")
                self.send_response(status)
                for name, value in {"Content-Length": str(len(answer)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def told(self, prediction_id: str) -> list[tuple[str, dict[str, Any]]]:
        """The events and bodies that came for a prediction, in their order."""
        found = []
        for _, headers, body in list(self.received):
            name, event, _ = headers["webhook-id"].split("-")
            if name == prediction_id:
                found.append((event, json.loads(body)))
        return found

    def headers(self, prediction_id: str, event: str) -> list[dict[str, str]]:
        return [h for _, h, _ in list(self.received) if h["webhook-id"].startswith(f"{prediction_id}-{event}-")]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


class Caller:
    """An owner who starts predictions with a webhook."""

    def __init__(self, client: httpx.Client, receiver: Receiver, wait_until: WaitUntil) -> None:
        self._client = client
        self._receiver = receiver
        self._wait_until = wait_until

    def create(self, body: dict[str, Any], events: list[str] | None = None, path: str = "/hook?job=7") -> str:
        asked = {**body, "webhook": self._receiver.url + path}
        if events:
            asked["webhook_events_filter"] = events
        answer = self._client.post("/predictions", json=asked)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def shown(self, prediction_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self._client.get(f"/predictions/{prediction_id}").raise_for_status().json()
        return found

    def cancel(self, prediction_id: str) -> None:
        self._client.post(f"/predictions/{prediction_id}/cancel").raise_for_status()

    def completed(self, prediction_id: str, seconds: float = 40) -> dict[str, Any]:
        """The body of the webhook that tells the end."""

        def found() -> dict[str, Any] | None:
            return next((body for event, body in self._receiver.told(prediction_id) if event == "completed"), None)

        body: dict[str, Any] = self._wait_until(found, seconds, f"the completed webhook of {prediction_id}")
        return body

    def heard(self, prediction_id: str, events: set[str]) -> None:
        """Waits until webhooks of these events have come."""

        def found() -> bool:
            return events <= {event for event, _ in self._receiver.told(prediction_id)}

        self._wait_until(found, 30, f"webhooks {events} of {prediction_id}")

    def secret(self) -> str:
        answer = self._client.get("/webhooks/default/secret").raise_for_status().json()
        assert answer.keys() == {"key"}
        return str(answer["key"])


@pytest.fixture
def alice(api: Api, receiver: Receiver, wait_until: WaitUntil) -> Caller:
    return Caller(api("alice"), receiver, wait_until)


def command(cloud: LocalCloud, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **CREDENTIALS, "AWS_ENDPOINT_URL": cloud.endpoint_url, "AWS_REGION": REGION}
    return subprocess.run(  # noqa: S603  # ours
        [sys.executable, "-m", "predictions", *arguments, "--stack", STACK_NAME],
        env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip


def hold_ends(replicate: LocalReplicate) -> None:
    """Keep all ends from the stack until `release`: `completed` would overtake webhooks on a busy machine."""
    replicate.fault("webhook_late", times=None, events=["completed"], seconds=600)
    replicate.fault("get_error", times=None)


def sleeper(seconds: float) -> dict[str, Any]:
    return {"version": "local/sleeper", "input": {"seconds": seconds}}


def verify(secret: str, headers: dict[str, str], body: bytes) -> None:
    Webhook(secret).verify(body, headers)  # type: ignore[no-untyped-call,unused-ignore]


class TestRefused:
    @pytest.mark.parametrize(
        "url", ["http://10.0.0.1/", "http://[::1]:80/", "https://169.254.169.254/", "http://x.example"]
    )
    def test_private_and_plain_addresses_are_refused_before_anything_is_spent(self, api: Api, url: str) -> None:
        answer = api("alice").post("/predictions", json={**sleeper(0), "webhook": url})
        assert (answer.status_code, answer.json()["invalid_fields"][0]["field"]) == (422, "webhook")

    def test_secret_needs_a_token_with_the_scope_predict(self, cloud: LocalCloud) -> None:
        url = f"{cloud.stack.api_url}/webhooks/default/secret"
        headers = {"Authorization": f"Bearer {cloud.create_token('carol', ['read'])}"}
        assert httpx.get(url, trust_env=False, timeout=60).status_code == 401
        assert httpx.get(url, headers=headers, trust_env=False, timeout=60).status_code == 403

    def test_redirect_is_not_followed_and_tried_again_later(
        self, alice: Caller, receiver: Receiver, replicate: LocalReplicate
    ) -> None:
        receiver.answers = [(307, {"Location": f"{receiver.url}/elsewhere"}, b"")]
        prediction_id = alice.create(sleeper(0), ["completed"])
        alice._wait_until(lambda: len(receiver.headers(prediction_id, "completed")) == 2, 40, "the second try")
        assert {path for path, _, _ in receiver.received} == {"/hook?job=7"}

    def test_receiver_that_is_gone_is_not_asked_again(
        self, cloud: LocalCloud, alice: Caller, receiver: Receiver, replicate: LocalReplicate
    ) -> None:
        receiver.answers = [(410, {}, b"")]
        queue = cloud.outputs["DeliveriesQueueUrl"]
        # Those to receivers of other tests, which are gone, are tried again for a day.
        cloud.client("sqs").purge_queue(QueueUrl=queue)
        alice.completed(alice.create(sleeper(0), ["completed"]))

        def empty() -> bool:
            names = [f"ApproximateNumberOfMessages{which}" for which in ("", "NotVisible", "Delayed")]
            counts = cloud.client("sqs").get_queue_attributes(QueueUrl=queue, AttributeNames=names)["Attributes"]
            return set(counts.values()) == {"0"}

        alice._wait_until(empty, 20, "the delivery to be done with")
        assert len(receiver.received) == 1


class TestDelivered:
    def test_start_comes_first_and_the_end_once_the_files_are_stored(
        self, cloud: LocalCloud, alice: Caller, receiver: Receiver, replicate: LocalReplicate
    ) -> None:
        for _ in range(3):
            hold_ends(replicate)
            prediction_id = alice.create({"version": "local/series", "input": {"delay_seconds": 1}}, EVERY_EVENT)
            alice.heard(prediction_id, {"start", "logs"})
            replicate.release()
            body = alice.completed(prediction_id)
            told = receiver.told(prediction_id)
            outputs = [shown for event, shown in told if event == "output"]
            if outputs:
                break
            # `completed` is sent a second later; on a busy machine it overtakes `output`, and tells the same.
        assert told[0][0] == "start"
        assert (told[0][1]["status"], "output" in told[0][1], told[0][1]["output_files"]) == ("processing", False, [])
        assert told[-1][0] == "completed"
        assert body["status"] == "succeeded"
        for file in body["output_files"]:
            stored = cloud.client("s3").head_object(Bucket=file["bucket"], Key=file["key"])
            assert stored["ContentLength"] == file["bytes"]
        assert len(body["output_files"]) == len(body["output"]) == 3
        assert [(shown["status"], len(shown["output"])) for shown in outputs] == [("processing", 3)]
        assert "logs" in {event for event, _ in told}
        assert replicate.origin not in json.dumps([shown for _, shown in told])
        shown = alice.shown(prediction_id)
        assert {k: shown[k] for k in ("id", "status", "completed_at", "metrics")} == {
            k: body[k] for k in ("id", "status", "completed_at", "metrics")
        }

    def test_text_is_told_as_it_grows(self, alice: Caller, receiver: Receiver, replicate: LocalReplicate) -> None:
        story = {"prompt": "a whale", "max_tokens": 12, "delay_seconds": 0.2}
        hold_ends(replicate)
        prediction_id = alice.create({"version": "local/storyteller", "input": story})
        alice.heard(prediction_id, {"output"})
        replicate.release()
        end = "".join(alice.completed(prediction_id)["output"])
        told = receiver.told(prediction_id)
        growing = ["".join(body["output"]) for event, body in told if event == "output"]
        assert {event for event, _ in told} == {"output", "completed"}
        assert growing
        assert all(end.startswith(text) for text in growing)

    @pytest.mark.parametrize(
        ("body", "status"), [({"version": "local/crasher", "input": {}}, "failed"), (sleeper(60), "canceled")]
    )
    def test_other_ends_are_told_too(
        self, alice: Caller, receiver: Receiver, replicate: LocalReplicate, body: dict[str, Any], status: str
    ) -> None:
        prediction_id = alice.create(body, ["completed"])
        if status == "canceled":
            alice.cancel(prediction_id)
        assert alice.completed(prediction_id)["status"] == status
        assert [event for event, _ in receiver.told(prediction_id)] == ["completed"]

    def test_receiver_that_fails_is_called_again_under_the_same_id(
        self, alice: Caller, receiver: Receiver, replicate: LocalReplicate
    ) -> None:
        receiver.answers = [(500, {}, b"x" * 100_000), (404, {}, b"")]
        prediction_id = alice.create(sleeper(0), ["completed"])
        tries = alice._wait_until(
            lambda: len(found := receiver.headers(prediction_id, "completed")) == 3 and found, 60, "the third try"
        )
        assert len({headers["webhook-id"] for headers in tries}) == 1
        moments = [int(headers["webhook-timestamp"]) for headers in tries]
        assert moments[1] - moments[0] >= 4
        assert moments[2] - moments[1] > moments[1] - moments[0]

    def test_prediction_without_a_webhook_runs_no_function_of_webhooks(
        self, cloud: LocalCloud, api: Api, wait_until: WaitUntil, replicate: LocalReplicate, quiet: None
    ) -> None:
        before: Counter[str] = cloud.invocations()
        created = api("alice").post("/predictions", json=sleeper(0)).json()["id"]
        wait_until(lambda: api("alice").get(f"/predictions/{created}").json()["status"] == "succeeded")
        time.sleep(1.5)  # the emulator reads the stream each second
        ran = cloud.invocations() - before
        assert ran["start_prediction"] == 1
        assert ran["publish_changes"] <= 2, "for the events of its start and end, at once or one by one"
        assert ran["deliver_webhook"] == 0


class TestSecrets:
    def test_webhook_is_signed_with_its_owners_secret_and_no_other(
        self, api: Api, alice: Caller, receiver: Receiver, wait_until: WaitUntil, replicate: LocalReplicate
    ) -> None:
        bob = Caller(api("bob"), receiver, wait_until)
        assert alice.secret() == alice.secret() != bob.secret()
        alice.completed(alice.create(sleeper(0), ["completed"]))
        (_, headers, body) = receiver.received[-1]
        verify(alice.secret(), headers, body)
        for secret, changed in ((bob.secret(), body), (alice.secret(), body + b" ")):
            with pytest.raises(WebhookVerificationError):
                verify(secret, headers, changed)

    def test_no_secret_of_an_owner_and_no_address_of_a_receiver_is_in_any_log(
        self, cloud: LocalCloud, alice: Caller, receiver: Receiver, replicate: LocalReplicate
    ) -> None:
        secret = alice.secret()
        receiver.answers = [(500, {}, b"CANARY-ANSWER")]
        prediction_id = alice.create(sleeper(0), ["completed"], "/hook?token=CANARY-PATH")
        alice._wait_until(lambda: len(receiver.headers(prediction_id, "completed")) == 2, 40, "the second try")
        logs = cloud.client("logs")
        text = ""
        for group in logs.describe_log_groups()["logGroups"]:
            for page in logs.get_paginator("filter_log_events").paginate(logGroupName=group["logGroupName"]):
                text += "".join(event["message"] for event in page["events"])
        assert "webhook not delivered" in text
        for hidden in (secret, secret.removeprefix("whsec_"), "CANARY"):
            assert hidden not in text

    def test_old_and_new_secret_both_sign_after_a_rotation(
        self, cloud: LocalCloud, api: Api, receiver: Receiver, wait_until: WaitUntil, replicate: LocalReplicate
    ) -> None:
        erin = Caller(api("erin"), receiver, wait_until)
        old = erin.secret()
        command(cloud, "webhooks", "rotate", "--owner", "erin")
        new = erin.secret()
        assert new != old
        erin.completed(erin.create(sleeper(0), ["completed"]))
        (_, headers, body) = receiver.received[-1]
        for secret in (old, new):
            verify(secret, headers, body)


class TestOperated:
    def test_webhook_is_sent_again_by_command(
        self, cloud: LocalCloud, alice: Caller, receiver: Receiver, wait_until: WaitUntil, replicate: LocalReplicate
    ) -> None:
        prediction_id = alice.create(sleeper(0), ["completed"])
        alice.completed(prediction_id)
        command(cloud, "webhooks", "redeliver", prediction_id)
        tries = wait_until(lambda: len(t := receiver.headers(prediction_id, "completed")) == 2 and t, 20)
        assert len({headers["webhook-id"] for headers in tries}) == 1

    def test_webhook_that_was_given_up_is_listed_and_sent_again_by_command(
        self, cloud: LocalCloud, alice: Caller, receiver: Receiver, wait_until: WaitUntil, replicate: LocalReplicate
    ) -> None:
        prediction_id = alice.create(sleeper(0), [])
        alice.completed(prediction_id)
        receiver.answers = [(503, {}, b"")]
        # A day has passed: this was the last try.
        message = {"id": prediction_id, "event": "completed", "n": 1, "first_at": int(time.time()) - 86_401}
        queue, dead = (cloud.outputs[f"Deliveries{name}Url"] for name in ("Queue", "DeadLetterQueue"))
        sqs = cloud.client("sqs")
        sqs.send_message(QueueUrl=queue, MessageBody=json.dumps(message))

        def given_up() -> bool:
            name = "ApproximateNumberOfMessages"
            counts = sqs.get_queue_attributes(QueueUrl=dead, AttributeNames=[name])["Attributes"]
            return bool(counts[name] == "1")

        wait_until(given_up, 20, "the delivery to be given up")
        listed = json.loads(command(cloud, "dead-letters", "list", "webhooks", "--json").stdout)
        assert listed == [{**message, "reason": "responded with 503"}]
        assert "Redriven: 1." in command(cloud, "dead-letters", "redrive", "webhooks").stderr
        wait_until(lambda: len(receiver.headers(prediction_id, "completed")) == 3, 20, "the third webhook")
        assert command(cloud, "dead-letters", "list", "webhooks", "--json").stdout.strip() == "[]"
