"""One frozen configuration, read from the environment once and passed down."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit

from market.errors import InvalidRequest

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_FEE_BPS = 1000
# Of what a provider earns by selling a lease's idle time, its holder gets so much.
DEFAULT_RESALE_BPS = 5000
DEFAULT_ISSUER = "Compute Market"
DEFAULT_NODE_PATIENCE_S = 60
DEFAULT_GATEWAYS = 1
GATEWAYS_MAX = 64
# Answers that one replica generates at once.
DEFAULT_SEQUENCES = 128
SEQUENCES_MAX = 4096
# Processes per node and engine that wait for a model, where pools may start one.
DEFAULT_SPARES = 1
SPARES_MAX = 16


class UsageSync(StrEnum):
    """What an answer's end waits for: its record written (survives kill -9), synced to the
    gateway's disk (survives a power cut there), or committed by the ledger.
    """

    SPOOL = "spool"
    FSYNC = "fsync"
    ACK = "ack"


@dataclass(frozen=True, slots=True)
class Config:
    """Where the market lives and how it is reached."""

    home: Path
    url: str
    database_url: str | None = None
    fee_bps: int = DEFAULT_FEE_BPS
    issuer: str = DEFAULT_ISSUER
    usage_sync: UsageSync = UsageSync.SPOOL
    node_patience_s: int = DEFAULT_NODE_PATIENCE_S
    gateways: int = DEFAULT_GATEWAYS
    sequences: int = DEFAULT_SEQUENCES
    node: str = "local"
    scorer: str = ""
    spares: int = DEFAULT_SPARES
    resale_bps: int = DEFAULT_RESALE_BPS

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> "Config":
        """Read the MARKET_* variables of the README's table.

        Raises InvalidRequest, naming the variable, if one makes no sense.
        """
        home = Path(environ.get("MARKET_HOME") or Path.home() / ".market").expanduser().absolute()
        url = (environ.get("MARKET_URL") or DEFAULT_URL).rstrip("/")
        if not _is_address(url):
            raise InvalidRequest(f"MARKET_URL={url!r} is no address such as {DEFAULT_URL}")
        fee_bps = _bps(environ, "MARKET_FEE_BPS", DEFAULT_FEE_BPS)
        sync = environ.get("MARKET_USAGE_SYNC") or UsageSync.SPOOL
        if sync not in list(UsageSync):
            raise InvalidRequest(f"MARKET_USAGE_SYNC={sync!r}: choose from {', '.join(UsageSync)}")
        patience = environ.get("MARKET_NODE_PATIENCE_S") or str(DEFAULT_NODE_PATIENCE_S)
        if not patience.isdigit():
            raise InvalidRequest(f"MARKET_NODE_PATIENCE_S={patience!r}: whole seconds, e.g. 60")
        gateways = _count(environ, "MARKET_GATEWAYS", DEFAULT_GATEWAYS, GATEWAYS_MAX)
        sequences = _count(environ, "MARKET_SEQUENCES", DEFAULT_SEQUENCES, SEQUENCES_MAX)
        return cls(
            home,
            url,
            environ.get("MARKET_DATABASE_URL") or None,
            fee_bps,
            environ.get("MARKET_ISSUER") or DEFAULT_ISSUER,
            UsageSync(sync),
            int(patience),
            gateways,
            sequences,
            scorer=environ.get("MARKET_SCORER") or "",
            spares=_count(environ, "MARKET_SPARES", DEFAULT_SPARES, SPARES_MAX, least=0),
            resale_bps=_bps(environ, "MARKET_RESALE_BPS", DEFAULT_RESALE_BPS),
        )

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
    def proof_dir(self) -> Path:
        """Signed checkpoints of the ledgers and the public key that checks them."""
        return self.home / "proof"

    @property
    def statements_dir(self) -> Path:
        """Settlements and statements by period."""
        return self.home / "statements"

    @property
    def spool_dir(self) -> Path:
        """Usage records on their way from this machine's gateways to the ledger."""
        return self.state_dir / "spool"

    @property
    def signing_key_file(self) -> Path:
        """The ledger's Ed25519 key, mode 0600."""
        return self.state_dir / "ledger-signing.key"

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


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # half an IPv6 address, or a port beyond 65535
        return False


def _bps(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name) or str(default)
    if not text.isdigit() or int(text) > 10_000:
        raise InvalidRequest(f"{name}={text!r}: basis points from 0 to 10000, e.g. {default}")
    return int(text)


def _count(
    environ: Mapping[str, str], name: str, default: int, most: int, *, least: int = 1
) -> int:
    text = environ.get(name) or str(default)
    if not text.isdigit() or not least <= int(text) <= most:
        raise InvalidRequest(f"{name}={text!r}: {least} to {most}")
    return int(text)
