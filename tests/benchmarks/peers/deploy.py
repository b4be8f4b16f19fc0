"""Deploys the peers beside a stack: what a user would write instead, on the same emulator and stand-in.

Each length of a model has functions of its own, so that what they take is told apart while all run at once.
"""

import io
import json
import time
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from local.cloud import CREDENTIALS, LocalCloud
from tests.benchmarks.report import BenchmarkFailed

HERE = Path(__file__).parent
MEMORY_MB = 512
"""Of every function of a peer: what one writes who has not measured."""
WAIT, LOOP = "wait", "loop"
STEPS = ("create", "get", "store")
LOOP_SECONDS = 5
"""Of the wait in `loop.asl.json`."""
_TRUST = "2012-10-17"
# As long as the longest model takes, on a busy machine.
_SECONDS = 180


@dataclass(frozen=True)
class Peers:
    """The deployed peers.

    Attributes:
        functions: Physical names of the functions, by peer, length and step: `wait 10 wait`, `loop 60 get`.
        machines: ARNs of the state machines, by length.
    """

    functions: Mapping[str, str]
    machines: Mapping[int, str]


@contextmanager
def deployed(cloud: LocalCloud, lengths: tuple[int, ...]) -> Iterator[Peers]:
    """Deploy all peers for these lengths, in seconds; they go with the emulator."""
    put = _role(cloud, "peer-functions", "lambda", "s3:PutObject", f"arn:aws:s3:::{cloud.stack.outputs_bucket}/peers/*")
    invoke = _role(cloud, "peer-machines", "states", "lambda:InvokeFunction", "*")
    functions, machines = {}, {}
    for length in lengths:
        functions[f"{WAIT} {length} wait"] = _function(cloud, put, "wait", length)
        arns = {}
        for step in STEPS:
            name = functions[f"{LOOP} {length} {step}"] = _function(cloud, put, step, length)
            arns[step] = cloud.client("lambda").get_function(FunctionName=name)["Configuration"]["FunctionArn"]
        definition = (HERE / "loop.asl.json").read_text()
        for step, arn in arns.items():
            definition = definition.replace(f"${{{step}}}", arn)
        machines[length] = cloud.client("stepfunctions").create_state_machine(
            name=f"peer-loop-{length}", definition=definition, roleArn=invoke
        )["stateMachineArn"]
    yield Peers(functions, machines)


def run(cloud: LocalCloud, peers: Peers, length: int, model: str, given: Mapping[str, Any]) -> str:
    """Run each peer once, both at once; return the execution of the machine.

    The models have run once the machine has asked as often as it asks within `length` seconds, on any machine.

    Raises:
        BenchmarkFailed: One did not store its file.
    """
    event = {"model": model, "input": dict(given)}
    states = cloud.client("stepfunctions")
    cloud.replicate.fault("start_late", seconds=3600, times=None)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(_invoke, cloud, peers.functions[f"{WAIT} {length} wait"], event)
        execution: str = states.start_execution(stateMachineArn=peers.machines[length], input=json.dumps(event))[
            "executionArn"
        ]
        deadline = time.monotonic() + _SECONDS
        while _asked(cloud, execution) < length // LOOP_SECONDS and time.monotonic() < deadline:
            time.sleep(0.2)
        cloud.replicate.release()
        found = [waiting.result()]
    while (shown := states.describe_execution(executionArn=execution))["status"] == "RUNNING":
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    found.append(json.loads(shown.get("output") or "{}"))
    if any("bytes" not in each for each in found):
        raise BenchmarkFailed(f"a peer has not stored its file: {found}")
    return execution


def _asked(cloud: LocalCloud, execution: str) -> int:
    """Return how often a machine has asked."""
    pages = cloud.client("stepfunctions").get_paginator("get_execution_history").paginate(executionArn=execution)
    events = [event for page in pages for event in page["events"]]
    return sum(event.get("stateExitedEventDetails", {}).get("name") == "Get" for event in events)


def warm(cloud: LocalCloud, peers: Peers, model: str, given: Mapping[str, Any]) -> None:
    """Have every function of the peers run once."""
    event: dict[str, Any] = {"model": model, "input": dict(given)}
    for length in peers.machines:
        done = _invoke(cloud, peers.functions[f"{WAIT} {length} wait"], event)
        for step in ("create", "get"):
            _invoke(cloud, peers.functions[f"{LOOP} {length} {step}"], event | {"id": done["id"]})
        _invoke(cloud, peers.functions[f"{LOOP} {length} store"], done)


def _invoke(cloud: LocalCloud, name: str, event: Mapping[str, Any]) -> dict[str, Any]:
    # By default a client repeats a call that has not been answered for a minute, and the model runs twice.
    patient = Config(read_timeout=_SECONDS, retries={"total_max_attempts": 1})
    client = boto3.client(
        "lambda",
        endpoint_url=cloud.endpoint_url,
        region_name=cloud.region,
        aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        config=patient,
    )
    answer = client.invoke(FunctionName=name, Payload=json.dumps(event).encode())
    told: dict[str, Any] = json.loads(answer["Payload"].read())
    return told


def _role(cloud: LocalCloud, name: str, service: str, action: str, resource: str) -> str:
    trusted = {"Effect": "Allow", "Action": "sts:AssumeRole", "Principal": {"Service": f"{service}.amazonaws.com"}}
    allowed = {"Effect": "Allow", "Action": action, "Resource": resource}
    iam = cloud.client("iam")
    arn: str = iam.create_role(RoleName=name, AssumeRolePolicyDocument=_policy(trusted))["Role"]["Arn"]
    iam.put_role_policy(RoleName=name, PolicyName=name, PolicyDocument=_policy(allowed))
    return arn


def _policy(statement: Mapping[str, Any]) -> str:
    return json.dumps({"Version": _TRUST, "Statement": [statement]})


def _function(cloud: LocalCloud, role: str, step: str, length: int) -> str:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as writing:
        writing.write(HERE / "app.py", "app.py")
    name = f"peer-{step}-{length}"
    cloud.client("lambda").create_function(
        FunctionName=name,
        Runtime="python3.13",
        Role=role,
        Handler=f"app.{step}",
        Code={"ZipFile": archive.getvalue()},
        MemorySize=MEMORY_MB,
        Timeout=_SECONDS,
        Environment={
            "Variables": {
                "REPLICATE_URL": cloud.replicate_url,
                "REPLICATE_TOKEN": cloud.replicate.token,
                "BUCKET": cloud.stack.outputs_bucket,
            }
        },
    )
    return name
