from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from market.scheduler.reconcile import End, Forget, Mark, Remove, Seen, Start, plan
from market.types import AppStatus, Offer, OfferState, ReplicaState
from tests.samples import NOON, OFFER, REPLICA

APP = REPLICA.app_name
GPU = ("server", 0)
RUNNING = AppStatus(run="serve-1:4711", failed=False, message="")
STARTING = AppStatus(run=None, failed=False, message="")
FAILED = AppStatus(run=None, failed=True, message="no memory")
OFFERS = {"server": OFFER}
LOST = {"server": replace(OFFER, state=OfferState.LOST)}
ALONE = [ReplicaState.STARTING, ReplicaState.READY, ReplicaState.FAILED]
FREEING = (ReplicaState.FREEING, "its processes are ending")


def replica(name="lease-1-0", state=ReplicaState.WAITING, reason="", age_s=0, **place):
    return replace(
        REPLICA,
        replica_id=name,
        state=state,
        reason=reason,
        place=replace(REPLICA.place, **place),
        created_at=NOON + timedelta(seconds=age_s),
    )


def steps(*replicas, offers=OFFERS, starts=None, apps=None, taken=(), **residents):
    """The plan; ``residents`` are those of the nodes that answered."""
    there = {node_id: frozenset(names) for node_id, names in residents.items()}
    return plan(replicas, offers, starts or {}, Seen(apps or {}, there, frozenset(taken)), NOON)


def mark(state, reason, name="lease-1-0"):
    return Mark(name, state, reason)


class TestWaiting:
    def test_is_started(self):
        own = replica()
        assert steps(own) == [mark(ReplicaState.STARTING, "replica starting"), Start(own)]

    def test_not_before_its_start(self):
        starts = {"lease-1-0": NOON + timedelta(seconds=1)}
        (step,) = steps(replica(), starts=starts)
        assert step == mark(ReplicaState.WAITING, "booked from 2026-11-01 12:00:01 UTC on")
        assert steps(replica(reason=step.reason), starts=starts) == []
        assert Start(replica()) in steps(replica(), starts={"lease-1-0": NOON})

    @pytest.mark.parametrize("state", [OfferState.LOST, OfferState.LEFT])
    def test_not_on_a_node_that_is_gone(self, state):
        offers = {"server": replace(OFFER, state=state)}
        assert steps(replica(), offers=offers) == [
            mark(ReplicaState.WAITING, f"node server is {state}")
        ]

    def test_not_on_a_node_that_nobody_knows(self):
        assert steps(replica(), offers={}) == [mark(ReplicaState.WAITING, "node server is left")]

    def test_on_a_node_that_drains(self):
        own = replica()
        assert Start(own) in steps(
            own, offers={"server": replace(OFFER, state=OfferState.DRAINING)}
        )

    @pytest.mark.parametrize(
        "state", [ReplicaState.READY, ReplicaState.STOPPING, ReplicaState.FREEING]
    )
    def test_not_while_its_gpu_is_taken(self, state):
        before = replica("old", state, "serving")
        (step,) = [s for s in steps(before, replica(), apps={"model-old": RUNNING}) if mine(s)]
        assert step == mark(ReplicaState.WAITING, "its GPU is being freed")

    def test_beside_others_whose_shares_leave_room(self):
        before = replica("old", ReplicaState.READY, "serving", gpu_milli=600)
        apps = {"model-old": RUNNING}
        fits, too_much = replica(gpu_milli=400), replica(gpu_milli=401)
        assert Start(fits) in steps(before, fits, apps=apps)
        assert Start(too_much) not in steps(before, too_much, apps=apps)

    def test_not_while_another_engine_starts_on_its_gpu(self):
        before = replica("old", ReplicaState.STARTING, "replica starting", gpu_milli=300)
        own, apps = replica(gpu_milli=300), {"model-old": STARTING}
        (step,) = [s for s in steps(before, own, apps=apps) if mine(s)]
        assert step == mark(ReplicaState.WAITING, "another engine is starting on its GPU")
        elsewhere = replica(gpu_milli=300, gpu_indices=(1,))
        assert Start(elsewhere) in steps(before, elsewhere, apps=apps)

    def test_not_while_serve_restarts_another_on_its_gpu(self):
        # bug reported
        before = replica("old", ReplicaState.READY, "serving", gpu_milli=300)
        own = replica(gpu_milli=300)
        assert Start(own) not in steps(before, own, apps={"model-old": STARTING})
        assert Start(own) in steps(before, own, apps={"model-old": RUNNING})

    def test_one_after_the_other_oldest_first(self):
        young = replica("a", gpu_milli=300, age_s=2)
        old = replica("b", gpu_milli=300, age_s=1)
        assert [s for s in steps(young, old) if isinstance(s, Start)] == [Start(old)]

    def test_all_its_gpus_must_be_free(self):
        before = replica("old", ReplicaState.FREEING, gpu_indices=(1,))
        own = replica(gpu_indices=(0, 1))
        assert Start(own) not in steps(before, own)
        assert Start(own) in steps(own)

    def test_without_gpus_it_is_in_nobodys_way(self):
        place = {"gpu_indices": (), "gpu_milli": 0}
        one, two = replica("a", **place), replica("b", **place)
        assert [s for s in steps(one, two) if isinstance(s, Start)] == [Start(one), Start(two)]


def mine(step):
    return getattr(step, "replica_id", None) == "lease-1-0" or isinstance(step, Start)


class TestRunning:
    def test_serving_is_marked_once(self):
        own = replica(state=ReplicaState.STARTING)
        assert steps(own, apps={APP: RUNNING}) == [mark(ReplicaState.READY, "serving")]
        assert steps(replica(state=ReplicaState.READY, reason="serving"), apps={APP: RUNNING}) == []

    @pytest.mark.parametrize("state", [ReplicaState.STARTING, ReplicaState.READY])
    def test_what_serve_says_is_passed_on(self, state):
        app = AppStatus(run=None, failed=False, message="loading weights")
        expected = [mark(ReplicaState.STARTING, "loading weights")]
        assert steps(replica(state=state), apps={APP: app}) == expected
        assert steps(replica(state=state, reason="x"), apps={APP: STARTING}) == [
            mark(ReplicaState.STARTING, "replica starting")
        ]

    def test_failure_keeps_the_reason_and_is_not_started_again(self):
        own = replica(state=ReplicaState.STARTING)
        assert steps(own, apps={APP: FAILED}) == [mark(ReplicaState.FAILED, "no memory")]
        silent = AppStatus(run=None, failed=True, message="")
        assert steps(own, apps={APP: silent}) == [
            mark(ReplicaState.FAILED, "the replica did not start")
        ]
        failed = replica(state=ReplicaState.FAILED, reason="no memory")
        assert steps(failed) == steps(failed, apps={APP: FAILED}) == []

    @pytest.mark.parametrize("app", [None, RUNNING, STARTING])
    @pytest.mark.parametrize("state", [ReplicaState.STARTING, ReplicaState.READY])
    def test_on_a_lost_node_it_waits_for_the_node(self, state, app):
        apps = {} if app is None else {APP: app}
        assert steps(replica(state=state), offers=LOST, apps=apps) == [
            mark(ReplicaState.STARTING, "node server is lost")
        ]

    def test_one_that_died_with_its_node_did_not_fail(self):
        # bug reported
        own = replica(state=ReplicaState.READY, reason="serving")
        assert steps(own, offers=LOST, apps={APP: FAILED}) == [
            mark(ReplicaState.STARTING, "node server is lost")
        ]


class TestRestart:
    @pytest.mark.parametrize("state", [ReplicaState.STARTING, ReplicaState.READY])
    def test_lost_application_is_started_again(self, state):
        own = replica(state=state)
        assert steps(own) == [mark(ReplicaState.STARTING, "replica starting"), Start(own)]

    def test_those_that_shared_a_gpu_start_one_after_the_other(self):
        one = replica("a", ReplicaState.READY, "serving", gpu_milli=500)
        two = replica("b", ReplicaState.READY, "serving", gpu_milli=500)
        wait = mark(ReplicaState.WAITING, "another engine is starting on its GPU", "b")
        assert steps(one, two) == [
            mark(ReplicaState.STARTING, "replica starting", "a"),
            Start(one),
            wait,
        ]

    def test_also_if_the_node_came_back_later_than_the_rest(self):
        # bug reported
        one = replica("a", ReplicaState.STARTING, "node server is lost", gpu_milli=500)
        two = replica("b", ReplicaState.STARTING, "node server is lost", gpu_milli=500)
        assert [s for s in steps(one, two) if isinstance(s, Start)] == [Start(one)]

    def test_one_whose_engine_starts_already_goes_first(self):
        # bug reported
        one = replica("a", ReplicaState.STARTING, "node server is lost", gpu_milli=500)
        two = replica("b", ReplicaState.STARTING, "replica starting", gpu_milli=500)
        made = steps(one, two, apps={"model-b": STARTING})
        assert [s for s in made if isinstance(s, Start)] == []


class TestEnding:
    @pytest.mark.parametrize("app", [RUNNING, STARTING, FAILED])
    @pytest.mark.parametrize("state", [ReplicaState.STOPPING, ReplicaState.FREEING])
    def test_its_application_is_removed_first(self, state, app):
        assert steps(replica(state=state), apps={APP: app}) == [Remove(APP)]

    def test_then_its_processes_end(self):
        assert steps(replica(state=ReplicaState.STOPPING)) == [mark(*FREEING)]

    def test_gpu_is_free_only_when_nothing_is_left_on_it(self):
        own = replica(state=ReplicaState.FREEING, reason=FREEING[1])
        assert steps(own) == []
        assert steps(own, server=["lease-1-0"], taken=[GPU]) == [End("lease-1-0", "server")]
        (step,) = steps(own, server=[], taken=[GPU])
        assert step == mark(ReplicaState.FREEING, "its GPU's memory is not free yet")
        assert steps(own, server=[], taken=[("server", 1), ("other", 0)]) == [Forget("lease-1-0")]
        assert steps(own, server=["another"])[-1] == Forget("lease-1-0")

    def test_who_waits_for_the_gpu_starts_only_after_it_was_forgotten(self):
        old, own = replica("old", *FREEING), replica(reason="its GPU is being freed")
        assert steps(old, own, server=[]) == [Forget("old")]
        assert Start(own) in steps(own, server=[])

    def test_nothing_is_left_on_a_node_that_has_left(self):
        left = {"server": replace(OFFER, state=OfferState.LEFT)}
        assert steps(replica(state=ReplicaState.FREEING), offers=left) == [Forget("lease-1-0")]


class TestStrangers:
    def test_application_that_nobody_wants_is_removed_others_are_left_alone(self):
        assert steps(apps={"model-old": RUNNING, "gateway": RUNNING}) == [Remove("model-old")]

    def test_processes_that_nobody_wants_or_not_there_are_ended(self):
        own = replica(state=ReplicaState.READY, reason="serving")
        made = steps(own, apps={APP: RUNNING}, server=["lease-1-0", "old"], other=["lease-1-0"])
        assert made == [End("lease-1-0", "other"), End("old", "server")]

    def test_nothing_starts_on_a_node_that_came_back_with_them(self):
        # bug reported
        own = replica()
        assert End("old", "server") in steps(own, server=["old"])
        assert Start(own) not in steps(own, server=["old"])
        assert Start(own) in steps(own, server=[])


class FakeCluster:
    """Nodes n0 (two GPUs) and n1 (one), where engines take three ticks to start.

    Refuses what must not happen: two engines starting on a GPU, more than a GPU, a GPU whose
    memory is still taken. What Serve restarts itself is not the plan's doing.
    """

    TICKS = 3

    def __init__(self):
        self.offers = {
            name: replace(OFFER, offer_id=name, node_id=name, gpus=OFFER.gpus[:count])
            for name, count in (("n0", 2), ("n1", 1))
        }
        self.replicas = {}
        self.left = {}  # ticks until an application serves; None: it failed
        self.processes = {}  # place of each that runs
        self.stuck = set()  # processes that only End ends
        self.memory = {}  # ticks until the memory of a GPU is free
        self.number = 0
        self.answers = True

    def lives(self, place):
        return self.offers[place.node_id].state is not OfferState.LOST

    def order(self, node_id, gpu_indices, milli):
        """What matching would allow: shares of all that are to stay never exceed a GPU."""
        gpus = [(node_id, i) for i in gpu_indices if i < len(self.offers[node_id].gpus)]
        used = [self.wanted_milli(gpu) for gpu in gpus]
        if gpus and max(used) + milli <= 1000:
            self.number += 1
            own = replica(
                f"r{self.number}",
                age_s=self.number,
                offer_id=node_id,
                node_id=node_id,
                gpu_indices=tuple(index for _, index in gpus),
                gpu_milli=milli,
            )
            self.replicas[own.replica_id] = own

    def wanted_milli(self, gpu):
        ending = (ReplicaState.STOPPING, ReplicaState.FREEING)
        places = [r.place for r in self.replicas.values() if r.state not in ending]
        return sum(p.gpu_milli for p in places if gpu in gpus_of(p))

    def apps(self):
        status = {None: FAILED, 0: RUNNING}
        return {f"model-{name}": status.get(left, STARTING) for name, left in self.left.items()}

    def leftovers(self):
        return {name for name in self.processes if name not in self.left}

    def seen(self):
        there, taken = {}, {gpu for gpu, ticks in self.memory.items() if ticks}
        taken |= {gpu for name in self.leftovers() for gpu in gpus_of(self.processes[name])}
        for node_id, offer in self.offers.items():
            if self.answers and offer.state is not OfferState.LOST:
                here = [name for name, p in self.processes.items() if p.node_id == node_id]
                there[node_id] = frozenset(here)
        return Seen(self.apps(), there, frozenset(gpu for gpu in taken if gpu[0] in there))

    def act(self):
        """One round; returns what was done."""
        made = plan(self.replicas.values(), self.offers, {}, self.seen(), NOON)
        for step in made:
            match step:
                case Mark(name, state, reason):
                    self.replicas[name] = replace(
                        self.replicas[name], state=state, reason=reason
                    )
                case Forget(name):
                    del self.replicas[name]
                case Start(own):
                    self.start(own.replica_id, own.place)
                case Remove(app_name):
                    self.left.pop(app_name.removeprefix("model-"))
                case End(name, _):
                    self.end(name)
        return made

    def start(self, name, place):
        if name in self.left:
            return
        assert self.lives(place)
        for gpu in gpus_of(place):
            others = {n: p for n, p in self.processes.items() if gpu in gpus_of(p) and n != name}
            assert all(self.left.get(other) in (0, None) for other in others), "two starts"
            assert sum(p.gpu_milli for p in others.values()) + place.gpu_milli <= 1000
            assert not self.memory.get(gpu), "its memory is taken"
        self.left[name] = self.TICKS
        self.processes[name] = place

    def end(self, name):
        place = self.processes.pop(name)
        self.stuck.discard(name)
        self.memory.update(dict.fromkeys(gpus_of(place), 1))

    def tick(self):
        for name, left in self.left.items():
            if left and name in self.processes:
                self.left[name] = left - 1
        self.memory = {gpu: max(0, ticks - 1) for gpu, ticks in self.memory.items()}
        for name in self.leftovers() - self.stuck:
            self.end(name)


def gpus_of(place):
    return [(place.node_id, index) for index in place.gpu_indices]
