"""The scheduler's state: in memory to decide on, in SQL to survive; both change together."""

import asyncio
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, Table, delete, select

from market import storage
from market.catalog import Model
from market.errors import Overloaded
from market.scheduler import tables
from market.storage import Stateless, StorageFull, upsert
from market.types import (
    Bounds,
    CloseReason,
    Deployment,
    Gpu,
    LanePolicy,
    Lease,
    LeaseState,
    Mode,
    Offer,
    OfferState,
    Order,
    OrderState,
    Place,
    Replica,
    ReplicaState,
    StartCost,
    UsageRecord,
)

logger = logging.getLogger(__name__)

LOCK_PATIENCE_S = 5.0

Value = Offer | Order | Lease | Deployment | Replica | StartCost | Model


@dataclass
class State:
    """Everything by id. ``outbox`` are lease segments that the ledger does not have yet."""

    offers: dict[str, Offer] = field(default_factory=dict)
    orders: dict[str, Order] = field(default_factory=dict)
    leases: dict[str, Lease] = field(default_factory=dict)
    deployments: dict[str, Deployment] = field(default_factory=dict)
    replicas: dict[str, Replica] = field(default_factory=dict)
    starts: dict[str, StartCost] = field(default_factory=dict)
    models: dict[str, Model] = field(default_factory=dict)
    outbox: dict[int, tuple[str, UsageRecord]] = field(default_factory=dict)
    epoch: int = 0
    next_seq: int = 0


class Store:
    """One writer, one connection. ``state`` may be read at any time, changed only by ``save``."""

    def __init__(self, url: str, lock_file: Path, on_fatal: Callable[[], None]) -> None:
        self._url = url
        self._lock_file = lock_file
        self._on_fatal = on_fatal
        self._thread = ThreadPoolExecutor(1, "scheduler-store")
        self._resources = ExitStack()
        self.state = State()
        self.replica_changes = 0

    async def open(self) -> None:
        """Lock, connect, migrate, load. Raises MarketFault if another process has it."""
        try:
            lock = storage.exclusive_lock(self._lock_file, LOCK_PATIENCE_S)
            await asyncio.to_thread(self._resources.enter_context, lock)
            self._engine = await self._in_thread(storage.connect, self._url, "scheduler")
            self.state = await self.run(load)
        except BaseException:
            self._resources.close()
            raise

    async def close(self) -> None:
        """Let go of the database."""
        await self._in_thread(self._engine.dispose)
        self._thread.shutdown()
        self._resources.close()

    async def run(self, command: storage.Command) -> Any:
        """One command in a transaction of its own. Raises Overloaded if the disk is full."""
        try:
            (result,) = await self._in_thread(
                storage.run_group, self._engine, Stateless(), [command]
            )
        except StorageFull as error:
            reason = "the scheduler's disk is full"
            raise Overloaded(reason, code="storage_full", retry_after_s=10) from error
        except Exception:
            # What memory says may differ from what is committed: only a new process knows.
            logger.exception("the scheduler's database failed")
            self._on_fatal()
            raise
        if isinstance(result, Exception):
            raise result
        return result

    async def save(
        self,
        values: Iterable[Value] = (),
        gone: Iterable[Value] = (),
        records: Sequence[tuple[str, UsageRecord]] = (),
        epoch: int | None = None,
    ) -> None:
        """Store values, delete others and number records of leases for sending: all or nothing."""
        kept, deleted = list(values), list(gone)
        state = self.state
        numbered = list(enumerate(records, start=state.next_seq))
        next_seq = state.next_seq + len(numbered)
        epoch_now = state.epoch if epoch is None else epoch

        def command(connection: Connection) -> None:
            for value in deleted:
                table = _TABLES[type(value)]
                (key,) = table.primary_key
                connection.execute(delete(table).where(key == getattr(value, key.name)))
            for kind, table in _TABLES.items():
                rows = [_row(value) for value in kept if type(value) is kind]
                if rows:
                    upsert(connection, table, rows)
            if numbered:
                connection.execute(
                    tables.outbox.insert(),
                    [
                        {"seq": seq, "lease_id": name, "record": msgspec.msgpack.encode(record)}
                        for seq, (name, record) in numbered
                    ],
                )
            if numbered or epoch is not None:
                row = {"id": 1, "epoch": epoch_now, "next_seq": next_seq}
                upsert(connection, tables.sender, [row])

        await self.run(command)
        self.replica_changes += any(isinstance(v, Replica) for v in (*kept, *deleted))
        for value in deleted:
            _shelf(state, type(value)).pop(_key(value), None)
        for value in kept:
            _shelf(state, type(value))[_key(value)] = value
        state.outbox.update(numbered)
        state.next_seq, state.epoch = next_seq, epoch_now

    async def sent(self, before_seq: int) -> None:
        """Forget segments that the ledger has: all with a lower number."""
        table = tables.outbox
        await self.run(lambda c: c.execute(delete(table).where(table.c.seq < before_seq)).close())
        for seq in [seq for seq in self.state.outbox if seq < before_seq]:
            del self.state.outbox[seq]

    async def _in_thread(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


_TABLES: dict[type, Table] = {
    Offer: tables.offers,
    Order: tables.orders,
    Lease: tables.leases,
    Deployment: tables.deployments,
    Replica: tables.replicas,
    StartCost: tables.starts,
    Model: tables.models,
}


def load(connection: Connection) -> State:
    """Everything, as it was when the last transaction was committed."""
    state = State()
    for kind, table in _TABLES.items():
        (key,) = table.primary_key
        for row in connection.execute(select(table).order_by(key)):
            value = _value(kind, row)
            _shelf(state, kind)[_key(value)] = value
    for row in connection.execute(select(tables.outbox).order_by(tables.outbox.c.seq)):
        record = msgspec.msgpack.decode(row.record, type=UsageRecord)
        state.outbox[row.seq] = (row.lease_id, record)
    sender = connection.execute(select(tables.sender)).one_or_none()
    if sender is not None:
        state.epoch, state.next_seq = sender.epoch, sender.next_seq
    return state


def _shelf(state: State, kind: type) -> dict[str, Any]:
    name = _TABLES[kind].name
    shelf: dict[str, Any] = getattr(state, name)
    return shelf


def _key(value: Value) -> str:
    (key,) = _TABLES[type(value)].primary_key
    return str(getattr(value, key.name))


def _row(value: Value) -> dict[str, Any]:
    if isinstance(value, Offer):
        return _plain(value) | {"gpus": json.dumps([asdict(gpu) for gpu in value.gpus])}
    if isinstance(value, Lease):
        return _plain(value) | {"gpu_indices": json.dumps(value.gpu_indices)}
    if isinstance(value, Order):
        return _plain(value) | {"policy": _policy_text(value.policy)}
    if isinstance(value, Deployment):
        row = _plain(value) | {"policy": _policy_text(value.policy)}
        return row | _plain(row.pop("bounds"))
    if isinstance(value, Replica):
        row = _plain(value)
        place = _plain(row.pop("place"))
        return row | place | {"gpu_indices": json.dumps(place["gpu_indices"])}
    return _plain(value)


def _policy_text(policy: LanePolicy | None) -> str | None:
    return None if policy is None else json.dumps(asdict(policy))


def _plain(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in fields(value)}


def _value(kind: type, row: Row[Any]) -> Value:
    values = dict(row._mapping)
    if "gpu_indices" in values:
        values["gpu_indices"] = tuple(json.loads(values["gpu_indices"]))
    if values.get("policy") is not None:
        values["policy"] = LanePolicy(**json.loads(values["policy"]))
    if kind is Offer:
        gpus = tuple(Gpu(**gpu) for gpu in json.loads(values["gpus"]))
        return Offer(**values | {"gpus": gpus, "state": OfferState(values["state"])})
    if kind is Order:
        return Order(**values | {"state": OrderState(values["state"])})
    if kind is Lease:
        reason = values["close_reason"]
        values["close_reason"] = None if reason is None else CloseReason(reason)
        return Lease(**values | {"state": LeaseState(values["state"])})
    if kind is Deployment:
        bounds = Bounds(**{f.name: values.pop(f.name) for f in fields(Bounds)})
        return Deployment(**values | {"mode": Mode(values["mode"]), "bounds": bounds})
    if kind is StartCost or kind is Model:
        return kind(**values)
    place = Place(**{f.name: values.pop(f.name) for f in fields(Place)})
    return Replica(**values | {"place": place, "state": ReplicaState(values["state"])})
