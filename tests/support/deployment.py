"""What stack tests deploy."""

import shutil
from pathlib import Path

import pytest

from local.cloud import CHECKOUT

QUICK = {
    "FirstPollSeconds": "5",
    "PollSeconds": "3",
    "SubmitGraceSeconds": "30",
    "LogLevel": "DEBUG",
    "CorsOrigin": "https://app.example.com",
    "AlarmTopicArn": "arn:aws:sns:us-east-1:000000000000:alarms",
}


def copy_checkout(factory: pytest.TempPathFactory) -> Path:
    """What is deployed of this checkout, to be changed and deployed."""
    folder = factory.mktemp("checkout")
    # The metadata of the template names the other two, and sam deploy uploads them.
    for name in ("template.yaml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, folder)
    for name in ("functions", "layers", "recipes", "statemachine"):
        shutil.copytree(CHECKOUT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder
