"""`python -m local.replicate`: run the local Replicate until SIGINT, SIGTERM or the end of its parent.

Prints one line to stdout when it accepts requests: `{"url": "http://127.0.0.1:PORT/v1"}`. Logs go to stderr.
"""

import argparse
import contextlib
import json
import logging
import socket
import sys
from pathlib import Path

import uvicorn

from local.replicate.faults import Settings
from local.replicate.front import Connections, Front
from local.replicate.webhooks import new_signing_secret


class Server(uvicorn.Server):
    """Reports on stdout when it is ready, in a machine-readable form."""

    def __init__(self, config: uvicorn.Config, url: str) -> None:
        super().__init__(config)
        self._url = url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then print the ready line."""
        await super().startup(sockets)
        if not self.should_exit:
            print(json.dumps({"url": self._url}), flush=True)


def main() -> int:
    """Run the server; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m local.replicate", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1; 0 (the default) picks a free one")
    parser.add_argument(
        "--state-dir",
        type=Path,
        required=True,
        help="folder for files and logs; files of an earlier run are removed at start",
    )
    parser.add_argument("--token", default="r8_local", help="the one access token that is accepted (%(default)s)")
    parser.add_argument(
        "--removal-seconds", type=float, default=3600.0, help="data is removed after this (%(default)s)"
    )
    parser.add_argument("--creates-per-minute", type=int, default=600, help="rate limit of creates (%(default)s)")
    parser.add_argument("--signing-secret", default=None, help="whsec_…, key of the webhook signatures (random)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # httpx logs whole URLs.
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # With the protocol named, or asyncio does not disable Nagle's algorithm: 40 ms for each response.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", arguments.port))
    origin = f"http://127.0.0.1:{listener.getsockname()[1]}"
    settings = Settings(
        removal_seconds=arguments.removal_seconds,
        creates_per_minute=arguments.creates_per_minute,
        signing_secret=arguments.signing_secret or new_signing_secret(),
    )
    front = Front(origin, arguments.state_dir.resolve(), arguments.token, settings)
    config = uvicorn.Config(
        front.app(),
        http=Connections,
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=65,
        # Silent responses and streams do not delay the shutdown.
        timeout_graceful_shutdown=1,
    )
    with listener, contextlib.suppress(KeyboardInterrupt):
        Server(config, f"{origin}/v1").run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())
