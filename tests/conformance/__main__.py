"""Run the flows of all clients and write ``docs/conformance.md``: ``make conformance``.

``python -m tests.conformance CLIENT [FLOW …]`` runs one client's flows only, prints what they tell, and writes nothing.
"""

import sys

from local.cloud import LocalCloud
from tests.conformance.suite import CLIENTS, NOT_OF_THE_OFFICIAL, Client, Told, operations, page, write
from tests.support.deployment import QUICK


def main(names: list[str]) -> int:
    """Write the page if every flow went well; return the exit status."""
    if names:
        return try_one(CLIENTS[names[0]], names[1:])
    lacks = [f"{client.title}: {client.lacks}" for client in CLIENTS.values() if client.lacks]
    if lacks:
        sys.stderr.write("\n".join(lacks) + "\n")
        return 1
    with LocalCloud(parameters=QUICK) as cloud:
        told = {}
        for client in CLIENTS.values():
            sys.stderr.write(f"{client.title}\n")
            told[client.name] = client.run(cloud)
    failed = [line for name in told for line in complaints(CLIENTS[name], told[name])]
    if failed:
        sys.stderr.write("\n".join(failed) + "\n")
        return 1
    write(page(told))
    return 0


def complaints(client: Client, told: dict[str, Told]) -> list[str]:
    """Return what went wrong with a client's flows, and which are missing."""
    failed = [f"{client.name} {flow}: {each.detail}" for flow, each in told.items() if not each.ok]
    wanted = operations().keys() - NOT_OF_THE_OFFICIAL if client.official else set()
    missing = [f"{client.name} {flow}: it has no such flow" for flow in sorted(wanted - told.keys())]
    unknown = [
        f"{client.name} {flow}: there is no such operation" for flow in sorted(told.keys() - operations().keys())
    ]
    return failed + missing + unknown


def try_one(client: Client, flows: list[str]) -> int:
    """Run flows of one client, or all of its flows, and print what they tell; return the exit status."""
    with LocalCloud(parameters=QUICK) as cloud:
        told = client.run(cloud, flows)
    for flow, each in told.items():
        sys.stderr.write(f"{'ok    ' if each.ok else 'FAILED'} {flow} {each.detail}\n")
    return 0 if all(each.ok for each in told.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
