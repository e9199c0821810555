"""No test may touch the user's own market, and unit tests may not start Ray."""

from collections.abc import Iterator
from pathlib import Path

# Else its plugin imports it when pytest ends, deep in calls: there CPython 3.11 may fail to compile
# it (SystemError: AST constructor recursion depth mismatch).
import hypothesis
import pytest

# How fast a machine is, and what else runs on it, is no property of the code. The same examples
# every time; others with pytest --hypothesis-profile=explore.
hypothesis.settings.register_profile(
    "explore", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile(
    "same", hypothesis.settings.get_profile("explore"), derandomize=True
)
hypothesis.settings.load_profile("same")

RAY_FREE = ("unit", "contracts", "properties")


@pytest.fixture(autouse=True)
def no_ray_in_fast_tests(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(str(request.node.path)).parent.name
    if folder in RAY_FREE:
        import ray

        def refuse(*_arguments: object, **_keywords: object) -> None:
            raise AssertionError("this test must not start or join a Ray cluster")

        monkeypatch.setattr(ray, "init", refuse)


@pytest.fixture(autouse=True, scope="session")
def own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("MARKET_HOME", str(tmp_path_factory.mktemp("no-home")))
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("TOKENIZERS_PARALLELISM", "false")
    for name in ("MARKET_URL", "MARKET_API_KEY", "MARKET_DATABASE_URL", "RAY_ADDRESS"):
        patch.delenv(name, raising=False)
    yield
    patch.undo()
