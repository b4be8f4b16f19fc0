"""The local cloud: AWS, emulated on this machine, with the project's own template deployed to it.

`LocalCloud` starts the MiniStack emulator (IAM enforced) and the Replicate stand-in, builds and deploys
``template.yaml`` with the real ``sam build`` and ``sam deploy``, adds the API's address and the groups of logs,
and stops every process again. All servers listen on loopback only, at free ports, in a directory of their own, so any
number of local clouds can run side by side; the user's AWS configuration is neither read nor written.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from predictions.api.access_tokens import AccessTokens, Scope

from local.processes import answers, free_port, is_running, stop, undisturbed
from local.replicate.process import LocalReplicate

CHECKOUT = Path(__file__).resolve().parent.parent
EMULATOR_PYTHON = CHECKOUT / ".local" / "emulator" / "bin" / "python"
LEASH = CHECKOUT / "local" / "leash.py"
EMULATOR = CHECKOUT / "local" / "emulator" / "__main__.py"
REGION = "us-east-1"
STACK_NAME = "replicate-serverless"
OWNER = "local"  # of the access token and, by QueueOwner, of everything that comes without one

# https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html; new accounts can have less.
CONCURRENCY = 1000

# The emulator treats this key as the account's root user.
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
NO_USER_CONFIGURATION = {
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}
# The machine's proxy settings, for tools that use the internet (pip during a build; the real Replicate).
NETWORK_VARIABLES = {
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
    "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CERT", "UV_INDEX_URL", "UV_DEFAULT_INDEX", "UV_CACHE_DIR",
}  # fmt: skip


class LocalCloudError(Exception):
    """The local cloud could not start; the message names the part, the reason and its log."""


@dataclass(frozen=True)
class Upstream:
    """A Replicate to run predictions on, other than the stand-in.

    Attributes:
        url: The address of its API, ending in ``/v1``.
        token: Its API token.
    """

    url: str
    token: str


@dataclass(frozen=True)
class Stack:
    """Addresses and credentials of the deployed stack: the content of ``stack.json``."""

    api_url: str
    access_token: str
    owner: str
    endpoint_url: str
    region: str
    table_name: str
    outputs_bucket: str
    inputs_bucket: str
    queue_url: str
    event_bus_name: str
    state_machine_arn: str
    submitted_state_machine_arn: str
    run_prediction_function_name: str
    run_prediction_function_arn: str
    replicate_api_url: str

    @contextlib.contextmanager
    def file(self, path: Path) -> Iterator[None]:
        """Store this in a private file, written atomically, while the context lasts."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self), indent=2) + "\n"
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".stack-", delete=False) as unfinished:
            unfinished.write(text)
        Path(unfinished.name).replace(path)
        try:
            yield
        finally:
            # Another local cloud may have replaced the file since.
            with contextlib.suppress(FileNotFoundError):
                if path.read_text() == text:
                    path.unlink()


class LocalCloud:
    """A context in which the stack is deployed and reachable.

    Attributes:
        stack: Addresses and credentials of the stack.
        owner: The owner of its access token, and of what the queue and direct invocations start.
        stack_name: Its name.
        region: Its region.
        endpoint_url: The emulator: all of AWS.
        replicate_url: The API the stack runs predictions on, ending in ``/v1``.
        replicate: The stand-in behind it; not set with another upstream.
        outputs: The outputs of the stack, by name.
        resources: The physical ids of its resources, by logical id.
    """

    stack: Stack
    endpoint_url: str
    replicate_url: str
    replicate: LocalReplicate
    outputs: Mapping[str, str]
    resources: Mapping[str, str]

    def __init__(
        self,
        *,
        parameters: Mapping[str, str] | None = None,
        upstream: Upstream | None = None,
        concurrency: int = CONCURRENCY,
        directory: Path | None = None,
        checkout: Path = CHECKOUT,
        stack_name: str = STACK_NAME,
        region: str = REGION,
        beside: LocalCloud | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Prepare a local cloud; entering the context starts it.

        Args:
            parameters: Template parameters that differ from those of a local deployment.
            upstream: The Replicate to use; without one a stand-in is started.
            concurrency: The account's limit of function calls at the same time; a new account's can be 10.
            directory: The directory for state and logs while it runs, by default `local_directory`.
            checkout: The folder with ``template.yaml``.
            stack_name: The name of the stack.
            region: Its region.
            beside: A running cloud whose emulator and Replicate are used, instead of others; it must outlive this one.
            say: Called with each line of progress.
        """
        self._parameters = dict(parameters or {})
        self._upstream = upstream
        self._concurrency = concurrency
        self._directory = directory or local_directory()
        self.owner = self._parameters.get("QueueOwner", OWNER)
        self._checkout = checkout
        self.stack_name = stack_name
        self.region = region
        self._beside = beside
        self._say = say
        self._cleanup = contextlib.ExitStack()
        self._clients: dict[str, Any] = {}

    def __enter__(self) -> Self:
        """Start, build, deploy.

        Raises:
            LocalCloudError: A part did not start, build or deploy. All started processes are stopped again.
        """
        began = time.monotonic()
        try:
            self.run_directory = self._make_run_directory()
            self._build = self._new_build()
            building = self._build.start()
            if building:
                self._cleanup.callback(stop, building)
            if self._beside:
                self._join(self._beside)
            else:
                self._start_emulator()
                self._start_replicate()
            if building:
                self._say("building the functions and the layer (sam build)")
                self._build.finish(building)
            self.deploy()
        except BaseException:
            self.stop(keep_logs=True)
            raise
        self._say(f"ready in {time.monotonic() - began:.0f} s")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop every started process, and wait until it has ended."""
        self.stop(keep_logs=error is not None and not isinstance(error, (KeyboardInterrupt, SystemExit)))

    def deploy(self) -> None:
        """Deploy the built template as a new stack, also after `delete`.

        Raises:
            LocalCloudError: The deployment failed.
        """
        self._say("deploying template.yaml (sam deploy)")
        self._deploy()
        self._complete()
        self.stack = self._describe()

    def deploy_again(self, **parameters: str) -> None:
        """Build and deploy the changes in the checkout.

        Args:
            parameters: Template parameters that change.

        Raises:
            LocalCloudError: The build or the deployment failed.
        """
        self._parameters |= parameters
        self._build = self._new_build()
        if building := self._build.start():
            self._cleanup.callback(stop, building)
            self._build.finish(building)
        self._deploy()

    def delete(self) -> None:
        """Delete the stack with ``sam delete``, and wait until it is gone.

        Raises:
            LocalCloudError: The deletion failed.
        """
        log = self._log("sam-delete")
        cloudformation = self.client("cloudformation")
        stack_id = cloudformation.describe_stacks(StackName=self.stack_name)["Stacks"][0]["StackId"]
        named = ("--stack-name", self.stack_name, "--no-prompts")
        command = [_sam_program(), "delete", *named, *_sam_options(self.region)]
        deleting = self._start_sam(command, self.run_directory, log)
        # Deleting the stack is the last step of `sam delete`, which checks its progress only every 30 seconds.
        while cloudformation.describe_stacks(StackName=stack_id)["Stacks"][0]["StackStatus"] != "DELETE_COMPLETE":
            if deleting.poll() is not None:
                raise LocalCloudError(f"sam delete failed.\n{_tail(log)}")
            time.sleep(0.2)

    def stop(self, *, keep_logs: bool = False) -> None:
        """Stop everything, and remove the logs unless `keep_logs` is set."""
        logs = self._directory / "logs"
        with undisturbed():
            try:
                self._cleanup.close()
            finally:
                run_directory: Path | None = getattr(self, "run_directory", None)
                if run_directory and keep_logs:
                    shutil.rmtree(logs, ignore_errors=True)
                    shutil.copytree(self.logs, logs)
                if run_directory:
                    shutil.rmtree(run_directory, ignore_errors=True)
        if keep_logs and logs.exists():
            self._say(f"the logs are in {_short(logs)}")

    def client(self, service: str) -> Any:
        """Return a client of an AWS service of this cloud, with all rights."""
        if service not in self._clients:
            self._clients[service] = aws_client(self.endpoint_url, service, self.region)
        return self._clients[service]

    def create_token(self, owner: str, scopes: Sequence[str] = tuple(Scope)) -> str:
        """Create an access token of the API."""
        tokens = AccessTokens(self.outputs["TableName"], self.client("dynamodb"))
        return tokens.create(owner, scopes, "local")[0]

    @property
    def functions(self) -> dict[str, str]:
        """Map folder names of functions (``copy_outputs``) to physical names."""
        return {
            re.sub(r"(?<!^)(?=[A-Z])", "_", logical_id.removesuffix("Function")).lower(): physical_id
            for logical_id, physical_id in self.resources.items()
            if logical_id.endswith("Function")
        }

    def invocations(self) -> Counter[str]:
        """Count the runs of each function (by its folder's name) since the deployment.

        The counts come from the log, not from CloudWatch's metrics: there the emulator counts only invocations through
        the Invoke call.
        """
        pages = self.client("logs").get_paginator("filter_log_events")
        return Counter(
            {
                function: sum(
                    len(page["events"])
                    for page in pages.paginate(logGroupName=_log_group(name), filterPattern='"START RequestId"')
                )
                for function, name in self.functions.items()
            }
        )

    def _make_run_directory(self) -> Path:
        self._directory.mkdir(parents=True, exist_ok=True)
        for abandoned in self._directory.glob("cloud-*-*"):
            if not is_running(int(abandoned.name.split("-")[1])):
                shutil.rmtree(abandoned, ignore_errors=True)
        run_directory = Path(tempfile.mkdtemp(prefix=f"cloud-{os.getpid()}-", dir=self._directory))
        for name in ("logs", "tmp"):
            (run_directory / name).mkdir()
        return run_directory

    @property
    def logs(self) -> Path:
        """Return the folder of the logs, while the cloud runs."""
        return self.run_directory / "logs"

    def _log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def _start_emulator(self) -> None:
        self._say("starting AWS on this machine (MiniStack)")
        for _ in range(3):  # a free port may be taken before the emulator binds it
            port = free_port()
            log = self._log("emulator")
            with log.open("ab") as output:
                process = subprocess.Popen(
                    [str(EMULATOR_PYTHON), str(LEASH), str(EMULATOR)],
                    cwd=self.run_directory,
                    env=self._emulator_variables(port),
                    stdin=subprocess.PIPE,  # the leash
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    # A group of its own: Ctrl-C reaches this process only, and leftover processes can be found.
                    start_new_session=True,
                )
            self._cleanup.callback(stop, process)
            self.endpoint_url = f"http://127.0.0.1:{port}"
            if answers(f"{self.endpoint_url}/_ministack/health", process, seconds=60):
                return
        raise LocalCloudError(f"The AWS emulator did not start.\n{_tail(log)}")

    def _emulator_variables(self, port: int) -> dict[str, str]:
        # Functions inherit this environment, so it starts empty: their variables come from the template.
        internet = _network() if self._upstream else {}
        return {
            **internet,
            **CREDENTIALS,
            **NO_USER_CONFIGURATION,
            "AUTH": "true",
            "LAMBDA_ACCOUNT_CONCURRENCY": str(self._concurrency),
            "BIND_HOST": "127.0.0.1",
            "GATEWAY_PORT": str(port),
            "MINISTACK_HOST": "127.0.0.1",
            "MINISTACK_REGION": REGION,
            "STATE_DIR": str(self.run_directory / "state"),
            "S3_DATA_DIR": str(self.run_directory / "s3"),
            "TMPDIR": str(self.run_directory / "tmp"),
            "HOME": str(self.run_directory),
            "PATH": os.defpath,
            "LANG": "C.UTF-8",
            "LOG_LEVEL": "INFO",
            # Servers that would listen on every address, and containers that are not ours.
            "SFTP_ENABLED": "0",
            "IOT_MTLS_ENABLED": "0",
            "DOCKER_HOST": f"unix://{self.run_directory}/no-docker",
            "PYTHONNOUSERSITE": "1",
        }

    def _join(self, other: LocalCloud) -> None:
        self.endpoint_url, self.replicate_url = other.endpoint_url, other.replicate_url
        self._upstream = other._upstream
        if not self._upstream:
            self.replicate = other.replicate

    def _start_replicate(self) -> None:
        if self._upstream:
            self.replicate_url = self._upstream.url
            return
        self._say("starting a stand-in for Replicate, with models (Cog)")
        try:
            self.replicate = self._cleanup.enter_context(LocalReplicate(self._log("replicate").with_suffix("")))
        except RuntimeError as error:
            raise LocalCloudError(str(error)) from error
        self.replicate_url = self.replicate.url

    def _runtime_parameters(self) -> dict[str, str]:
        """Return the parameters that affect the build."""
        architecture = {"aarch64": "arm64", "arm64": "arm64"}.get(platform.machine(), "x86_64")
        return {
            "PythonRuntime": self._parameters.get("PythonRuntime", f"python3.{sys.version_info.minor}"),
            "Architecture": self._parameters.get("Architecture", architecture),
        }

    def _new_build(self) -> _Build:
        return _Build(self._checkout, self._runtime_parameters(), self._log("sam-build"))

    def _start_sam(self, command: Sequence[str], folder: Path, log: Path) -> subprocess.Popen[bytes]:
        """Start a SAM command on this cloud's AWS, stopped with this cloud at the latest."""
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env=_sam_variables(self.region) | {"AWS_ENDPOINT_URL": self.endpoint_url}, start_new_session=True,
            )  # fmt: skip
        self._cleanup.callback(stop, process)
        return process

    def deployed_parameters(self, replicate_url: str, token: str) -> dict[str, str]:
        """Return the parameters of the deployment, for an address of Replicate and its token."""
        url = urlsplit(replicate_url)
        return {
            "ReplicateApiUrl": replicate_url,
            "ReplicateApiToken": token,
            # Replicate's own file hosts are always allowed.
            "FileOrigins": "" if url.hostname == "api.replicate.com" else f"{url.scheme}://{url.netloc}",
            "AllowLoopbackWebhooks": "true",
            # The token of stack.json shows what the queue and direct invocations start.
            "QueueOwner": self.owner,
            **self._runtime_parameters(),
            **self._parameters,
        }

    def _deploy(self) -> None:
        token = self._upstream.token if self._upstream else self.replicate.token
        parameters = self.deployed_parameters(self.replicate_url, token)
        # A private file, because command lines are visible to every user of the machine.
        overrides = self.run_directory / "parameters.yaml"
        overrides.touch(mode=0o600)
        overrides.write_text(json.dumps(parameters))  # JSON is YAML
        log = self._log("sam-deploy")
        command = [*self._deploy_command(), "--parameter-overrides", f"file://{overrides}"]
        if self._start_sam(command, self._checkout, log).wait() != 0:
            raise LocalCloudError(f"sam deploy failed.\n{_tail(log)}")
        cloudformation = self.client("cloudformation")
        stack = cloudformation.describe_stacks(StackName=self.stack_name)["Stacks"][0]
        self.outputs = {output["OutputKey"]: output["OutputValue"] for output in stack["Outputs"]}
        pages = cloudformation.get_paginator("list_stack_resources").paginate(StackName=self.stack_name)
        resources = [resource for page in pages for resource in page["StackResourceSummaries"]]
        self.resources = {r["LogicalResourceId"]: r.get("PhysicalResourceId", "") for r in resources}

    def _deploy_command(self) -> list[str]:
        return [
            *_sam("deploy", self._build.template, self.region),
            *("--stack-name", self.stack_name, "--resolve-s3", "--no-confirm-changeset", "--no-progressbar"),
            *("--capabilities", "CAPABILITY_IAM", "CAPABILITY_AUTO_EXPAND"),
        ]

    def _complete(self) -> None:
        """Add what the emulator ignores in the template, and run the first sweep."""
        self.api_url = f"{self.endpoint_url}/_aws/execute-api/{self.resources['Api']}/v1"
        name = self.outputs["ApiUrlParameterName"]
        self.client("ssm").put_parameter(Name=name, Value=self.api_url, Type="String", Overwrite=True)

        # All functions share a log group, in which AWS names each stream after its function. The emulator does not.
        functions = self.client("lambda")
        for function in self.functions.values():
            self.client("logs").create_log_group(logGroupName=_log_group(function))
            logging = {"LogGroup": _log_group(function)}
            functions.update_function_configuration(FunctionName=function, LoggingConfig=logging)

        answer = functions.invoke(FunctionName=self.resources["SweepPredictionsFunction"], Payload=b"{}")
        if "FunctionError" in answer:
            raise LocalCloudError(f"The first sweep failed: {answer['Payload'].read().decode()[:2000]}")

    def _describe(self) -> Stack:
        return Stack(
            api_url=self.api_url,
            access_token=self.create_token(self.owner),
            owner=self.owner,
            endpoint_url=self.endpoint_url,
            region=self.region,
            table_name=self.outputs["TableName"],
            outputs_bucket=self.outputs["OutputsBucketName"],
            inputs_bucket=self.outputs["InputsBucketName"],
            queue_url=self.outputs["RequestsQueueUrl"],
            event_bus_name=self.outputs["EventBusName"],
            state_machine_arn=self.outputs["TrackPredictionStateMachineArn"],
            submitted_state_machine_arn=self.outputs["TrackSubmittedStateMachineArn"],
            run_prediction_function_name=self.outputs["RunPredictionFunctionName"],
            run_prediction_function_arn=self.outputs["RunPredictionFunctionArn"],
            replicate_api_url=self.replicate_url,
        )


class _Build:
    """The output of ``sam build``, cached under a digest of all its inputs.

    Two local clouds share it; an unfinished build is never visible to the other.
    """

    def __init__(self, checkout: Path, parameters: Mapping[str, str], log: Path) -> None:
        self._checkout = checkout
        self._parameters = parameters
        self._log = log
        self._builds = CHECKOUT / ".local" / "builds"
        self._directory = self._builds / self._fingerprint()
        self.template = self._directory / "build" / "template.yaml"

    def start(self) -> subprocess.Popen[bytes] | None:
        """Start the build, unless its output exists already."""
        if self.template.exists():
            os.utime(self._directory)
            return None
        self._builds.mkdir(parents=True, exist_ok=True)
        for old in self._builds.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if old.stat().st_mtime < time.time() - 24 * 3600:  # no longer used
                    shutil.rmtree(old, ignore_errors=True)
        self._unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=self._builds))
        overrides = [f"ParameterKey={name},ParameterValue={value}" for name, value in self._parameters.items()]
        with self._log.open("wb") as log:
            return subprocess.Popen(
                [
                    *_sam("build", self._checkout / "template.yaml"),
                    *("--build-dir", str(self._unfinished / "build"), "--parallel"),
                    *("--parameter-overrides", " ".join(overrides)),
                ],
                cwd=self._checkout, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=_sam_variables() | self._layer_variables(), start_new_session=True,
            )  # fmt: skip

    def _layer_variables(self) -> dict[str, str]:
        # See layers/predictions/Makefile: functions run on this machine, so the layer needs modules for this platform
        # only.
        return {"PYTHON_RUNTIME": self._parameters["PythonRuntime"], "LAYER_PLATFORMS": "host"}

    def finish(self, building: subprocess.Popen[bytes]) -> None:
        """Wait for the build to finish and move its output into place.

        Raises:
            LocalCloudError: The build failed.
        """
        if building.wait() != 0:
            shutil.rmtree(self._unfinished, ignore_errors=True)
            raise LocalCloudError(f"sam build failed.\n{_tail(self._log)}")
        try:
            self._unfinished.rename(self._directory)
        except OSError:  # another local cloud has built the same concurrently
            shutil.rmtree(self._unfinished, ignore_errors=True)

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps([str(self._checkout), sorted(self._parameters.items())]).encode())
        sources = [self._checkout / "template.yaml"]
        for folder in ("functions", "layers", "recipes", "statemachine"):
            sources += sorted((self._checkout / folder).rglob("*"))
        for source in sources:
            if source.is_file() and "__pycache__" not in source.parts:
                digest.update(f"{source.relative_to(self._checkout)}\0{source.stat().st_mode}\0".encode())
                digest.update(hashlib.sha256(source.read_bytes()).digest())
        return digest.hexdigest()[:16]


def aws_client(endpoint_url: str, service: str, region: str = REGION) -> Any:
    """Create a client of an AWS service of a local cloud, with all permissions."""
    # More attempts would hide errors of the emulator.
    config = Config(retries={"total_max_attempts": 2}, proxies={}, s3={"addressing_style": "path"})
    session: Any = boto3.session.Session("test", "test", region_name=region)
    return session.client(service, endpoint_url=endpoint_url, config=config)


def _log_group(function: str) -> str:
    return f"/aws/lambda/{function}"


def local_directory() -> Path:
    """Return the directory of local clouds: ``LOCAL_DIR``, or ``.local`` here."""
    return Path(os.environ.get("LOCAL_DIR") or CHECKOUT / ".local").absolute()


def validate(template: Path = CHECKOUT / "template.yaml") -> int:
    """Check a template with ``sam validate --lint``; return its exit status."""
    return subprocess.run([*_sam("validate", template), "--lint"], cwd=CHECKOUT, env=_sam_variables()).returncode


def stack_parameters(text: str, template: Path = CHECKOUT / "template.yaml") -> dict[str, str]:
    """Parse ``STACK_PARAMETERS``: ``Key=Value`` pairs, quoted as in a shell.

    Raises:
        LocalCloudError: The text is not of that form, or the template has no such parameter.
    """
    try:
        pairs = [word.partition("=") for word in shlex.split(text)]
    except ValueError as error:
        raise LocalCloudError(f"STACK_PARAMETERS cannot be read ({error}): {text}") from error
    for name, equals, _ in pairs:
        if not (name.isalnum() and equals):
            raise LocalCloudError(f'STACK_PARAMETERS must be "Key=Value Key=Value …", but has {name!r}.')
    section = re.search(r"^Parameters:\n(.*?)^\w", template.read_text(), re.MULTILINE | re.DOTALL)
    known = re.findall(r"^  (\w+):$", section[1], re.MULTILINE) if section else []  # parsing YAML takes seconds
    for name, _, _ in pairs:
        if name not in known:
            # sam deploy ignores it, and the stack would run with the default.
            near = {each.lower(): each for each in known}
            found = [near[each] for each in difflib.get_close_matches(name.lower(), near)]
            hint = f"Did you mean {' or '.join(found)}?" if found else f"It has {', '.join(sorted(known))}."
            raise LocalCloudError(f"STACK_PARAMETERS: template.yaml has no parameter {name!r}. {hint}")
    return {name: value for name, _, value in pairs}


def _sam(command: str, template: Path, region: str = REGION) -> list[str]:
    return [_sam_program(), command, "--template-file", str(template), *_sam_options(region)]


def _sam_program() -> str:
    return str(Path(sys.executable).parent / "sam")


def _sam_options(region: str) -> list[str]:
    # A samconfig.toml for the real AWS must not apply here.
    return ["--config-file", str(_sam_directory() / "samconfig.toml"), "--region", region]


def _sam_directory() -> Path:
    directory = CHECKOUT / ".local" / "sam"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "samconfig.toml").touch()
    return directory


def _sam_variables(region: str = REGION) -> dict[str, str]:
    # SAM stores its weekly version check and the consent to telemetry in this file.
    metadata = {"telemetryEnabled": False, "lastVersionCheck": time.time()}
    (_sam_directory() / "metadata.json").write_text(json.dumps(metadata))
    return {
        **_network(),
        **CREDENTIALS,
        **NO_USER_CONFIGURATION,
        "AWS_DEFAULT_REGION": region,
        "SAM_CLI_TELEMETRY": "0",
        "SAM_CLI_POLL_DELAY": "0.3",
        "__SAM_CLI_APP_DIR": str(_sam_directory()),
        "HOME": os.environ.get("HOME", str(CHECKOUT)),  # the caches of pip and uv
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "LANG": "C.UTF-8",
    }


def _network() -> dict[str, str]:
    variables = {name: value for name, value in os.environ.items() if name in NETWORK_VARIABLES}
    loopback = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1", "localhost"]))
    return variables | {"NO_PROXY": loopback, "no_proxy": loopback}


def _tail(log: Path, lines: int = 25) -> str:
    text = "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    return f"The end of {log.name}:\n{text}"


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
