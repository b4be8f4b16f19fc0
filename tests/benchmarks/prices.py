"""What 1,000 predictions cost on AWS: its list prices, and the arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass

REGION = "us-east-1"
STORED_DAYS = 30


@dataclass(frozen=True)
class Price:
    """A list price in us-east-1: the first tier, without free tier.

    Attributes:
        dollars: For `per` units.
        unit: What is counted.
        source: Where AWS says so.
    """

    dollars: float
    per: int
    unit: str
    source: str


PRICES = {
    "API requests": Price(3.50, 1_000_000, "requests (REST API)", "https://aws.amazon.com/api-gateway/pricing/"),
    "Lambda requests": Price(0.20, 1_000_000, "invocations", "https://aws.amazon.com/lambda/pricing/"),
    "Lambda time": Price(0.0000133334, 1, "GB-seconds (arm64)", "https://aws.amazon.com/lambda/pricing/"),
    "State transitions": Price(0.025, 1_000, "transitions (Standard)", "https://aws.amazon.com/step-functions/pricing/"),
    "DynamoDB writes": Price(0.625, 1_000_000, "write units (on-demand)", "https://aws.amazon.com/dynamodb/pricing/on-demand/"),
    "DynamoDB reads": Price(0.125, 1_000_000, "read units (on-demand)", "https://aws.amazon.com/dynamodb/pricing/on-demand/"),
    "S3 writes": Price(0.005, 1_000, "PUT, POST requests (Standard)", "https://aws.amazon.com/s3/pricing/"),
    "S3 reads": Price(0.0004, 1_000, "GET, HEAD requests (Standard)", "https://aws.amazon.com/s3/pricing/"),
    "S3 storage": Price(0.023, 1, "GB-months (Standard)", "https://aws.amazon.com/s3/pricing/"),
    "Queue requests": Price(0.40, 1_000_000, "requests (standard queue)", "https://aws.amazon.com/sqs/pricing/"),
    "Events": Price(1.00, 1_000_000, "events of one's own", "https://aws.amazon.com/eventbridge/pricing/"),
    "Logs": Price(0.50, 1, "GB taken in", "https://aws.amazon.com/cloudwatch/pricing/"),
    "Secrets": Price(0.05, 10_000, "API calls", "https://aws.amazon.com/secrets-manager/pricing/"),
}  # fmt: skip
"""AWS's list prices of 2025, in the order of the table."""


def cost(units: Mapping[str, float], times: int = 1_000) -> dict[str, float]:
    """Dollars by name of the price, for so many predictions.

    Args:
        units: What one prediction uses of each price in `PRICES`.
        times: How many predictions.
    """
    return {name: times * units.get(name, 0.0) * price.dollars / price.per for name, price in PRICES.items()}
