"""A market of its own for a benchmark: commands on a home and a port of its own."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

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
