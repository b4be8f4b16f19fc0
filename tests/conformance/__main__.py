"""Run the flows of all official clients and write ``docs/conformance.md``: ``make conformance``."""

import sys

from local.cloud import LocalCloud
from tests.conformance.clients import CLIENTS, OPERATIONS, page, write
from tests.support.deployment import QUICK


def main() -> int:
    """Write the page if every flow went well; return the exit status."""
    lacks = [f"{client.title}: {client.lacks}" for client in CLIENTS.values() if client.lacks]
    if lacks:
        sys.stderr.write("\n".join(lacks) + "\n")
        return 1
    with LocalCloud(parameters=QUICK) as cloud:
        told = {client.name: client.run(cloud) for client in CLIENTS.values()}
    failed = [
        f"{name} {flow}: {told[name][flow].detail if flow in told[name] else 'it has no such flow'}"
        for name in told
        for flow in OPERATIONS
        if flow not in told[name] or not told[name][flow].ok
    ]
    if failed:
        sys.stderr.write("\n".join(failed) + "\n")
        return 1
    write(page(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
