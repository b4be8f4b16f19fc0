"""The proxy that kills functions at their calls kills the process that made the call, and no other one."""

import os
import socket
import subprocess
import sys

from tests.support.aws_proxy import process_at

CONNECT = """
import socket, sys
port, to = map(int, sys.argv[1:])
connection = socket.socket()
connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
connection.bind(("127.0.0.1", port))
connection.connect(("127.0.0.1", to))
print("connected", flush=True)
sys.stdin.read()
"""


def test_process_is_found_by_both_ends_where_another_one_has_the_same_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        to_one, to_other = one.getsockname()[1], other.getsockname()[1]
        with socket.socket() as ours:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            ours.bind(("127.0.0.1", 0))
            port = ours.getsockname()[1]
            ours.connect(("127.0.0.1", to_one))
            command = [sys.executable, "-c", CONNECT, str(port), str(to_other)]
            # Leaving the context closes its standard input, which ends it.
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:  # noqa: S603  # ours
                assert child.stdout is not None
                assert child.stdout.readline() == b"connected\n"
                assert process_at(port, to_one) == os.getpid()
                assert process_at(port, to_other) == child.pid
            assert process_at(port, to_other) is None
