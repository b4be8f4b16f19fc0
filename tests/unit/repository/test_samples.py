"""The samples of docs/samples: they parse, name what the template has, and do what their first lines say."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import boto3
import pytest
from cfnlint.api import ManualArgs, lint
from moto import mock_aws
from predictions.errors import Problem
from predictions.notifications.event_bus import SOURCE
from predictions.store.predictions import PredictionsTable
from samcli.cli.types import CfnParameterOverridesType

from tests.conformance.suite import CLIENTS
from tests.support.fakes import Clock, ReplicateInMemory
from tests.support.fixtures import make_recipe_changes
from tests.support.pages import section
from tests.support.samples import SAMPLES, load_worker, terraform, text, worker_template, workflow
from tests.support.template import ROOT, load_template

PARAMETERS: dict[str, dict[str, Any]] = load_template()["Parameters"]
OUTPUTS: set[str] = set(load_template()["Outputs"])
FILES = [
    path.relative_to(SAMPLES).as_posix()
    for path in sorted(SAMPLES.rglob("*"))
    if path.is_file() and "node_modules" not in path.parts
]
LOCKS = [name for name in FILES if name.endswith("package-lock.json")]


def check_value(name: str, value: str) -> None:
    """A parameter of the template takes a value."""
    parameter = PARAMETERS[name]
    assert re.fullmatch(parameter.get("AllowedPattern", ".*"), value), (name, value)
    if parameter["Type"] == "Number":
        assert parameter["MinValue"] <= int(value) <= parameter["MaxValue"], (name, value)


# -- all of them ---------------------------------------------------------------------------------------------------


def test_index_links_to_every_sample() -> None:
    links = set(re.findall(r"\]\(([\w./-]+)\)", text("README.md")))
    # What belongs to the sample that is linked: its packages, its compiler, its frame.
    beside = re.compile(r".*/(package(-lock)?|tsconfig|cdk)\.json|README\.md|nextjs/app/layout\.tsx")
    assert {name for name in FILES if not beside.fullmatch(name)} <= links
    assert {Path(name).parts[0] for name in FILES} - {"README.md"} == {
        "caller.asl.json", "cdk", "github-actions", "mcp", "nextjs", "s3-recipe", "terraform", "worker",
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in FILES if re.search(r"\.(tf|ts|tsx|py|ya?ml)$", name)])
def test_sample_begins_with_what_it_is(name: str) -> None:
    assert re.match(r'(#|//|""") ?[A-Z][\w /]+', text(name))


@pytest.mark.parametrize("name", FILES)
def test_sample_holds_no_secret_and_no_account(name: str) -> None:
    content = text(name)
    assert not re.search(r"\br8_\w|\bAKIA|\bwhsec_|-----BEGIN", content)
    accounts = re.findall(r"(?<![\w.-])\d{12}(?![\w.])", content if name not in LOCKS else "")
    assert set(accounts) <= {"123456789012"}


@pytest.mark.parametrize("name", LOCKS)
def test_lock_of_a_sample_has_each_package_with_its_hash_and_no_registry(name: str) -> None:
    lock = json.loads(text(name))
    declared = json.loads(text(name.replace("-lock", "")))
    root = lock["packages"].pop("")
    for kind in ("dependencies", "devDependencies"):
        assert root[kind] == declared[kind]
        assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in declared[kind].values())
    installed = [each for each in lock["packages"].values() if not each.get("inBundle")]
    assert len(installed) > 5
    assert all(each["integrity"].startswith("sha512-") and "resolved" not in each for each in installed)


# -- Terraform -----------------------------------------------------------------------------------------------------

# https://registry.terraform.io/providers/hashicorp/aws/latest/docs/resources/cloudformation_stack
ARGUMENTS = {
    "capabilities", "disable_rollback", "iam_role_arn", "name", "notification_arns", "on_failure", "parameters",
    "policy_body", "policy_url", "region", "tags", "template_body", "template_url", "timeout_in_minutes", "timeouts",
}  # fmt: skip


def terraform_stack() -> dict[str, Any]:
    (found,) = [
        each["aws_cloudformation_stack"] for each in terraform()["resource"] if "aws_cloudformation_stack" in each
    ]
    return dict(found["replicate"])


def test_terraform_gives_parameters_that_the_template_has() -> None:
    variables = {name: each for block in terraform()["variable"] for name, each in block.items()}
    parameters = terraform_stack()["parameters"]
    assert {"ReplicateTokenSecretArn", "PermissionsBoundaryArn"} <= parameters.keys() <= PARAMETERS.keys()
    assert "ReplicateApiToken" not in parameters  # it would be in the state
    for name, value in parameters.items():
        variable = re.fullmatch(r"\$\{var\.(\w+)\}", value)
        if not variable:
            check_value(name, value)
        elif "default" in variables[variable[1]]:
            check_value(name, variables[variable[1]]["default"])
    used = set(re.findall(r"\bvar\.(\w+)", text("terraform/main.tf")))
    assert used == variables.keys()
    assert {name for name, each in variables.items() if "default" not in each} == {
        "templates_bucket",
        "token_secret_arn",
    }


def test_terraform_names_outputs_that_the_template_has() -> None:
    named = re.findall(r'aws_cloudformation_stack\.replicate\.outputs\["(\w+)"\]', text("terraform/main.tf"))
    assert len(named) == len(terraform()["output"]) >= 4
    assert set(named) <= OUTPUTS


def test_terraform_consents_to_what_cloudformation_asks_for_without_a_change_set() -> None:
    stack = terraform_stack()
    assert stack.keys() <= ARGUMENTS
    # https://docs.aws.amazon.com/AWSCloudFormation/latest/APIReference/API_CreateStack.html: Capabilities
    assert stack["capabilities"] == ["CAPABILITY_IAM", "CAPABILITY_AUTO_EXPAND"]
    assert "template_body" not in stack
    assert (ROOT / "template.yaml").stat().st_size > 51_200
    assert "filesha256" in text("terraform/main.tf")


def test_terraform_is_formatted_as_its_own_command_does() -> None:
    program = shutil.which("terraform") or shutil.which("tofu")
    if not program:
        pytest.skip("neither terraform nor tofu is installed")
    command = [program, "fmt", "-check", "-diff", str(SAMPLES / "terraform")]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603  # formats only
    assert (done.returncode, done.stdout) == (0, "")


# -- CDK (`cdk synth` runs in the stack tests) ---------------------------------------------------------------------


def test_cdk_app_names_parameters_and_outputs_that_the_template_has() -> None:
    app = text("cdk/app.ts")
    block = re.search(r"  parameters: \{\n(.*?)\n  \},", app, re.DOTALL)
    assert block
    parameters = dict(re.findall(r"^    (\w+): (.+),$", block[1], re.MULTILINE))
    assert {"ReplicateTokenSecretArn", "PermissionsBoundaryArn"} <= parameters.keys() <= PARAMETERS.keys()
    context = json.loads(text("cdk/cdk.json"))["context"]
    for name, value in parameters.items():
        asked = re.fullmatch(r'context\("(\w+)"\)', value)
        check_value(name, context[asked[1]] if asked else json.loads(value))
    listed = re.search(r"for \(const name of (\[.*?\])\)", app)
    assert listed
    assert {"ApiUrl", "EventBusName"} < {*json.loads(listed[1])} <= OUTPUTS


# -- GitHub Actions ------------------------------------------------------------------------------------------------


def steps() -> list[dict[str, Any]]:
    return list(workflow()["jobs"]["deploy"]["steps"])


def script(name: str) -> str:
    (found,) = [step["run"] for step in steps() if step.get("name") == name]
    return str(found)


def test_workflow_may_ask_for_a_token_and_nothing_else() -> None:
    assert workflow()["permissions"] == {}
    assert workflow()["jobs"]["deploy"]["permissions"] == {"contents": "read", "id-token": "write"}
    assert list(workflow()["on"]) == ["workflow_dispatch"]
    # An input that a script has in its text, instead of in a variable, is code.
    assert not [step["run"] for step in steps() if "${{" in step.get("run", "")]
    assert "secrets." not in text("github-actions/deploy.yml")


def test_workflow_pins_each_action_to_a_commit() -> None:
    used = [step["uses"] for step in steps() if "uses" in step]
    assert [each.partition("@")[0] for each in used] == [
        "aws-actions/setup-sam",
        "aws-actions/configure-aws-credentials",
    ]
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", each) for each in used)
    assert len(re.findall(r"uses: \S+@[0-9a-f]{40} # v\d+", text("github-actions/deploy.yml"))) == len(used)


def test_variables_of_the_workflow_are_those_that_its_header_names() -> None:
    header, _, body = text("github-actions/deploy.yml").partition("\nname:")
    assert set(re.findall(r"\bvars\.(\w+)", body)) == set(
        re.findall(r"\b[A-Z]+(?:_[A-Z]+)*S\b|\b[A-Z]+(?:_[A-Z]+)+\b", header)
    )


def test_trust_policy_admits_the_environment_of_the_workflow_only() -> None:
    (statement,) = json.loads(text("github-actions/trust-policy.json"))["Statement"]
    provider = "token.actions.githubusercontent.com"
    assert statement["Action"] == "sts:AssumeRoleWithWebIdentity"
    assert statement["Principal"]["Federated"].endswith(f":oidc-provider/{provider}")
    conditions = statement["Condition"]
    # StringEquals, without wildcards: https://docs.github.com/en/actions/reference/security/oidc
    assert conditions == {
        "StringEquals": {
            f"{provider}:aud": "sts.amazonaws.com",
            f"{provider}:sub": f"repo:OWNER/REPOSITORY:environment:{workflow()['jobs']['deploy']['environment']}",
        }
    }


Run = Callable[..., subprocess.CompletedProcess[str]]
VERSION = "0.1.0"
ZIP = f"replicate-serverless-{VERSION}.zip"


@pytest.fixture
def run_script(tmp_path: Path) -> Run:
    """Runs a step of the workflow as GitHub does, with stand-ins of `gh`, `unzip` and `sam`."""
    release, programs = tmp_path / "release-page", tmp_path / "programs"
    release.mkdir()
    programs.mkdir()
    with zipfile.ZipFile(release / ZIP, "w") as packed:
        packed.writestr("template.yaml", "Resources: {}")
    digest = hashlib.sha256((release / ZIP).read_bytes()).hexdigest()
    (release / "SHA256SUMS").write_text(
        f"{digest}  {ZIP}\n{'0' * 64}  replicate_serverless-{VERSION}-py3-none-any.whl\n"
    )
    stand_ins = {
        "gh": f'echo "gh $*" >> {tmp_path}/calls; cp {release}/* .',
        "unzip": f'{sys.executable} -m zipfile -e "$2" "$4"',
        "sam": f'test -f template.yaml && printf "%s\\n" "$@" > {tmp_path}/sam',
    }
    for name, lines in stand_ins.items():
        (programs / name).write_text(f"#!/bin/bash -e\n{lines}\n")
        (programs / name).chmod(0o755)
    workspace = tmp_path / "workspace"
    workspace.mkdir()

    def run(name: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "VERSION": VERSION, **variables}
        # https://docs.github.com/en/actions/reference/workflows-and-actions/workflow-syntax#jobsjob_idstepsshell
        command = ["/bin/bash", "-e", "-c", script(name)]
        return subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True)  # noqa: S603  # ours

    return run


DOWNLOAD = "Download the release and check its digests"


def given(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The options of `sam deploy`, and the parameters as SAM itself reads them."""
    words = (folder / "sam").read_text().splitlines()
    place = words.index("--parameter-overrides")
    return words[:place], CfnParameterOverridesType().convert(tuple(words[place + 1 :]), None, None)


@pytest.mark.parametrize("boundary", ["", "arn:aws:iam::123456789012:policy/boundary"])
def test_workflow_deploys_the_release_with_parameters_of_the_template(
    run_script: Run, tmp_path: Path, boundary: str
) -> None:
    assert (done := run_script(DOWNLOAD, RELEASES="team/stack")).returncode == 0, done.stderr
    assert f"release download v{VERSION} --repo team/stack" in (tmp_path / "calls").read_text()
    secret = "arn:aws:secretsmanager:eu-central-1:123456789012:secret:replicate-AbC123"
    done = run_script("Deploy", REPLICATE_TOKEN_SECRET_ARN=secret, PERMISSIONS_BOUNDARY_ARN=boundary)
    assert done.returncode == 0, done.stderr
    options, parameters = given(tmp_path)
    assert options[:3] == ["deploy", "--template-file", "template.yaml"]
    assert options[options.index("--capabilities") + 1] == "CAPABILITY_IAM"
    assert parameters == {"ReplicateTokenSecretArn": secret} | (
        {"PermissionsBoundaryArn": boundary} if boundary else {}
    )
    for name, value in parameters.items():
        check_value(name, value)


def test_workflow_stops_at_a_release_with_another_digest(run_script: Run, tmp_path: Path) -> None:
    with (tmp_path / "release-page" / ZIP).open("ab") as packed:
        packed.write(b"more")
    assert run_script(DOWNLOAD, RELEASES="team/stack").returncode != 0
    assert not (tmp_path / "workspace" / "release").exists()


@pytest.mark.parametrize("version", ["", "v0.1.0", "0.1.0; id", "../0.1.0", "latest"])
def test_workflow_stops_at_what_is_no_version(run_script: Run, tmp_path: Path, version: str) -> None:
    assert run_script(DOWNLOAD, RELEASES="team/stack", VERSION=version).returncode != 0
    assert not (tmp_path / "calls").exists()


# -- the page in Next.js (built and used in the stack tests) -------------------------------------------------------


def test_token_of_the_page_stays_on_the_server() -> None:
    pages = [name for name in FILES if name.endswith(".tsx")]
    assert len(pages) == 2
    for name in pages:
        assert "process.env" not in text(name)
    for name in FILES:
        assert name in LOCKS or "NEXT_PUBLIC" not in text(name)
    route = text("nextjs/app/api/pictures/route.ts")
    (read,) = re.findall(r"const \{ (.*) \} = process\.env", route)
    variables = {each.partition(" =")[0] for each in read.split(", ")}
    shown = set(re.findall(r"\b(REPLICATE_\w+|MODEL)=", text("README.md")))
    assert variables == shown == {"REPLICATE_BASE_URL", "REPLICATE_API_TOKEN", "MODEL"}
    assert 'fetch("/api/pictures"' in text("nextjs/app/page.tsx")


def test_page_uses_the_versions_of_the_conformance_tests() -> None:
    packages = json.loads(text("nextjs/package.json"))["dependencies"]
    tested = dict(package.rsplit("@", 1) for package in CLIENTS["ai_sdk_7"].packages)
    assert packages.items() >= tested.items()


# -- the worker ----------------------------------------------------------------------------------------------------


WORKER = load_worker()


def detail(id_: str = "yyys72zxolexwjthl2aalbmehp", **changed: Any) -> dict[str, Any]:
    files = [{"path": "", "uri": "s3://outputs/alice/one/0", "bytes": 3, "content_type": "image/png"}]
    found = {"event_id": f"{id_}-succeeded", "id": id_, "model": "o/n", "status": "succeeded", "error": None}
    return found | {"output_files": files} | changed


class Office:
    """A worker with the queue and the table of its template, in moto."""

    def __init__(self, folder: Path) -> None:
        self.sqs = boto3.client("sqs", region_name="us-east-1")
        self.s3 = boto3.client("s3", region_name="us-east-1")
        self.s3.create_bucket(Bucket="outputs")
        self.s3.put_object(Bucket="outputs", Key="alice/one/0", Body=b"png")
        # A message that is kept is there again at once.
        queue = self.sqs.create_queue(QueueName="results", Attributes={"VisibilityTimeout": "0"})
        self.queue_url = queue["QueueUrl"]
        table = worker_template()["Resources"]["EventsTable"]["Properties"]
        keys = {name: table[name] for name in ("AttributeDefinitions", "BillingMode", "KeySchema")}
        self.events = boto3.resource("dynamodb", region_name="us-east-1").create_table(TableName="events", **keys)
        self.folder, self.clock = folder, Clock()
        self.handled: list[str] = []

    def handle(self, found: Mapping[str, Any]) -> None:
        self.handled.append(found["event_id"])
        WORKER.handle(found, self.s3, self.folder)

    def worker(self, handler: Callable[[Mapping[str, Any]], None] | None = None) -> Any:
        return WORKER.Worker(self.sqs, self.queue_url, self.events, handler or self.handle, self.clock.now)

    def deliver(self, found: Mapping[str, Any]) -> None:
        self.sqs.send_message(QueueUrl=self.queue_url, MessageBody=json.dumps({"detail": found}))

    @property
    def waiting(self) -> int:
        found = self.sqs.get_queue_attributes(QueueUrl=self.queue_url, AttributeNames=["ApproximateNumberOfMessages"])
        return int(found["Attributes"]["ApproximateNumberOfMessages"])


class Killed(BaseException):
    """The worker's process has ended."""


def crash(_: Mapping[str, Any]) -> None:
    """Handle an event no further than this."""
    raise Killed


@pytest.fixture
def office(environment: None, tmp_path: Path) -> Iterator[Office]:
    with mock_aws():
        yield Office(tmp_path)


def test_worker_handles_an_event_that_comes_twice_once(office: Office) -> None:
    for _ in range(2):
        office.deliver(detail())
    assert office.worker().work(0) == 2
    assert office.handled == [detail()["event_id"]]
    assert (office.folder / detail()["id"] / "0").read_bytes() == b"png"
    outcome = json.loads((office.folder / detail()["id"] / "result.json").read_text())
    assert (outcome["status"], outcome["error"]) == ("succeeded", None)
    office.clock.advance(2 * WORKER.LEASE_SECONDS)
    office.deliver(detail())
    office.worker().work(0)
    assert (len(office.handled), office.waiting) == (1, 0)


def test_event_of_a_worker_that_fails_is_handled_at_its_next_delivery(office: Office) -> None:
    def fail(found: Mapping[str, Any]) -> None:
        raise OSError("the disk is full")

    office.deliver(detail())
    office.deliver(detail("b" * 26, output_files=[{"path": "", "error": "too large"}]))
    office.worker(fail).work(0)
    assert office.waiting == 2
    office.worker().work(0)
    assert (len(office.handled), office.waiting) == (2, 0)
    assert [path.name for path in (office.folder / ("b" * 26)).iterdir()] == ["result.json"]


def test_event_of_a_worker_that_crashed_is_handled_after_its_lease(office: Office) -> None:
    (office.folder / f".{detail()['id']}").mkdir()
    office.deliver(detail())
    with pytest.raises(Killed):
        office.worker(crash).work(0)
    office.worker().work(0)
    assert (office.handled, office.waiting) == ([], 1)  # perhaps it is only slow
    office.clock.advance(WORKER.LEASE_SECONDS)
    office.worker().work(0)
    assert (len(office.handled), office.waiting) == (1, 0)


def test_worker_that_fails_after_its_lease_leaves_that_of_another(office: Office) -> None:
    def fail_late(found: Mapping[str, Any]) -> None:
        office.clock.advance(WORKER.LEASE_SECONDS)
        with pytest.raises(Killed):
            office.worker(crash).work(0)  # another worker has begun
        raise OSError

    office.deliver(detail())
    office.worker(fail_late).work(0)
    office.worker().work(0)
    assert (office.handled, office.waiting) == ([], 1)


def test_message_that_is_no_event_does_not_keep_the_others(office: Office) -> None:
    office.sqs.send_message(QueueUrl=office.queue_url, MessageBody="no JSON")
    office.deliver(detail())
    office.worker().work(0)
    assert (len(office.handled), office.waiting) == (1, 1)


def test_template_of_the_worker_is_valid_and_takes_outputs_of_the_stack() -> None:
    assert lint(text("worker/template.yaml"), config=ManualArgs(regions=["eu-central-1"])) == []
    parameters = worker_template()["Parameters"]
    taken = {name for name, each in parameters.items() if "Default" not in each}
    assert {"EventBusName", "OutputsBucketName"} < taken <= OUTPUTS
    assert parameters["Owner"]["Default"] == PARAMETERS["QueueOwner"]["Default"]
    for name in parameters:
        assert f"{name}=" in text("README.md")


def test_rule_of_the_worker_matches_events_of_the_stack() -> None:
    pattern = worker_template()["Resources"]["ResultsRule"]["Properties"]["EventPattern"]
    assert pattern["source"] == [SOURCE]
    page = section("docs/events.md", "Events")
    assert {f"`{name}`" for name in pattern["detail-type"]} <= set(re.findall(r"`Prediction \w+`", page))
    fields = set(re.findall(r"^\| `(\w+)` \|", section("docs/events.md", "The schema, version 1"), re.MULTILINE))
    assert pattern["detail"].keys() <= fields
    read = set(re.findall(r'detail\["(\w+)"\]', text("worker/worker.py")))
    assert {"id", "event_id", "output_files"} <= read <= fields


def test_policy_of_the_worker_allows_what_it_calls() -> None:
    policy = worker_template()["Resources"]["WorkerPolicy"]["Properties"]["PolicyDocument"]
    allowed = set()
    for statement in policy["Statement"]:
        actions = statement["Action"]
        allowed |= set(actions if isinstance(actions, list) else [actions])
    calls = {
        "send_message": "sqs:SendMessage",
        "receive_message": "sqs:ReceiveMessage",
        "delete_message": "sqs:DeleteMessage",
        "update_item": "dynamodb:UpdateItem",
        "get_item": "dynamodb:GetItem",
        "download_file": "s3:GetObject",
    }
    made = set(re.findall(r"\.([a-z]+_(?:message|item|file|object))\(", text("worker/worker.py")))
    assert made == calls.keys()
    assert allowed == set(calls.values())


def test_lease_of_the_worker_ends_before_the_message_comes_again() -> None:
    queue = worker_template()["Resources"]["ResultsQueue"]["Properties"]
    assert queue["VisibilityTimeout"] > WORKER.LEASE_SECONDS
    assert queue["MessageRetentionPeriod"] < WORKER.REMEMBERED_SECONDS


def test_variables_of_the_worker_are_those_that_its_header_names() -> None:
    source = text("worker/worker.py")
    read = set(re.findall(r'environ(?:\.get\(|\[)"(\w+)"', source))
    assert read == set(re.findall(r"\b(?:[A-Z]+_[A-Z_]*(?:URL|NAME|FOLDER)|MODEL)\b", WORKER.__doc__ or ""))
    outputs = {each["Description"].split()[0] for each in worker_template()["Outputs"].values()}
    assert {"RESULTS_QUEUE_URL", "EVENTS_TABLE_NAME"} <= outputs


# -- the recipe ----------------------------------------------------------------------------------------------------

RECIPE = SAMPLES / "s3-recipe" / "restyle.json"
# The fields of the model, as Replicate's page of it lists them.
KONTEXT = {
    "type": "object",
    "required": ["prompt"],
    "properties": {
        "prompt": {"type": "string"},
        "input_image": {"type": "string", "format": "uri"},
        "output_format": {"type": "string", "enum": ["jpg", "png"]},
    },
}


@pytest.fixture
def model(replicate: ReplicateInMemory) -> str:
    """The model of the recipe, at Replicate."""
    name: str = json.loads(RECIPE.read_text())["model"]
    schema = {"components": {"schemas": {"Input": KONTEXT}}}
    replicate.models[name] = {"is_official": True, "latest_version": {"id": "1" * 64, "openapi_schema": schema}}
    return name


def test_recipe_is_valid_as_one_of_the_deployment(
    table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock, model: str
) -> None:
    changes = make_recipe_changes(table, replicate, clock)
    changes.check("queue", RECIPE.read_bytes(), RECIPE.stem)
    broken = json.loads(RECIPE.read_text())
    broken["input"]["output_format"] = "bmp"
    with pytest.raises(Problem):
        changes.check("queue", json.dumps(broken).encode(), RECIPE.stem)


def test_recipe_is_put_by_the_route_of_the_page() -> None:
    assert f'-X PUT "$API/recipes/{RECIPE.stem}"' in text("README.md")
    assert f"-d @{RECIPE.name}" in text("README.md")
    prefix = json.loads(RECIPE.read_text())["s3"]["prefix"]
    assert f"s3://$INPUTS_BUCKET/{prefix}" in text("README.md")


# -- MCP (started in the stack tests) ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "key"), [("mcp/mcp.json", "mcpServers"), ("mcp/vscode.mcp.json", "servers")])
def test_mcp_configuration_starts_the_tested_version(name: str, key: str) -> None:
    configuration = json.loads(text(name))
    (server,) = configuration[key].values()
    assert server["command"] == "npx"
    assert server["args"][1] in CLIENTS["mcp"].packages
    shown = dict(CLIENTS["mcp"].shown)["point"]
    assert set(server["env"]) == set(re.findall(r"(REPLICATE_\w+):", shown))
    asked = {each["id"] for each in configuration.get("inputs", [])}
    assert set(re.findall(r"\$\{input:([\w-]+)\}", json.dumps(server))) == asked
    (token,) = [each for each in configuration.get("inputs", []) if each["id"] == "access-token"] or [
        {"password": True}
    ]
    assert token["password"] is True
