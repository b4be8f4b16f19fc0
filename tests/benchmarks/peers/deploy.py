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


def run(cloud: LocalCloud, peers: Peers, model: str, given: Mapping[str, Any]) -> dict[int, str]:
    """Run each peer once for each length, all at once; return the executions of the machines, by length.

    Raises:
        BenchmarkFailed: One did not store its file.
    """
    event = {"model": model, "input": dict(given)}
    states = cloud.client("stepfunctions")
    executions, answers = {}, []
    with ThreadPoolExecutor(len(peers.machines)) as pool:
        for length, machine in peers.machines.items():
            with _created(cloud, length):
                answers.append(pool.submit(_invoke, cloud, peers.functions[f"{WAIT} {length} wait"], event))
            with _created(cloud, length):
                started = states.start_execution(stateMachineArn=machine, input=json.dumps(event))
                executions[length] = started["executionArn"]
        found = [answer.result() for answer in answers]
    deadline = time.monotonic() + _SECONDS
    for execution in executions.values():
        while (shown := states.describe_execution(executionArn=execution))["status"] == "RUNNING":
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
        found.append(json.loads(shown.get("output") or "{}"))
    if any("bytes" not in each for each in found):
        raise BenchmarkFailed(f"a peer has not stored its file: {found}")
    return executions


def warm(cloud: LocalCloud, peers: Peers, model: str, given: Mapping[str, Any]) -> None:
    """Have every function of the peers run once."""
    event: dict[str, Any] = {"model": model, "input": dict(given)}
    for length in peers.machines:
        done = _invoke(cloud, peers.functions[f"{WAIT} {length} wait"], event)
        for step in ("create", "get"):
            _invoke(cloud, peers.functions[f"{LOOP} {length} {step}"], event | {"id": done["id"]})
        _invoke(cloud, peers.functions[f"{LOOP} {length} store"], done)


@contextmanager
def _created(cloud: LocalCloud, length: int) -> Iterator[None]:
    """Have the next prediction take so long, and wait until it is created."""
    cloud.replicate.fault("start_late", seconds=length)
    before = _creates(cloud)
    yield
    deadline = time.monotonic() + 30
    while _creates(cloud) == before:
        if time.monotonic() > deadline:
            raise BenchmarkFailed("a peer has not created its prediction")
        time.sleep(0.05)


def _creates(cloud: LocalCloud) -> int:
    return sum(each["method"] == "POST" for each in cloud.replicate.record()["requests"])


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
