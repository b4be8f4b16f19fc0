"""Fixtures: AWS in process (moto) made from the template's own properties, Replicate in process, time by hand."""

from collections.abc import Iterator
from typing import Any

import pytest
from predictions.admission.quotas import OwnersUsage
from predictions.admission.rate_limiter import Limiter
from predictions.aws import clients
from predictions.aws.executions import Executions
from predictions.files.outputs_bucket import OutputsBucket
from predictions.lifecycle.model_lookup import ModelLookup, ModelSchemas
from predictions.observability import metrics
from predictions.recipes.manage import RecipeChanges
from predictions.recipes.rules import RecipeRules
from predictions.recipes.store import RecipeItems
from predictions.store.predictions import PredictionsTable
from predictions.store.recent_requests import RecentRequests
from predictions.store.schemas import StoredSchemas
from predictions.upstream.client import Replicate
from predictions.upstream.credentials import Token

from tests.support.downloads import downloads_of
from tests.support.fakes import API_URL, Clock, Executed, ReplicateInMemory, Wakes
from tests.support.protocol import Submissions, Timing
from tests.support.quick_aws import QUICK, QuickTable, account, mocked
from tests.support.template import table_properties

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_SESSION_TOKEN": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_REGION": "us-east-1",
    "TABLE_NAME": "predictions",
    "CORS_ORIGIN": "",
    "OUTPUTS_BUCKET_NAME": "outputs",
    "INPUTS_BUCKET_NAME": "inputs",
    "FILE_RETENTION_DAYS": "1",
    "STATE_MACHINE_ARN": "arn:aws:states:us-east-1:123456789012:stateMachine:track-prediction",
    "SUBMITTED_STATE_MACHINE_ARN": "arn:aws:states:us-east-1:123456789012:stateMachine:track-submitted",
    "PIPELINE_STATE_MACHINE_ARN": "arn:aws:states:us-east-1:123456789012:stateMachine:run-pipeline",
    "REQUESTS_QUEUE_URL": "https://sqs.us-east-1.amazonaws.com/123456789012/requests",
    "BATCH_STATE_MACHINE_ARN": "arn:aws:states:us-east-1:123456789012:stateMachine:run-batch",
    "API_URL_PARAMETER": "/replicate-serverless/api_url",
    "REPLICATE_API_URL": ReplicateInMemory.URL,
    "REPLICATE_TOKEN_SECRET_ARN": "replicate-token",
    "SIGNING_SECRET_ARN": "signing-secret",
    "POLL_PREDICTION_FUNCTION_NAME": "poll-prediction",
    "WEBHOOK_MASTER_SECRET_ARN": "webhook-master",
    "LINK_SECRET_ARN": "link-secret",
    "FILE_HOSTS": "https://outputs.s3.us-east-1.amazonaws.com https://inputs.s3.us-east-1.amazonaws.com",
    "SOURCE_BUCKET_NAME": "source",
    "DELIVERIES_QUEUE_URL": "https://sqs.us-east-1.amazonaws.com/123456789012/deliveries",
    "DELIVERIES_DEAD_LETTER_QUEUE_URL": "https://sqs.us-east-1.amazonaws.com/123456789012/dead-deliveries",
    "DELIVERIES_CONCURRENCY": "20",
    "CHANGES_RETRY_QUEUE_URL": "https://sqs.us-east-1.amazonaws.com/123456789012/changes-retry",
    "CHANGES_DEAD_LETTER_QUEUE_URL": "https://sqs.us-east-1.amazonaws.com/123456789012/dead-changes",
    "REQUESTS_DEAD_LETTER_QUEUE_URL": "https://sqs.us-east-1.amazonaws.com/123456789012/dead-requests",
    "REQUESTS_DEAD_LETTER_QUEUE_ARN": "arn:aws:sqs:us-east-1:123456789012:dead-requests",
    "REQUESTS_QUEUE_ARN": "arn:aws:sqs:us-east-1:123456789012:requests",
    "RECIPE_FILES_ARN": "arn:aws:lambda:us-east-1:123456789012:layer:replicate-serverless-recipe-files:7",
    "RECIPE_NAME_PREFIX": "replicate-serverless-recipe-",
    "SCHEDULE_GROUP_NAME": "replicate-serverless",
    "SCHEDULER_ROLE_ARN": "arn:aws:iam::123456789012:role/scheduler",
    "MAX_ORIGIN_DEPTH": "3",
    "EVENT_BUS_NAME": "bus",
    "PROCESSING_EVENTS": "false",
    "USAGE_COUNTERS": "false",
    "QUEUE_OWNER": "queue",
    "QUEUE_SENDERS": "AROAALICE0000=alice",
    "FILE_ORIGINS": "",
    "ALLOW_LOOPBACK_WEBHOOKS": "false",
    "DEFAULT_LIFETIME_SECONDS": "86400",
    "TRAINING_LIFETIME_SECONDS": "604800",
    "SUBMIT_GRACE_SECONDS": "90",
    "UNKNOWN_SUBMISSION": "fail",
    "MAX_UNKNOWN_CREATES": "5",
    "VALIDATE_INPUT": "true",
    "CREATES_PER_MINUTE": "600",
    "MAX_START_DELAY_SECONDS": "300",
    "RETENTION_DAYS": "30",
    "FIRST_POLL_SECONDS": "60",
    "POLL_SECONDS": "600",
    "LIVE_READ_SECONDS": "1",
    "SYNC_WAIT_SECONDS": "25",
    "LIVE_READS_PER_MINUTE": "600",
    "OUTPUT_URL_SECONDS": "3600",
    "OUTPUT_URL_DOMAIN": "",
    "OUTPUT_URL_KEY_ID": "",
    "OUTPUT_URL_SECRET_ARN": "",
    "POWERTOOLS_SERVICE_NAME": "replicate-serverless",
    "POWERTOOLS_METRICS_NAMESPACE": "ReplicateServerless",
    "POWERTOOLS_LOG_LEVEL": "INFO",
    "POWERTOOLS_TRACE_DISABLED": "true",
    "TRACING": "PassThrough",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a function, the same for every test."""
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    # Made at import, before this environment; what a test counted is not the next one's.
    monkeypatch.setattr(metrics.provider, "namespace", ENVIRONMENT["POWERTOOLS_METRICS_NAMESPACE"])
    metrics.clear_metrics()


SECRETS = {
    "replicate-token": ReplicateInMemory.TOKEN,
    "signing-secret": "{}",
    "webhook-master": "m" * 64,
    "link-secret": "l" * 64,
}


@pytest.fixture
def table_service() -> str:
    """Who answers DynamoDB: the table in memory, or `moto` where a test's own fixture of this name says so."""
    return "memory"


@pytest.fixture
def cloud(environment: None, table_service: str) -> Iterator[None]:
    """An empty AWS account with the stack's table, bucket, parameter and secrets."""
    with mocked(), QUICK.lent(None if table_service == "moto" else QuickTable()):
        if table_service == "moto":
            clients.client("dynamodb").create_table(TableName="predictions", **table_properties())
        # The others not through clients, each of which costs a test more than all of these.
        s3, ssm, sqs = account("s3", "aws"), account("ssm"), account("sqs")
        for bucket in ("outputs", "inputs", "source"):
            s3.create_bucket(bucket, ENVIRONMENT["AWS_REGION"])
        ssm.put_parameter("/replicate-serverless/api_url", "", API_URL, "String", "", "", False, [], "text", None, [])
        for name, text in SECRETS.items():
            account("secretsmanager").create_secret(name, text, None, "", [], None, None, [], False)
        for queue in ("requests", "deliveries", "dead-deliveries", "dead-requests", "changes-retry", "dead-changes"):
            sqs.create_queue(queue)
        account("scheduler").create_schedule_group("replicate-serverless", [])
        account("events").create_event_bus("bus")
        yield


@pytest.fixture
def clock() -> Clock:
    """A clock that only the test moves."""
    return Clock()


@pytest.fixture
def replicate(clock: Clock) -> Iterator[ReplicateInMemory]:
    """Replicate, in this process."""
    with ReplicateInMemory(clock) as replicate:
        yield replicate


@pytest.fixture
def outputs(cloud: None, clock: Clock, replicate: ReplicateInMemory) -> OutputsBucket:
    """The outputs bucket, whose files come from the Replicate in this process."""
    return OutputsBucket("outputs", open_client=downloads_of(replicate.client), clock=clock.now, sleep=clock.sleep)


@pytest.fixture
def table(cloud: None, outputs: OutputsBucket) -> PredictionsTable:
    """The predictions table."""
    return PredictionsTable("predictions", outputs, clients.client("dynamodb"))


@pytest.fixture
def executed(cloud: None) -> Executed:
    """The executions that were started."""
    return Executed()


@pytest.fixture
def pipeline_executed(cloud: None) -> Executed:
    """The executions of pipelines that were started."""
    return Executed("run-pipeline")


@pytest.fixture
def wakes(cloud: None) -> Wakes:
    """The task tokens that were sent."""
    return Wakes()


@pytest.fixture
def submissions(
    table: PredictionsTable, replicate: ReplicateInMemory, executed: Executed, wakes: Wakes, clock: Clock
) -> Submissions:
    """The protocol, with everything around it in this process."""
    return make_submissions(table, replicate, executed, clock)


TIMING = Timing(lifetime=86400, training_lifetime=604800, grace=90, first_poll=60, retention=30 * 86400)


def make_submissions(
    table: PredictionsTable,
    replicate: ReplicateInMemory,
    executed: Executed,
    clock: Clock,
    *,
    timing: Timing | None = None,
    upstream: Replicate | None = None,
    **options: Any,
) -> Submissions:
    """The protocol with other options; `schemas=None` checks no input."""
    upstream = upstream or Replicate(ReplicateInMemory.URL, Token("replicate-token"), replicate.client())
    dynamodb = clients.client("dynamodb")
    timing = timing or TIMING
    options = {
        "schemas": ModelSchemas(StoredSchemas.from_env(), upstream, now=clock.now),
        "limiter": Limiter("predictions", dynamodb, now=clock.now),
        "recent": RecentRequests.from_env(),
        "usage": OwnersUsage("predictions", dynamodb, now=clock.now),
        "between_readings": clock.sleep,
        "sleep": clock.sleep,
        **options,
    }
    return Submissions(
        table,
        upstream,
        Executions(executed.machine_arn, clients.client("stepfunctions")),
        timing,
        now=clock.now,
        **options,
    )


def make_recipe_changes(table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock) -> RecipeChanges:
    """Changes to recipes, whose models are those of the Replicate in this process."""
    upstream = Replicate(ReplicateInMemory.URL, Token("replicate-token"), replicate.client())
    return RecipeChanges(
        RecipeItems.from_env(),
        RecipeRules.from_env(sleep=clock.advance),
        ModelLookup(upstream, ModelSchemas(StoredSchemas.from_env(), upstream, now=clock.now), now=clock.now),
        source_bucket_name="source",
        outputs_bucket_name="outputs",
        allow_loopback_webhooks=False,
        now=clock.now,
    )
