"""What runs on a provider's machine: the node's environment, its agent, its supervisor."""

import json
import subprocess
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayTaskError

from market.cluster import agent, node
from market.cluster.agent import AgentClient, NodeAgent, by_replica, marks_of, memory_is_free
from market.cluster.node import WorkerFacts
from market.cluster.supervisor import (
    NOWHERE,
    PAUSE_MAX_S,
    PAUSE_MIN_S,
    Membership,
    admission_of,
    error_of,
    load_membership,
    next_pause_s,
    worker_facts,
)
from market.errors import InvalidKey, InvalidRequest, MarketError, MarketFault, NotFound, Overloaded

FACTS = WorkerFacts("acme", "a", "rtx-a6000", 49_140, (0, 2), 16, "127.0.0.1:6379", "ray-secret")


def environment(node_id="a", record="/a/worker.json", **more):
    return {node.NODE_VARIABLE: node_id, node.RECORD_VARIABLE: record, **more}


class TestEnvironment:
    def test_secrets_do_not_reach_a_providers_node(self, tmp_path):
        shell = {
            "PATH": "/bin",
            "LC_ALL": "C.UTF-8",
            "HF_HOME": "/cache",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "https_proxy": "http://proxy:3128",
            "MARKET_API_KEY": "s3cr3t",
            "MARKET_DATABASE_URL": "s3cr3t",
            "MARKET_HOME": "/home/acme/.market",
            "HF_TOKEN": "s3cr3t",
            "HUGGING_FACE_HUB_TOKEN": "s3cr3t",
            "VLLM_API_KEY": "s3cr3t",
            "NVIDIA_API_KEY": "s3cr3t",
            "AWS_ACCESS_KEY_ID": "s3cr3t",
            "AWS_SECRET_ACCESS_KEY": "s3cr3t",
            "AWS_SESSION_TOKEN": "s3cr3t",
            "GOOGLE_APPLICATION_CREDENTIALS": "s3cr3t",
            "SSH_AUTH_SOCK": "s3cr3t",
            "PGPASSWORD": "s3cr3t",
            "HTTP_PROXY": "http://user:s3cr3t@proxy:3128",
            "RAY_AUTH_TOKEN": "s3cr3t",
            "RAY_ADDRESS": "elsewhere:6379",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
            "CUDA_VISIBLE_DEVICES": "0,1",
            "ANYTHING_ELSE": "s3cr3t",
        }
        given = node.worker_environment(shell, tmp_path / "worker.token")
        assert "s3cr3t" not in " ".join(given.values())
        kept = {name: given[name] for name in shell.keys() & given.keys()}
        assert kept == {
            "PATH": "/bin",
            "LC_ALL": "C.UTF-8",
            "HF_HOME": "/cache",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "https_proxy": "http://proxy:3128",
            "CUDA_VISIBLE_DEVICES": "",
        }
        assert given["RAY_AUTH_MODE"] == "token"
        assert given["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "worker.token")

    def test_labels_of_a_node(self):
        assert node.worker_labels(FACTS) == (
            "market.io/role=provider,market.io/provider=acme,market.io/node=a,"
            "market.io/gpu-type=rtx-a6000,market.io/gpu-memory-mib=49140"
        )

    @pytest.mark.parametrize(
        ("gpu_type", "label"),
        [("quadro-rtx-6000/8000", "quadro-rtx-6000-8000"), ("x" * 70, "x" * 63), ("", "unknown")],
    )
    def test_gpu_types_become_labels(self, gpu_type, label):
        facts = WorkerFacts("acme", "a", gpu_type, 1, (0,), 1, "127.0.0.1:1", "")
        assert f"gpu-type={label}," in node.worker_labels(facts)

    @pytest.mark.parametrize("name", ["", "a b", "a,market.io/role=operator", "-a", "x" * 64, "ä"])
    def test_ids_that_cannot_be_labels_are_refused(self, name):
        with pytest.raises(InvalidRequest, match="node id"):
            node.worker_labels(WorkerFacts("acme", name, "h100", 1, (0,), 1, "127.0.0.1:1", ""))

    def test_one_slot_for_each_physical_gpu(self):
        assert node.slots("a", (0, 2)) == {"gpu-slot/a/0": 1, "gpu-slot/a/2": 1}

    def test_address_of_a_node(self):
        for head in ("127.0.0.1:6379", "localhost:6379", "[::1]:6379"):
            assert node.node_ip(head) == "127.0.0.1"
        assert node.node_ip("127.8.8.8:6379").startswith("127.")
        with pytest.raises(MarketFault, match="no way from here"):
            node.node_ip("no-such-host.invalid:6379")

    def test_token_is_not_shown(self):
        assert "ray-secret" not in repr(FACTS)


class TestResidents:
    def test_only_replicas_of_this_node_count(self):
        marks = marks_of("a", environment())
        processes = [
            (9, environment(MARKET_REPLICA="r2")),
            (7, environment(MARKET_REPLICA="r1")),
            (5, environment(MARKET_REPLICA="r1")),
            (1, environment()),
            (2, environment(MARKET_REPLICA="")),
            (3, environment("b", "/b/worker.json", MARKET_REPLICA="r1")),
            (4, environment("a", "/other-market/worker.json", MARKET_REPLICA="r1")),
            (6, {"MARKET_REPLICA": "r1"}),
        ]
        assert by_replica(processes, marks) == {"r1": [5, 7], "r2": [9]}

    def test_node_that_others_started_is_known_by_name_alone(self):
        marks = marks_of("a", {"PATH": "/bin"})
        assert by_replica([(5, environment(MARKET_REPLICA="r1"))], marks) == {"r1": [5]}

    def test_processes_are_found_and_ended(self, monkeypatch, tmp_path):
        mine = environment(record=str(tmp_path / "worker.json"), PATH="/bin:/usr/bin")
        for name, value in mine.items():
            monkeypatch.setenv(name, value)
        script = ["sh", "-c", "trap '' TERM; echo; read line"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with (
            subprocess.Popen(script, env=mine | {"MARKET_REPLICA": "r1"}, **pipes) as engine,
            subprocess.Popen(["sleep", "60"], env=mine | {"MARKET_REPLICA": "r2"}) as other,
        ):
            engine.stdout.readline()  # deaf to SIGTERM from now on
            here = NodeAgent("a")
            assert here.residents() == {"r1": [engine.pid], "r2": [other.pid]}
            assert here.end("r1", patience_s=0.1) == []
            assert here.residents() == {"r2": [other.pid]}
            assert here.end("r2", patience_s=5) == []
            assert here.end("r2", patience_s=5) == []
            assert engine.poll() is not None
            assert other.poll() is not None


@pytest.mark.parametrize(
    ("used_mib", "others_milli", "free"),
    [
        (0, 0, True),
        (2_457, 0, True),
        (2_458, 0, False),
        (40_960, 500, True),
        (43_417, 500, True),
        (43_418, 500, False),
        (81_920, 970, True),
    ],
)
def test_memory_is_free_up_to_what_others_may_use(used_mib, others_milli, free):
    assert memory_is_free(used_mib, 81_920, others_milli) is free


class FakeRay:
    """Ray as the client sees it; ``answers`` are values or errors of the calls to come."""

    def __init__(self, *answers, alive=True):
        self.answers, self.started, self.cancelled = list(answers), [], []
        self.nodes = lambda: [{"Alive": alive, "Labels": {node.NODE_LABEL: "a"}}]
        self.cancel = self.cancelled.append

    def remote(self, kind):
        assert kind is NodeAgent
        call = SimpleNamespace(remote=lambda *_arguments: "call")
        actor = SimpleNamespace(residents=call, end=call, gpu_memory=call)

        def options(**chosen):
            self.started.append(chosen)
            return SimpleNamespace(remote=lambda _node_id: actor)

        return SimpleNamespace(options=options)

    def get(self, call, timeout):
        assert call == "call"
        assert timeout >= agent.ANSWER_TIMEOUT_S
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


class TestClient:
    @pytest.fixture
    def reach(self, monkeypatch):
        def make(*answers, alive=True):
            fake = FakeRay(*answers, alive=alive)
            monkeypatch.setattr(agent, "ray", fake)
            return fake, AgentClient()

        return make

    def test_starts_one_agent_pinned_to_its_node(self, reach):
        fake, client = reach({"r1": [5]}, {})
        assert client.residents("a") == {"r1": [5]}
        assert client.gpu_memory("a") == {}
        (options,) = fake.started
        assert options["name"] == "node-agent-a"
        assert options["label_selector"] == {"market.io/node": "a"}
        assert options["lifetime"] == "detached"

    def test_node_that_is_not_there_is_not_waited_for(self, reach):
        fake, client = reach(alive=False)
        with pytest.raises(Overloaded, match="not in the cluster"):
            client.residents("a")
        with pytest.raises(Overloaded):
            client.residents("b")
        assert fake.started == []

    def test_silent_agent_is_overloaded_and_its_call_will_not_run_later(self, reach):
        fake, client = reach(GetTimeoutError("late"), [])
        with pytest.raises(Overloaded, match="does not answer"):
            client.end("a", "r1", 1)
        assert fake.cancelled == ["call"]
        assert client.end("a", "r1", 1) == []
        assert len(fake.started) == 2, "a lost agent is looked up again"

    def test_restarting_agent_is_overloaded(self, reach):
        _, client = reach(ActorUnavailableError("gone", b"0" * 16))
        with pytest.raises(Overloaded):
            client.residents("a")

    def test_failing_driver_is_told_apart_from_a_silent_node(self, reach):
        failure = RayTaskError("gpu_memory", "traceback", MarketFault("nvidia-smi failed"))
        _, client = reach(
            failure.as_instanceof_cause(), RayTaskError("end", "t", ValueError("bug"))
        )
        with pytest.raises(MarketFault, match="node a: nvidia-smi failed"):
            client.gpu_memory("a")
        with pytest.raises(MarketFault, match="it failed in end"):
            client.end("a", "r1", 1)


ANSWER = {"node_id": "a", "node_key": "key", "ray_address": "10.0.0.1:6379", "ray_token": "t"}
NODE = {
    "provider_id": "acme",
    "gpu_type": "h100",
    "gpus": [{"index": 0, "memory_mib": 81_920}, {"index": 3, "memory_mib": 80_000}],
    "cpu_count": 64,
}


class TestJoin:
    def test_token_is_shown_once_and_then_the_key(self):
        before = Membership("http://market", NODE, join_token="token")
        assert before.body() == {"join_token": "token", "node": NODE}
        after = before.admitted(admission_of(ANSWER))
        assert after.body() == {"node_id": "a", "node_key": "key", "node": NODE}
        assert after.join_token is None
        assert "token" not in json.dumps(after.body())
        assert "key" not in repr(after).replace("node_key", "")

    def test_membership_that_an_administrator_wrote(self, tmp_path):
        assert load_membership(tmp_path) is None
        written = {"market_url": "http://market", "node": NODE, "join_token": "token"}
        (tmp_path / "node.json").write_text(json.dumps(written))
        assert load_membership(tmp_path) == Membership("http://market", NODE, "token")

    @pytest.mark.parametrize("answer", [None, [], {}, ANSWER | {"ray_address": None}])
    def test_answer_that_is_no_admission(self, answer):
        with pytest.raises(MarketFault, match="ray_address"):
            admission_of(answer)
        assert admission_of(ANSWER | {"more": 1}).ray_address == "10.0.0.1:6379"

    def test_facts_for_ray(self):
        facts = worker_facts(admission_of(ANSWER), NODE)
        assert (facts.provider_id, facts.node_id, facts.gpu_indices) == ("acme", "a", (0, 3))
        assert (facts.gpu_memory_mib, facts.cpu_count) == (80_000, 64)
        assert (facts.ray_address, facts.ray_token) == ("10.0.0.1:6379", "t")
        assert worker_facts(NOWHERE, NODE | {"gpus": []}).gpu_memory_mib == 0
        for name in NODE:
            with pytest.raises(InvalidRequest, match="incomplete"):
                worker_facts(NOWHERE, {k: v for k, v in NODE.items() if k != name})

    @pytest.mark.parametrize(
        ("status", "kind"), [(400, InvalidRequest), (401, InvalidKey), (410, NotFound)]
    )
    def test_refusals_keep_the_markets_words(self, status, kind):
        error = error_of(status, json.dumps({"error": {"message": "no such key"}}))
        assert type(error) is kind
        assert error.message == "no such key"

    @pytest.mark.parametrize("text", ["Path '/x' not found", "", "[]", '{"error": "no"}', "null"])
    def test_404_of_a_proxy_is_not_the_markets_word(self, text):
        assert type(error_of(404, text)) is MarketError

    def test_pauses_grow_until_a_node_has_run_for_long(self):
        pauses = [0.0]
        for _ in range(6):
            pauses.append(next_pause_s(pauses[-1], ran_s=5))
        assert pauses == [0, 1, 2, 4, 8, PAUSE_MAX_S, PAUSE_MAX_S]
        assert next_pause_s(PAUSE_MAX_S, ran_s=3600) == PAUSE_MIN_S
