from dataclasses import replace

from market.scheduler.reconcile import Forget, Mark, Remove, Start, plan
from market.types import AppStatus, Deployment, DeploymentState, Mode
from tests.samples import NOON

WANTED = Deployment(
    deployment_id="tiny-1",
    model="tiny",
    mode=Mode.TOKENS,
    engine="transformers",
    replicas=1,
    offer_id="local",
    gpu_milli=0,
    state=DeploymentState.STARTING,
    reason="replica starting",
    created_at=NOON,
)
APP = WANTED.app_name
RUNNING = AppStatus(running=True, failed=False, message="")
STARTING = AppStatus(running=False, failed=False, message="")
FAILED = AppStatus(running=False, failed=True, message="no memory")


def test_what_is_missing_is_started():
    assert plan([WANTED], {}) == [Start(WANTED)]


def test_lost_application_is_not_ready_any_more_and_started_again():
    ready = replace(WANTED, state=DeploymentState.READY, reason="serving")
    mark, start = plan([ready], {})
    assert (mark.state, start) == (DeploymentState.STARTING, Start(ready))


def test_what_nobody_wants_is_removed():
    assert plan([], {"model-old": RUNNING}) == [Remove("model-old")]


def test_applications_that_are_no_models_are_left_alone():
    assert plan([], {"gateway": RUNNING}) == []


def test_running_is_marked_once():
    assert plan([WANTED], {APP: RUNNING}) == [Mark("tiny-1", DeploymentState.READY, "serving")]
    ready = replace(WANTED, state=DeploymentState.READY, reason="serving")
    assert plan([ready], {APP: RUNNING}) == []


def test_failure_keeps_the_reason_and_is_not_started_again():
    assert plan([WANTED], {APP: FAILED}) == [Mark("tiny-1", DeploymentState.FAILED, "no memory")]
    failed = replace(WANTED, state=DeploymentState.FAILED, reason="no memory")
    assert plan([failed], {}) == []


def test_replica_that_went_away_makes_it_starting_again():
    ready = replace(WANTED, state=DeploymentState.READY, reason="serving")
    (step,) = plan([ready], {APP: STARTING})
    assert step.state is DeploymentState.STARTING


def test_stopping_is_removed_then_forgotten():
    stopping = replace(WANTED, state=DeploymentState.STOPPING)
    assert plan([stopping], {APP: RUNNING}) == [Remove(APP)]
    assert plan([stopping], {}) == [Forget("tiny-1")]
