"""Command for usage: what owners ran and what it cost, as a table with bars, CSV or JSON."""

import json
import sys
from datetime import UTC, datetime
from typing import Annotated

import typer

from predictions.api.usage import UsageQuery, usage_csv
from predictions.aws.dynamodb import Table
from predictions.cli.stack import JsonList, NotDone, Stack, command, group, line, print_table
from predictions.errors import Problem
from predictions.money.usage import read_usage

app = group("Show what owners ran and what it cost.")

_BAR = 20


@command(app, "usage", example="usage --from 2026-11-01 --to 2026-11-30 --by owner,model --stack NAME")
def show_usage(
    stack: Stack,
    first: Annotated[
        str | None, typer.Option("--from", metavar="YYYY-MM-DD", help="First day in UTC (default: of the month).")
    ] = None,
    last: Annotated[
        str | None, typer.Option("--to", metavar="YYYY-MM-DD", help="Last day in UTC (default: today).")
    ] = None,
    by: Annotated[str, typer.Option(help="Some of owner, day, and model or label, with commas.")] = "day",
    owner: Annotated[str | None, typer.Option(help="Only this owner (default: all).")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_json: JsonList = False,
) -> None:
    """Show counters of usage: predictions by end, seconds, and dollars that Replicate bills."""
    given = {"from": first, "to": last, "by": by}
    try:
        query = UsageQuery.read(
            {name: text for name, text in given.items() if text is not None}, datetime.now(UTC).date()
        )
    except Problem as problem:
        raise NotDone(str(problem.detail)) from None
    table = Table(stack.output("TableName"), stack.client("dynamodb"))
    rows = read_usage(table, query.first, query.last, owner, query.by)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    if as_csv:
        sys.stdout.write(usage_csv(query.by, rows))
        return
    most = max((row["cost_micro_dollars"] or 0 for row in rows), default=0) or 1
    shown = []
    for row in rows:
        cost, ends = row["cost_micro_dollars"], row["predictions"]
        dollars = "unknown" if cost is None else f"{cost / 1e6:.6f}"
        counts = (str(sum(ends.values())), str(ends["failed"]), f"{row['predict_seconds']:.1f}", dollars)
        groups = (line(row[name], 100) for name in query.by)
        shown.append((*groups, *counts, str(row["cost_unknown"]), "#" * round((cost or 0) / most * _BAR)))
    print_table((*(name.upper() for name in query.by), "RAN", "FAILED", "SECONDS", "DOLLARS", "UNKNOWN", ""), shown)
