"""Writes of several items at once: all or none, the same with moto and the table in memory, again after a conflict."""

from typing import Any

import pytest
from botocore.exceptions import ClientError
from predictions.aws import clients
from predictions.aws.dynamodb import (
    NEW,
    PRESENT,
    Condition,
    ConditionFailed,
    IfNotExists,
    Key,
    PutWrite,
    Table,
    TransactionRefused,
    UpdateWrite,
)

A, B, C = (Key(pk, "x") for pk in "abc")


@pytest.fixture(params=["moto", "memory"])
def table_service(request: pytest.FixtureRequest) -> str:
    """Both answer DynamoDB, one after the other."""
    return str(request.param)


@pytest.fixture
def table(cloud: None) -> Table:
    return Table("predictions", clients.client("dynamodb"))


def test_all_is_written(table: Table) -> None:
    table.put_item(B, {"n": 1, "old": True})
    table.transact(
        [
            PutWrite(A, {"text": "t"}, NEW),
            UpdateWrite(B, set={"m": IfNotExists(5)}, remove=["old"], add={"n": 2}, condition=PRESENT),
            UpdateWrite(C, add={"n": 4}),
        ]
    )
    found = table.read_items([A, B, C])
    assert found[A] == {**A._asdict(), "text": "t"}
    assert found[B] == {**B._asdict(), "n": 3, "m": 5}
    assert found[C] == {**C._asdict(), "n": 4}


def test_one_condition_that_fails_leaves_everything_and_tells_what_is_there(table: Table) -> None:
    table.put_item(A, {"n": 1})
    writes: list[PutWrite | UpdateWrite] = [
        PutWrite(A, {"n": 2}, NEW),
        UpdateWrite(B, set={"n": 1}),
        UpdateWrite(C, set={"n": 1}, condition=PRESENT),
    ]
    with pytest.raises(TransactionRefused) as refused:
        table.transact(writes)
    assert refused.value.items == {0: {**A._asdict(), "n": 1}, 2: None}
    assert table.read_items([A, B, C]) == {A: {**A._asdict(), "n": 1}}


class Contended:
    """A client whose calls meet the transaction of another writer so often."""

    def __init__(self, conflicts: int) -> None:
        self.left, self.calls = conflicts, 0

    def transact_write_items(self, **_: Any) -> dict[str, Any]:
        reasons = [{"Code": "None"}, {"Code": "TransactionConflict"}]
        return self._answer("TransactionCanceledException", CancellationReasons=reasons)

    def update_item(self, **_: Any) -> dict[str, Any]:
        return self._answer("TransactionConflictException")

    put_item = delete_item = update_item

    def _answer(self, code: str, **more: Any) -> dict[str, Any]:
        self.calls += 1
        self.left -= 1
        if self.left >= 0:
            response: Any = {"Error": {"Code": code, "Message": ""}, **more}
            raise ClientError(response, "Write")
        return {}


@pytest.mark.parametrize("conflicts", [1, 4])
def test_write_that_meets_a_transaction_of_another_writer_is_repeated(conflicts: int) -> None:
    for write in ("transact", "update", "put"):
        client: Any = Contended(conflicts)
        waited: list[float] = []
        table = Table("predictions", client, sleep=waited.append)
        match write:
            case "transact":
                table.transact([UpdateWrite(A, set={"n": 1}), UpdateWrite(B, set={"n": 1})])
            case "update":
                table.update_item(A, set={"n": 1})
            case "put":
                table.put_item(A, {"n": 1})
        assert (client.calls, len(waited)) == (conflicts + 1, conflicts)
        assert 0 < sum(waited) < 1


def test_conflict_that_stays_is_an_error_after_five_tries() -> None:
    client: Any = Contended(9)
    with pytest.raises(ClientError, match="TransactionCanceledException"):
        Table("predictions", client, sleep=lambda _: None).transact([UpdateWrite(A), UpdateWrite(B)])
    assert client.calls == 5


def test_condition_that_fails_is_no_conflict_and_is_not_repeated(table: Table) -> None:
    with pytest.raises(ConditionFailed):
        table.update_item(A, set={"n": 1}, condition=Condition("n = :n", n=3))
