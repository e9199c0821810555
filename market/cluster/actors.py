"""Services as detached Ray actors, and proxies that call them through crashes."""

import asyncio
import contextlib
import importlib
import inspect
import logging
import time
from enum import Enum
from typing import Any, TypeVar, cast

import ray
from ray.exceptions import RayError, RayTaskError

from market.cluster.node import NAMESPACE, OPERATOR_NODES
from market.errors import MarketError, MarketFault, Overloaded

logger = logging.getLogger(__name__)

RETRY_S = 60.0
PAUSE_S = 0.1

Service = TypeVar("Service")


class Answer(Enum):
    """What became of a command. NOT_OPEN is worth another try, REFUSED is final."""

    DONE = "done"
    REFUSED = "refused"
    NOT_OPEN = "not_open"


class ServiceHost:
    """The actor around a service: builds it, opens it, forwards calls to it.

    ``factory`` is ``module:function`` and returns an object with ``open`` and ``close``.
    """

    def __init__(self, factory: str, *arguments: Any) -> None:
        module, _, name = factory.partition(":")
        self._service = getattr(importlib.import_module(module), name)(*arguments)
        self._opening: asyncio.Task[None] | None = None
        if ray.is_initialized():
            # After a crash nobody may call for long, but the service has loops of its own to run.
            ray.get_runtime_context().current_actor.wake.remote()

    async def wake(self) -> None:
        """Open the service if nobody has called yet."""
        with contextlib.suppress(MarketError):  # whoever calls next is told
            await self._opened()

    async def call(self, method: str, arguments: Any, keywords: Any) -> tuple[Answer, Any]:
        """What became of the command, and its result or the error that callers shall see."""
        try:
            await self._opened()
        except MarketError as error:
            return Answer.NOT_OPEN, error
        try:
            return Answer.DONE, await getattr(self._service, method)(*arguments, **keywords)
        except MarketError as error:
            return Answer.REFUSED, error

    async def _opened(self) -> None:
        """Open the service once; a failed try is reported and the next call tries again."""
        if self._opening is None:
            self._opening = asyncio.create_task(self._service.open())
        opening = self._opening
        try:
            await asyncio.shield(opening)
        except BaseException:
            if opening.done() and self._opening is opening:
                self._opening = None
            raise


def start_service(name: str, factory: str, *arguments: Any) -> None:
    """Start the named actor unless it runs already. It restarts for ever after crashes."""
    ray.remote(ServiceHost).options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_task_retries=0,
        max_concurrency=10_000,
        num_cpus=0,
        label_selector=OPERATOR_NODES,
    ).remote(factory, *arguments)


def stop_service(name: str) -> None:
    """End the named actor for good; nothing happens if there is none."""
    try:
        actor = ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return
    ray.kill(actor, no_restart=True)


class _Absent(Exception):
    """No actor has the name (yet)."""


class _Proxy:
    def __init__(self, service: type, actor_name: str) -> None:
        self._service = service
        self._actor_name = actor_name
        self._actor: Any = None

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_") or not inspect.iscoroutinefunction(
            getattr(self._service, method, None)
        ):
            raise AttributeError(f"{self._service.__name__} has no command {method!r}")

        async def call(*arguments: Any, **keywords: Any) -> Any:
            return await self._call(method, arguments, keywords)

        return call

    def __getstate__(self) -> dict[str, Any]:
        return {"_service": self._service, "_actor_name": self._actor_name, "_actor": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    async def _find(self) -> Any:
        if self._actor is None:
            try:
                self._actor = await asyncio.to_thread(ray.get_actor, self._actor_name, NAMESPACE)
            except ValueError as error:
                raise _Absent from error
        return self._actor

    async def _call(self, method: str, arguments: Any, keywords: Any) -> Any:
        """Call until an answer comes: every command may safely be done twice."""
        deadline = time.monotonic() + RETRY_S
        while True:
            try:
                actor = await self._find()
                answer, value = await actor.call.remote(method, arguments, keywords)
            except RayTaskError as error:
                # The command itself failed and was undone; its cause may look like anything.
                logger.error("%s failed in %s", self._actor_name, method, exc_info=error)
                raise MarketFault(f"the {self._actor_name} failed in {method}") from error
            except (RayError, _Absent) as error:
                # Killed, restarting, out of memory, its node gone: whether the command was done
                # is unknown, so it is sent again.
                self._actor = None
                if time.monotonic() > deadline:
                    raise Overloaded(
                        f"the {self._actor_name} does not answer", retry_after_s=5
                    ) from error
                await asyncio.sleep(PAUSE_S)
                continue
            if answer is Answer.DONE:
                return value
            if answer is Answer.REFUSED:
                raise value
            if time.monotonic() > deadline:
                reason = f"the {self._actor_name} cannot start: {value}"
                raise Overloaded(reason, retry_after_s=5) from value
            await asyncio.sleep(PAUSE_S)


def proxy(service: type[Service], actor_name: str) -> Service:
    """An object with the service's coroutines that runs them in the named actor.

    Calls wait out restarts of the actor for up to 60 s, then raise Overloaded. Picklable.
    """
    return cast(Service, _Proxy(service, actor_name))
