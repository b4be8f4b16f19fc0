"""The processes of a local cloud: started at free ports, awaited, and stopped with everything that they started."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator

import httpx

SECONDS_TO_STOP = 1.0  # no state is kept, so killing loses nothing
SECONDS_TO_BE_GONE = 10.0  # a killed process is a zombie until init reaps it


def free_port() -> int:
    """Return a port of this machine that no process uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def answers(url: str, process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait until a process responds at a URL; return whether it does, and runs."""
    deadline = time.monotonic() + seconds
    with httpx.Client(trust_env=False, timeout=5) as http:
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if http.get(url).is_success:
                    return process.poll() is None
            time.sleep(0.1)
    return False


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a process group, and wait until all have ended (workers linger)."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(SECONDS_TO_STOP)
    # macOS returns EPERM for a group of zombies.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        for number, seconds in ((signal.SIGTERM, SECONDS_TO_STOP), (signal.SIGKILL, SECONDS_TO_BE_GONE)):
            os.killpg(process.pid, number)
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.05)
    process.wait()
    if process.stdin:
        process.stdin.close()


def is_running(pid: int) -> bool:
    """Return whether a process with this id exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore a second Ctrl-C while stopping (possible in the main thread only)."""
    signals = (signal.SIGINT, signal.SIGTERM)
    try:
        before = [signal.signal(number, signal.SIG_IGN) for number in signals]
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
