"""Copies files in a process of its own, and tells what that took of memory and time.

    python tests/attacks/copier.py '{"warm_up": URL, "predictions": [{"files": [URL, …], "seconds": 30}, …]}'

The outputs bucket is that of the environment: `AWS_ENDPOINT_URL_S3` says where it is. Before the measured copies one
of a small file makes the clients, and what it used is given back, so that what is measured are the files.
"""

import ctypes
import json
import re
import sys
import time
from pathlib import Path

from predictions.errors import CopyInterrupted
from predictions.files.copier import STOP_BEFORE_SECONDS
from predictions.files.outputs_bucket import OutputsBucket


def main() -> None:
    asked = json.loads(sys.argv[1])
    bucket = OutputsBucket.from_env()

    def copy(urls: list[str], folder: str, seconds: float) -> list[dict[str, object]]:
        end = time.monotonic() + seconds + STOP_BEFORE_SECONDS
        files = bucket.find_files(list(urls))
        assert len(files) == len(urls)
        stored = bucket.store(
            files, prefix=f"alice/{folder}", remaining_seconds=lambda: end - time.monotonic(), final=True
        )
        return [file.to_item() for file in stored]

    try:
        copy([asked["warm_up"]] * 4, "warm", 60)
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is used now
        before = memory("VmRSS")
        stored, seconds = [], []
        for n, prediction in enumerate(asked["predictions"]):
            started = time.monotonic()
            stored.append(copy(prediction["files"], str(n), prediction["seconds"]))
            seconds.append(time.monotonic() - started)
    except CopyInterrupted as error:
        sys.exit(f"interrupted, although this is the last call: {error}")
    answer = {"stored": stored, "seconds": seconds, "bytes_above_start": memory("VmHWM") - before}
    print(json.dumps(answer))  # noqa: T201  # a program's answer


def memory(name: str) -> int:
    """A figure of this process, in bytes: https://man7.org/linux/man-pages/man5/proc_pid_status.5.html"""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
