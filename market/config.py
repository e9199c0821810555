"""One frozen configuration, read from the environment once and passed down."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from market.errors import InvalidRequest

DEFAULT_URL = "http://127.0.0.1:8000"


@dataclass(frozen=True, slots=True)
class Config:
    """Where the market lives and how it is reached."""

    home: Path
    url: str
    database_url: str | None = None

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> "Config":
        """Read MARKET_HOME, MARKET_URL and MARKET_DATABASE_URL.

        Raises InvalidRequest if MARKET_URL is no http address.
        """
        home = Path(environ.get("MARKET_HOME") or Path.home() / ".market").expanduser().absolute()
        url = (environ.get("MARKET_URL") or DEFAULT_URL).rstrip("/")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidRequest(f"MARKET_URL={url!r} is no address such as {DEFAULT_URL}")
        return cls(home, url, environ.get("MARKET_DATABASE_URL") or None)

    @property
    def http_host(self) -> str:
        """Host the gateway listens on."""
        return urlsplit(self.url).hostname or "127.0.0.1"

    @property
    def http_port(self) -> int:
        """Port the gateway listens on."""
        parts = urlsplit(self.url)
        return parts.port or (443 if parts.scheme == "https" else 80)

    @property
    def state_dir(self) -> Path:
        """Databases, locks and process ids: nothing for readers."""
        return self.home / "state"

    @property
    def staging_dir(self) -> Path:
        """Where Parquet parts are written before they are public."""
        return self.home / "staging"

    @property
    def ledger_dir(self) -> Path:
        """The public ledgers: only finished Parquet files."""
        return self.home / "ledger"

    @property
    def models_dir(self) -> Path:
        """Models on this machine's disk."""
        return self.home / "models"

    @property
    def logs_dir(self) -> Path:
        """Logs of the processes that ``market up`` starts."""
        return self.home / "logs"

    @property
    def operator_key_file(self) -> Path:
        """The first operator key, mode 0600."""
        return self.home / "operator.key"

    @property
    def chat_key_file(self) -> Path:
        """The tenant key that ``market chat`` uses on this machine, mode 0600."""
        return self.home / "chat.key"

    @property
    def ledger_url(self) -> str:
        """SQLAlchemy URL of the ledger's database."""
        return self.database_url or f"sqlite:///{self.state_dir / 'ledger.db'}"

    @property
    def scheduler_url(self) -> str:
        """SQLAlchemy URL of the scheduler's tables.

        Its own file on SQLite, because the ledger locks its file exclusively.
        """
        return self.database_url or f"sqlite:///{self.state_dir / 'scheduler.db'}"
