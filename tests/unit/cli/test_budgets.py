"""Commands for budgets: what they write, show and refuse."""

import json
import time
from typing import Any

import pytest
from predictions.admission.quotas import OwnerLimits, OwnersLimits
from predictions.admission.rate_limiter import Limiter
from predictions.aws import clients
from predictions.aws.dynamodb import Table
from predictions.cli.__main__ import main
from predictions.cli.stack import Stack
from predictions.clock import rfc3339
from predictions.money.budgets import UNKNOWN_PRICE_DEFAULT, used_key

ON = ("--stack", "demo")


@pytest.fixture(autouse=True)
def owners(cloud: None, monkeypatch: pytest.MonkeyPatch) -> OwnersLimits:
    """The owners' limits of the stack that every command names."""
    outputs = {"TableName": "predictions"}
    monkeypatch.setattr(Stack, "output", lambda _, key: outputs[key])
    monkeypatch.setattr(Stack, "client", lambda _, name: clients.client(name))
    return OwnersLimits("predictions", clients.client("dynamodb"))


def budget(*argv: str) -> int:
    return main(["budgets", *argv, *ON])


def of_stack() -> tuple[int, int, int]:
    return Limiter("predictions", clients.client("dynamodb")).stack_budget()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("set", "alice"), "Give at least one of --day, --month"),
        (("set", "alice", "--day", "-1"), "--day must be dollars above 0, at most 1000000"),
        (("set", "alice", "--day", "0"), "--day must be dollars above 0"),
        (("set", "alice", "--month", "1e3"), "(got '1e3')"),
        (("set", "alice", "--month", "nan"), "(got 'nan')"),
        (("set", "alice", "--month", "1.0000001"), "at most 6 decimals"),
        (("set", "alice", "--month", "1000001"), "--month must be dollars above 0, at most 1000000"),
        (("set", "alice", "--day", "1", "--unknown-price", "x"), "--unknown-price must be dollars of at least 0"),
        (("set", "--day", "1"), "Name either OWNER, or --whole-stack."),
        (("set", "alice", "--whole-stack", "--day", "1"), "Name either OWNER, or --whole-stack."),
        (("set", "A#lice", "--day", "1"), "The owner 'A#lice' must be"),
        (("remove",), "Name either OWNER, or --whole-stack."),
    ],
)
def test_command_that_is_wrong_is_refused_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], said: str
) -> None:
    assert budget(*argv) == 2
    assert said in capsys.readouterr().err
    assert clients.client("dynamodb").scan(TableName="predictions")["Items"] == []


def test_budget_of_an_owner_stands_beside_its_limits(owners: OwnersLimits, capsys: pytest.CaptureFixture[str]) -> None:
    owners.set_limits("alice", OwnerLimits(per_day=7))
    assert budget("set", "alice", "--day", "20") == 0
    assert budget("set", "alice", "--month", "300.5", "--unknown-price", "0.25") == 0
    assert "The budget of alice is $20.00 a day and $300.50 a month" in capsys.readouterr().err
    whole = OwnerLimits(per_day=7, budget_day=20_000_000, budget_month=300_500_000, budget_unknown=250_000)
    assert owners.limits_of("alice") == whole
    assert OwnerLimits.of_context(whole.context()) == whole
    owners.remove_limits("alice")
    assert owners.limits_of("alice").budget_day == 20_000_000, "limits and budget are removed apart"
    assert list(owners.list_limits()) == []
    owners.set_limits("alice", OwnerLimits(per_day=8))
    assert budget("remove", "alice") == budget("remove", "alice") == 0
    assert owners.limits_of("alice") == OwnerLimits(per_day=8)
    owners.remove_limits("alice")
    assert clients.client("dynamodb").scan(TableName="predictions")["Items"] == []


def test_owner_with_a_budget_alone_has_no_limits() -> None:
    assert not OwnerLimits(budget_day=1)
    assert OwnerLimits(budget_day=1).open_allowed("batch") is None


def test_budget_of_the_stack_is_in_the_limiters_item_and_outlives_its_writes() -> None:
    assert budget("set", "--whole-stack", "--month", "2000") == 0
    assert of_stack() == (0, 2_000_000_000, UNKNOWN_PRICE_DEFAULT)
    limiter = Limiter("predictions", clients.client("dynamodb"))
    limiter.pause_by_command("Test.")
    limiter.block(5)
    limiter.resume()
    assert budget("set", "--whole-stack", "--day", "9", "--unknown-price", "0") == 0
    assert of_stack() == (9_000_000, 2_000_000_000, 0)
    assert budget("remove", "--whole-stack") == 0
    assert of_stack() == (0, 0, 0)


def test_list_shows_what_is_used_of_each_budget(capsys: pytest.CaptureFixture[str]) -> None:
    assert budget("set", "alice", "--day", "2") == budget("set", "--whole-stack", "--month", "10") == 0
    today = rfc3339(time.time())[:10]
    values: dict[str, Any] = {f"d{today[8:]}": 500_000, "month": 700_000, "unknown": 100_000}
    for owner in ("alice", ""):
        Table("predictions", clients.client("dynamodb")).put_item(used_key(owner, today), values)
    capsys.readouterr()
    assert budget("list", "--json") == 0
    assert json.loads(capsys.readouterr().out) == [
        {
            "budget": "stack", "owner": None, "month_micro_dollars": 10_000_000, "month_used_micro_dollars": 700_000,
            "month_unknown_micro_dollars": 100_000, "unknown_price_micro_dollars": 100_000,
        },
        {
            "budget": "owner", "owner": "alice", "day_micro_dollars": 2_000_000, "day_used_micro_dollars": 500_000,
            "month_unknown_micro_dollars": 100_000, "unknown_price_micro_dollars": 100_000,
        },
    ]  # fmt: skip
    assert budget("list") == 0
    out = capsys.readouterr().out
    assert "(whole stack)  -" in out
    assert "$0.70 of $10.00" in out
    assert "alice          $0.50 of $2.00" in out
