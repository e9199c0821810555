"""SQL tables of the ledger (SQLAlchemy Core; SQLite or PostgreSQL)."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

from market.storage import Moment, Pico

metadata = MetaData()


accounts = Table(
    "accounts",
    metadata,
    Column("account_id", String, primary_key=True),
    Column("side", String, nullable=False),
    Column("may_overdraw", Boolean, nullable=False),
    Column("currency", String, nullable=False),
    Column("debits_pico", Pico, nullable=False),
    Column("credits_pico", Pico, nullable=False),
    Column("held_pico", Pico, nullable=False),
)

transfers = Table(
    "transfers",
    metadata,
    Column("tsn", BigInteger, primary_key=True, autoincrement=False),
    Column("booked_at", Moment, nullable=False),
    Column("transfer_id", String, nullable=False, unique=True),
    Column("kind", String, nullable=False),
    Column("debit_account", String, nullable=False),
    Column("credit_account", String, nullable=False),
    Column("amount_pico", Pico, nullable=False),
    Column("currency", String, nullable=False),
    Column("reason", String, nullable=False),
    Column("made_by", String, nullable=False),
    Column("lsn_lo", BigInteger),
    Column("lsn_hi", BigInteger),
)

holds = Table(
    "holds",
    metadata,
    Column("hold_id", String, primary_key=True),
    Column("producer", String, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("request", Text, nullable=False),
    Column("amount_pico", Pico, nullable=False),
    Column("state", String, nullable=False),
    Column("posted_pico", Pico, nullable=False),
    Index("holds_by_state", "state", "producer"),
)

producers = Table(
    "producers",
    metadata,
    Column("producer", String, primary_key=True),
    Column("epoch", Integer, nullable=False),
    Column("next_seq", BigInteger, nullable=False),
)

journal = Table(
    "journal",
    metadata,
    Column("lsn_lo", BigInteger, primary_key=True, autoincrement=False),
    Column("lsn_hi", BigInteger, nullable=False),
    Column("booked_at", Moment, nullable=False),
    Column("batch", LargeBinary, nullable=False),
)

parts = Table(
    "parts",
    metadata,
    Column("dataset", String, primary_key=True),
    Column("lo", BigInteger, primary_key=True, autoincrement=False),
    Column("hi", BigInteger, nullable=False),
    Column("date", String, nullable=False),
    Column("name", String, nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("sha256", String, nullable=False),
    Column("state", String, nullable=False),
    Index("parts_by_date", "dataset", "date"),
)

tenants = Table(
    "tenants",
    metadata,
    Column("tenant_id", String, primary_key=True),
    Column("created_at", Moment, nullable=False),
)

providers = Table(
    "providers",
    metadata,
    Column("provider_id", String, primary_key=True),
    Column("created_at", Moment, nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("api_key_id", String, primary_key=True),
    Column("key_hash", String, nullable=False, unique=True),
    Column("role", String, nullable=False),
    Column("subject_id", String, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("revoked_at", Moment),
)

rate_cards = Table(
    "rate_cards",
    metadata,
    Column("price_id", String, primary_key=True),
    Column("model", String, nullable=False),
    Column("input_pico", Pico, nullable=False),
    Column("cached_input_pico", Pico, nullable=False),
    Column("output_pico", Pico, nullable=False),
    Column("currency", String, nullable=False),
    Column("valid_from", Moment, nullable=False),
    Index("rate_cards_by_model", "model", "valid_from"),
)
