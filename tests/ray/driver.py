"""Ray's side of the tests, in a process of its own: Ray reads its settings when it is imported.

One JSON line in, {"do": command, "with": arguments}; one JSON line out.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from market.cluster import node

COMMANDS = {}


def command(function):
    COMMANDS[function.__name__] = function
    return function


@command
def nodes():
    import ray

    return [
        {
            "ray_id": found["NodeID"],
            "node": found["Labels"].get(node.NODE_LABEL),
            "alive": found["Alive"],
            "labels": found["Labels"],
            "resources": found["Resources"],
        }
        for found in ray.nodes()
    ]


class Holder:
    """Takes a share of a slot, or plays a replica that starts an engine."""

    def where(self):
        return os.environ[node.NODE_VARIABLE], os.environ["CUDA_VISIBLE_DEVICES"]

    def start_engine(self, deaf):
        """A child, and one whose parent ends at once; ``deaf``: that heeds no SIGTERM."""
        child = subprocess.Popen(["sleep", "600"])
        work = "trap '' TERM; while :; do sleep 1; done" if deaf else "exec sleep 600"
        script = f'sh -c "{work}" >/dev/null 2>&1 & echo $!'
        orphan = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
        return {"replica": os.getpid(), "child": child.pid, "orphan": int(orphan.stdout)}


HOLDERS = {}


@command
def hold(name, node_id, resources, environment):
    import ray

    HOLDERS[name] = (
        ray.remote(Holder)
        .options(
            num_cpus=0,
            resources=resources,
            label_selector={node.NODE_LABEL: node_id},
            runtime_env={"env_vars": environment},
        )
        .remote()
    )


@command
def where(name, timeout_s):
    """Node and visible GPUs of a holder, None if it still waits."""
    import ray

    try:
        return ray.get(HOLDERS[name].where.remote(), timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        return None


@command
def release(name):
    import ray

    ray.kill(HOLDERS.pop(name))


@command
def start_engine(name, deaf):
    import ray

    return ray.get(HOLDERS[name].start_engine.remote(deaf), timeout=60)


@command
def ask_agent(method, arguments):
    from market.cluster.agent import AgentClient

    return getattr(AgentClient(), method)(*arguments)


def main(state_dir, answers):
    node.enter_environment(Path(state_dir))
    import ray

    head = node.load_head(Path(state_dir))
    ray.init(address=head.address, namespace=node.NAMESPACE, log_to_driver=False)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = {"answer": COMMANDS[asked["do"]](**asked["with"])}
        except Exception as error:  # noqa: BLE001  # the test decides
            answer = {"error": type(error).__name__, "message": str(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    # Whatever prints must not come between the answers.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        main(sys.argv[1], answers)
