"""The services as their actors run them, and how to reach them from any process of the cluster.

What is heavy is imported where it is needed: a scheduler that was killed must be back in seconds.
"""

from functools import partial
from typing import TYPE_CHECKING

from market.clock import SystemClock
from market.cluster.actors import proxy
from market.config import Config

if TYPE_CHECKING:
    from market.answers import Answers
    from market.ledger.service import Ledger
    from market.scheduler.service import Scheduler

LEDGER = "ledger"
SCHEDULER = "scheduler"
ANSWERS = "answers"


def make_ledger(config: Config) -> "Ledger":
    """The ledger service as its actor runs it."""
    from market.ledger.service import Ledger

    return Ledger(config, SystemClock())


def make_scheduler(config: Config) -> "Scheduler":
    """The scheduler service as its actor runs it."""
    from market.cluster.serve import ServeCluster
    from market.ledger.producer import UsageLedger, send
    from market.scheduler.core import LedgerPort
    from market.scheduler.service import Scheduler

    return Scheduler(
        config,
        SystemClock(),
        proxy(LedgerPort, LEDGER),  # type: ignore[type-abstract]
        ServeCluster(config),
        partial(send, proxy(UsageLedger, LEDGER)),  # type: ignore[type-abstract]
    )


def make_answers(config: Config) -> "Answers":
    """The store of answers as its actor runs it."""
    from market.answers import Answers

    return Answers(config, SystemClock())


def answers_client() -> "Answers":
    """The store of answers of the running market."""
    from market.answers import Answers

    return proxy(Answers, ANSWERS)


def ledger_client() -> "Ledger":
    """The ledger of the running market."""
    from market.ledger.service import Ledger

    return proxy(Ledger, LEDGER)


def scheduler_client() -> "Scheduler":
    """The scheduler of the running market."""
    from market.scheduler.service import Scheduler

    return proxy(Scheduler, SCHEDULER)
