"""What talks to DynamoDB itself is tested with moto."""

import pytest


@pytest.fixture
def table_service() -> str:
    """Let moto answer DynamoDB."""
    return "moto"
