"""Provider nodes of a real Ray cluster: joined, looked at, killed, brought back, ended."""

import signal

import psutil
import pytest

from market.cluster import node, supervisor
from market.errors import Conflict, InvalidKey, InvalidRequest, MarketError
from tests.ray.conftest import SECRETS, TOKEN, Provider, alive, wait_until

pytestmark = pytest.mark.timeout(300)


def start_engine(operator, node_id, replica_id, deaf=False):
    """A replica with two processes below it, one of them re-parented."""
    name, marked = f"{replica_id} on {node_id}", {"MARKET_REPLICA": replica_id}
    operator.driver.do("hold", name=name, node_id=node_id, resources={}, environment=marked)
    return operator.driver.do("start_engine", name=name, deaf=deaf)


def test_node_brings_its_labels_and_slots(operator, node_a):
    found = operator.nodes()["a"]
    labels = {name: value for name, value in found["labels"].items() if "market.io" in name}
    assert labels == {
        "market.io/role": "provider",
        "market.io/provider": "acme",
        "market.io/node": "a",
        "market.io/gpu-type": "h100",
        "market.io/gpu-memory-mib": "81920",
    }
    slots = {name: n for name, n in found["resources"].items() if name.startswith("gpu-slot")}
    assert slots == {"gpu-slot/a/0": 1, "gpu-slot/a/1": 1}
    assert found["resources"]["CPU"] >= node.LOGICAL_CPUS_MIN
    assert "GPU" not in found["resources"]


def test_operator_has_slots_for_gpus_of_its_own(operator):
    found = operator.nodes()["local"]
    slots = {name: n for name, n in found["resources"].items() if name.startswith("gpu-slot")}
    assert slots == {"gpu-slot/local/1": 1}
    assert found["labels"][node.ROLE_LABEL] == "operator"


def test_no_secret_reaches_the_node(node_a):
    for process in (node_a.supervisor(), node_a.raylet()):
        environment = process.environ()
        assert not SECRETS.keys() & environment.keys()
        assert not set(SECRETS.values()) & set(environment.values())
    for name in ("node.json", "worker.token"):
        assert (node_a.state_dir / name).stat().st_mode & 0o777 == 0o600
    assert TOKEN not in (node_a.state_dir / "node.json").read_text()


def test_shares_of_one_gpu_never_exceed_it(operator, node_a):
    half = {node.slot_resource("a", 1): 0.5}
    driver = operator.driver
    for name in ("first", "second", "third"):
        gpu = {"CUDA_VISIBLE_DEVICES": "1"}
        driver.do("hold", name=name, node_id="a", resources=half, environment=gpu)
    assert driver.do("where", name="first", timeout_s=60) == ["a", "1"]
    assert driver.do("where", name="second", timeout_s=60) == ["a", "1"]
    assert driver.do("where", name="third", timeout_s=3) is None
    driver.do("release", name="first")
    assert driver.do("where", name="third", timeout_s=60) == ["a", "1"]
    for name in ("second", "third"):
        driver.do("release", name=name)


def test_agent_sees_and_ends_whole_process_trees(operator, node_a, node_b):
    pids = start_engine(operator, "a", "r1", deaf=True)
    others = start_engine(operator, "b", "r1")
    assert psutil.Process(pids["orphan"]).ppid() != pids["replica"]
    seen = operator.driver.agent("residents", "a")
    assert set(pids.values()) <= set(seen["r1"])
    assert not set(others.values()) & set(seen["r1"])
    assert operator.driver.agent("end", "a", "r1", 0.5) == []
    assert not any(alive(pid) for pid in pids.values())
    assert operator.driver.agent("residents", "a") == {}
    assert all(alive(pid) for pid in others.values())
    assert operator.driver.agent("end", "b", "r1", 0.5) == []


def test_joining_again_is_harmless(operator, node_a):
    before, worker = len(operator.asked), node_a.worker()
    assert node_a.join() == "a"
    assert node_a.worker() == worker
    assert len(operator.asked) == before
    other = Provider(operator, "a")
    other.facts["cpu_count"] = 64
    with pytest.raises(Conflict, match="other facts"):
        other.join()


def test_node_outlives_its_supervisor_and_gets_another(node_a):
    worker, killed = node_a.worker(), node_a.supervisor()
    killed.kill()
    psutil.wait_procs([killed], timeout=10)
    assert node_a.join() == "a"
    assert node_a.worker() == worker
    wait_until(lambda: node_a.supervisor().pid != killed.pid, "another supervisor")


def test_refused_join_says_why_and_starts_nothing(operator):
    stranger = Provider(operator, "c")
    with pytest.raises(InvalidKey, match="node c shows no good key"):
        stranger.join("stolen")
    with pytest.raises(InvalidRequest, match="a join token is needed"):
        stranger.join()
    nobody = f"http://127.0.0.1:{node.free_port()}"
    with pytest.raises(MarketError, match="no market answers"):
        supervisor.begin_join(
            stranger.state_dir, stranger.logs_dir, nobody, f"{TOKEN}-c", stranger.facts
        )
    stranger.facts["gpus"] = [{"index": 0}]
    asked = len(operator.asked)
    with pytest.raises(InvalidRequest, match="memory_mib"):
        stranger.join(f"{TOKEN}-c")
    assert len(operator.asked) == asked, "a token was spent on facts that nobody can use"
    assert stranger.leave() is False


def test_killed_raylet_returns_as_the_same_node(operator, node_b):
    before = operator.nodes()["b"]["ray_id"]
    pids = start_engine(operator, "b", "r2")
    node_b.raylet().send_signal(signal.SIGKILL)

    def dead():
        return any(n["ray_id"] == before and not n["alive"] for n in operator.driver.do("nodes"))

    wait_until(dead, "the node counting as dead", timeout_s=15)
    back = wait_until(lambda: operator.nodes().get("b"), "the node's return")
    assert back["ray_id"] != before
    assert back["resources"][node.slot_resource("b", 0)] == 1
    assert operator.asked[-1].keys() == {"node_id", "node_key", "node"}
    assert operator.asked[-1]["node_id"] == "b"
    assert not any(alive(pid) for pid in pids.values()), "an engine of the lost node still runs"
    assert operator.driver.agent("residents", "b") == {}


def test_node_that_is_no_longer_wanted_stops_trying(operator, node_b):
    process = node_b.supervisor()
    key = operator.keys.pop("b")
    node_b.raylet().send_signal(signal.SIGKILL)
    wait_until(lambda: not alive(process.pid), "the end of the supervisor")
    assert not node_b.processes()
    assert "node b shows no good key" in (node_b.logs_dir / supervisor.LOG).read_text()
    with pytest.raises(InvalidKey, match="node b shows no good key"):
        node_b.join()
    operator.keys["b"] = key


def test_node_follows_an_operator_that_comes_back_elsewhere(operator, node_a):
    before = operator.head.address
    operator.stop_head()
    operator.start_head()
    assert operator.head.address != before
    wait_until(lambda: "a" in operator.nodes(), "the node's return", timeout_s=120)
    assert operator.driver.agent("residents", "a") == {}


def test_leaving_ends_every_process_and_coming_back_needs_no_token(operator, node_a):
    start_engine(operator, "a", "r3")
    family = [node_a.supervisor(), *node_a.processes()]
    assert len(family) > 4
    assert node_a.leave() is True
    assert not any(alive(process.pid) for process in family)
    assert node_a.leave() is False
    wait_until(lambda: "a" not in operator.nodes(), "the end of node a", timeout_s=15)
    assert node_a.join() == "a"
