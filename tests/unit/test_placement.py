import math
from dataclasses import replace
from random import Random

import pytest

from market import placement
from market.placement import (
    GpuRoom,
    NodeRoom,
    Packer,
    Placement,
    Policy,
    ShareRequest,
    choose,
    classes_of,
    give_back,
    take,
)

WHOLE = ShareRequest(1, 1000)
PAIR = ShareRequest(2, 1000)
CPU_TASK = ShareRequest(0, 0, cpu_milli=4000)
RULES = (Policy.BEST_FIT, Policy.FGD_Q, Policy.FGD_BF)


def share(milli, gpu_memory_mib=0):
    return ShareRequest(1, milli, gpu_memory_mib)


def node(node_id, *gpus, cpu_milli=64_000, memory_mib=256_000, gpu_type="a100"):
    """A GPU is its free milli, with as much memory per milli, or a ready GpuRoom."""
    rooms = tuple(g if isinstance(g, GpuRoom) else GpuRoom(g, 80 * g) for g in gpus)
    return NodeRoom(node_id, gpu_type, cpu_milli, memory_mib, rooms)


def workload(*requests):
    return tuple((request, 1 / len(requests)) for request in requests)


class TestRequest:
    @pytest.mark.parametrize(
        "values",
        [
            (2, 500),
            (1, 0),
            (1, 1001),
            (0, 500),
            (-1, 1000),
            (0, 0, 1),
            (1, 500, -1),
            (1, 500, 0, -1),
        ],
    )
    def test_only_whole_gpus_one_share_or_none(self, values):
        with pytest.raises(ValueError, match="not a request"):
            ShareRequest(*values)


class TestClasses:
    def test_are_the_most_frequent_ones_that_make_95_percent(self):
        requests = [WHOLE] * 60 + [share(500)] * 34 + [PAIR] * 4 + [share(100)] * 2
        classes = classes_of(requests)
        assert [request for request, _ in classes] == [WHOLE, share(500), PAIR]
        assert [p for _, p in classes] == [60 / 98, 34 / 98, 4 / 98]

    def test_order_of_requests_does_not_matter(self):
        requests = [share(milli) for milli in range(100, 200)] * 2
        shuffled = Random(1).sample(requests, len(requests))
        assert classes_of(requests) == classes_of(shuffled)
        assert math.fsum(p for _, p in classes_of(requests)) == pytest.approx(1)

    def test_main_memory_makes_no_other_class(self):
        assert classes_of([WHOLE, replace(WHOLE, memory_mib=1)]) == ((WHOLE, 1.0),)

    def test_of_nothing_there_are_none(self):
        assert classes_of([]) == ()


class TestBestFit:
    def test_takes_the_fullest_node(self):
        nodes = [node("a", 1000, 1000), node("b", 1000, 600), node("c", 1000, 1000)]
        assert choose(nodes, WHOLE, (), Policy.BEST_FIT) == Placement("b", (0,))

    def test_takes_the_fullest_gpu(self):
        chosen = choose([node("a", 1000, 400, 600)], share(400), (), Policy.BEST_FIT)
        assert chosen == Placement("a", (1,))

    def test_counts_cpu_and_gpu_each_by_its_scale(self):
        by_cpu = [node("a", 1000, cpu_milli=24_000), node("b", 1000, 900, cpu_milli=8_000)]
        assert choose(by_cpu, WHOLE, (), Policy.BEST_FIT).node_id == "b"


class TestFragments:
    def test_keeps_whole_what_the_workload_wants_whole(self):
        nodes = [node("a", 1000), node("b", 500)]
        assert choose(nodes, share(400), workload(WHOLE)).node_id == "b"

    def test_leaves_a_rest_that_the_workload_can_use(self):
        # 700 - 300 would be lost to the half of tasks that want 700; 1000 - 300 is not.
        classes = workload(share(300), share(700))
        nodes = [node("a", 700, 1000)]
        assert choose(nodes, share(300), classes, Policy.BEST_FIT).gpu_indices == (0,)
        for policy in (Policy.FGD_Q, Policy.FGD_BF):
            assert choose(nodes, share(300), classes, policy).gpu_indices == (1,)

    def test_keeps_cpu_beside_free_gpus(self):
        nodes = [node("a", 1000, cpu_milli=8000), node("b", 0)]
        classes = workload(replace(WHOLE, cpu_milli=8000))
        assert choose(nodes, CPU_TASK, classes, Policy.BEST_FIT).node_id == "a"
        assert choose(nodes, CPU_TASK, classes).node_id == "b"
        # A GPU whose node lacks the CPU is lost already.
        starved = replace(nodes[0], cpu_milli=7000)
        assert choose([starved, nodes[1]], CPU_TASK, classes).node_id == "a"

    def test_quantised_score_ties_where_the_exact_one_does_not(self):
        # dF is -0.03 * 500 on a and -0.03 * 400 on b: both score int(100 * sigmoid) = 49.
        classes = ((share(600), 0.03), (share(1), 0.97))
        nodes = [node("a", 1000), node("b", 900)]
        assert choose(nodes, share(500), classes, Policy.FGD_Q).node_id == "a"
        assert choose(nodes, share(500), classes, Policy.FGD_BF).node_id == "b"

    def test_memory_alone_makes_a_fragment(self):
        # Both have the same share free; only b has the memory that the workload wants.
        poor = GpuRoom(600, 10_000)
        nodes = [node("a", GpuRoom(600, 40_000)), node("b", poor)]
        assert choose(nodes, share(200, 5_000), workload(share(600, 40_000))).node_id == "b"

    def test_of_an_unwanted_type_go_first(self):
        nodes = [node("a", 1000), node("b", 1000, gpu_type="t4")]
        classes = workload(replace(WHOLE, gpu_types=frozenset({"a100"})))
        assert choose(nodes, WHOLE, classes).node_id == "b"

    def test_without_a_workload_the_best_fit_decides(self):
        nodes = [node("a", 1000, 1000), node("b", 1000, 600)]
        assert choose(nodes, share(500), ()) == Placement("b", (1,))


class TestRandom:
    def test_reaches_every_gpu_with_room_and_no_other(self):
        nodes = [node("a", 1000, 300), node("b", 500, 600)]
        chosen = {choose(nodes, share(500), (), Policy.RANDOM, Random(seed)) for seed in range(50)}
        assert chosen == {Placement("a", (0,)), Placement("b", (0,)), Placement("b", (1,))}

    def test_same_seed_chooses_the_same(self):
        nodes = [node(name, 1000, 1000) for name in "abcd"]
        requests = [share(250)] * 20
        runs = []
        for order in (nodes, nodes[::-1]):
            packer = Packer(order, (), Policy.RANDOM, Random(7))
            runs.append([packer.place(request) for request in requests])
        assert runs[0] == runs[1]

    @pytest.mark.parametrize(("policy", "random"), [(Policy.RANDOM, None), (*RULES[:1], Random(1))])
    def test_takes_a_random_and_no_other_policy_does(self, policy, random):
        with pytest.raises(ValueError, match="policy"):
            Packer([], (), policy, random)


@pytest.mark.parametrize("policy", RULES)
class TestRoom:
    def test_is_refused_if_no_node_has_it(self, policy):
        full = node("a", 400, 400, cpu_milli=1000, memory_mib=1000)
        for request in (
            share(401),
            WHOLE,
            replace(share(100), cpu_milli=1001),
            replace(share(100), memory_mib=1001),
            replace(share(100), gpu_types=frozenset({"t4", "h100"})),
        ):
            assert choose([full], request, workload(WHOLE), policy) is None
        assert choose([], WHOLE, (), policy) is None

    def test_memory_is_hard(self, policy):
        nodes = [node("a", GpuRoom(1000, 15_999)), node("b", GpuRoom(100, 16_000))]
        assert choose(nodes, share(100, 16_000), (), policy) == Placement("b", (0,))
        assert choose(nodes[:1], share(100, 16_000), (), policy) is None

    def test_any_of_the_types_will_do(self, policy):
        nodes = [node("a", 1000), node("b", 1000, gpu_type="t4")]
        wanted = replace(WHOLE, gpu_types=frozenset({"t4", "h100"}))
        assert choose(nodes, wanted, (), policy).node_id == "b"

    def test_needs_no_gpu_if_none_is_asked_for(self, policy):
        assert choose([node("a")], CPU_TASK, workload(WHOLE), policy) == Placement("a", ())

    def test_ties_end_on_the_lowest_id_and_index(self, policy):
        nodes = [node(name, 300, 1000, 1000) for name in "cab"]
        for order in (nodes, nodes[::-1]):
            assert choose(order, WHOLE, workload(WHOLE), policy) == Placement("a", (1,))


@pytest.mark.parametrize("policy", RULES)
class TestDomains:
    def two(self, node_id, *milli):
        """Two NVLinks: even and odd GPUs."""
        gpus = [GpuRoom(m, 80 * m, index % 2) for index, m in enumerate(milli)]
        return node(node_id, *gpus)

    def test_several_gpus_stay_within_one(self, policy):
        nodes = [self.two("a", 1000, 0, 0, 1000, 0, 1000)]
        assert choose(nodes, PAIR, workload(PAIR), policy) == Placement("a", (3, 5))

    def test_node_where_one_will_do_is_preferred(self, policy):
        nodes = [self.two("a", 1000, 1000), self.two("b", 1000, 1000, 1000, 1000)]
        assert choose(nodes, PAIR, workload(PAIR), policy) == Placement("b", (0, 2))

    def test_as_few_as_can_be_are_taken_if_none_has_enough(self, policy):
        three = node("a", *(GpuRoom(1000, 0, domain) for domain in (0, 1, 1, 2)))
        assert choose([three], ShareRequest(3, 1000), (), policy) == Placement("a", (0, 1, 2))

    def test_never_over_two_nodes(self, policy):
        assert choose([node("a", 1000), node("b", 1000)], PAIR, (), policy) is None


@pytest.mark.parametrize("policy", [Policy.FGD_Q, Policy.FGD_BF])
def test_one_gpu_comes_from_a_broken_domain(policy):
    gpus = (GpuRoom(1000, 0, 0), GpuRoom(1000, 0, 0), GpuRoom(1000, 0, 1), GpuRoom(0, 0, 1))
    assert choose([node("a", *gpus)], WHOLE, workload(PAIR), policy).gpu_indices == (2,)


class TestTakeAndGiveBack:
    def test_are_each_others_inverse(self):
        before = node("a", 1000, 700, GpuRoom(1000, 4, 3))
        request = ShareRequest(1, 300, 80, 5, 6)
        after = take(before, request, (1,))
        assert after.gpus[1] == GpuRoom(400, 80 * 700 - 80)
        assert (after.cpu_milli, after.memory_mib) == (63_995, 255_994)
        assert give_back(after, request, (1,)) == before

    @pytest.mark.parametrize(
        ("request_", "indices"),
        [
            (share(701), (1,)),
            (share(100, 60_000), (1,)),
            (replace(share(1), cpu_milli=64_001), (0,)),
            (replace(share(1), memory_mib=256_001), (0,)),
            (PAIR, (0, 0)),
            (share(1), ()),
        ],
    )
    def test_refuse_what_has_no_room(self, request_, indices):
        with pytest.raises(ValueError, match="GPU"):
            take(node("a", 1000, 700), request_, indices)

    def test_refuse_to_make_a_gpu_more_than_whole(self):
        with pytest.raises(ValueError, match="GPU 0 of a"):
            give_back(node("a", 700), share(301), (0,))


class TestPacker:
    def test_takes_room_until_there_is_none(self):
        packer = Packer([node("a", 1000, 500)], workload(share(500)))
        placed = [packer.place(share(500)) for _ in range(4)]
        assert placed == [
            Placement("a", (1,)),
            Placement("a", (0,)),
            Placement("a", (0,)),
            None,
        ]
        assert [gpu.milli for gpu in packer.room("a").gpus] == [0, 0]

    def test_released_room_is_as_before(self):
        before = node("a", 1000, 1000)
        packer = Packer([before], workload(WHOLE))
        placement = packer.place(PAIR)
        assert packer.place(WHOLE) is None
        packer.release(placement, PAIR)
        assert packer.room("a") == before
        assert packer.place(PAIR) == placement

    def test_release_twice_is_refused_and_changes_nothing(self):
        packer = Packer([node("a", 1000)], ())
        placement = packer.place(share(500))
        packer.release(placement, share(500))
        with pytest.raises(ValueError, match="GPU 0 of a"):
            packer.release(placement, share(500))
        assert packer.place(WHOLE) == Placement("a", (0,))

    def test_removed_node_takes_nothing_and_added_one_does(self):
        packer = Packer([node("a", 1000), node("b", 1000)], ())
        packer.place(share(300))
        assert packer.remove("a").gpus[0].milli == 700
        assert packer.place(WHOLE).node_id == "b"
        assert packer.place(share(300)) is None
        packer.add(node("c", 300))
        assert packer.place(share(300)) == Placement("c", (0,))

    def test_node_ids_are_unique_and_known(self):
        packer = Packer([node("a", 1000)], ())
        with pytest.raises(ValueError, match="node a"):
            packer.add(node("a", 500))
        for call in (packer.room, packer.remove):
            with pytest.raises(KeyError):
                call("b")
        with pytest.raises(KeyError):
            packer.release(Placement("b", (0,)), WHOLE)

    @pytest.mark.parametrize("policy", RULES)
    def test_order_of_nodes_does_not_matter(self, policy):
        nodes = [node(f"n{number}", *[1000] * (number % 3 + 1)) for number in range(9)]
        requests = [share(milli) for milli in (300, 700, 450, 200, 1000)] * 6 + [PAIR] * 3
        classes = classes_of(requests)
        runs = []
        for order in (nodes, nodes[::-1], Random(3).sample(nodes, 9)):
            packer = Packer(order, classes, policy)
            runs.append([packer.place(request) for request in requests])
        assert runs[0] == runs[1] == runs[2]
        assert None in runs[0]

    @pytest.mark.parametrize(
        ("limit", "kept"), [("CHANGES_MAX", "_changes"), ("QUEUES_MAX", "_queues")]
    )
    def test_forgets_beyond_a_limit_and_chooses_the_same(self, limit, kept, monkeypatch):
        requests = [share(100 * (number % 9 + 1)) for number in range(60)]
        classes = classes_of(requests)

        def placed():
            packer = Packer([node(f"n{number}", 1000, 1000) for number in range(8)], classes)
            return [packer.place(request) for request in requests], len(getattr(packer, kept))

        expected, unlimited = placed()
        monkeypatch.setattr(placement, limit, 4)
        choices, limited = placed()
        assert choices == expected
        # Placing once more adds up to two changes, starting afresh one per state.
        assert limited <= 4 + 2 < unlimited
