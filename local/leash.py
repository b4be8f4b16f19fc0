"""Run a program that does not outlive its starter: ``python leash.py PROGRAM.py ARGUMENT…``.

Standard input is the leash: a pipe that the starter never writes to. However the starter ends, SIGKILL included, the
kernel closes the pipe, and this process stops itself and its child processes. This works on Linux and macOS. The
starter must make it the leader of a process group of its own.
"""

import os
import runpy
import signal
import sys
import threading
import time

SECONDS_TO_STOP = 3


def stop_when_let_go() -> None:
    """Wait for the end of standard input, then stop the group, by force if needed."""
    while os.read(0, 4096):
        pass
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGTERM)
        time.sleep(SECONDS_TO_STOP)
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def main() -> None:
    """Run the Python file named by the first argument; it sees the arguments after it."""
    threading.Thread(target=stop_when_let_go, daemon=True).start()
    del sys.argv[0]
    # Nothing is imported from the folder of this file: `local.replicate` would shadow `replicate`.
    del sys.path[0]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
