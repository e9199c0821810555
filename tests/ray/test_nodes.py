"""Provider nodes of a real Ray cluster: joined, looked at, killed, brought back, ended."""

import signal

import psutil
import pytest

from market.cluster import node, supervisor
from market.errors import Conflict, InvalidKey, InvalidRequest, MarketError
from tests.ray.conftest import SECRETS, TOKEN, Provider, alive, wait_until

pytestmark = pytest.mark.timeout(300)


def test_node_brings_its_labels_and_slots(machine):
    found = machine.nodes()["a"]
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
    assert machine.nodes()["local"]["labels"][node.ROLE_LABEL] == "operator"


def test_no_secret_reaches_the_node(machine, providers):
    for process in (providers[0].supervisor(), providers[0].raylet()):
        environment = process.environ()
        assert not SECRETS.keys() & environment.keys()
        assert not set(SECRETS.values()) & set(environment.values())
    for name in ("node.json", "worker.token"):
        assert (providers[0].state_dir / name).stat().st_mode & 0o777 == 0o600
    assert TOKEN not in (providers[0].state_dir / "node.json").read_text()


def test_shares_of_one_gpu_never_exceed_it(machine):
    half = {node.slot_resource("a", 1): 0.5}
    driver = machine.driver
    for name in ("first", "second", "third"):
        gpu = {"CUDA_VISIBLE_DEVICES": "1"}
        driver.do("hold", name=name, node_id="a", resources=half, environment=gpu)
    assert driver.do("where", name="first", timeout_s=60) == "a"
    assert driver.do("where", name="second", timeout_s=60) == "a"
    assert driver.do("where", name="third", timeout_s=3) is None
    driver.do("release", name="first")
    assert driver.do("where", name="third", timeout_s=60) == "a"
    for name in ("second", "third"):
        driver.do("release", name=name)


def start_engine(machine, node_id, replica_id):
    """A replica with two processes below it, one of them re-parented and deaf to SIGTERM."""
    name, marked = f"{replica_id} on {node_id}", {"MARKET_REPLICA": replica_id}
    machine.driver.do("hold", name=name, node_id=node_id, resources={}, environment=marked)
    return machine.driver.do("start_engine", name=name)


def test_agent_sees_and_ends_whole_process_trees(machine):
    pids = start_engine(machine, "a", "r1")
    others = start_engine(machine, "b", "r1")
    assert psutil.Process(pids["orphan"]).ppid() != pids["replica"]
    seen = machine.driver.agent("residents", "a")
    assert set(pids.values()) <= set(seen["r1"])
    assert not set(others.values()) & set(seen["r1"])
    assert machine.driver.agent("gpu_memory", "a") == machine.driver.agent("gpu_memory", "b")
    assert machine.driver.agent("end", "a", "r1", 0.5) == []
    assert not any(alive(pid) for pid in pids.values())
    assert machine.driver.agent("residents", "a") == {}
    assert all(alive(pid) for pid in others.values())
    assert machine.driver.agent("end", "b", "r1", 0.5) == []


def test_joining_again_is_harmless(machine, providers):
    before, worker = len(machine.asked), node.load_worker(providers[0].state_dir)
    assert providers[0].join() == "a"
    assert node.load_worker(providers[0].state_dir) == worker
    assert len(machine.asked) == before
    other = Provider(machine, "a")
    other.facts["cpu_count"] = 64
    with pytest.raises(Conflict, match="other facts"):
        other.join()


def test_refused_join_says_why_and_starts_nothing(machine):
    stranger = Provider(machine, "c")
    with pytest.raises(InvalidKey, match="node c shows no good key"):
        stranger.join("stolen")
    with pytest.raises(InvalidRequest, match="a join token is needed"):
        stranger.join()
    stranger.facts["gpus"] = [{"index": 0}]
    asked = len(machine.asked)
    with pytest.raises(InvalidRequest, match="memory_mib"):
        stranger.join(f"{TOKEN}-c")
    assert len(machine.asked) == asked, "a token was spent on facts that nobody can use"
    with pytest.raises(MarketError, match="no market answers"):
        supervisor.begin_join(
            stranger.state_dir,
            stranger.logs_dir,
            f"http://127.0.0.1:{node.free_port()}",
            f"{TOKEN}-c",
            stranger.facts | {"gpus": []},
        )
    assert stranger.leave() is False


def test_killed_raylet_returns_as_the_same_node(machine, providers):
    before = machine.nodes()["b"]["ray_id"]
    pids = start_engine(machine, "b", "r2")
    providers[1].raylet().send_signal(signal.SIGKILL)

    def dead():
        return any(n["ray_id"] == before and not n["alive"] for n in machine.driver.do("nodes"))

    wait_until(dead, "the node counting as dead", timeout_s=15)
    back = wait_until(lambda: machine.nodes().get("b"), "the node's return")
    assert back["ray_id"] != before
    assert back["resources"][node.slot_resource("b", 0)] == 1
    assert machine.asked[-1].keys() == {"node_id", "node_key", "node"}
    assert machine.asked[-1]["node_id"] == "b"
    assert not any(alive(pid) for pid in pids.values()), "an engine of the lost node still runs"
    assert machine.driver.agent("residents", "b") == {}


def test_nodes_follow_an_operator_that_comes_back_elsewhere(machine, providers):
    before = machine.head.address
    machine.stop_head()
    machine.start_head()
    assert machine.head.address != before
    wait_until(lambda: {"a", "b"} <= machine.nodes().keys(), "the nodes' return", timeout_s=90)
    assert machine.driver.agent("residents", "a") == {}


def test_node_that_is_no_longer_wanted_stops_trying(machine, providers):
    process = providers[1].supervisor()
    key = machine.keys.pop("b")
    providers[1].raylet().send_signal(signal.SIGKILL)
    wait_until(lambda: not alive(process.pid), "the end of the supervisor")
    assert not providers[1].processes()
    assert "node b shows no good key" in (providers[1].logs_dir / "supervisor.log").read_text()
    with pytest.raises(InvalidKey, match="node b shows no good key"):
        providers[1].join()
    machine.keys["b"] = key
    assert providers[1].join() == "b"


def test_leaving_ends_every_process(machine, providers):
    start_engine(machine, "a", "r3")
    family = [providers[0].supervisor(), *providers[0].processes()]
    assert len(family) > 4
    assert providers[0].leave() is True
    assert not any(alive(process.pid) for process in family)
    assert providers[0].leave() is False
    wait_until(lambda: "a" not in machine.nodes(), "the end of node a", timeout_s=15)
