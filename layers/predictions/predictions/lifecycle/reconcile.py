"""Unknown outcomes: whether Replicate accepted a create is read from its list, never guessed.

A create whose answer was lost may have started a prediction. Until that is known, nothing is submitted again:

    match       an entry of the list carries our webhook, or is the only one that can be this prediction: it is bound
    excluded    an entry is another prediction's: its webhook is another, it is bound to another item of ours or
                recorded as an orphan, or it ran another 64-digit version. Nothing else excludes: inputs are removed
                and redacted, models have aliases, a GET may be 404
    undecided   an entry is neither: there is no evidence, and a person has to look
    absent      two complete readings show none of these, the second one begun a grace after the holder of the claim
                sent its last byte: the claim is released, and the prediction submitted again

Readings are shared. Unknown claims are registered (`pk` = `unknown`), and the holder of the lease (`pk` = `readings`,
`sk` = `lease`) reads the list once for all of them. The lease's item also holds the budget of list calls: at most 60 in
any minute, however many predictions wait. A lease only saves work: each write that follows from a reading is
conditional on the claim that was read.

A prediction that was submitted again stays registered: the list is read once more 1 and 5 minutes after it was bound,
and after it has ended. One that turns up all the same is an orphan. It is canceled, and stops all resubmission for an
hour (`sk` = `breaker`), since evidence of this kind was wrong.
"""

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from predictions.aws.clients import api_url, client
from predictions.aws.dynamodb import deserialize, read_items, serialize
from predictions.observability import MetricUnit, logger, metrics
from predictions.store.predictions import Change, Prediction, PredictionsTable
from predictions.upstream.client import Collection, Replicate, Target
from predictions.upstream.errors import OutcomeUnknown, Unavailable
from predictions.upstream.list_reader import MARGIN_SECONDS, Listed, ListReader, Reading, digest_of
from predictions.upstream.prediction import UpstreamPrediction

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

# After the holder of a claim is done: an answered 5xx is mostly a create that was not accepted, and lists are fast.
_LOOKS_ANSWERED = (3, 10, 30)
_LOOKS_UNANSWERED = (10, 30, 90)
_LONGEST_WAIT_SECONDS = 300
# A list that could not be read is asked again soon, so that an outage of Replicate's costs minutes after its end.
_FAILED_WAITS = (10, 120)
# The second reading may follow the first one at once, where the grace is over.
_SECOND_READING_SECONDS = 5
# Older evidence is not acted on without another reading.
_EVIDENCE_SECONDS = 300

RESUBMIT_WAITS = (5, 20, 80, 300)
"""How long a prediction waits for its next submission, by how often its outcome was unknown."""

_READING_SECONDS = 25
_LEASE_SECONDS = 55
_ENTRIES_ASKED = 40
_ENTRIES_SECONDS = 10

CALLS_PER_MINUTE = 40
CALLS_AT_ONCE = 19
"""Together fewer than 60 list calls in any minute."""

_CONTROLS = 20
# Most open items of a busy stack wait for other things: pages of the index that are looked through for controls.
_CONTROL_PAGES = 5
_CONTROL_PAGE_ITEMS = 100
# A prediction that is bound is due again so long after its first poll.
_DUE_AFTER_POLL_SECONDS = 120
# At the edge of what was read, the clocks decide whether an entry is shown.
_CONTROL_MARGIN_SECONDS = 5

_AGAIN_AFTER_SECONDS = (60, 300)
STOP_SECONDS = 3600
"""For how long nothing is submitted again once evidence has proved wrong."""

_REMEMBERED_SECONDS = 7200
_HISTORY = 8
_NAMED = 10

_LEASE = {"pk": "readings", "sk": "lease"}
_BREAKER = {"pk": "readings", "sk": "breaker"}

Bind = Callable[[Prediction, UpstreamPrediction], Prediction]


def target_of(prediction: Prediction) -> Target:
    """Return what runs a prediction, or is trained."""
    if prediction.object == "training":
        return Target("training", prediction.name, prediction.version)
    if prediction.kind == "deployment":
        return Target("deployment", prediction.name)
    if prediction.version is None:
        return Target("model", prediction.name)
    return Target("version", prediction.name, prediction.version)


def webhook_of(prediction_id: str) -> str:
    """Return the URL at which Replicate reports on a prediction.

    The whole URL tells whose an entry is: a prediction of another stack of the same account may have the same id.
    """
    return f"{api_url()}/webhooks/replicate/{prediction_id}"


def undecided_ids(prediction: Prediction) -> list[str]:
    """Return the ids of upstream predictions that may be this one, as the last reading saw them."""
    history = json.loads(prediction.readings_json or "[]")
    return list(history[-1].get("undecided", [])) if history else []


@dataclass(frozen=True)
class _Verdict:
    """What a reading says of one claim."""

    matches: tuple[Listed, ...] = ()
    undecided: tuple[Listed, ...] = ()
    candidates: tuple[Listed, ...] = ()


@dataclass(frozen=True)
class _Hidden:
    """What is known of an entry whose webhook the list does not show; `known` is False where it could not be asked."""

    known: bool
    webhook: str | None = None
    excluded: bool = False
    listed: Listed | None = None


class UnknownSubmissions:
    """Finds out what became of creates without a clear answer.

    Args:
        table: The predictions.
        replicate: Replicate.
        table_name: The table's name.
        dynamodb: The client to use.
        grace: How long after the holder of a claim is done the second reading may begin, in seconds.
        first_poll: When the first poll of a bound prediction is due, in seconds.
        now: The time, in seconds since 1970.
        sleep: Waits that many seconds.
    """

    def __init__(
        self,
        table: PredictionsTable,
        replicate: Replicate,
        table_name: str,
        dynamodb: "DynamoDBClient",
        *,
        grace: int,
        first_poll: int,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._table = table
        self._table_name = table_name
        self._dynamodb = dynamodb
        self._grace = grace
        self._first_poll = first_poll
        self._now = now
        self._sleep = sleep
        self._reader = ListReader(replicate, now=now)
        # Of the lease that this function has.
        self._budget = _Budget(0, now, sleep)
        self._until = 0

    @classmethod
    def from_env(cls, table: PredictionsTable, replicate: Replicate) -> "UnknownSubmissions":
        """From `TABLE_NAME`, `SUBMIT_GRACE_SECONDS` and `FIRST_POLL_SECONDS`."""
        return cls(
            table,
            replicate,
            os.environ["TABLE_NAME"],
            client("dynamodb"),
            grace=int(os.environ["SUBMIT_GRACE_SECONDS"]),
            first_poll=int(os.environ["FIRST_POLL_SECONDS"]),
        )

    # -- the holder of a claim --------------------------------------------------------------------------------

    def note(self, prediction: Prediction, error: OutcomeUnknown) -> int:
        """Record that the holder of a claim is done, without knowing what became of its create.

        If the function crashes before this, `submit_until` in the item says when it was done at the latest.

        Returns:
            In how many seconds to look for what the create has started.
        """
        # First: whoever finds `submit_over` relies on readings that others make for it.
        self._register(prediction)
        now = self._now()
        outcome = f"answered {error.status}" if error.status else "no answer"
        wait = self._waits(replace(prediction, submit_answered=error.status is not None))[0]
        values = {
            "submit_over": _whole(now),
            "submit_answered": error.status is not None,
            "submissions_json": _appended(prediction.submissions_json, {"at": prediction.claimed, "outcome": outcome}),
            "next_check_at": int(now) + wait + 120,
        }
        self._table.note_unknown(prediction, values)  # unless a webhook has bound it meanwhile
        return wait

    def _register(self, prediction: Prediction) -> None:
        self._put(f"claim#{prediction.claimed:010d}#{prediction.id}", prediction)

    def _put(self, sk: str, prediction: Prediction) -> None:
        item = {"pk": "unknown", "sk": sk, "id": prediction.id, "collection": prediction.collection,
                "expires_at": max(prediction.deadline, int(self._now())) + 86400}  # fmt: skip
        self._dynamodb.put_item(TableName=self._table_name, Item=serialize(item))

    # -- looks ------------------------------------------------------------------------------------------------

    def look(self, prediction: Prediction, bind: Bind) -> int:
        """Look for a claimed prediction in Replicate's list, if that is due and nobody else is reading.

        Args:
            prediction: A claimed and unbound one.
            bind: Binds a prediction to what Replicate tells.

        Returns:
            In how many seconds to look again, where its item says nothing new.
        """
        now = self._now()
        lease = self._lease()
        last = _last_of(lease, prediction.collection)
        read_at, failed = self._last_reading_of(prediction, last)
        wait = self._next_look(prediction, read_at, failed=failed) - now
        if wait > 0:
            return max(1, math.ceil(wait))
        if not self._acquire(lease, now):
            if prediction.submit_over is None:
                self._register(prediction)  # after a crash: so that whoever reads looks for this one too
            # Many that wait come one after the other.
            spread = 3 + min(60, int(last.get("claims", 0)) // 20)
            return 2 + int(prediction.id, 36) % spread
        self._read(prediction.collection, [prediction], bind)
        there = self._table.get(prediction.id)
        if there is None or there.holder_done_at is None or there.upstream_id:
            return 1
        wait = self._next_look(there, float(there.read_at or 0), failed=there.read_failed) - self._now()
        return max(1, math.ceil(wait))

    def has_evidence(self, prediction: Prediction) -> bool:
        """Whether there is evidence that Replicate accepted nothing of this claim."""
        return (
            prediction.claimed is not None
            and prediction.evidence_at is not None
            and self._now() - prediction.evidence_at <= _EVIDENCE_SECONDS
        )

    def _waits(self, prediction: Prediction) -> tuple[int, ...]:
        looks = _LOOKS_ANSWERED if prediction.submit_answered else _LOOKS_UNANSWERED
        return tuple(sorted({*looks, self._grace + 1}))

    def _last_reading_of(self, prediction: Prediction, last: Mapping[str, Any]) -> tuple[float, bool]:
        """When the list was last read for this claim, and whether that reading was none."""
        done_at = prediction.holder_done_at or 0
        began = float(last.get("began", 0))
        registered = float(last.get("registered", began))
        searched_from = prediction.searched_from - MARGIN_SECONDS
        covered = (
            prediction.submit_over is not None  # so its holder has registered it
            and registered >= done_at
            and (last.get("why_not") is not None or float(last.get("reached", began)) <= searched_from)
        )
        if covered and began > (prediction.read_at or 0):
            return began, last.get("why_not") is not None
        return float(prediction.read_at or 0), prediction.read_failed

    def _next_look(self, prediction: Prediction, read_at: float, *, failed: bool) -> float:
        """When the next look at a claim is due."""
        done_at = float(prediction.holder_done_at or 0)
        waits = self._waits(prediction)
        if read_at < done_at:
            # None yet. After a crash nobody knows what happened before the lease was over.
            return done_at + (waits[0] if prediction.submit_over else _SECOND_READING_SECONDS)
        elapsed = read_at - done_at
        if failed:
            least, most = _FAILED_WAITS
            return read_at + min(most, max(least, elapsed / 4))
        if prediction.absent_at is not None and prediction.evidence_at is None and elapsed >= self._grace:
            return read_at + _SECOND_READING_SECONDS
        for wait in waits:
            if wait > elapsed:
                return done_at + wait
        return read_at + min(_LONGEST_WAIT_SECONDS, max(waits[-1], elapsed / 2))

    # -- readings ---------------------------------------------------------------------------------------------

    def _lease(self) -> dict[str, Any]:
        found = self._dynamodb.get_item(TableName=self._table_name, Key=serialize(_LEASE), ConsistentRead=True)
        return deserialize(found["Item"]) if "Item" in found else {}

    def _acquire(self, lease: Mapping[str, Any], now: float) -> bool:
        """Take the lease, unless somebody has it.

        The budget is written as used up until the lease ends: if this function crashes, nobody asks more than it.
        """
        if lease.get("until", 0) > now:
            return False
        self._budget = _Budget(float(lease.get("used_ms", 0)) / 1000, self._now, self._sleep)
        until = int(now) + _LEASE_SECONDS
        try:
            self._dynamodb.update_item(
                TableName=self._table_name,
                Key=serialize(_LEASE),
                UpdateExpression="SET #until = :until, used_ms = :used",
                ConditionExpression="attribute_not_exists(#until) OR #until <= :now",
                ExpressionAttributeNames={"#until": "until"},
                ExpressionAttributeValues=serialize(
                    {":until": until, ":used": int((until + _Budget.burst_seconds) * 1000), ":now": int(now)}
                ),
            )
        except self._dynamodb.exceptions.ConditionalCheckFailedException:
            return False
        self._until = until
        return True

    def _give_back(self, last: Mapping[str, Any]) -> None:
        try:
            self._dynamodb.update_item(
                TableName=self._table_name,
                Key=serialize(_LEASE),
                UpdateExpression="SET used_ms = :used, last_json = :last REMOVE #until",
                ConditionExpression="#until = :until",
                ExpressionAttributeNames={"#until": "until"},
                ExpressionAttributeValues=serialize(
                    {":used": int(self._budget.used_until * 1000), ":last": json.dumps(last), ":until": self._until}
                ),
            )
        except self._dynamodb.exceptions.ConditionalCheckFailedException:
            logger.warning("the lease on reading the list was over before the reading")

    def _read(
        self, collection: Collection, own: Sequence[Prediction], bind: Bind, again: Sequence[Prediction] = ()
    ) -> Reading:
        """Read the list once, as the holder of the lease, and settle every registered claim."""
        lease = self._lease()
        # Of what is registered from now on, this reading may know nothing.
        registered_at = self._now()
        claims = self._registered(collection)
        claims |= {prediction.id: prediction for prediction in own}
        watched = [*claims.values(), *again]
        back_to = min((p.searched_from for p in watched), default=int(self._now())) - MARGIN_SECONDS
        over_at = self._now() + _READING_SECONDS
        reading = self._reader.read(collection, back_to, may_ask=lambda: self._budget.may_ask(over_at), over_at=over_at)
        if reading.why_not is None and (missing := self._missing_controls(collection, reading, back_to)):
            reading.why_not = f"it does not show {len(missing)} predictions that it has to show, such as {missing[0]}"
        logger.info(
            "list read", pages=reading.pages, entries=len(reading.entries), reason=reading.why_not, claims=len(claims)
        )
        self._settle(collection, reading, list(claims.values()), {p.id for p in own}, bind)
        last = json.loads(lease.get("last_json", "{}"))
        last[collection] = {
            "began": reading.began,
            "registered": registered_at,
            "reached": max(0, reading.reached) if reading.reached != float("inf") else reading.began,
            "why_not": reading.why_not,
            "claims": len(claims),
        }
        self._give_back(last)
        return reading

    def _registered(self, collection: Collection) -> dict[str, Prediction]:
        """The claims that are registered and still unknown; what else is registered is removed."""
        keys: dict[str, list[str]] = {}
        for item in self._query("claim#"):
            if item["collection"] == collection:
                keys.setdefault(str(item["id"]), []).append(str(item["sk"]))
        there = self._get_many(keys)
        claims = {}
        for id_, sks in keys.items():
            prediction = there.get(id_)
            open_ = prediction is not None and not prediction.terminal and not prediction.upstream_id
            for sk in sks:
                if prediction is not None and open_ and sk == f"claim#{prediction.claimed or 0:010d}#{id_}":
                    claims[id_] = prediction
                else:
                    self._remove(sk)
        return claims

    def _query(self, begin: str) -> list[dict[str, Any]]:
        found = []
        for page in self._dynamodb.get_paginator("query").paginate(
            TableName=self._table_name,
            KeyConditionExpression="pk = :pk AND begins_with(sk, :begin)",
            ExpressionAttributeValues=serialize({":pk": "unknown", ":begin": begin}),
        ):
            found += [deserialize(item) for item in page["Items"]]
        return found

    def _get_many(self, ids: Iterable[str]) -> dict[str, Prediction]:
        return self._table.get_many(ids)

    def _remove(self, sk: str) -> None:
        self._dynamodb.delete_item(TableName=self._table_name, Key=serialize({"pk": "unknown", "sk": sk}))

    def _missing_controls(self, collection: Collection, reading: Reading, back_to: float) -> list[str]:
        """The open, bound predictions of this stack, created in the same window, that a reading does not show.

        Younger ones than the grace are left out: the list may be late by as much.
        """
        start = max(back_to, reading.reached)
        due_from = int(start) + self._first_poll + _DUE_AFTER_POLL_SECONDS
        pages = self._dynamodb.get_paginator("query").paginate(
            TableName=self._table_name,
            IndexName="due",
            KeyConditionExpression="#open = :open AND next_check_at >= :from",
            ExpressionAttributeNames={"#open": "open"},
            ExpressionAttributeValues=serialize({":open": "open", ":from": due_from}),
            PaginationConfig={
                "PageSize": _CONTROL_PAGE_ITEMS, "MaxItems": _CONTROL_PAGES * _CONTROL_PAGE_ITEMS
            },
        )  # fmt: skip
        controls: list[str] = []
        for page in pages:
            pks = [str(deserialize(item)["pk"]) for item in page["Items"]]
            there = self._get_many(pk.removeprefix("prediction#") for pk in pks if pk.startswith("prediction#"))
            controls += [
                prediction.upstream_id
                for prediction in there.values()
                if prediction.upstream_id
                and prediction.collection == collection
                and not prediction.terminal
                and not prediction.unknown_creates
                and start + _CONTROL_MARGIN_SECONDS <= (prediction.claimed or 0) <= reading.began - self._grace
            ]
            if len(controls) >= _CONTROLS:
                break
        return [upstream_id for upstream_id in controls[:_CONTROLS] if upstream_id not in reading.entries]

    # -- what a reading says ----------------------------------------------------------------------------------

    def _settle(
        self, collection: Collection, reading: Reading, claims: list[Prediction], own: set[str], bind: Bind
    ) -> None:
        hidden = self._hidden(collection, reading, claims)
        digests: dict[str, str | None] = {}
        verdicts = {p.id: self._judge(p, reading, hidden, digests) for p in claims}
        for prediction in claims:
            verdict = verdicts[prediction.id]
            if verdict.matches:
                self._bind_first(prediction, verdict.matches, bind)
                continue
            complete = reading.covers(prediction.searched_from - MARGIN_SECONDS)
            done_at = prediction.holder_done_at
            if complete and done_at is not None and reading.began >= done_at + self._grace:
                only = verdict.candidates
                if len(only) == 1 and self._table.reserve(only[0].id, prediction):
                    logger.info("found by its likeness", upstream_id=only[0].id)
                    bind(prediction, _told(only[0]))
                    continue
            self._note_reading(prediction, reading, verdict, complete=complete, own=prediction.id in own)

    def _bind_first(self, prediction: Prediction, matches: Sequence[Listed], bind: Bind) -> None:
        """Bind the first of the entries with our webhook; each further one is an orphan."""
        for match in sorted(matches, key=lambda each: each.created):
            logger.info("found in the list", upstream_id=match.id)
            bind(prediction, _told(match))

    def _judge(
        self, prediction: Prediction, reading: Reading, hidden: Mapping[str, _Hidden], digests: dict[str, str | None]
    ) -> _Verdict:
        start = prediction.searched_from - MARGIN_SECONDS
        ours = webhook_of(prediction.id)
        matches, undecided = [], []
        for entry in reading.entries.values():
            if entry.created < start or _other_version(prediction, entry):
                continue
            known = hidden.get(entry.id, _Hidden(known=False))
            if webhook := entry.webhook or known.webhook:
                if webhook == ours:
                    matches.append(entry)
            elif not known.excluded and entry.id not in prediction.orphans | prediction.orphans_canceled:
                undecided.append(known.listed or entry if known.known else entry)
        candidates = []
        if undecided and not matches:
            target = target_of(prediction)
            likely = [entry for entry in undecided if target.ran(_told(entry))]
            if likely:
                if prediction.id not in digests:
                    text = self._table.input_json(prediction)
                    digests[prediction.id] = digest_of(text) if text else None
                wanted = digests[prediction.id]
                candidates = [entry for entry in likely if wanted and entry.input_digest == wanted]
        return _Verdict(tuple(matches), tuple(undecided), tuple(candidates))

    def _hidden(self, collection: Collection, reading: Reading, claims: Sequence[Prediction]) -> dict[str, _Hidden]:
        """What is known of the entries whose webhook the list does not show.

        Each is asked for once: what Replicate's answer shows is remembered.
        """
        entries = [
            entry
            for entry in reading.entries.values()
            if entry.webhook is None
            and any(entry.created >= p.searched_from - MARGIN_SECONDS and not _other_version(p, entry) for p in claims)
        ]
        if not entries:
            return {}
        found: dict[str, _Hidden] = {}
        keys = [
            key for entry in entries for key in ((f"listed#{entry.id}", "listed"), (f"upstream#{entry.id}", "upstream"))
        ]
        items = read_items(self._dynamodb, self._table_name, keys)
        ids = {p.id for p in claims}
        asked, until = 0, self._now() + _ENTRIES_SECONDS
        for entry in entries:
            reserved = items.get((f"upstream#{entry.id}", "upstream"))
            if reserved is not None and (reserved["id"] not in ids or reserved.get("orphan")):
                found[entry.id] = _Hidden(known=True, excluded=True)
                continue
            remembered = items.get((f"listed#{entry.id}", "listed"))
            if remembered is None:
                if asked >= _ENTRIES_ASKED or self._now() >= until:
                    continue  # the next reading goes on
                asked += 1
                remembered = self._ask(collection, entry)
            elif not remembered.get("webhook") and "bound_to" not in remembered and self._now() < until:
                # It may have been bound since, as by the answer to its create.
                remembered |= {"bound_to": bound} if (bound := self._table.bound_to(entry.id)) else {}
            if remembered is not None:
                found[entry.id] = _remembered(remembered, entry)
        return found

    def _ask(self, collection: Collection, entry: Listed) -> dict[str, Any] | None:
        """Find out whose an entry is, and remember it; None where that cannot be told now."""
        item: dict[str, Any] = {"pk": f"listed#{entry.id}", "sk": "listed",
                                "expires_at": int(self._now()) + _REMEMBERED_SECONDS}  # fmt: skip
        bound_to = self._table.bound_to(entry.id)
        if bound_to is not None:
            item["bound_to"] = bound_to
        else:
            try:
                shown = self._reader.entry(entry.id, collection)
            except Unavailable as error:
                logger.warning("an entry could not be read", upstream_id=entry.id, reason=str(error))
                return None
            if shown is None:
                return None  # 404 excludes nothing
            item["webhook"] = shown.webhook or ""
            details = {"model": shown.model, "version": shown.version, "deployment": shown.deployment,
                       "input_digest": shown.input_digest}  # fmt: skip
            item |= {name: value for name, value in details.items() if value is not None}
        self._dynamodb.put_item(TableName=self._table_name, Item=serialize(item))
        return item

    def _note_reading(
        self, prediction: Prediction, reading: Reading, verdict: _Verdict, *, complete: bool, own: bool
    ) -> None:
        done_at = prediction.holder_done_at
        if done_at is None or reading.began < done_at:
            return
        absent = complete and not verdict.undecided
        values: dict[str, Any] = {}
        began = int(reading.began)
        if absent and prediction.absent_at is None:
            values["absent_at"] = began
        elif absent and reading.began >= max(done_at + self._grace, (prediction.absent_at or 0) + 1):
            values["evidence_at"] = began
        if verdict.undecided:
            values["evidence_at"] = 0
            metrics.add_metric(name="UndecidableSubmissions", unit=MetricUnit.Count, value=1)
        if not values and not own and not verdict.undecided:
            return  # the lease's item tells that it was read
        saw: dict[str, Any] = {"at": began, "pages": reading.pages, "entries": len(reading.entries)}
        if verdict.undecided:
            saw["undecided"] = [entry.id for entry in verdict.undecided[:_NAMED]]
            saw["number"] = len(verdict.undecided)
        if not complete:
            saw["why_not"] = (reading.why_not or "it did not reach back to the first claim")[:200]
        failed = reading.why_not is not None
        wait = self._next_look(replace(prediction, **values), reading.began, failed=failed) - self._now()
        values |= {
            "read_at": began,
            "read_failed": failed,
            "readings_json": _appended(prediction.readings_json, saw),
            "next_check_at": int(self._now() + max(0, wait)) + 120,
        }
        self._table.note_unknown(prediction, values)

    # -- after a resubmission ---------------------------------------------------------------------------------

    def watch(self, prediction: Prediction) -> None:
        """Register a prediction that is about to be submitted again, so that the list is read again afterwards."""
        self._put(f"again#{prediction.id}", prediction)

    def look_again(self, orphaned: Callable[[Prediction], None], bind: Bind) -> int:
        """Read the list once more for predictions that were submitted again, where that is due.

        Args:
            orphaned: Told of each prediction that turned out to have an orphan.
            bind: Binds a prediction to what Replicate tells.

        Returns:
            For how many it was due.
        """
        registered = self._query("again#")
        if not registered:
            return 0
        now = self._now()
        there = self._get_many(str(item["id"]) for item in registered)
        due: dict[Collection, list[tuple[dict[str, Any], Prediction]]] = {}
        for item in registered:
            prediction = there.get(str(item["id"]))
            if (
                prediction is None
                or (prediction.terminal and not prediction.upstream_id)
                or _read_to_the_end(prediction, item.get("read_at", 0))
            ):
                self._remove(item["sk"])
            elif prediction.upstream_id and _due_again(prediction, item.get("read_at", 0), now):
                due.setdefault(prediction.collection, []).append((item, prediction))
        for collection, items in due.items():
            if not self._acquire(self._lease(), now):
                break
            watched = [prediction for _, prediction in items]
            reading = self._read(collection, [], bind, again=watched)
            if reading.why_not is not None:
                continue
            for item, prediction in items:
                self._find_orphans(prediction, reading, orphaned)
                self._note_again(item, prediction, reading)
        return sum(len(items) for items in due.values())

    def _find_orphans(self, prediction: Prediction, reading: Reading, orphaned: Callable[[Prediction], None]) -> None:
        ours = webhook_of(prediction.id)
        hidden = self._hidden(prediction.collection, reading, [prediction])
        for entry in reading.entries.values():
            webhook = entry.webhook or hidden.get(entry.id, _Hidden(known=False)).webhook
            if webhook != ours or entry.id == prediction.upstream_id:
                continue
            merge = self._table.merge(prediction.id, _told(entry), self._now())
            if merge.change is Change.ORPHAN and merge.prediction is not None and merge.prediction.orphans:
                logger.error("orphan: evidence of absence was wrong", upstream_id=entry.id)
                metrics.add_metric(name="Orphans", unit=MetricUnit.Count, value=1)
                orphaned(merge.prediction)

    def _note_again(self, item: Mapping[str, Any], prediction: Prediction, reading: Reading) -> None:
        began = int(reading.began)
        if _read_to_the_end(prediction, began):
            self._remove(item["sk"])
            return
        self._dynamodb.put_item(TableName=self._table_name, Item=serialize({**item, "read_at": began}))

    # -- orphans and the breaker ------------------------------------------------------------------------------

    def remember_orphan(self, upstream_id: str, prediction: Prediction) -> None:
        """Record whose orphan an upstream prediction is, so that it is nobody's candidate."""
        item = {"pk": f"upstream#{upstream_id}", "sk": "upstream", "id": prediction.id, "orphan": True,
                "expires_at": prediction.expires_at}  # fmt: skip
        self._dynamodb.put_item(TableName=self._table_name, Item=serialize(item))

    def stop(self, prediction: Prediction, upstream_id: str) -> None:
        """Stop all resubmission of this stack for `STOP_SECONDS`: evidence has proved wrong."""
        item = {**_BREAKER, "until": int(self._now()) + STOP_SECONDS, "id": prediction.id, "upstream_id": upstream_id}
        self._dynamodb.put_item(TableName=self._table_name, Item=serialize(item))
        logger.error("evidence of absence was wrong: nothing is submitted again for an hour", upstream_id=upstream_id)
        metrics.add_metric(name="ResubmissionStopped", unit=MetricUnit.Count, value=1)

    def stopped_seconds(self) -> int:
        """How long nothing is to be submitted again; 0 where nothing stops it."""
        found = self._dynamodb.get_item(TableName=self._table_name, Key=serialize(_BREAKER), ConsistentRead=True)
        until = deserialize(found["Item"])["until"] if "Item" in found else 0
        return max(0, int(until - self._now()))


class _Budget:
    """The list calls of the stack: `CALLS_AT_ONCE`, and `CALLS_PER_MINUTE` from then on (a GCRA).

    Args:
        used_until: Until when the rate is used up, in seconds since 1970.
    """

    interval = 60 / CALLS_PER_MINUTE
    burst_seconds = CALLS_AT_ONCE * interval

    def __init__(self, used_until: float, now: Callable[[], float], sleep: Callable[[float], None]) -> None:
        self.used_until = used_until
        self._now = now
        self._sleep = sleep

    def may_ask(self, over_at: float) -> bool:
        """Wait for the turn of one more call; return False if that is after `over_at`."""
        now = self._now()
        used_until = max(self.used_until, now) + self.interval
        wait = used_until - now - self.burst_seconds
        if now + wait >= over_at:
            return False
        if wait > 0:
            self._sleep(wait)
        self.used_until = used_until
        return True


def _last_of(lease: Mapping[str, Any], collection: str) -> dict[str, Any]:
    last: dict[str, Any] = json.loads(lease.get("last_json", "{}")).get(collection, {})
    return last


def _whole(moment: float) -> int:
    """A moment as a whole second, not earlier."""
    return math.ceil(moment)


def _other_version(prediction: Prediction, entry: Listed) -> bool:
    """Whether an entry is excluded by its version: both are named by 64 digits, and differ."""
    sent, ran = prediction.version or "", entry.version or ""
    return sent != ran and all(re.fullmatch(r"[0-9a-f]{64}", version) for version in (sent, ran))


def _remembered(item: Mapping[str, Any], entry: Listed) -> _Hidden:
    if "bound_to" in item:
        return _Hidden(known=True, excluded=True)
    webhook = str(item.get("webhook", ""))
    if webhook:
        return _Hidden(known=True, webhook=webhook)
    details = {
        name: item.get(name) or getattr(entry, name) for name in ("model", "version", "deployment", "input_digest")
    }
    return _Hidden(known=True, listed=replace(entry, **details))


def _told(entry: Listed) -> UpstreamPrediction:
    """What binds a prediction to an entry. Its end, if it has ended, is told by a poll, with the output."""
    return UpstreamPrediction(
        id=entry.id, status="starting", model=entry.model, version=entry.version, deployment=entry.deployment
    )


def _due_again(prediction: Prediction, read_at: int, now: float) -> bool:
    bound_at = prediction.bound_at or prediction.created
    moments = [bound_at + seconds for seconds in _AGAIN_AFTER_SECONDS]
    if prediction.ended_visibly and prediction.ended:
        # A reading that began in the same second may have begun before the end.
        moments.append(prediction.ended + 1)
    return any(read_at < moment <= now for moment in moments)


def _read_to_the_end(prediction: Prediction, read_at: int) -> bool:
    """Whether the last reading was the last one that is needed."""
    bound_at = prediction.bound_at or prediction.created
    last = max(bound_at + _AGAIN_AFTER_SECONDS[-1], (prediction.ended or 0) + 1)
    return prediction.ended_visibly and read_at >= last


def _appended(history_json: str | None, entry: Mapping[str, Any]) -> str:
    history = json.loads(history_json or "[]")
    return json.dumps([*history[-_HISTORY + 1 :], entry], separators=(",", ":"))
