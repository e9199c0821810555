"""A market of its own for a benchmark: commands on a home and a port of its own."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import paced_engine

SCRIPTS = Path(__file__).parent
MODEL = "tiny-qwen"
MARKET = Path(sys.executable).parent / "market"


def free_port() -> int:
    """A TCP port nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class OwnMarket:
    """Started on entering, stopped on leaving. ``model`` is a folder that becomes a local model."""

    def __init__(self, home: Path, model: Path, **settings: str) -> None:
        self.home = home
        self.url = f"http://127.0.0.1:{free_port()}"
        self.pid = 0
        ours = {"MARKET_HOME": str(home), "MARKET_URL": self.url, **settings}
        self._environment = {k: v for k, v in os.environ.items() if k != "MARKET_API_KEY"} | ours
        (home / "models").mkdir(parents=True)
        (home / "models" / model.name).symlink_to(model)

    def __enter__(self) -> "OwnMarket":
        self.cli("up")
        self.pid = json.loads((self.home / "state" / "cluster.json").read_text())["pid"]
        return self

    def __exit__(self, *_error: object) -> None:
        self.cli("down")

    def cli(self, *arguments: str) -> Any:
        """Run a command; its answer."""
        done = subprocess.run(
            [str(MARKET), *arguments, "--output", "json"],
            env=self._environment,
            check=True,
            stdout=subprocess.PIPE,
        )
        return json.loads(done.stdout)

    def tenant(self, name: str, deposit: str = "1000") -> str:
        """Make a tenant with money; its key."""
        self.cli("tenants", "create", name)
        self.cli("tenants", "deposit", name, deposit)
        return str(self.cli("keys", "create", "--tenant", name, "--no-save")["api_key"])


def tiny_model(folder: Path, *options: str) -> Path:
    """The model in ``folder``, made if it is not there."""
    if not folder.exists():
        script = [sys.executable, str(SCRIPTS / "make_tiny_model.py"), str(folder), *options]
        subprocess.run(script, check=True, stderr=subprocess.DEVNULL)
    return folder


def install_paced(folder: Path) -> None:
    """Make the paced engine one of those that markets started from here know."""
    plugins = folder / "plugins"
    plugins.mkdir()
    paced_engine.installed(plugins)
    os.environ["PYTHONPATH"] = str(plugins)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


@contextmanager
def paced_market(model: Path | None, **settings: str) -> Iterator[OwnMarket]:
    """A market that serves the tiny model's name by the paced engine."""
    with tempfile.TemporaryDirectory(prefix="market-bench-") as name:
        folder = Path(name)
        install_paced(folder)
        with OwnMarket(folder / "home", tiny_model(model or folder / MODEL), **settings) as own:
            own.cli("deploy", MODEL, "--mode", "tokens", "--engine", "paced")
            yield own
