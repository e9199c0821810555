"""Random clusters and requests: no room is exceeded, the index chooses as a plain search does."""

from dataclasses import replace
from itertools import combinations
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from market.fragments import FIT_WEIGHT_MILLI
from market.placement import (
    GpuRoom,
    NodeRoom,
    Packer,
    Policy,
    ShareRequest,
    choose,
    classes_of,
    give_back,
    take,
)

TYPES = ("a100", "t4")
MEMORY_MIB = 80
gpu_types = st.sampled_from([frozenset(), frozenset({"t4"}), frozenset(TYPES)])
hosts = {"cpu_milli": st.sampled_from([0, 1000, 4000]), "memory_mib": st.sampled_from([0, 10])}
shares = st.builds(
    ShareRequest,
    st.just(1),
    st.sampled_from([100, 250, 300, 500, 700]),
    st.sampled_from([0, 20, 50]),
    gpu_types=gpu_types,
    **hosts,
)
whole = st.builds(
    ShareRequest, st.integers(1, 4), st.just(1000), st.sampled_from([0, 80]), gpu_types=gpu_types,
    **hosts,
)  # fmt: skip
requests = shares | whole | st.builds(ShareRequest, st.just(0), st.just(0), **hosts)
workloads = st.lists(requests, max_size=12).map(classes_of)


@st.composite
def empty_nodes(draw, node_id):
    domains = draw(st.lists(st.integers(0, 2), max_size=5))
    gpus = tuple(GpuRoom(1000, MEMORY_MIB, domain) for domain in domains)
    cpu_milli = draw(st.sampled_from([4000, 8000, 16_000]))
    return NodeRoom(node_id, draw(st.sampled_from(TYPES)), cpu_milli, 40, gpus)


@st.composite
def used_nodes(draw, node_id):
    node = draw(empty_nodes(node_id))
    gpus = tuple(
        GpuRoom(milli, MEMORY_MIB * milli // 1000, domain)
        for _, _, domain in node.gpus
        for milli in [draw(st.sampled_from([0, 200, 350, 500, 1000, 1000]))]
    )
    return replace(node, gpus=gpus)


def fragments(node, classes):
    """F, word by word from the paper, a domain being a node of its own."""
    total = 0.0
    for request, probability in classes:
        for domain in {gpu.domain for gpu in node.gpus}:
            cell = [gpu for gpu in node.gpus if gpu.domain == domain]
            fit = [
                gpu
                for gpu in cell
                if gpu.milli >= request.gpu_milli and gpu.memory_mib >= request.gpu_memory_mib
            ]
            runs = (
                request.gpu_count > 0
                and len(fit) >= request.gpu_count
                and node.cpu_milli >= request.cpu_milli
                and (not request.gpu_types or node.gpu_type in request.gpu_types)
            )
            lost = sum(gpu.milli for gpu in cell) - (sum(gpu.milli for gpu in fit) if runs else 0)
            total += probability * lost
    return total


def score(node, after, classes):
    fit = after.cpu_milli / 128_000 + sum(gpu.milli for gpu in after.gpus) / 8_000
    return fragments(node, classes) - fragments(after, classes) - FIT_WEIGHT_MILLI * fit / 2


def possible(nodes, request):
    """Every (within one domain?, node, node afterwards)."""
    for node in nodes:
        if request.gpu_types and node.gpu_type not in request.gpu_types:
            continue
        for indices in combinations(range(len(node.gpus)), request.gpu_count):
            try:
                after = take(node, request, indices)
            except ValueError:
                continue
            yield len({node.gpus[index].domain for index in indices}) <= 1, node, after


@settings(max_examples=200, deadline=None)
@given(st.tuples(*(used_nodes(name) for name in "abc")), requests, workloads)
def test_nothing_scores_better_than_what_is_chosen(nodes, request, classes):
    chosen = choose(nodes, request, classes)
    options = list(possible(nodes, request))
    if chosen is None:
        assert not options
        return
    node = next(node for node in nodes if node.node_id == chosen.node_id)
    within = len({node.gpus[index].domain for index in chosen.gpu_indices}) <= 1
    assert within == any(one_domain for one_domain, _, _ in options)
    if within:
        best = max(score(*option, classes) for one_domain, *option in options if one_domain)
        after = take(node, request, chosen.gpu_indices)
        assert score(node, after, classes) >= best - 1e-6


class PackerMachine(RuleBasedStateMachine):
    policy = Policy.FGD_BF

    @initialize(data=st.data(), classes=workloads, count=st.integers(0, 4))
    def start(self, data, classes, count):
        self.classes = classes
        self.empty = {name: data.draw(empty_nodes(name)) for name in "abcdef"[:count]}
        self.rooms = dict(self.empty)
        self.placed = []
        # Two that draw the same.
        self.random, random = (
            Random(1) if self.policy is Policy.RANDOM else None for _ in range(2)
        )
        self.packer = Packer(self.rooms.values(), classes, self.policy, random)

    @rule(request=requests, seed=st.integers(0, 5))
    def place(self, request, seed):
        nodes = Random(seed).sample(list(self.rooms.values()), len(self.rooms))
        expected = choose(nodes, request, self.classes, self.policy, self.random)
        placement = self.packer.place(request)
        assert placement == expected
        if placement is not None:
            node = self.rooms[placement.node_id]
            self.rooms[placement.node_id] = take(node, request, placement.gpu_indices)
            self.placed.append((placement, request))

    @precondition(lambda self: self.placed)
    @rule(which=st.integers(0, 50))
    def release(self, which):
        placement, request = self.placed.pop(which % len(self.placed))
        self.packer.release(placement, request)
        node = self.rooms[placement.node_id]
        self.rooms[placement.node_id] = give_back(node, request, placement.gpu_indices)

    @precondition(lambda self: self.rooms)
    @rule(which=st.integers(0, 5))
    def remove(self, which):
        node_id = sorted(self.rooms)[which % len(self.rooms)]
        assert self.packer.remove(node_id) == self.rooms.pop(node_id)
        self.placed = [(p, request) for p, request in self.placed if p.node_id != node_id]

    @rule(data=st.data(), node_id=st.sampled_from("abcdef"))
    def add(self, data, node_id):
        if node_id not in self.rooms:
            self.empty[node_id] = self.rooms[node_id] = data.draw(empty_nodes(node_id))
            self.packer.add(self.rooms[node_id])

    @invariant()
    def no_gpu_holds_more_than_it_has(self):
        for node_id, room in getattr(self, "rooms", {}).items():
            assert self.packer.room(node_id) == room
            assert min(room.cpu_milli, room.memory_mib) >= 0
            for index, gpu in enumerate(room.gpus):
                held = [
                    request
                    for placement, request in self.placed
                    if placement.node_id == node_id and index in placement.gpu_indices
                ]
                assert sum(request.gpu_milli for request in held) + gpu.milli == 1000
                memory_mib = sum(request.gpu_memory_mib for request in held)
                assert memory_mib + gpu.memory_mib == MEMORY_MIB
                assert min(gpu.milli, gpu.memory_mib) >= 0

    def teardown(self):
        for placement, request in getattr(self, "placed", []):
            self.packer.release(placement, request)
        for node_id in getattr(self, "rooms", {}):
            assert self.packer.room(node_id) == self.empty[node_id]


class BestFitMachine(PackerMachine):
    policy = Policy.BEST_FIT


class QuantisedMachine(PackerMachine):
    policy = Policy.FGD_Q


class RandomMachine(PackerMachine):
    policy = Policy.RANDOM


MACHINE = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestFgdBf = PackerMachine.TestCase
TestFgdBf.settings = MACHINE
TestBestFit = BestFitMachine.TestCase
TestBestFit.settings = MACHINE
TestFgdQ = QuantisedMachine.TestCase
TestFgdQ.settings = MACHINE
TestRandom = RandomMachine.TestCase
TestRandom.settings = MACHINE
