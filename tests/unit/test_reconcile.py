from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from market.scheduler.reconcile import End, Forget, Mark, Remove, Seen, Start, plan
from market.types import AppStatus, OfferState, Place, ReplicaState
from tests.samples import NOON, OFFER, REPLICA

APP = REPLICA.app_name
GPU = ("server", 0)
RUNNING = AppStatus("serve-1:4711", failed=False, message="", replica_id=REPLICA.replica_id)
OLD = replace(RUNNING, replica_id="old")
STARTING = AppStatus(run=None, failed=False, message="")
FAILED = AppStatus(run=None, failed=True, message="no memory")
OFFERS = {"server": OFFER}
LOST = {"server": replace(OFFER, state=OfferState.LOST)}
FREEING = (ReplicaState.FREEING, "its processes are ending")
ENDING = (ReplicaState.STOPPING, ReplicaState.FREEING)
SERVING = (ReplicaState.STARTING, ReplicaState.READY)


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


BEGIN = mark(ReplicaState.STARTING, "replica starting")
UNSEEN = mark(ReplicaState.STARTING, "node server is lost")


class TestWaiting:
    def test_is_started(self):
        own = replica()
        assert steps(own) == [BEGIN, Start(own)]

    def test_not_before_its_start(self):
        starts = {"lease-1-0": NOON + timedelta(seconds=1)}
        (step,) = steps(replica(), starts=starts)
        assert step == mark(ReplicaState.WAITING, "booked from 2026-11-01 12:00:01 UTC on")
        assert steps(replica(reason=step.reason), starts=starts) == []
        assert Start(replica()) in steps(replica(), starts={"lease-1-0": NOON})

    @pytest.mark.parametrize("state", [OfferState.LOST, OfferState.LEFT])
    def test_not_on_a_node_that_is_gone(self, state):
        offers = {"server": replace(OFFER, state=state)}
        (step,) = steps(replica(), offers=offers)
        assert step == mark(ReplicaState.WAITING, f"node server is {state}")

    def test_on_a_node_that_drains_but_not_on_one_that_nobody_knows(self):
        own, drains = replica(), {"server": replace(OFFER, state=OfferState.DRAINING)}
        assert Start(own) in steps(own, offers=drains)
        assert steps(own, offers={}) == [mark(ReplicaState.WAITING, "node server is left")]

    @pytest.mark.parametrize("state", [ReplicaState.READY, *ENDING])
    def test_not_while_its_gpu_is_taken(self, state):
        before = replica("old", state, "serving")
        (step,) = [s for s in steps(before, replica(), apps={"model-old": OLD}) if mine(s)]
        assert step == mark(ReplicaState.WAITING, "its GPU is being freed")

    def test_beside_others_whose_shares_leave_room(self):
        before = replica("old", ReplicaState.READY, "serving", gpu_milli=600)
        apps = {"model-old": OLD}
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

        before = replica("old", ReplicaState.READY, "serving", gpu_milli=300)
        own = replica(gpu_milli=300)
        assert Start(own) not in steps(before, own, apps={"model-old": STARTING})
        assert Start(own) in steps(before, own, apps={"model-old": OLD})

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

    @pytest.mark.parametrize("state", SERVING)
    def test_what_serve_says_is_passed_on(self, state):
        app = AppStatus(run=None, failed=False, message="loading weights")
        (step,) = steps(replica(state=state), apps={APP: app})
        assert step == mark(ReplicaState.STARTING, "loading weights")
        assert steps(replica(state=state), apps={APP: STARTING}) == [BEGIN]

    def test_who_serves_is_trusted_while_serve_does_not_know(self):
        unsure = replace(STARTING, unsure=True)
        assert steps(replica(state=ReplicaState.READY), apps={APP: unsure}) == []
        assert steps(replica(state=ReplicaState.STARTING), apps={APP: unsure}) == [BEGIN]

    def test_failure_keeps_the_reason_and_is_not_started_again(self):
        own = replica(state=ReplicaState.STARTING)
        assert steps(own, apps={APP: FAILED}) == [mark(ReplicaState.FAILED, "no memory")]
        (step,) = steps(own, apps={APP: replace(FAILED, message="")})
        assert step == mark(ReplicaState.FAILED, "the replica did not start")
        failed = replica(state=ReplicaState.FAILED, reason="no memory")
        assert steps(failed) == steps(failed, apps={APP: FAILED}) == []

    @pytest.mark.parametrize("app", [None, RUNNING, STARTING])
    @pytest.mark.parametrize("state", SERVING)
    def test_on_a_lost_node_it_waits_for_the_node(self, state, app):
        apps = {} if app is None else {APP: app}
        assert steps(replica(state=state), offers=LOST, apps=apps) == [UNSEEN]

    def test_one_that_died_with_its_node_did_not_fail(self):

        own = replica(state=ReplicaState.READY, reason="serving")
        assert steps(own, offers=LOST, apps={APP: FAILED}) == [UNSEEN]


class TestRestart:
    @pytest.mark.parametrize("state", SERVING)
    def test_lost_application_is_started_again(self, state):
        own = replica(state=state)
        assert steps(own) == [BEGIN, Start(own)]

    def test_those_that_shared_a_gpu_start_one_after_the_other(self):
        one = replica("a", ReplicaState.READY, "serving", gpu_milli=500)
        two = replica("b", ReplicaState.READY, "serving", gpu_milli=500)
        wait = mark(ReplicaState.WAITING, "another engine is starting on its GPU", "b")
        assert steps(one, two) == [replace(BEGIN, replica_id="a"), Start(one), wait]

    def test_also_if_the_node_came_back_later_than_the_rest(self):

        one = replica("a", ReplicaState.STARTING, "node server is lost", gpu_milli=500)
        two = replica("b", ReplicaState.STARTING, "node server is lost", gpu_milli=500)
        assert [s for s in steps(one, two) if isinstance(s, Start)] == [Start(one)]

    def test_one_whose_engine_starts_already_goes_first(self):

        one = replica("a", ReplicaState.STARTING, "node server is lost", gpu_milli=500)
        two = replica("b", ReplicaState.STARTING, "replica starting", gpu_milli=500)
        made = steps(one, two, apps={"model-b": STARTING})
        assert [s for s in made if isinstance(s, Start)] == []


class TestEnding:
    @pytest.mark.parametrize("app", [RUNNING, STARTING, FAILED])
    @pytest.mark.parametrize("state", ENDING)
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

    def test_a_lost_node_may_come_back_with_its_processes(self):

        assert steps(replica(state=ReplicaState.FREEING), offers=LOST) == []

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

        own = replica()
        assert End("old", "server") in steps(own, server=["old"])
        assert Start(own) not in steps(own, server=["old"])
        assert Start(own) in steps(own, server=[])


class FakeCluster:
    """Nodes n0 (two GPUs) and n1 (one), where engines take three ticks to start.

    Refuses to start two engines at once on a GPU, or more than is free of it. What Serve restarts
    by itself is not the plan's doing. What an application leaves behind runs until it is ended.
    """

    TICKS = 3

    def __init__(self):
        self.offers = {
            name: replace(OFFER, offer_id=name, node_id=name, gpus=OFFER.gpus[:count])
            for name, count in (("n0", 2), ("n1", 1))
        }
        self.replicas = {}
        self.apps = {}  # ticks until each serves; None: it failed
        self.processes = {}  # where each runs
        self.released = []  # places whose memory is not free yet
        self.silent = False  # whether nodes do not say what runs on them
        self.number = 0

    def order(self, node_id, gpu_indices, milli):
        """What matching would allow: shares of all that are to stay never exceed a GPU."""
        place = Place(node_id, node_id, gpu_indices, milli)
        own = replace(replica(f"r{self.number}", age_s=self.number), place=place)
        places = [r.place for r in self.replicas.values() if r.state not in ENDING]
        if all(used_milli(places, gpu) + milli <= 1000 for gpu in gpus_of(own.place)):
            self.replicas[own.replica_id] = own
            self.number += 1

    def stop(self, number):
        for name in sorted(self.replicas)[number : number + 1]:
            self.replicas[name] = replace(self.replicas[name], state=ReplicaState.STOPPING)

    def fail(self, number):
        for name in [n for n, ticks in sorted(self.apps.items()) if ticks][number : number + 1]:
            self.apps[name] = None
            self.processes.pop(name, None)

    def kill(self, number):
        """Serve replaces the process."""
        for name in [n for n, ticks in sorted(self.apps.items()) if ticks == 0][number:][:1]:
            self.apps[name] = self.TICKS

    def restart(self):
        """The whole cluster: only what is wanted is known again."""
        self.apps.clear()
        self.processes.clear()
        self.released.clear()

    def lose(self, node_id, dead):
        """The node is not seen any more; its processes may live on."""
        self.offers[node_id] = replace(self.offers[node_id], state=OfferState.LOST)
        for name in [n for n, place in self.processes.items() if dead and place.node_id == node_id]:
            del self.processes[name]
            self.apps.update(dict.fromkeys({name} & set(self.apps), self.TICKS))

    def find(self, node_id):
        self.offers[node_id] = replace(self.offers[node_id], state=OfferState.OPEN)

    def hush(self, silent):
        self.silent = silent

    def seen(self):
        apps = {}
        for name, ticks in self.apps.items():
            lives = name in self.processes and self.lives(self.processes[name])
            running = replace(RUNNING, replica_id=name)
            serves = running if ticks == 0 and lives else STARTING
            apps[f"model-{name}"] = FAILED if ticks is None else serves
        there = {
            node_id: frozenset(n for n, p in self.processes.items() if p.node_id == node_id)
            for node_id, offer in self.offers.items()
            if not self.silent and offer.state is OfferState.OPEN
        }
        left = [*self.released, *(p for n, p in self.processes.items() if n not in self.apps)]
        taken = {gpu for place in left for gpu in gpus_of(place) if gpu[0] in there}
        return Seen(apps, there, frozenset(taken))

    def lives(self, place):
        return self.offers[place.node_id].state is OfferState.OPEN

    def act(self):
        made = plan(self.replicas.values(), self.offers, {}, self.seen(), NOON)
        for step in made:
            match step:
                case Mark(name, state, reason):
                    self.replicas[name] = replace(self.replicas[name], state=state, reason=reason)
                case Forget(name):
                    del self.replicas[name]
                case Start(own):
                    self.start(own.replica_id, own.place)
                case Remove(app_name):
                    del self.apps[app_name.removeprefix("model-")]
                case End(name, _):
                    self.released.append(self.processes.pop(name))
        return made

    def rounds(self, count):
        for _ in range(count):
            self.act()
            self.tick()

    def start(self, name, place):
        if name in self.apps:
            return
        assert self.lives(place)
        for gpu in gpus_of(place):
            others = {n: p for n, p in self.processes.items() if gpu in gpus_of(p) and n != name}
            assert not any(self.apps.get(other) for other in others), "two start at once"
            places = [*others.values(), *self.released]
            assert used_milli(places, gpu) + place.gpu_milli <= 1000, "more than a GPU"
        self.apps[name] = self.TICKS
        self.processes[name] = place

    def tick(self):
        self.released.clear()
        for name, ticks in self.apps.items():
            own = self.replicas.get(name)
            if ticks and own is not None and self.lives(own.place):
                self.processes.setdefault(name, own.place)
                self.apps[name] = ticks - 1


def gpus_of(place):
    return [(place.node_id, index) for index in place.gpu_indices]


def used_milli(places, gpu):
    return sum(place.gpu_milli for place in places if gpu in gpus_of(place))


def does(name, *arguments):
    return st.tuples(st.just(name), *arguments)


nodes = st.sampled_from(["n0", "n1"])
numbers = st.integers(0, 3)
gpus = st.sampled_from([("n0", (0,)), ("n0", (1,)), ("n0", (0, 1)), ("n1", (0,)), ("n1", ())])
orders = st.tuples(gpus, st.sampled_from([1000, 500, 400, 300])).map(
    lambda drawn: ("order", *drawn[0], drawn[1])
)
events = st.one_of(
    orders,
    does("rounds", st.integers(1, 4)),
    does("stop", numbers),
    does("fail", numbers),
    does("kill", numbers),
    does("restart"),
    does("lose", nodes, st.booleans()),
    does("find", nodes),
    does("hush", st.booleans()),
)


@given(st.lists(orders, min_size=4, max_size=6), st.lists(events, max_size=30))
@settings(max_examples=150, deadline=None)
def test_whatever_happens_it_ends_as_wanted_and_no_gpu_is_given_twice(first, later):

    cluster = FakeCluster()
    for name, *arguments in [*first, ("rounds", 15), *later]:
        getattr(cluster, name)(*arguments)
    cluster.hush(False)
    for node_id in cluster.offers:
        cluster.find(node_id)
    wanted = {name for name, r in cluster.replicas.items() if r.state not in ENDING}
    cluster.rounds(60)
    assert cluster.act() == []
    states = {name: r.state for name, r in cluster.replicas.items()}
    ready = {name for name in states if states[name] is ReplicaState.READY}
    assert set(cluster.processes) == ready <= set(cluster.apps) <= set(states) == wanted
    assert {states[name] for name in wanted - ready} <= {ReplicaState.FAILED}
