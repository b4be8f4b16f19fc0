"""Commands for prices: what they write, what they refuse, and costs of what has ended without one."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from predictions.aws import clients
from predictions.aws.dynamodb import Table
from predictions.cli.__main__ import main
from predictions.cli.stack import Stack
from predictions.files.outputs_bucket import OutputsBucket
from predictions.money.stored import StackPrices, shipped
from predictions.money.unknown import UnknownCosts
from predictions.status import Status
from predictions.store.predictions import PredictionsTable

from tests.support.fakes import Clock, answers_lost, meanwhile
from tests.support.predictions import current, put, raw_items, told

ON = ("--stack", "demo")


def today() -> str:
    """The date of prices that are set without one."""
    return datetime.now(UTC).date().isoformat()


@pytest.fixture
def items(cloud: None) -> Table:
    """The stack's table."""
    return Table("predictions", clients.client("dynamodb"))


@pytest.fixture
def table(items: Table, clock: Clock) -> PredictionsTable:
    """The predictions."""
    return PredictionsTable("predictions", OutputsBucket("outputs", clock=clock.now), clients.client("dynamodb"))


@pytest.fixture(autouse=True)
def stack(items: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stack that every command names."""
    outputs = {"TableName": "predictions", "OutputsBucketName": "outputs"}
    monkeypatch.setattr(Stack, "output", lambda _, key: outputs[key])
    monkeypatch.setattr(Stack, "client", lambda _, name: clients.client(name))


def own(items: Table) -> dict[str, Any]:
    """The stack's own entries."""
    return StackPrices(items).own_entries()[0]


def entry(*tiers: dict[str, Any], **members: Any) -> dict[str, Any]:
    """An entry that was read today."""
    return {"date": today(), "source": "https://replicate.com/o/m", "tiers": list(tiers), **members}


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that must not succeed, and return why."""
    assert main([*argv, *ON]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (("set",), "Name the KEY to set"),
        (("set", "flux", "run=1"), "flux: is no key"),
        (("set", "o/m"), "o/m.tiers[0]: must have `prices`, `hardware`, or both"),
        (("set", "o/m", "image_output_count"), "'image_output_count' must have the form METRIC=DOLLARS"),
        (("set", "o/m", "image_output_count=-1"), "o/m.tiers[0].prices.image_output_count: must be dollars"),
        (("set", "o/m", "image_output_count=1e9"), "decimal string"),
        (("set", "o/m", "image_output_count=99999"), "at most 10000 dollars"),
        (("set", "o/m", "images=1"), "o/m.tiers[0].prices.images: is no metric"),
        (("set", "o/m", "run=1", "--when", "prompt=x"), "o/m.tiers[0].when.prompt: is no criterion"),
        (("set", "o/m", "run=1", "--when", "with_audio"), "must have the form METRIC=VALUE"),
        (("set", "o/m", "run=1", "--date", "today"), "o/m.date: must be a date"),
        (("set", "o/m", "run=1", "--source", "ftp://x"), "o/m.source: must be a link"),
        (("set", "hardware:gpu-t4", "run=1"), "that of a second alone"),
        (("set", "hardware:gpu-t4", "second=-1"), "hardware:gpu-t4.second"),
        (("remove", "o/m"), "no own price of 'o/m'"),
        (("remove", "google/veo-3"), "cannot be removed: set another"),
        (("apply", "--since", "2026-11-01", "--owner", "A B"), "The owner 'A B' must be"),
    ],
)
def test_what_is_wrong_is_refused_with_its_field_and_nothing_is_written(
    capsys: pytest.CaptureFixture[str], items: Table, argv: tuple[str, ...], why: str
) -> None:
    assert why in refused(capsys, "prices", *argv)
    assert own(items) == {}


def test_price_is_set_for_all_predictions_of_a_model(capsys: pytest.CaptureFixture[str], items: Table) -> None:
    assert main(["prices", "set", "o/m", "image_output_count=0.04", "run=0.1", *ON]) == 0
    assert capsys.readouterr().err == "Set o/m: in use everywhere within 5 minutes.\n"
    assert own(items) == {"o/m": entry({"prices": {"image_output_count": "0.04", "run": "0.1"}})}
    assert main(["prices", "set", "o/m", "--hardware", "gpu-t4", "--source", "https://x.y", *ON]) == 0
    assert own(items) == {"o/m": entry({"hardware": "gpu-t4"}, source="https://x.y")}


def test_tier_is_added_or_replaced_and_what_always_applies_stays_last(items: Table) -> None:
    for argv in (
        ["run=1"],
        ["run=2", "--when", "model_variant=high"],
        ["run=3", "--when", "with_audio=true", "--when", "resolution_target=720p"],
        ["run=4", "--when", "model_variant=high"],
    ):
        assert main(["prices", "set", "o/m", *argv, *ON]) == 0
    assert own(items)["o/m"]["tiers"] == [
        {"when": {"with_audio": True, "resolution_target": "720p"}, "prices": {"run": "3"}},
        {"when": {"model_variant": "high"}, "prices": {"run": "4"}},
        {"prices": {"run": "1"}},
    ]


def test_tier_of_a_delivered_price_is_replaced_and_its_others_stay(items: Table) -> None:
    name = "video_output_duration_seconds"
    assert main(["prices", "set", "google/veo-3", f"{name}=0.5", "--when", "model_variant=with_audio", *ON]) == 0
    assert own(items)["google/veo-3"]["tiers"] == [
        {"when": {"model_variant": "without_audio"}, "prices": {name: "0.20"}},
        {"when": {"model_variant": "with_audio"}, "prices": {name: "0.5"}},
    ]


@pytest.mark.parametrize(
    ("key", "argv", "source"),
    [
        ("hardware:gpu-t4", ["second=0.0002"], "https://replicate.com/pricing"),
        ("deployment:acme/mine", ["--hardware", "gpu-t4"], "https://replicate.com/deployments/acme/mine"),
        ("training:acme/mine", ["training_step_count=0.002"], "https://replicate.com/acme/mine"),
        (f"acme/mine:{'a' * 64}", ["run=1"], "https://replicate.com/acme/mine"),
    ],
)
def test_source_is_by_default_the_page_of_the_key(items: Table, key: str, argv: list[str], source: str) -> None:
    assert main(["prices", "set", key, *argv, *ON]) == 0
    assert own(items)[key]["source"] == source


def test_entries_of_a_file_are_set_together_or_not_at_all(
    capsys: pytest.CaptureFixture[str], items: Table, tmp_path: Path
) -> None:
    good = tmp_path / "prices.json"
    good.write_text(json.dumps({"o/a": entry({"prices": {"run": "1"}}), "o/b": entry({"hardware": "gpu-t4"})}))
    assert main(["prices", "set", "--file", str(good), *ON]) == 0
    assert "Set 2 entries" in capsys.readouterr().err
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps({"o/c": entry({"prices": {"run": "1"}}), "o/d": entry({"prices": {"run": 1}})}))
    assert "o/d.tiers[0].prices.run" in refused(capsys, "prices", "set", "--file", str(bad))
    assert "Name either KEY, or --file" in refused(capsys, "prices", "set", "o/a", "--file", str(good))
    bad.write_bytes(b"\xff\xfe")
    assert "is not UTF-8" in refused(capsys, "prices", "set", "--file", str(bad))
    bad.write_text(" " * (1024 * 1024 + 1))
    assert "more than 1048576 bytes" in refused(capsys, "prices", "set", "--file", str(bad))
    assert own(items).keys() == {"o/a", "o/b"}


def test_two_commands_at_once_lose_no_entry(capsys: pytest.CaptureFixture[str], items: Table) -> None:
    with meanwhile(
        "PutItem", lambda: StackPrices(items).write_entries(lambda _: {"o/first": entry({"hardware": "x"})})
    ):
        assert "at the same time. Repeat" in refused(capsys, "prices", "set", "o/second", "run=1")
    assert main(["prices", "set", "o/second", "run=1", *ON]) == 0
    assert own(items).keys() == {"o/first", "o/second"}


def test_list_shows_which_prices_are_the_stacks_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prices", "set", "google/veo-3", "run=0.1", *ON]) == 0
    assert main(["prices", "set", "o/timed", "--hardware", "gpu-t4", "--when", "with_audio=false", *ON]) == 0
    capsys.readouterr()
    assert main(["prices", "list", *ON]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["KEY", "WHEN", "DOLLARS", "DATE", "OF"]
    assert ["google/veo-3", "run=0.1", today(), "stack"] in lines
    assert ["o/timed", "with_audio=false", "predict_time", "by", "gpu-t4", today(), "stack"] in lines
    assert ["hardware:gpu-t4", "second=0.000225", "2026-05-04", "delivered"] in lines
    assert main(["prices", "list", "--json", *ON]) == 0
    listed = {each["key"]: each for each in json.loads(capsys.readouterr().out)}
    assert listed.keys() == {*shipped(), "o/timed"}
    assert (listed["google/veo-3"]["own"], listed["google/veo-3-fast"]["own"]) == (True, False)


def test_removed_price_is_the_delivered_one_again(capsys: pytest.CaptureFixture[str], items: Table) -> None:
    assert main(["prices", "set", "google/veo-3", "run=0.1", *ON]) == 0
    assert main(["prices", "remove", "google/veo-3", *ON]) == 0
    assert own(items) == {}
    assert StackPrices(items).book().find("google/veo-3") is not None


def test_check_lists_unknown_costs_newest_first(
    capsys: pytest.CaptureFixture[str], items: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = datetime.now(UTC).timestamp()
    register = UnknownCosts(items)
    register.note("o/old", "No price of o/old is known.", "alice", "a" * 26, now - 9000)
    register.note("o/new", "Its metrics lack x.", "bob", "b" * 26, now)
    assert main(["prices", "set", "o/new", "run=1", *ON]) == 0
    capsys.readouterr()
    assert main(["prices", "check", *ON]) == 0
    _, first, second = capsys.readouterr().out.splitlines()
    assert (first.split()[0], second.split()[0]) == ("o/new", "o/old")
    assert "  yes          Its metrics lack x." in first
    assert "  no           No price of o/old is known." in second
    assert main(["prices", "check", "--json", *ON]) == 0
    newest, _ = json.loads(capsys.readouterr().out)
    assert (newest["key"], newest["owners"], newest["example"], newest["has_price"]) == (
        "o/new",
        ["bob"],
        "b" * 26,
        True,
    )


# -- apply --------------------------------------------------------------------------------------------------------


def unpriced(table: PredictionsTable, clock: Clock, *, owner: str = "alice", **report: Any) -> str:
    """The id of a prediction that has ended at an unknown cost."""
    prediction = put(table, clock, owner=owner)
    table.merge(
        prediction.id, told("succeeded", **{"model": "o/m", "metrics": {"predict_time": 2}} | report), clock.now()
    )
    return prediction.id


def test_later_price_is_applied_to_what_ended_without_one_and_to_nothing_else(
    capsys: pytest.CaptureFixture[str], items: Table, table: PredictionsTable, clock: Clock
) -> None:
    clock.advance(datetime.now(UTC).timestamp() - clock.now())
    known = unpriced(table, clock, model="black-forest-labs/flux-schnell", metrics={"image_output_count": 1})
    of_alice, of_bob = unpriced(table, clock), unpriced(table, clock, owner="bob")
    other = unpriced(table, clock, model="o/other")
    running = put(table, clock).id
    lost = table.end(put(table, clock), Status.FAILED, "lost", clock.now())
    free = put(table, clock, claim=False)
    table.end(free, Status.CANCELED, None, clock.now())
    register = UnknownCosts(items)
    for later, owner in enumerate(("alice", "bob")):
        register.note("o/m", "No price of o/m is known.", owner, of_alice, clock.now() + later)
    assert main(["prices", "set", "o/m", "--hardware", "gpu-t4", *ON]) == 0
    before = raw_items(known)["status"]
    day = datetime.fromtimestamp(clock.now(), UTC).date().isoformat()
    assert main(["prices", "apply", "--since", day, "--dry-run", *ON]) == 0
    assert capsys.readouterr().out == "Would write the cost of 2 predictions, $0.000900 in all; 2 stay unknown.\n"
    assert current(table, of_alice).cost_micro_dollars is None
    assert main(["prices", "apply", "--since", day, *ON]) == 0
    assert capsys.readouterr().out == "Wrote the cost of 2 predictions, $0.000900 in all; 2 stay unknown.\n"
    for each in (of_alice, of_bob):
        there = current(table, each)
        assert (there.cost_micro_dollars, there.cost_reason) == (450, None)
        assert there.cost_price == f"o/m#1@{today()}"
    assert raw_items(known)["status"] == before
    assert "cost_micro_dollars" not in raw_items(running)["status"]
    assert current(table, other).cost_reason == "No price of o/other is known."
    assert lost is not None
    assert current(table, lost.id).cost_micro_dollars is None
    # The second time nothing is left.
    assert main(["prices", "apply", "--since", day, *ON]) == 0
    assert capsys.readouterr().out == "Wrote the cost of 0 predictions, $0.000000 in all; 2 stay unknown.\n"


def test_apply_covers_what_earlier_releases_ended_where_its_owner_is_named(
    capsys: pytest.CaptureFixture[str], table: PredictionsTable, clock: Clock
) -> None:
    clock.advance(datetime.now(UTC).timestamp() - clock.now())
    ids = [
        unpriced(table, clock, model="black-forest-labs/flux-dev", metrics={"image_output_count": 2}) for _ in range(3)
    ]
    never = put(table, clock, claim=False)
    table.end(never, Status.CANCELED, None, clock.now())
    for each in (*ids, never.id):
        clients.client("dynamodb").update_item(
            TableName="predictions",
            Key={"pk": {"S": f"prediction#{each}"}, "sk": {"S": "status"}},
            UpdateExpression="REMOVE cost_micro_dollars, cost_reason, cost_price",
        )
    assert main(["prices", "apply", "--since", "2020-01-01", *ON]) == 0
    assert "Name an --owner to look" in capsys.readouterr().err
    with answers_lost():
        assert main(["prices", "apply", "--since", "2020-01-01", "--owner", "alice", *ON]) == 0
    assert {current(table, each).cost_micro_dollars for each in ids} == {50_000}
    assert current(table, never.id).cost_micro_dollars == 0


def test_apply_passes_over_what_is_about_to_be_removed_and_what_was_created_earlier(
    capsys: pytest.CaptureFixture[str], table: PredictionsTable, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    expired = unpriced(table, clock)  # in 2025, and past its retention by now
    assert main(["prices", "set", "o/m", "run=1", *ON]) == 0
    for since in ("2020-01-01", today()):
        assert main(["prices", "apply", "--since", since, "--owner", "alice", *ON]) == 0
        assert capsys.readouterr().out == "Wrote the cost of 0 predictions, $0.000000 in all; 0 stay unknown.\n"
    assert current(table, expired).cost_micro_dollars is None


def test_apply_reads_page_after_page(table: PredictionsTable, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    clock.advance(datetime.now(UTC).timestamp() - clock.now())
    for _ in range(203):
        clock.advance(1)
        unpriced(table, clock)
    assert main(["prices", "set", "o/m", "run=0.01", *ON]) == 0
    assert main(["prices", "apply", "--since", "2020-01-01", "--owner", "alice", *ON]) == 0
    assert capsys.readouterr().out == "Wrote the cost of 203 predictions, $2.030000 in all; 0 stay unknown.\n"
