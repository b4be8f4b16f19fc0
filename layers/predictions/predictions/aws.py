"""Clients of AWS, made once for each warm function.

All clients share one botocore session: loading its data is a third of what a client costs at cold start.
boto3's own layer (resources, sessions, collections) is left out for the same reason.
"""

import os
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, overload

import botocore.session
from botocore.config import Config

if TYPE_CHECKING:
    from aws_lambda_powertools.utilities.parameters import SSMProvider
    from mypy_boto3_cloudformation import CloudFormationClient
    from mypy_boto3_dynamodb import DynamoDBClient
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_secretsmanager import SecretsManagerClient
    from mypy_boto3_ssm import SSMClient
    from mypy_boto3_stepfunctions import SFNClient


@cache
def _session() -> botocore.session.Session:
    return botocore.session.get_session()


# Signature version 4 is what KMS-encrypted buckets and newer regions demand of presigned URLs; connections are
# kept for several copies at once; the bounds keep one stuck call from eating a function's whole time.
_CONFIG = Config(
    signature_version="v4",
    max_pool_connections=16,
    connect_timeout=5,
    read_timeout=20,
    retries={"mode": "standard", "total_max_attempts": 4},
)
_S3_CONFIG = _CONFIG.merge(Config(signature_version="s3v4"))


@overload
def client(name: Literal["dynamodb"]) -> "DynamoDBClient": ...
@overload
def client(name: Literal["s3"]) -> "S3Client": ...
@overload
def client(name: Literal["stepfunctions"]) -> "SFNClient": ...
@overload
def client(name: Literal["secretsmanager"]) -> "SecretsManagerClient": ...
@overload
def client(name: Literal["ssm"]) -> "SSMClient": ...
@overload
def client(name: Literal["cloudformation"]) -> "CloudFormationClient": ...


def client(name: str) -> Any:
    """The one client of an AWS service in this process.

    Args:
        name: The service's name in botocore.

    Returns:
        A client whose region, endpoint and credentials come from the environment, as on Lambda.
    """
    return _client(name)


@cache
def _client(name: str) -> Any:
    return _session().create_client(name, config=_S3_CONFIG if name == "s3" else _CONFIG)


_API_URL_CACHE_SECONDS = 300


@cache
def _parameters() -> "SSMProvider":
    # Imports boto3, which the functions that need no URL (the authorizer stands before every call) do not pay for.
    from aws_lambda_powertools.utilities.parameters import SSMProvider

    return SSMProvider(boto3_client=client("ssm"))


def api_url() -> str:
    """The stack's public URL, ending in `/v1`.

    From the SSM parameter that `API_URL_PARAMETER` names: a function that had the API's id in its environment would
    depend on the API, which depends on the function. The request's own host is a stranger's to choose.

    Raises:
        ClientError, BotoCoreError: The parameter cannot be read.
    """
    from aws_lambda_powertools.utilities.parameters.exceptions import GetParameterError

    try:
        value = _parameters().get(os.environ["API_URL_PARAMETER"], max_age=_API_URL_CACHE_SECONDS)
    except GetParameterError as error:
        # Powertools hides botocore's error, by which everybody else knows that AWS failed.
        raise (error.__context__ or error) from None
    return str(value).rstrip("/")
