"""The commands behind ``make``: ``python -m local run|demo|send|env|validate``."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from local.activity import Activity
from local.cloud import LocalCloud, LocalCloudError, Upstream, local_directory, stack_parameters, validate
from local.demo import DemoFailed, demonstrate
from local.picture import Recorder, draw_demo
from local.running import NotRunning, exports, reserved, running_stack
from local.send import SendFailed, send
from local.terminal import Terminal


def main() -> int:
    """Run one command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m local", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run", help="keep a local cloud running until SIGINT or SIGTERM")
    demo = commands.add_parser("demo", help="run predictions on a local cloud and show each step")
    demo.add_argument("--live", action="store_true", help="run them on the real Replicate, which costs money")
    demo.add_argument("--verbose", action="store_true", help="also show the functions, states and writes of each one")
    demo.add_argument("--picture", type=Path, help="draw the output into this SVG file")
    sending = commands.add_parser("send", help="send an event sample to the running local cloud")
    sending.add_argument("sample", type=Path, help="a file below events/")
    sending.add_argument("--model", help="the model to run, as owner/name")
    sending.add_argument("--file", type=Path, help="the content of the object in a sample of S3")
    commands.add_parser("env", help="print the variables of the running local cloud, for eval in a shell")
    commands.add_parser("validate", help="check template.yaml")
    arguments = parser.parse_args()

    terminal = Terminal(sys.stdout)
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    try:
        match arguments.command:
            case "run":
                run(terminal, os.environ)
            case "demo":
                if arguments.picture:
                    recorder = Recorder(sys.stdout)
                    files = demonstrate(Terminal(recorder, colours=True), os.environ, verbose=arguments.verbose)
                    arguments.picture.write_text(draw_demo(recorder.parts, files))
                else:
                    demonstrate(terminal, os.environ, live=arguments.live, verbose=arguments.verbose)
            case "send":
                send(terminal, arguments.sample, model=arguments.model, file=arguments.file)
            case "env":
                terminal = Terminal(sys.stderr)  # a shell evaluates the other stream
                print(exports(running_stack(), os.environ))
            case "validate":
                return validate()
    except (LocalCloudError, NotRunning, DemoFailed, SendFailed) as error:
        terminal.refuse(str(error))
        return 1
    return 0


def run(terminal: Terminal, environment: Mapping[str, str]) -> None:
    """Keep a local cloud running in the foreground, with its ``stack.json``.

    Args:
        terminal: Where progress and addresses are shown.
        environment: ``LOCAL_DIR``, ``REPLICATE_API_URL`` with ``REPLICATE_API_TOKEN``, ``STACK_PARAMETERS``.

    Raises:
        LocalCloudError: The cloud did not start, another one runs in this folder, or those variables are invalid.
    """
    upstream = upstream_from(environment)
    parameters = stack_parameters(environment.get("STACK_PARAMETERS", ""))
    path = local_directory() / "stack.json"
    stopped = threading.Event()
    with reserved(path.parent):
        with LocalCloud(parameters=parameters, upstream=upstream, say=terminal.step) as cloud:
            # From here on a signal ends the wait instead of raising an exception at an arbitrary point.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: stopped.set())
            activity = Activity(cloud, terminal)
            activity.skip()
            with cloud.stack.file(path):
                terminal.write(READY.format(stack=cloud.stack, path=path, model=EXAMPLE, logs=cloud.logs))
                while not (stopped.wait(0.5) or interrupted_make()):
                    activity.show()
            terminal.step("stopping")
        terminal.step("stopped")


EXAMPLE = "local/painter"
READY = """
The stack is running. Its addresses and a token are in {path}
Logs of the functions, of AWS and of the stand-in are in {logs} until it stops

  curl -s {stack.api_url}/models/{model}/predictions \\
    -H 'Authorization: Bearer {stack.access_token}' \\
    -H 'Content-Type: application/json' -H 'Prefer: wait' \\
    -d '{{"input": {{"prompt": "a lighthouse at dusk"}}}}'

In another shell, eval "$(make -s env)" sets the variables that the pages use. Ctrl-C stops the stack.
"""


def upstream_from(environment: Mapping[str, str]) -> Upstream | None:
    """Return the Replicate that the environment names, or None for the stand-in.

    Raises:
        LocalCloudError: The environment has an address without a token.
    """
    url = environment.get("REPLICATE_API_URL", "").rstrip("/")
    if not url:
        return None
    token = environment.get("REPLICATE_API_TOKEN")
    if not token:
        raise LocalCloudError("REPLICATE_API_URL is set, REPLICATE_API_TOKEN is not: set it to a token of that API.")
    return Upstream(url, token)


def interrupted_make() -> bool:
    """Return whether the make that started this process received SIGINT alone.

    A terminal sends Ctrl-C to every process of a job, and make relies on that: it only waits. Other programs may signal
    only the process that they started. While make handles the signal it blocks it, which Linux shows; on other systems
    this is False.
    """
    try:
        status = Path(f"/proc/{os.getppid()}/status").read_text()
    except OSError:
        return False
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    return fields["Name"] == "make" and bool(int(fields["SigBlk"], 16) >> (signal.SIGINT - 1) & 1)


def _stop(number: int, _frame: FrameType | None) -> None:
    # Raised at the point where the signal arrives: every context on the way out stops its processes.
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
