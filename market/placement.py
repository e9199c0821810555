"""GPU shares -> nodes and GPUs: which node takes a request, and which of its GPUs.

Pure: rooms and requests in, a placement out. ``choose`` looks at a few nodes, a ``Packer`` keeps
thousands indexed; both choose the same (``fragments`` says by which cost).
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import chain
from random import Random

from market.fragments import (
    WHOLE_MILLI,
    Classes,
    GpuRoom,
    Gpus,
    NodeRoom,
    Policy,
    Scorer,
    ShareRequest,
    classes_of,
)

__all__ = [
    "Classes",
    "GpuRoom",
    "NodeRoom",
    "Packer",
    "Placement",
    "Policy",
    "ShareRequest",
    "choose",
    "classes_of",
    "give_back",
    "take",
]

# Beyond these a packer forgets what it has worked out, so that a long life needs no more memory.
CHANGES_MAX = 100_000
QUEUES_MAX = 256


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request goes; ``gpu_indices`` ascend and are empty if it asks for no GPU."""

    node_id: str
    gpu_indices: tuple[int, ...]


def take(node: NodeRoom, request: ShareRequest, gpu_indices: Sequence[int]) -> NodeRoom:
    """The node after ``request`` was put on these GPUs. ValueError if there is no room."""
    return _moved(node, request, gpu_indices, -1)


def give_back(node: NodeRoom, request: ShareRequest, gpu_indices: Sequence[int]) -> NodeRoom:
    """The node after ``request`` has left these GPUs. ValueError if one would be over whole."""
    return _moved(node, request, gpu_indices, 1)


def _moved(node: NodeRoom, request: ShareRequest, indices: Sequence[int], sign: int) -> NodeRoom:
    gpus = list(node.gpus)
    for index in indices:
        milli = gpus[index].milli + sign * request.gpu_milli
        memory_mib = gpus[index].memory_mib + sign * request.gpu_memory_mib
        gpus[index] = GpuRoom(milli, memory_mib, gpus[index].domain)
        if not 0 <= milli <= WHOLE_MILLI or memory_mib < 0:
            raise ValueError(f"GPU {index} of {node.node_id} would have {gpus[index]}")
    cpu_milli = node.cpu_milli + sign * request.cpu_milli
    memory_mib = node.memory_mib + sign * request.memory_mib
    if cpu_milli < 0 or memory_mib < 0 or len(set(indices)) != request.gpu_count:
        raise ValueError(f"GPUs {indices} of {node} are no place for {request}")
    return NodeRoom(node.node_id, node.gpu_type, cpu_milli, memory_mib, tuple(gpus))


def choose(
    nodes: Iterable[NodeRoom],
    request: ShareRequest,
    classes: Classes,
    policy: Policy = Policy.FGD_BF,
    random: Random | None = None,
) -> Placement | None:
    """Where to put ``request``, None if no node has room; without an index, for a few nodes.

    The order of ``nodes`` does not matter. ``random`` is for that policy alone (else ValueError).
    Without classes ``FGD_BF`` is best fit.
    """
    scorer = Scorer(classes, policy, random)
    found: dict[tuple[bool, float], dict[str, NodeRoom]] = defaultdict(dict)
    for node in nodes:
        gpus, _ = scorer.gpus(node)
        cost = scorer.cost(gpus, node.cpu_milli, node.memory_mib, request)
        if cost is not None:
            found[cost][node.node_id] = node
    if not found:
        return None
    tied = found[min(found)]
    node_id = scorer.pick(sorted(tied))
    return Placement(node_id, scorer.gpu_indices(tied[node_id], request))


@dataclass(slots=True, eq=False)
class _State:
    """What nodes with the same room have in common; their ids ascend."""

    number: int
    gpus: Gpus
    cpu_milli: int
    memory_mib: int
    node_ids: list[str] = field(default_factory=list)


# An entry is out of date once its id is no longer the state's lowest. Numbers settle comparisons.
_Entry = tuple[tuple[bool, float], str, int, _State]


@dataclass(slots=True, eq=False)
class _Queue:
    """States with room for one request, the best first, as of ``seen`` changes."""

    entries: list[_Entry]
    seen: int


class Packer:
    """Nodes indexed by state (what room they have, no matter which GPU has it).

    Per request there is a heap of states by cost. A change of a state's lowest node id is noted
    once and reaches a heap when its request comes again, so that placing looks at what has
    changed, not at every node.
    """

    def __init__(
        self,
        nodes: Iterable[NodeRoom],
        classes: Classes,
        policy: Policy = Policy.FGD_BF,
        random: Random | None = None,
    ) -> None:
        self._settings = (classes, policy, random)
        self._random = policy is Policy.RANDOM
        self._rooms: dict[str, NodeRoom] = {}
        self._index()
        for node in nodes:
            self.add(node)

    def room(self, node_id: str) -> NodeRoom:
        """What is free on a node. KeyError if there is none of that id."""
        return self._rooms[node_id]

    def add(self, node: NodeRoom) -> None:
        """Another node to place on. ValueError if its id is taken."""
        if node.node_id in self._rooms:
            raise ValueError(f"there is a node {node.node_id}")
        self._enter(node)

    def remove(self, node_id: str) -> NodeRoom:
        """Place on it no more; its room as it was. KeyError if there is none of that id."""
        node = self._rooms[node_id]
        self._leave(node)
        del self._rooms[node_id]
        return node

    def place(self, request: ShareRequest) -> Placement | None:
        """Take room for ``request`` where it costs least; None, and no change, if there is none."""
        if len(self._changes) > CHANGES_MAX:
            self._index()
        node_id = self._any(request) if self._random else self._lowest(request)
        if node_id is None:
            return None
        node = self._rooms[node_id]
        placement = Placement(node_id, self._scorer.gpu_indices(node, request))
        self._leave(node)
        self._enter(take(node, request, placement.gpu_indices))
        return placement

    def release(self, placement: Placement, request: ShareRequest) -> None:
        """Give back what ``place`` took. KeyError if the node is gone, ValueError if too much."""
        node = self._rooms[placement.node_id]
        after = give_back(node, request, placement.gpu_indices)
        self._leave(node)
        self._enter(after)

    def _lowest(self, request: ShareRequest) -> str | None:
        entries = self._queue(request).entries
        while entries:
            _, node_id, _, state = entries[0]
            if state.node_ids and state.node_ids[0] == node_id:
                return node_id
            heappop(entries)
        return None

    def _queue(self, request: ShareRequest) -> _Queue:
        queue = self._queues.get(request)
        if queue is None:
            if len(self._queues) >= QUEUES_MAX:
                self._queues.clear()
            queue = self._queues[request] = _Queue([], -1)
        news = len(self._changes) - queue.seen
        if queue.seen < 0 or news + len(queue.entries) > 4 * len(self._states):
            queue.entries = [e for s in self._states.values() if (e := self._entry(s, request))]
            heapify(queue.entries)
        else:
            for state in self._changes[queue.seen :]:
                entry = self._entry(state, request) if state.node_ids else None
                if entry is not None:
                    heappush(queue.entries, entry)
        queue.seen = len(self._changes)
        return queue

    def _entry(self, state: _State, request: ShareRequest) -> _Entry | None:
        cost = self._scorer.cost(state.gpus, state.cpu_milli, state.memory_mib, request)
        return None if cost is None else (cost, state.node_ids[0], state.number, state)

    def _any(self, request: ShareRequest) -> str | None:
        queue = self._queue(request)
        live = {entry[2]: entry for entry in queue.entries if entry[3].node_ids}
        queue.entries = list(live.values())
        if not live:
            return None
        lowest = min([entry[0] for entry in queue.entries])
        tied = [entry[3].node_ids for entry in queue.entries if entry[0] == lowest]
        return self._scorer.pick(sorted(chain.from_iterable(tied)))

    def _index(self) -> None:
        """Start the index afresh from the rooms."""
        self._scorer = Scorer(*self._settings)
        self._states: dict[tuple[Gpus, int, int], _State] = {}
        self._number = 0
        self._changes: list[_State] = []
        self._queues: dict[ShareRequest, _Queue] = {}
        for node in self._rooms.values():
            self._enter(node)
        self._changes.clear()

    def _enter(self, node: NodeRoom) -> None:
        self._rooms[node.node_id] = node
        gpus, _ = self._scorer.gpus(node)
        key = (gpus, node.cpu_milli, node.memory_mib)
        state = self._states.get(key)
        if state is None:
            self._number += 1
            state = self._states[key] = _State(self._number, *key)
        insort(state.node_ids, node.node_id)
        if state.node_ids[0] == node.node_id:
            self._changes.append(state)

    def _leave(self, node: NodeRoom) -> None:
        gpus, _ = self._scorer.gpus(node)
        key = (gpus, node.cpu_milli, node.memory_mib)
        state = self._states[key]
        place = bisect_left(state.node_ids, node.node_id)
        del state.node_ids[place]
        if not state.node_ids:
            del self._states[key]
        elif place == 0:
            self._changes.append(state)
