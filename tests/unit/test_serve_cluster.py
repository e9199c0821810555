"""What is read from Serve's own account of an application."""

import pytest
from ray.serve.schema import ApplicationStatus as App

from market.cluster.serve import _status

RUN = {"replica_id": "abc", "pid": 4711, "state": "RUNNING"}


def details(app, deployment, *replicas, **settings):
    return {
        "status": app,
        "message": "",
        "deployments": {
            "replica": {
                "status": deployment,
                "message": "",
                "replicas": [RUN | replica for replica in replicas],
                "deployment_config": {"user_config": settings or None},
            }
        },
    }


@pytest.mark.parametrize(
    ("app", "deployment", "replica", "run", "unsure"),
    [
        ("RUNNING", "HEALTHY", {}, "abc:4711", False),
        ("DEPLOYING", "UPDATING", {"state": "RECOVERING", "pid": None}, None, True),
        ("DEPLOYING", "UPDATING", {}, None, True),
        ("DEPLOYING", "UPDATING", {"state": "STARTING", "pid": None}, None, False),
        ("RUNNING", "UPDATING", {"state": "UPDATING"}, None, False),
        ("UNHEALTHY", "UNHEALTHY", {"state": "STOPPING"}, None, False),
    ],
)
def test_who_serves_and_whether_serve_knows(app, deployment, replica, run, unsure):
    seen = _status(details(App(app), deployment, replica, replica_id="r-1", asleep=True))
    assert (seen.run, seen.unsure) == (run, unsure)
    assert (seen.replica_id, seen.asleep, seen.failed) == ("r-1", True, False)


def test_spare_has_no_settings():
    seen = _status(details(App("RUNNING"), "HEALTHY", {}))
    assert (seen.run, seen.replica_id, seen.asleep) == ("abc:4711", "", False)
