"""The samples of docs/samples on the deployed stack, as their readers use them."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import boto3
import httpx
import pytest
from PIL import Image

from local import npm
from local.cloud import CHECKOUT, OWNER, REGION, LocalCloud
from local.processes import answers, free_port, stop
from tests.conformance.suite import CLIENTS, environment
from tests.support.samples import SAMPLES, load_worker, text

Api = Callable[..., httpx.Client]
Boto = Callable[[str], Any]
Wait = Callable[..., Any]

NO_AWS = re.compile(r"AWS_.*")
WORKER = load_worker()
PNG = b"\x89PNG"


def process_environment(**more: str) -> dict[str, str]:
    """The environment of a sample's process: nothing of AWS and Replicate but what is given."""
    return {name: value for name, value in environment().items() if not NO_AWS.fullmatch(name)} | more


@contextlib.contextmanager
def started(command: list[str], folder: Path, log: Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of a sample, which writes into a log and is stopped at the end."""
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603  # of a sample
            command, cwd=folder, env=process_environment(**variables), stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        stop(process)


def run(command: list[str], folder: Path, **variables: str) -> None:
    """Run a command of a sample to its end."""
    done = subprocess.run(  # noqa: S603  # of a sample
        command, cwd=folder, env=process_environment(**variables), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]


# -- the worker ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def office(cloud: LocalCloud) -> Iterator[dict[str, str]]:
    """The worker's own stack: its outputs; it goes before the stack whose bus its rule is on."""
    made = cloud.client("cloudformation")
    given = {name: cloud.outputs[name] for name in ("EventBusName", "OutputsBucketName", "RequestsQueueArn")}
    parameters = [{"ParameterKey": name, "ParameterValue": value} for name, value in (given | {"Owner": OWNER}).items()]
    made.create_stack(
        StackName="results",
        TemplateBody=text("worker/template.yaml"),
        Parameters=parameters,
        Capabilities=["CAPABILITY_IAM"],
    )
    made.get_waiter("stack_create_complete").wait(StackName="results", WaiterConfig={"Delay": 1, "MaxAttempts": 60})
    (stack,) = made.describe_stacks(StackName="results")["Stacks"]
    yield {each["OutputKey"]: each["OutputValue"] for each in stack["Outputs"]}
    made.delete_stack(StackName="results")
    made.get_waiter("stack_delete_complete").wait(StackName="results", WaiterConfig={"Delay": 1, "MaxAttempts": 60})


@pytest.fixture(scope="module")
def hired(cloud: LocalCloud, office: Mapping[str, str]) -> dict[str, str]:
    """The variables of a worker that may do what its policy allows, and nothing else."""
    iam = cloud.client("iam")
    account = cloud.client("sts").get_caller_identity()["Account"]
    principal = {"Effect": "Allow", "Principal": {"AWS": f"arn:aws:iam::{account}:root"}, "Action": "sts:AssumeRole"}
    trust = json.dumps({"Version": "2012-10-17", "Statement": [principal]})
    role = iam.create_role(RoleName="results-worker", AssumeRolePolicyDocument=trust)["Role"]
    iam.attach_role_policy(RoleName="results-worker", PolicyArn=office["WorkerPolicyArn"])
    taken = cloud.client("sts").assume_role(RoleArn=role["Arn"], RoleSessionName="worker")["Credentials"]
    return {
        "AWS_ENDPOINT_URL": cloud.endpoint_url,
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_ACCESS_KEY_ID": taken["AccessKeyId"],
        "AWS_SECRET_ACCESS_KEY": taken["SecretAccessKey"],
        "AWS_SESSION_TOKEN": taken["SessionToken"],
        "AWS_CONFIG_FILE": os.devnull,
        "REQUESTS_QUEUE_URL": cloud.stack.queue_url,
        "RESULTS_QUEUE_URL": office["ResultsQueueUrl"],
        "EVENTS_TABLE_NAME": office["EventsTableName"],
        "MODEL": "local/painter",
    }


WORK = [sys.executable, str(SAMPLES / "worker" / "worker.py")]


def send(folder: Path, hired: Mapping[str, str], key: str) -> None:
    """Request a prediction, as the worker's command does."""
    run([*WORK, "send", key, "a harbour in fog"], folder, **hired)


def test_worker_handles_a_result_that_is_delivered_twice_once(
    boto: Boto, office: Mapping[str, str], hired: Mapping[str, str], tmp_path: Path, wait_until: Wait
) -> None:
    sqs, queue = boto("sqs"), office["ResultsQueueUrl"]
    key = f"order-{uuid.uuid4().hex}"
    send(tmp_path, hired, key)
    send(tmp_path, hired, key)  # which starts nothing more

    def arrived() -> list[dict[str, Any]]:
        found = sqs.receive_message(QueueUrl=queue, WaitTimeSeconds=1, VisibilityTimeout=0).get("Messages", [])
        return list(found)

    (message,) = wait_until(arrived, 60, "the event of the prediction")
    sqs.send_message(QueueUrl=queue, MessageBody=message["Body"])
    detail = json.loads(message["Body"])["detail"]
    assert (detail["status"], detail["owner"], detail["source"]) == ("succeeded", OWNER, "queue")

    handled: list[str] = []
    session = boto3.Session(
        aws_access_key_id=hired["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=hired["AWS_SECRET_ACCESS_KEY"],
        aws_session_token=hired["AWS_SESSION_TOKEN"],
        region_name=REGION,
    )
    endpoint = hired["AWS_ENDPOINT_URL"]
    s3 = session.client("s3", endpoint_url=endpoint)

    def handle(detail: Mapping[str, Any]) -> None:
        handled.append(detail["event_id"])
        WORKER.handle(detail, s3, tmp_path)

    events = session.resource("dynamodb", endpoint_url=endpoint).Table(office["EventsTableName"])
    worker = WORKER.Worker(session.client("sqs", endpoint_url=endpoint), queue, events, handle)
    received = 0

    def all_received() -> bool:
        nonlocal received
        received += worker.work(wait_seconds=1)
        return bool(received >= 2)

    wait_until(all_received, 30, "both deliveries")
    assert handled == [detail["event_id"]]
    assert (tmp_path / detail["id"] / "0").read_bytes().startswith(PNG)
    assert not arrived()


def test_process_of_the_worker_stores_a_result_and_stops_when_it_should(
    boto: Boto, office: Mapping[str, str], hired: Mapping[str, str], tmp_path: Path, wait_until: Wait
) -> None:
    log = tmp_path / "log"
    with started(WORK, tmp_path, log, **hired, RESULTS_FOLDER=str(tmp_path)) as process:
        send(tmp_path, hired, f"order-{uuid.uuid4().hex}")

        def stored() -> list[Path]:
            assert process.poll() is None, log.read_text()
            return list(tmp_path.glob("[a-z0-9]*/result.json"))

        (result,) = wait_until(stored, 60, "the stored result")
        assert json.loads(result.read_text())["status"] == "succeeded"
        assert (result.parent / "0").read_bytes().startswith(PNG)
        process.send_signal(signal.SIGTERM)
        # It stops when its long poll ends, which a message does earlier.
        again = json.dumps({"detail": {"event_id": f"{result.parent.name}-succeeded"}})
        boto("sqs").send_message(QueueUrl=office["ResultsQueueUrl"], MessageBody=again)
        assert process.wait(40) == 0, log.read_text()


# -- the recipe ----------------------------------------------------------------------------------------------------


def test_recipe_redraws_a_picture_that_is_dropped(cloud: LocalCloud, api: Api, boto: Boto, wait_until: Wait) -> None:
    definition = json.loads(text("s3-recipe/restyle.json"))
    # A model of the local stack, in whose input the picture has another name, and which takes no prompt.
    picture = definition["input"]["input_image"]
    local = {"model": "local/etcher", "input": {"image": picture}, "defaults": {}}
    client = api("restyler")
    assert client.put("/recipes/restyle", json=definition | local).status_code == 201
    drawn = io.BytesIO()
    Image.effect_noise((96, 64), 80).convert("RGB").save(drawn, "PNG")
    prefix, suffix = definition["s3"]["prefix"], definition["s3"]["suffix"]
    name = f"fox-{uuid.uuid4().hex}{suffix}"
    boto("s3").put_object(Bucket=cloud.stack.inputs_bucket, Key=prefix + name, Body=drawn.getvalue())

    def done() -> dict[str, Any] | None:
        found = client.get("/predictions").json()["results"]
        return client.get(f"/predictions/{found[0]['id']}").json() if found and "completed_at" in found[0] else None

    shown = wait_until(done, 60, "the redrawn picture")
    assert shown["status"] == "succeeded", shown
    (file,) = shown["output_files"]
    assert file["key"].startswith(f"restyler/restyled/{name}/")
    assert client.delete("/recipes/restyle").status_code == 204


# -- those of other languages, whose packages are installed first --------------------------------------------------

needs_node = pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")


def installed(sample: str) -> Path:
    """A copy of a sample with the packages of its lock."""
    source, folder = SAMPLES / sample, CHECKOUT / ".local" / "conformance" / f"sample_{sample}"
    npm.install(folder, (source / "package.json").read_text(), source / "package-lock.json")
    ignored = shutil.ignore_patterns("node_modules", "package*.json")
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=ignored)
    return folder


@pytest.mark.slow
@needs_node
def test_cdk_app_compiles_and_synthesizes_the_nested_stack(tmp_path: Path) -> None:
    folder = installed("cdk")
    shutil.copy(CHECKOUT / "template.yaml", folder / "packaged.yaml")
    shutil.rmtree(folder / "cdk.out", ignore_errors=True)
    command = ["npx", "--offline", "cdk", "synth", "--quiet", "--no-notices", "-c", "permissionsBoundaryArn=arn:x"]
    run(command, folder, CDK_DISABLE_CLI_TELEMETRY="true", HOME=str(tmp_path))
    template = json.loads((folder / "cdk.out" / "Replicate.template.json").read_text())
    (nested,) = [each for each in template["Resources"].values() if each["Type"] == "AWS::CloudFormation::Stack"]
    assert nested["Properties"]["Parameters"]["PermissionsBoundaryArn"] == "arn:x"
    assert nested["Properties"]["Tags"] == [{"Key": "service", "Value": "replicate-serverless"}]
    # The template goes through S3 as it is: an asset, named by its hash.
    (url,) = re.findall(r"[0-9a-f]{64}\.yaml", json.dumps(nested["Properties"]["TemplateURL"]))
    asset = folder / "cdk.out" / f"asset.{url}"
    assert asset.read_bytes() == (CHECKOUT / "template.yaml").read_bytes()
    # Its name is that of the parent, its logical id and at most 13 characters more, 30 together where recipes have
    # triggers: docs/deploy.md#resources
    (logical_id,) = [name for name, each in template["Resources"].items() if each is nested]
    assert len(f"Replicate-{logical_id}-") + 13 <= 30
    assert template["Outputs"].keys() >= {"ApiUrl", "RequestsQueueUrl", "EventBusName", "StackName"}


@pytest.fixture
def page(cloud: LocalCloud, tmp_path: Path) -> Iterator[str]:
    """The address of the page in Next.js, as `npm run build` and `npm run start` serve it."""
    folder = installed("nextjs")
    program = ["node", "node_modules/next/dist/bin/next"]
    variables = {
        "NEXT_TELEMETRY_DISABLED": "1",
        "REPLICATE_BASE_URL": cloud.stack.api_url,
        "REPLICATE_API_TOKEN": cloud.create_token("painter", ["predict", "read"]),
        "MODEL": "local/series",
    }
    run([*program, "build"], folder, **variables)
    sent = [path.read_text(errors="replace") for path in (folder / ".next" / "static").rglob("*.js")]
    assert any("/api/pictures" in script for script in sent)
    assert not [name for name, value in variables.items() for script in sent if len(value) > 1 and value in script]
    port = free_port()
    address, log = f"http://127.0.0.1:{port}", tmp_path / "log"
    with started([*program, "start", "-H", "127.0.0.1", "-p", str(port)], folder, log, **variables) as process:
        assert answers(address, process, 60), log.read_text()
        yield address


@pytest.mark.slow
@needs_node
def test_page_generates_a_picture_with_progress_and_pays_once(cloud: LocalCloud, page: str) -> None:
    cloud.replicate.reset()
    prompt, key = f"a fox {uuid.uuid4().hex}", uuid.uuid4().hex
    with httpx.Client(base_url=page, timeout=120, trust_env=False) as browser:
        shown = browser.get("/")
        assert 'name="prompt"' in shown.text
        assert browser.post("/api/pictures", json={"prompt": prompt, "key": "short"}).status_code == 400
        pictures = []
        for _ in range(2):  # as a page does whose connection was lost
            response = browser.post("/api/pictures", json={"prompt": prompt, "key": key})
            *progress, last = [json.loads(line) for line in response.text.splitlines()]
            assert progress
            assert all(line.keys() == {"progress"} for line in progress), progress
            assert last.get("mediaType") == "image/png", last
            pictures.append(last["picture"])
            # What the model logs, read while it runs or at its end.
            assert re.fullmatch(r"Picture \d of \d", progress[-1]["progress"])
        assert pictures[0] == pictures[1]
        failed = browser.post("/api/pictures", json={"prompt": f"{prompt} again", "key": key})
        assert "error" in json.loads(failed.text.splitlines()[-1])  # another request with the same key
    posted = [each for each in cloud.replicate.record()["requests"] if each["method"] == "POST"]
    assert len([each for each in posted if (each["body"] or {}).get("input", {}).get("prompt") == prompt]) == 1


def call(output: IO[str], input_: IO[str], number: int, method: str, **parameters: Any) -> dict[str, Any]:
    """Call a method of an MCP server: https://modelcontextprotocol.io/specification/2025-06-18/basic/transports."""
    input_.write(json.dumps({"jsonrpc": "2.0", "id": number, "method": method, "params": parameters}) + "\n")
    input_.flush()
    for line in output:
        message: dict[str, Any] = json.loads(line)
        if message.get("id") == number:
            assert "result" in message, message
            return dict(message["result"])
    raise AssertionError("the server has ended")


@pytest.mark.slow
@needs_node
@pytest.mark.parametrize(("name", "key"), [("mcp/mcp.json", "mcpServers"), ("mcp/vscode.mcp.json", "servers")])
def test_mcp_configuration_starts_a_server_of_the_stack(cloud: LocalCloud, name: str, key: str) -> None:
    folder, _ = CLIENTS["mcp"].installed()
    (server,) = json.loads(text(name))[key].values()
    # The values that a reader fills in; npx takes the package from the folder, and asks no registry.
    filled = {"REPLICATE_API_TOKEN": cloud.create_token("host"), "REPLICATE_BASE_URL": cloud.stack.api_url}
    assert filled.keys() == server["env"].keys()
    process = subprocess.Popen(  # noqa: S603  # of a sample
        [server["command"], *server["args"]], cwd=folder, env=process_environment(**filled, npm_config_offline="true"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdin
        assert process.stdout
        host = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "host", "version": "1"}}
        assert call(process.stdout, process.stdin, 1, "initialize", **host)["serverInfo"]["name"]
        process.stdin.write('{"jsonrpc": "2.0", "method": "notifications/initialized"}\n')
        args = {"version": "local/sleeper", "input": {"seconds": 0, "text": "by name"}, "Prefer": "wait=20"}
        invoked = {"name": "invoke_api_endpoint", "arguments": {"endpoint_name": "create_predictions", "args": args}}
        found = call(process.stdout, process.stdin, 2, "tools/call", **invoked)
        assert json.loads(found["content"][0]["text"])["output"] == "by name"
    finally:
        stop(process)  # type: ignore[arg-type]  # waits and signals only, whatever its pipes carry
        with process:
            pass  # closes its pipes
