"""Permissions of callers.

Permissions on EventBridge's rules and on schedules are checked with other ARNs than on AWS, and whether a function may
describe a run of a Distributed Map with any run instead of this one. `dynamodb:LeadingKeys`, with which policies limit
the items of the table that a function may access, is not supported.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from ministack.core import iam_actions

# The leading keys with which the current request is checked.
CHECKED: ContextVar[list[str]] = ContextVar("CHECKED")
CONDITION = re.compile(r"^\s*(#?\w+)\s*=\s*(:\w+)")


def leading_keys(request: Any) -> list[str]:
    """Return the partition keys in a DynamoDB request (strings in this stack)."""
    found = [request[part].get("pk") for part in ("Key", "Item") if part in request]
    for table in request.get("RequestItems", {}).values():
        puts = [each["PutRequest"]["Item"] for each in table if "PutRequest" in each] if isinstance(table, list) else []
        found += [key.get("pk") for key in (puts if isinstance(table, list) else table.get("Keys", []))]
    if named := CONDITION.match(request.get("KeyConditionExpression", "")):
        found.append(request.get("ExpressionAttributeValues", {}).get(named[2]))
    return [str(key["S"]) for key in found if isinstance(key, dict) and "S" in key]


def with_leading_keys(context_of: Callable[[bytes], dict[str, Any]]) -> Callable[[bytes], dict[str, Any]]:
    """Add the leading keys of a request to the context of its policies.

    https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/specifying-conditions.html
    """

    @functools.wraps(context_of)
    def context(body: bytes) -> dict[str, Any]:
        keys = leading_keys(json.loads(body or b"{}"))
        CHECKED.set(keys)
        # Without any key it is absent, as on AWS for a Scan or a DescribeTable.
        return context_of(body) | ({"dynamodb:LeadingKeys": keys} if keys or b"TransactItems" in body else {})

    return context


class EachWithItsKeys(list[tuple[str, str]]):
    """The checks of a transaction's items, one after the other, each with its own leading keys."""

    keys: list[list[str]]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        checked = CHECKED.get()
        for check, checked[:] in zip(super().__iter__(), self.keys, strict=True):
            yield check


def with_leading_keys_of_items(checks_of: Callable[..., list[tuple[str, str]]]) -> Callable[..., list[tuple[str, str]]]:
    """Check each item of a transaction with its own leading keys."""

    @functools.wraps(checks_of)
    def checks(action: str, body: bytes, *others: Any) -> list[tuple[str, str]]:
        found = EachWithItsKeys(checks_of(action, body, *others))
        if found:
            found.keys = [leading_keys(each) for item in json.loads(body)["TransactItems"] for each in item.values()]
        return found

    return checks


def addressed(find: Callable[..., str]) -> Callable[..., str]:
    """Check permissions on rules and schedules with the ARNs that AWS uses.

    https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazoneventbridge.html
    https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazoneventbridgescheduler.html
    """

    @functools.wraps(find)
    def resource(
        service: str, method: str, path: str, headers: Any, body: bytes, query: Any, region: str, account: str
    ) -> str:
        found = find(service, method, path, headers, body, query, region, account)
        if service == "events":
            asked = json.loads(body or b"{}")
            name, bus = asked.get("Rule") or asked.get("Name"), asked.get("EventBusName") or "default"
            action = next((str(headers[each]) for each in headers if each.lower() == "x-amz-target"), "")
            if name and action.endswith(("Rule", "Targets")):
                return f"arn:aws:events:{region}:{account}:rule/{name if bus == 'default' else f'{bus}/{name}'}"
        elif service == "scheduler" and ":schedule/default/" in found:
            group = json.loads(body or b"{}").get("GroupName") or query.get("groupName") or "default"
            return found.replace("/default/", f"/{group[0] if isinstance(group, list) else group}/")
        return found

    return resource


def with_map_runs(resource_of: Callable[..., str]) -> Callable[..., str]:
    """Check permissions on the very run of a Map that is described."""

    @functools.wraps(resource_of)
    def arn(*args: Any, **options: Any) -> str:
        found = resource_of(*args, **options)
        if found == "*":
            for value in (*args, *options.values()):
                if isinstance(value, bytes) and b'"mapRunArn"' in value:
                    return str(json.loads(value)["mapRunArn"])
        return found

    return arn


def patch() -> None:
    """Change the emulator."""
    iam_actions.extract_resource_arn = with_map_runs(addressed(iam_actions.extract_resource_arn))
    iam_actions.dynamodb_service_context = with_leading_keys(iam_actions.dynamodb_service_context)
    iam_actions.dynamodb_transaction_checks = with_leading_keys_of_items(iam_actions.dynamodb_transaction_checks)
