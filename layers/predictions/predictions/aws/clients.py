"""Clients of AWS, created once for each warm function.

All clients share one botocore session: loading its data is a third of what a client costs at cold start.
boto3's own layer (resources, sessions, collections) is left out for the same reason.
"""

import gzip
import json
import logging
import os
import threading
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.loaders import JSONFileLoader, Loader

if TYPE_CHECKING:
    from mypy_boto3_cloudformation import CloudFormationClient
    from mypy_boto3_dynamodb import DynamoDBClient
    from mypy_boto3_events import EventBridgeClient
    from mypy_boto3_lambda import LambdaClient
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_scheduler import EventBridgeSchedulerClient
    from mypy_boto3_secretsmanager import SecretsManagerClient
    from mypy_boto3_sqs import SQSClient
    from mypy_boto3_ssm import SSMClient
    from mypy_boto3_stepfunctions import SFNClient


_logger = logging.getLogger(__name__)

# What endpoints.json says of every partition, and of S3.
_HOST = "{service}.{region}.{dnsSuffix}"
_FIPS_HOST = "{service}-fips.{region}.{dnsSuffix}"
_SERVICES = {"s3": {"defaults": {"signatureVersions": ["s3v4"]}, "endpoints": {}}}


class _Files(JSONFileLoader):
    """Reads JSON into plain dicts: OrderedDict, botocore's choice of older Pythons, takes twice the time."""

    def load_file(self, file_path: str) -> Any:
        for name, opened in ((f"{file_path}.json", open), (f"{file_path}.json.gz", gzip.open)):
            if Path(name).is_file():
                with opened(name, "rb") as file:
                    return json.loads(file.read())
        return None


class _Data(Loader):
    """Botocore's data without what a client never needs, a quarter of what one costs at cold start.

    Botocore looks into each of its 400 services to tell which there are, and parses endpoints.json, 1.2 MB that its
    endpoint rules have replaced: only defaults are still read of it, and those are in partitions.json.
    """

    FILE_LOADER_CLASS = _Files

    def list_available_services(self, type_name: str) -> list[str]:  # noqa: ARG002  # botocore's signature
        return sorted({each.name for path in map(Path, self.search_paths) if path.is_dir() for each in path.iterdir()})

    def load_data_with_path(self, name: str) -> tuple[Any, str]:
        if name != "endpoints":
            return super().load_data_with_path(name)
        data, path = super().load_data_with_path("partitions")
        return {"version": 3, "partitions": [_endpoints(partition) for partition in data["partitions"]]}, path


def _endpoints(partition: dict[str, Any]) -> dict[str, Any]:
    """Return a partition of partitions.json as endpoints.json has it, by its defaults."""
    of = partition["outputs"]
    variants = [{"dnsSuffix": of["dnsSuffix"], "hostname": _FIPS_HOST, "tags": ["fips"]}]
    if of["supportsDualStack"]:
        both = {"dnsSuffix": of["dualStackDnsSuffix"]}
        variants.append({**both, "hostname": _FIPS_HOST, "tags": ["dualstack", "fips"]})
        variants.append({**both, "hostname": _HOST, "tags": ["dualstack"]})
    return {
        "partition": partition["id"],
        "dnsSuffix": of["dnsSuffix"],
        "regionRegex": partition["regionRegex"],
        "regions": partition["regions"],
        "defaults": {
            "hostname": _HOST,
            "protocols": ["https"],
            "signatureVersions": ["v4"],
            "variants": variants,
        },
        "services": _SERVICES,
    }


@cache
def _session() -> botocore.session.Session:
    session = botocore.session.get_session()
    session.register_component("data_loader", _Data())
    return session


# Files are copied by threads, and botocore's session must not create clients for two of them at once:
# https://docs.aws.amazon.com/boto3/latest/guide/session.html#multithreading-or-multiprocessing-with-sessions
_creating = threading.Lock()

# The bounds keep one stuck call from eating a function's whole time: API Gateway's callers wait 29 s in all.
_CONFIG = Config(connect_timeout=2, read_timeout=5, retries={"mode": "standard", "total_max_attempts": 4})
# Signature version 4 is what KMS-encrypted buckets and newer regions demand of presigned URLs; connections are kept for
# several copies at once, and a part of one takes longer than an item. The time to connect also bounds how long S3 may
# take nothing of an upload, which then begins again.
# Without an addressing style botocore signs URLs for the host of all regions, `{bucket}.s3.amazonaws.com`, which has no
# buckets of regions that opened since March 2019, and redirects for a day after a bucket of another region was created:
# https://docs.aws.amazon.com/AmazonS3/latest/userguide/VirtualHosting.html#VirtualHostingBackwardsCompatibility
# (https://github.com/boto/boto3/issues/2187). An endpoint that is an IP address, as the emulator's, gets paths anyway.
_S3_CONFIG = _CONFIG.merge(
    Config(
        signature_version="s3v4",
        s3={"addressing_style": "virtual", "us_east_1_regional_endpoint": "regional"},
        max_pool_connections=16,
        connect_timeout=5,
        read_timeout=20,
    )
)


@overload
def client(name: Literal["dynamodb"]) -> "DynamoDBClient": ...
@overload
def client(name: Literal["events"]) -> "EventBridgeClient": ...
@overload
def client(name: Literal["lambda"]) -> "LambdaClient": ...
@overload
def client(name: Literal["s3"]) -> "S3Client": ...
@overload
def client(name: Literal["scheduler"]) -> "EventBridgeSchedulerClient": ...
@overload
def client(name: Literal["stepfunctions"]) -> "SFNClient": ...
@overload
def client(name: Literal["secretsmanager"]) -> "SecretsManagerClient": ...
@overload
def client(name: Literal["sqs"]) -> "SQSClient": ...
@overload
def client(name: Literal["ssm"]) -> "SSMClient": ...
@overload
def client(name: Literal["cloudformation"]) -> "CloudFormationClient": ...


def client(name: str) -> Any:
    """Return this process's client of an AWS service.

    Args:
        name: The service's name in botocore.

    Returns:
        A client whose region, endpoint and credentials come from the environment, as on Lambda.
    """
    with _creating:
        return _client(name)


@cache
def _client(name: str) -> Any:
    config = _S3_CONFIG if name == "s3" else _CONFIG
    try:
        return _session().create_client(name, config=config)
    except Exception:
        # Botocore is the runtime's, in a version of its own: one that keeps its data otherwise costs time, no call.
        _logger.warning("%s: client made from all of botocore's data", name, exc_info=True)
        return botocore.session.get_session().create_client(name, config=config)


_API_URL_CACHE_SECONDS = 300
_api_url: tuple[float, str] | None = None


def api_url() -> str:
    """Return the stack's public URL, ending in `/v1`.

    From the SSM parameter that `API_URL_PARAMETER` names: a function that had the API's id in its environment would
    depend on the API, which depends on the function. The request's own host is the caller's to choose. A value that
    is known is used while SSM cannot be read.
    """
    global _api_url  # once for each warm function
    if _api_url is None or _api_url[0] < time.monotonic():
        try:
            ssm = client("ssm")
            found = ssm.get_parameter(Name=os.environ["API_URL_PARAMETER"])["Parameter"]["Value"]
        except (BotoCoreError, ClientError):
            if _api_url is None:
                raise
            found = _api_url[1]
        _api_url = (time.monotonic() + _API_URL_CACHE_SECONDS, found.rstrip("/"))
    return _api_url[1]
