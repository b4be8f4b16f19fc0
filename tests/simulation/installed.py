"""The real library and handlers, put into a simulated world: its clients, clock and chance are the schedule's."""

import os
import random
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import httpx
from predictions.aws import clients as aws
from predictions.files import copier
from predictions.files.outputs_bucket import OutputsBucket
from predictions.intake import queue as requests
from predictions.notifications.webhook_sender import Receivers
from predictions.observability import logger, metrics
from predictions.upstream import client as upstream

from tests.simulation.verdict import Verdict
from tests.simulation.world import ENVIRONMENT_HERE, World
from tests.simulation.worlds import worlds_of
from tests.support import library, strict_parameters
from tests.support.aws_clients import Clients
from tests.support.downloads import HttpxDownloads


class _Inline:
    """A pool of threads without threads: several at once would come in an order that no seed decides."""

    def __init__(self, _: int) -> None:
        pass

    def __enter__(self) -> "_Inline":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    map = staticmethod(map)


class Simulation:
    """Runs schedules in this process; see `installed`."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients

    def run(self, seed: int, **options: Any) -> Verdict:
        """Runs one schedule, in the worlds that its seed has."""
        return self.run_in(World(seed, **{"scenarios": worlds_of(seed), **options}))

    def run_in(self, world: World) -> Verdict:
        """Runs the schedule of a world."""
        self._clients.world = world
        aws._api_url = None
        for name in ("_source", "_pipelines", "_dropped_manifests"):
            getattr(requests, name).cache_clear()
        kept = {name: os.environ[name] for name in world.environment}
        os.environ.update(world.environment)
        strict_parameters.refused.clear()
        try:
            verdict = world.run()
            # A function that catches everything must not hide a call that AWS would refuse.
            assert not strict_parameters.refused, strict_parameters.refused
            return verdict
        finally:
            os.environ.update(kept)
            self._clients.world = None

    @property
    def world(self) -> World:
        """The one that runs now."""
        assert isinstance(self._clients.world, World)
        return self._clients.world


def _count_nothing(*_: object, **__: object) -> None:
    """In the place of what writes metrics to the log."""


@cache
def _clients() -> Clients:
    """Made once: reading what botocore knows of seven services takes a third of a second."""
    return Clients()


@cache
def _modules() -> list[ModuleType]:
    """All of the library but its commands: what handlers import only when they need it, too."""
    found = [import_module(name) for name in library.of_functions()]
    assert len(found) >= library.MODULES_LEAST - 10
    return found


@contextmanager
def _clocked(here: dict[Any, Any], own: dict[type, dict[str, Any]]) -> Iterator[None]:
    """Replaces the defaults of all constructors that are the real clock or real chance, and some by their names."""
    changed: list[tuple[Any, Any, Any]] = []
    for module in _modules():
        for each in list(vars(module).values()):
            if not isinstance(each, type) or each.__module__ != module.__name__ or "__init__" not in vars(each):
                continue
            method: Any = vars(each)["__init__"]
            if not hasattr(method, "__kwdefaults__"):
                continue
            named = own.get(each, {})
            keywords, positional = method.__kwdefaults__ or {}, method.__defaults__ or ()
            changed.append((method, dict(keywords) or None, positional or None))
            method.__kwdefaults__ = {n: named.get(n, _replaced(v, here)) for n, v in keywords.items()} or None
            method.__defaults__ = tuple(_replaced(value, here) for value in positional) or None
    try:
        yield
    finally:
        for method, keywords, positional in changed:
            method.__kwdefaults__, method.__defaults__ = keywords, positional


def _replaced(value: Any, here: dict[Any, Any]) -> Any:
    return next((ours for real, ours in here.items() if value is real), value)


@contextmanager
def installed() -> Iterator[Simulation]:
    """The library in this world: its clients, clock and chance are the schedule's, everything else is real."""
    clients = _clients()
    simulation = Simulation(clients)

    def now() -> float:
        return simulation.world.scheduler.now

    def sleep(seconds: float) -> None:
        simulation.world.step("sleeps", seconds)

    def chance() -> float:
        return simulation.world.rng.random()

    transport = httpx.MockTransport(lambda request: simulation.world.answer("handle", request))
    files = httpx.Client(transport=httpx.MockTransport(lambda request: simulation.world.answer("serve_file", request)))
    receivers = httpx.Client(transport=httpx.MockTransport(lambda request: simulation.world.answer("receive", request)))

    class Client(httpx.Client):
        def __init__(self, **options: Any) -> None:
            super().__init__(**{**options, "transport": transport})

    secret = SimpleNamespace(
        token_hex=lambda n: simulation.world.rng.randbytes(n).hex(),
        token_bytes=lambda n: simulation.world.rng.randbytes(n),
        token_urlsafe=lambda n: simulation.world.rng.randbytes(n).hex(),
        choice=lambda of: simulation.world.rng.choice(of),
        randbelow=lambda n: simulation.world.rng.randrange(n),
    )
    clock = SimpleNamespace(
        time=now, monotonic=now, sleep=sleep, perf_counter=time.perf_counter, thread_time=time.thread_time
    )
    here = {time.time: now, time.monotonic: now, time.sleep: sleep, random.random: chance}
    own: dict[type, dict[str, Any]] = {
        OutputsBucket: {"open_client": lambda: HttpxDownloads(files)},
        Receivers: {"open_client": lambda **_: nullcontext(receivers)},
    }
    level = logger.log_level
    environment = {**{k: v for k, v in os.environ.items() if not k.startswith("AWS_")}, **ENVIRONMENT_HERE}
    with ExitStack() as stack:
        for patched in (
            mock.patch.dict(os.environ, environment, clear=True),
            mock.patch.object(aws, "_client", clients),
            mock.patch.object(aws, "_api_url", None),
            mock.patch.object(copier, "ThreadPoolExecutor", _Inline),
            # In the thread of the process that the scheduler knows: the upstream itself keeps to the read's time.
            mock.patch.object(upstream, "run_in_time", lambda call, seconds: call()),
            mock.patch.object(httpx, "Client", Client),
            mock.patch.object(metrics, "add_metric", _count_nothing),
            _clocked(here, own),
        ):
            stack.enter_context(patched)
        for module in _modules():
            for name, real, ours in (("time", time, clock), ("secrets", secrets, secret)):
                if vars(module).get(name) is real:
                    stack.enter_context(mock.patch.object(module, name, ours))
            if "count_ended" in vars(module):
                stack.enter_context(mock.patch.object(module, "count_ended", _count_nothing))
        logger.setLevel("CRITICAL")
        try:
            yield simulation
        finally:
            logger.setLevel(level)
            files.close()
            receivers.close()


Chunk = tuple[int, Counter[str], dict[str, float], list[Verdict]]


def run_seeds(seeds: range) -> Chunk:
    """Runs some schedules: how many, what happened in them, the longest delays, and those that broke a promise."""
    figures: Counter[str] = Counter()
    worst: dict[str, float] = {}
    broken = []
    with installed() as simulation:
        for seed in seeds:
            verdict = simulation.run(seed)
            figures.update(verdict.figures)
            for what, seconds in verdict.worst.items():
                worst[what] = max(worst.get(what, 0.0), seconds)
            if verdict.broken:
                broken.append(verdict)
    return len(seeds), figures, worst, broken
