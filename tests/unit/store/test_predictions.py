"""The merge rule and what else may change an item, whatever the order, and how payloads are kept."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from predictions.aws import clients
from predictions.files.output_references import StoredFile
from predictions.files.outputs_bucket import OutputsBucket
from predictions.ids import derived_id, random_id
from predictions.intents.model import create_intent
from predictions.status import Status, rank_of, visible
from predictions.store.payloads import PAYLOAD_LIMIT_BYTES
from predictions.store.predictions import PredictionsTable
from predictions.store.records import AlreadyExists, Change, Prediction

from tests.support.fakes import VERSION, Clock, Died, answers_lost, meanwhile
from tests.support.predictions import FILE, put, raw_items, told


def objects_of(prediction: Prediction) -> dict[str, int]:
    """The objects below a prediction's payloads, with their sizes."""
    s3 = clients.client("s3")
    listed = s3.list_objects_v2(Bucket="outputs", Prefix=f"payloads/{prediction.id}/").get("Contents", [])
    return {found["Key"]: found["Size"] for found in listed}


class TestStatuses:
    def test_ranks_only_rise_and_every_end_is_one(self) -> None:
        assert [rank_of(s) for s in ("queued", "starting", "processing")] == [0, 1, 2]
        assert {rank_of(s) for s in ("succeeded", "failed", "canceled", "aborted")} == {9}

    @pytest.mark.parametrize("word", ["", "SUCCEEDED", "successful", "paused", "null"])
    def test_unknown_word_ranks_lowest(self, word: str) -> None:
        assert rank_of(word) == 0

    def test_aborted_is_shown_as_canceled_and_queued_as_starting(self) -> None:
        assert visible("aborted") == "canceled"
        assert visible("queued") == "starting"
        assert all(visible(s) == s for s in ("starting", "processing", "succeeded", "failed", "canceled"))


class TestIntent:
    def test_taken_id_tells_what_has_it_and_changes_nothing(self, table: PredictionsTable, clock: Clock) -> None:
        first = put(table, clock)
        intent = create_intent(
            json.dumps({"version": VERSION, "input": {"n": 2}}).encode(),
            {},
            owner="alice",
            reference=None,
            allow_loopback_webhooks=False,
        )
        from dataclasses import replace

        with pytest.raises(AlreadyExists) as taken:
            table.put_intent(
                replace(intent, id=first.id),
                version=VERSION,
                deadline=0,
                expires=0,
                claim=True,
                execution_arn="arn:2",
                now=clock.now(),
            )
        assert taken.value.prediction == first
        whole = table.read(first.id)
        assert whole is not None
        assert whole.input == {"n": 1}

    def test_intent_and_claim_are_one_write(self, table: PredictionsTable, clock: Clock) -> None:
        assert put(table, clock).claimed == int(clock.now())
        assert put(table, clock, claim=False).claimed is None

    def test_claim_is_given_once(self, table: PredictionsTable, clock: Clock) -> None:
        prediction = put(table, clock, claim=False)
        assert table.claim(prediction.id, None, clock.now()) is not None
        assert table.claim(prediction.id, None, clock.now()) is None

    def test_write_that_botocore_repeats_after_a_lost_answer_is_recognised_as_its_own(
        self, table: PredictionsTable, clock: Clock
    ) -> None:
        with answers_lost():
            prediction = put(table, clock, claim=False)
            assert table.claim(prediction.id, None, clock.now()) is not None
        assert table.claim(prediction.id, None, clock.now()) is None

    def test_release_by_one_who_lost_the_claim_changes_nothing(self, table: PredictionsTable, clock: Clock) -> None:
        stale = put(table, clock)
        assert table.release(stale, clock.now(), 5) is not None
        # In the same second: who looked before the first claim may claim right after its release.
        assert table.claim(stale.id, None, clock.now()) is not None
        assert table.release(stale, clock.now(), 5) is None

    def test_released_claim_of_a_bound_item_stays(self, table: PredictionsTable, clock: Clock) -> None:
        prediction = put(table, clock)
        table.merge(prediction.id, told("processing"), clock.now())
        assert table.release(prediction, clock.now(), 5) is None

    def test_ids_are_replicates_form_and_derived_from_owner_and_key(self) -> None:
        ids = {random_id() for _ in range(100)} | {derived_id("a", "k"), derived_id("a", "k2"), derived_id("b", "k")}
        assert len(ids) == 103
        assert all(len(i) == 26 and i.isascii() and i.isalnum() and i == i.lower() for i in ids)
        assert derived_id("a", "k") == derived_id("a", "k")


class TestMerge:
    def test_unknown_prediction_writes_nothing(self, table: PredictionsTable, clock: Clock) -> None:
        merge = table.merge("a" * 26, told("succeeded", output="x"), clock.now())
        assert merge.change is Change.UNKNOWN
        assert clients.client("dynamodb").scan(TableName="predictions")["Items"] == []

    def test_first_upstream_id_binds_and_a_second_one_is_an_orphan(self, table: PredictionsTable, clock: Clock) -> None:
        prediction = put(table, clock)
        assert table.merge(prediction.id, told("processing"), clock.now()).change is Change.PROGRESS
        merge = table.merge(prediction.id, told("succeeded", "v" * 26, output="other"), clock.now())
        assert merge.change is Change.ORPHAN
        merge = table.merge(prediction.id, told("processing", "v" * 26), clock.now())
        assert merge.change is Change.ORPHAN
        assert merge.prediction is not None
        assert merge.prediction.upstream_id == "u" * 26
        assert merge.prediction.orphans == {"v" * 26}
        assert list(table.due(clock.now(), 10)) == [f"prediction#{prediction.id}"]

    def test_prediction_for_an_item_that_ended_unbound_is_an_orphan(
        self, table: PredictionsTable, clock: Clock
    ) -> None:
        prediction = put(table, clock)
        table.end(prediction, Status.FAILED, "given up", clock.now())
        merge = table.merge(prediction.id, told("processing"), clock.now())
        assert merge.change is Change.ORPHAN
        assert merge.prediction is not None
        assert merge.prediction.visible == "failed"

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        words=st.lists(
            st.tuples(st.sampled_from([*[s.value for s in Status], "unheard-of"]), st.sampled_from("uv")), max_size=8
        )
    )
    def test_rank_never_falls_binding_never_changes_and_the_first_end_stays(
        self, table: PredictionsTable, clock: Clock, words: list[tuple[str, str]]
    ) -> None:
        prediction = put(table, clock)
        before = prediction
        for status, letter in words:
            merge = table.merge(prediction.id, told(status, letter * 26), clock.now())
            after = merge.prediction
            assert after is not None
            assert after.rank >= before.rank
            if before.upstream_id:
                assert after.upstream_id == before.upstream_id
            if before.terminal:
                assert (after.status, after.visible, after.error) == (before.status, before.visible, before.error)
            before = after

    def test_removed_output_replaces_nothing_that_was_kept(self, table: PredictionsTable, clock: Clock) -> None:
        # The writer of the result died before it wrote the status; an hour later Replicate has removed the output.
        prediction = put(table, clock)
        table._payloads.put_result(prediction, told("succeeded", output=[FILE], logs="kept"))
        table.merge(prediction.id, told("succeeded", output=None, data_removed=True), clock.now())
        whole = table.read(prediction.id)
        assert whole is not None
        assert (whole.output, whole.logs, whole.prediction.data_removed) == ([FILE], "kept", False)
        assert whole.prediction.awaits_copy

    def test_output_that_was_removed_before_anybody_read_it_is_said_so(
        self, table: PredictionsTable, clock: Clock
    ) -> None:
        prediction = put(table, clock)
        table.merge(prediction.id, told("succeeded", output=None, data_removed=True), clock.now())
        ended = table.get(prediction.id)
        assert ended is not None
        assert ended.data_removed
        assert ended.error is not None
        assert "removed" in ended.error

    def test_output_with_files_is_not_shown_as_ended_before_they_are_stored(
        self, table: PredictionsTable, clock: Clock
    ) -> None:
        prediction = put(table, clock)
        ended = table.merge(prediction.id, told("succeeded", output=[FILE]), clock.now()).prediction
        assert ended is not None
        assert (ended.terminal, ended.visible, ended.awaits_copy) == (True, "processing", True)
        assert ended.next_check_at == int(clock.now()) + 120
        shown = table.end_copy(ended, [StoredFile("/0", 0, "k", 3, "aa", "image/png")], clock.now())
        assert shown is not None
        assert (shown.visible, shown.next_check_at) == ("succeeded", None)
        assert table.end_copy(ended, [], clock.now()) is None, "the end was written twice"

    def test_failed_prediction_with_files_waits_for_them_too(self, table: PredictionsTable, clock: Clock) -> None:
        prediction = put(table, clock)
        ended = table.merge(prediction.id, told("failed", output=[FILE], error="late"), clock.now()).prediction
        assert ended is not None
        assert ended.visible == "processing"
        shown = table.end_copy(ended, [], clock.now())
        assert shown is not None
        assert (shown.visible, shown.error) == ("failed", "late")

    def test_end_leaves_the_sweeps_list(self, table: PredictionsTable, clock: Clock) -> None:
        prediction = put(table, clock)
        clock.advance(100)
        assert list(table.due(clock.now(), 10)) == [f"prediction#{prediction.id}"]
        table.merge(prediction.id, told("succeeded", output="text"), clock.now())
        assert list(table.due(clock.now() + 1e6, 10)) == []

    def test_binding_an_item_to_be_canceled_calls_the_sweep(self, table: PredictionsTable, clock: Clock) -> None:
        prediction = put(table, clock)
        table.request_cancel(prediction.id, clock.now())
        table.merge(prediction.id, told("processing"), clock.now())
        assert list(table.due(clock.now(), 10)) == [f"prediction#{prediction.id}"]


class TestOwnWord:
    def test_end_is_refused_where_the_item_moved_on(self, table: PredictionsTable, clock: Clock) -> None:
        unbound = put(table, clock)
        table.merge(unbound.id, told("processing"), clock.now())
        assert table.end(unbound, Status.FAILED, "given up", clock.now()) is None
        bound = table.get(unbound.id)
        assert bound is not None
        assert table.end(bound, Status.FAILED, "given up", clock.now()) is not None
        assert table.end(bound, Status.CANCELED, None, clock.now()) is None

    def test_cancel_flag_is_set_once_and_never_on_an_ended_item(self, table: PredictionsTable, clock: Clock) -> None:
        prediction = put(table, clock)
        assert table.request_cancel("b" * 26, clock.now()) is None
        assert table.request_cancel(prediction.id, clock.now()) is not None
        assert table.request_cancel(prediction.id, clock.now()) is None
        other = put(table, clock)
        table.merge(other.id, told("failed"), clock.now())
        assert table.request_cancel(other.id, clock.now()) is None

    def test_next_execution_is_counted_by_one_only(self, table: PredictionsTable, clock: Clock) -> None:
        prediction = put(table, clock)
        second = table.next_execution(prediction, "arn:2", clock.now())
        assert second is not None
        assert (second.execution_n, second.execution_arn) == (2, "arn:2")
        assert table.next_execution(prediction, "arn:2", clock.now()) is None


class TestCopyLease:
    def ended(self, table: PredictionsTable, clock: Clock) -> Prediction:
        prediction = put(table, clock)
        ended = table.merge(prediction.id, told("succeeded", output=[FILE]), clock.now()).prediction
        assert ended is not None
        return ended

    def test_running_execution_has_the_lease_without_a_write(self, table: PredictionsTable, clock: Clock) -> None:
        ended = self.ended(table, clock)
        before = raw_items(ended.id)
        assert table.lease_copy(ended, 1, 900, clock.now())
        assert raw_items(ended.id) == before

    def test_another_execution_waits_until_the_lease_has_ended(self, table: PredictionsTable, clock: Clock) -> None:
        ended = self.ended(table, clock)
        assert not table.lease_copy(ended, 2, 900, clock.now())
        clock.advance(1021)
        assert table.lease_copy(ended, 2, 900, clock.now())
        assert not table.lease_copy(ended, 1, 900, clock.now())

    def test_lease_too_short_for_the_work_is_renewed(self, table: PredictionsTable, clock: Clock) -> None:
        ended = self.ended(table, clock)
        clock.advance(500)
        assert table.lease_copy(ended, 1, 900, clock.now())
        renewed = table.get(ended.id)
        assert renewed is not None
        assert renewed.copy_until == int(clock.now()) + 1020


class TestPayloads:
    @pytest.mark.parametrize("size", [10, PAYLOAD_LIMIT_BYTES - 100, PAYLOAD_LIMIT_BYTES + 1, 2_000_000])
    def test_input_output_and_logs_of_any_size_are_kept_and_items_stay_small(
        self, table: PredictionsTable, clock: Clock, size: int
    ) -> None:
        prediction = put(table, clock, input={"text": "x" * size, "deep": [[[{"é": 1.5}]]]})
        table.merge(prediction.id, told("succeeded", output={"text": "y" * size}, logs="z" * size), clock.now())
        whole = table.read(prediction.id)
        assert whole is not None
        assert whole.input == {"text": "x" * size, "deep": [[[{"é": 1.5}]]]}
        assert (whole.output, whole.logs) == ({"text": "y" * size}, "z" * size)
        items = raw_items(prediction.id)
        assert all(len(json.dumps(item)) < 2 * PAYLOAD_LIMIT_BYTES for item in items.values())
        assert len(json.dumps(items["status"])) < 3000

    def test_status_item_holds_no_payload_that_makes_it_dearer(self, table: PredictionsTable, clock: Clock) -> None:
        prediction = put(table, clock, input={"prompt": "CANARY-INPUT" * 80})
        table.merge(prediction.id, told("processing", output="CANARY-OUTPUT", logs="CANARY-LOGS"), clock.now())
        table.merge(prediction.id, told("succeeded", output="CANARY-OUTPUT" * 160), clock.now())
        assert "CANARY" not in json.dumps(raw_items(prediction.id)["status"])

    def test_progress_never_shrinks(self, table: PredictionsTable, clock: Clock) -> None:
        prediction = put(table, clock)
        table.merge(prediction.id, told("processing", output=["a", "b"], logs="12"), clock.now())
        table.merge(prediction.id, told("processing", output=["a"], logs="1"), clock.now())
        whole = table.read(prediction.id)
        assert whole is not None
        assert (whole.output, whole.logs) == (["a", "b"], "12")

    def test_progress_that_grows_above_the_limit_stays_one_object_and_is_deleted(
        self, table: PredictionsTable, clock: Clock
    ) -> None:
        prediction = put(table, clock)
        step = PAYLOAD_LIMIT_BYTES // 20
        for n in range(1, 61):
            table.merge(prediction.id, told("processing", output=["a"] * n, logs="x" * (n * step)), clock.now())
            if n == 25:
                early = raw_items(prediction.id)["progress"]
        [(key, size)] = objects_of(prediction).items()
        assert size < 60 * step + 1000
        whole = table.read(prediction.id)
        assert whole is not None
        assert (whole.output, whole.logs) == (["a"] * 60, "x" * (60 * step))
        # A reader that has the item as it was then still finds its object.
        assert early["s3_key"]["S"] == key
        OutputsBucket("outputs").delete_all(prediction.id, prediction.owner)
        assert objects_of(prediction) == {}

    def test_large_progress_that_comes_late_replaces_nothing(self, table: PredictionsTable, clock: Clock) -> None:
        prediction = put(table, clock)
        logs = {size: "x" * (PAYLOAD_LIMIT_BYTES + size) for size in (1, 2, 3)}
        for size in (2, 1, 2):
            table.merge(prediction.id, told("processing", logs=logs[size]), clock.now())
        assert (whole := table.read(prediction.id))
        assert whole.logs == logs[2]

        def longer() -> None:
            table.merge(prediction.id, told("processing", logs=logs[3] + "!"), clock.now())

        for operation, service in (("HeadObject", "s3"), ("PutObject", "s3"), ("PutItem", "dynamodb")):
            with meanwhile(operation, longer, service=service):
                table.merge(prediction.id, told("processing", logs=logs[3]), clock.now())
            assert (whole := table.read(prediction.id))
            assert whole.logs == logs[3] + "!", operation
            logs[3] = logs[3] + "!!"
        assert len(objects_of(prediction)) == 1

    @pytest.mark.parametrize("before", [[], ["x" * 10], ["x" * (PAYLOAD_LIMIT_BYTES + 1)]])
    def test_writer_of_large_progress_that_dies_half_way_leaves_a_readable_prediction_and_one_object(
        self, table: PredictionsTable, clock: Clock, before: list[str]
    ) -> None:
        prediction = put(table, clock)
        for logs in before:
            table.merge(prediction.id, told("processing", logs=logs), clock.now())

        def die() -> None:
            raise Died

        large = "x" * (PAYLOAD_LIMIT_BYTES + 2)
        with meanwhile("PutItem", die), pytest.raises(Died):
            table.merge(prediction.id, told("processing", logs=large), clock.now())
        assert (whole := table.read(prediction.id))
        # The object may be newer than the item that names it, never older.
        assert whole.logs in (*before, large) if before else whole.logs is None
        with answers_lost("s3", "dynamodb"):
            table.merge(prediction.id, told("processing", logs=large), clock.now())
            table.merge(prediction.id, told("processing", logs=large + "!"), clock.now())
        assert (whole := table.read(prediction.id))
        assert whole.logs == large + "!"
        assert len(objects_of(prediction)) == 1

    def test_long_list_of_files_is_kept_beside_the_item(self, table: PredictionsTable, clock: Clock) -> None:
        prediction = put(table, clock)
        ended = table.merge(prediction.id, told("succeeded", output=[FILE] * 500), clock.now()).prediction
        assert ended is not None
        files = [StoredFile(f"/{i}", i, f"k/{i}", 10, "a" * 64, "image/png") for i in range(500)]
        table.end_copy(ended, files, clock.now())
        whole = table.read(prediction.id)
        assert whole is not None
        assert list(whole.files) == files
        assert len(json.dumps(raw_items(prediction.id)["status"])) < 3000


class TestList:
    def test_pages_are_in_order_without_gap_or_repetition_in_both_directions(
        self, table: PredictionsTable, clock: Clock
    ) -> None:
        ids = []
        for _ in range(7):
            ids.append(put(table, clock).id)
            clock.advance(0.001)
        put(table, clock, owner="bob")
        ids.reverse()

        def page(start: str | None, *, older: bool = True) -> tuple[list[Prediction], bool]:
            found = table.list("alice", start, older=older, size=3)
            return [whole.prediction for whole in found.predictions], found.more

        first, second = page(None), page(page(None)[0][-1].listed_at)
        third = page(second[0][-1].listed_at)
        assert [[p.id for p in part] for part, _ in (first, second, third)] == [ids[:3], ids[3:6], ids[6:]]
        assert [more for _, more in (first, second, third)] == [True, True, False]
        back, more = page(third[0][0].listed_at, older=False)
        assert ([p.id for p in back], more) == ([ids[5], ids[4], ids[3]], True)
        back, more = page(back[-1].listed_at, older=False)
        assert ([p.id for p in back], more) == ([ids[2], ids[1], ids[0]], False)

    def test_payloads_are_read_only_as_far_as_the_reader_goes(self, table: PredictionsTable, clock: Clock) -> None:
        for _ in range(3):
            put(table, clock, input={"text": "x" * 200_000})
            clock.advance(1)
        read: list[str] = []
        clients.client("s3").meta.events.register("before-call.s3.GetObject", lambda **_: read.append("object"))
        page = table.list("alice", None, older=True, size=100)
        next(page.predictions)
        assert read == ["object"]

    def test_empty_list_has_nothing_further(self, table: PredictionsTable) -> None:
        page = table.list("nobody", None, older=True, size=100)
        assert (list(page.predictions), page.more) == ([], False)
