"""Evidence: whether an entry of Replicate's list is the prediction of a claim, another one, or undecided.

Inputs are removed and redacted, webhooks may be hidden, models have aliases: only what is listed in
`lifecycle.reconcile` excludes an entry. The response to a GET of an entry is stored (`pk` = `listed#{id}`).
"""

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from predictions.aws.dynamodb import Table
from predictions.lifecycle.targets import target_of, webhook_of
from predictions.observability import logger
from predictions.store.keys import listed_key, upstream_key
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction
from predictions.upstream.client import Collection
from predictions.upstream.errors import Unavailable
from predictions.upstream.list_reader import MARGIN_SECONDS, Listed, ListReader, Reading, digest_of
from predictions.upstream.prediction import UpstreamPrediction

_ENTRIES_ASKED = 40
_ENTRIES_SECONDS = 10
_REMEMBERED_SECONDS = 7200


@dataclass(frozen=True)
class Verdict:
    """Hold what a reading says of one claim."""

    matches: tuple[Listed, ...] = ()
    undecided: tuple[Listed, ...] = ()
    candidates: tuple[Listed, ...] = ()


@dataclass(frozen=True)
class Hidden:
    """Describe an entry whose webhook the list does not show; `known` is False if it was not read."""

    known: bool
    webhook: str | None = None
    excluded: bool = False
    listed: Listed | None = None


class Evidence:
    """Judge entries of Replicate's list.

    Args:
        reader: Reads single entries.
    """

    def __init__(
        self,
        table: PredictionsTable,
        reader: ListReader,
        items: Table,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._table = table
        self._reader = reader
        self._items = items
        self._now = now

    @classmethod
    def from_env(cls, table: PredictionsTable, reader: ListReader) -> "Evidence":
        """Read `TABLE_NAME`."""
        return cls(table, reader, Table.from_env())

    def judge(
        self, prediction: Prediction, reading: Reading, hidden: Mapping[str, Hidden], digests: dict[str, str | None]
    ) -> Verdict:
        """Judge what a reading says of one claim.

        Args:
            prediction: The prediction of the claim.
            reading: The reading.
            hidden: Knowledge of the entries whose webhook the list does not show.
            digests: Digests of inputs by id, to which this adds those that it needs.
        """
        start = prediction.searched_from - MARGIN_SECONDS
        ours = webhook_of(prediction.id)
        matches, undecided = [], []
        for entry in reading.entries.values():
            if entry.created < start or _other_version(prediction, entry):
                continue
            known = hidden.get(entry.id, Hidden(known=False))
            if webhook := entry.webhook or known.webhook:
                if webhook == ours:
                    matches.append(entry)
            elif not known.excluded and entry.id not in prediction.orphans | prediction.orphans_canceled:
                undecided.append(known.listed or entry if known.known else entry)
        candidates: list[Listed] = []
        if undecided and not matches:
            target = target_of(prediction)
            likely = [entry for entry in undecided if target.ran(told_by(entry))]
            if likely:
                if prediction.id not in digests:
                    text = self._table.input_json(prediction)
                    digests[prediction.id] = digest_of(text) if text else None
                wanted = digests[prediction.id]
                candidates = [entry for entry in likely if wanted and entry.input_digest == wanted]
                if not all(hidden.get(entry.id, Hidden(known=False)).known for entry in candidates):
                    candidates = []  # a GET may still show their webhooks
        return Verdict(tuple(matches), tuple(undecided), tuple(candidates))

    def hidden(self, collection: Collection, reading: Reading, claims: Sequence[Prediction]) -> dict[str, Hidden]:
        """Return the records of the entries whose webhook the list does not show.

        Each is read once: the response is stored.
        """
        entries = [
            entry
            for entry in reading.entries.values()
            if entry.webhook is None
            and any(entry.created >= p.searched_from - MARGIN_SECONDS and not _other_version(p, entry) for p in claims)
        ]
        if not entries:
            return {}
        found: dict[str, Hidden] = {}
        keys = [key for entry in entries for key in (listed_key(entry.id), upstream_key(entry.id))]
        items = self._items.read_items(keys)
        ids = {p.id for p in claims}
        asked, until = 0, self._now() + _ENTRIES_SECONDS
        for entry in entries:
            reserved = items.get(upstream_key(entry.id))
            if reserved is not None and (reserved["id"] not in ids or reserved.get("orphan")):
                found[entry.id] = Hidden(known=True, excluded=True)
                continue
            remembered = items.get(listed_key(entry.id))
            if remembered is None:
                if asked >= _ENTRIES_ASKED or self._now() >= until:
                    continue  # the next reading continues
                asked += 1
                remembered = self._ask(collection, entry)
            elif not remembered.get("webhook") and "bound_to" not in remembered and self._now() < until:
                # An entry may have been bound since, for example by the response to its create.
                remembered |= {"bound_to": bound} if (bound := self._table.bound_to(entry.id)) else {}
            if remembered is not None:
                found[entry.id] = _remembered(remembered, entry)
        return found

    def _ask(self, collection: Collection, entry: Listed) -> dict[str, Any] | None:
        """Read which prediction an entry belongs to, and store that. Return None if that is unknown for now."""
        item: dict[str, Any] = {"expires_at": int(self._now()) + _REMEMBERED_SECONDS}
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
        self._items.put_item(listed_key(entry.id), item)
        return item


def _other_version(prediction: Prediction, entry: Listed) -> bool:
    """Return whether the version excludes an entry: both versions have 64 digits, and differ."""
    sent, ran = prediction.version or "", entry.version or ""
    return sent != ran and all(re.fullmatch(r"[0-9a-f]{64}", version) for version in (sent, ran))


def _remembered(item: Mapping[str, Any], entry: Listed) -> Hidden:
    if "bound_to" in item:
        return Hidden(known=True, excluded=True)
    webhook = str(item.get("webhook", ""))
    if webhook:
        return Hidden(known=True, webhook=webhook)
    details = {
        name: item.get(name) or getattr(entry, name) for name in ("model", "version", "deployment", "input_digest")
    }
    return Hidden(known=True, listed=replace(entry, **details))


def told_by(entry: Listed) -> UpstreamPrediction:
    """Return what binds a prediction to an entry. A poll reads the completion, with the output."""
    return UpstreamPrediction(
        id=entry.id, status="starting", model=entry.model, version=entry.version, deployment=entry.deployment
    )


def undecided_ids(prediction: Prediction) -> list[str]:
    """Return the ids of upstream predictions that may be this one, as the last conclusive reading showed them.

    An incomplete reading does not clear them.
    """
    conclusive = [reading for reading in json.loads(prediction.readings_json or "[]") if is_conclusive(reading)]
    return list(conclusive[-1].get("undecided", [])) if conclusive else []


def is_conclusive(reading: Mapping[str, Any]) -> bool:
    """Return whether a reading shows which entries may be the prediction: it names some, or is complete."""
    return "undecided" in reading or "why_not" not in reading
