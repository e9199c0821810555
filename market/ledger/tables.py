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

# Transfers that somebody asked for by id; those of usage batches are only in the journal.
transfers = Table(
    "transfers",
    metadata,
    Column("transfer_id", String, primary_key=True),
    Column("tsn", BigInteger, nullable=False),
    Column("kind", String, nullable=False),
    Column("debit_account", String, nullable=False),
    Column("credit_account", String, nullable=False),
    Column("amount_pico", Pico, nullable=False),
    Column("currency", String, nullable=False),
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
    Column("version", BigInteger, nullable=False, server_default="0"),
    Column("changed_at", Moment, nullable=False),
    Index("holds_by_state", "state", "changed_at"),
)

producers = Table(
    "producers",
    metadata,
    Column("producer", String, primary_key=True),
    Column("epoch", Integer, nullable=False),
    Column("next_seq", BigInteger, nullable=False),
)

# What a lease was charged so far at one price: the next segment's charge depends on it.
lease_totals = Table(
    "lease_totals",
    metadata,
    Column("lease_id", String, primary_key=True),
    Column("price_id", String, primary_key=True),
    Column("gpu_us", BigInteger, nullable=False),
)

# One row: the next numbers to give out, the last booking time, the head of the hash chain.
# ``pruned_head`` is the head just before the first entry that the journal still has.
counters = Table(
    "counters",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("next_entry", BigInteger, nullable=False),
    Column("next_lsn", BigInteger, nullable=False),
    Column("next_tsn", BigInteger, nullable=False),
    Column("booked_at", Moment, nullable=False),
    Column("head", LargeBinary, nullable=False),
    Column("pruned_entry", BigInteger, nullable=False),
    Column("pruned_head", LargeBinary, nullable=False),
)

journal = Table(
    "journal",
    metadata,
    Column("entry", BigInteger, primary_key=True, autoincrement=False),
    Column("booked_at", Moment, nullable=False),
    Column("lsn_lo", BigInteger, nullable=False),
    Column("lsn_hi", BigInteger, nullable=False),
    Column("tsn_lo", BigInteger, nullable=False),
    Column("tsn_hi", BigInteger, nullable=False),
    Column("producer", String),
    Column("epoch", Integer),
    Column("first_seq", BigInteger),
    Column("usage", LargeBinary),
    Column("transfers", LargeBinary),
    Column("head", LargeBinary, nullable=False),
    Index("journal_by_lsn", "lsn_hi"),
    Index("journal_by_tsn", "tsn_hi"),
)

# A range of rows as it was sealed: the leaves of the ledger's log, never changed once published.
# ``file`` is where the rows are now; compaction moves them.
parts = Table(
    "parts",
    metadata,
    Column("dataset", String, primary_key=True),
    Column("lo", BigInteger, primary_key=True, autoincrement=False),
    Column("hi", BigInteger, nullable=False),
    Column("date", String, nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("amount_pico", Pico, nullable=False),
    Column("rows_root", LargeBinary, nullable=False),
    Column("head", LargeBinary, nullable=False),
    Column("file", String, nullable=False),
    Column("sha256", String, nullable=False),
    Column("state", String, nullable=False),
    Column("leaf", BigInteger, unique=True),
    Column("leaf_hash", LargeBinary, nullable=False),
    Index("parts_by_date", "dataset", "date"),
)

# At most one row: a day whose compacted file is about to take the place of its parts.
compactions = Table(
    "compactions",
    metadata,
    Column("dataset", String, primary_key=True),
    Column("date", String, primary_key=True),
    Column("file", String, nullable=False),
    Column("sha256", String, nullable=False),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("size", BigInteger, primary_key=True, autoincrement=False),
    Column("root", LargeBinary, nullable=False),
    Column("note", Text, nullable=False),
    Column("made_at", Moment, nullable=False),
)

# What was taken back of a usage row, by whom and why.
refunds = Table(
    "refunds",
    metadata,
    Column("refund_id", String, primary_key=True),
    Column("tenant_id", String, nullable=False),
    Column("provider_id", String, nullable=False),
    Column("reverses_lsn", BigInteger),
    Column("lsn", BigInteger, nullable=False),
    Column("amount_pico", Pico, nullable=False),
    Index("refunds_by_row", "reverses_lsn"),
)

settlements = Table(
    "settlements",
    metadata,
    Column("period", String, primary_key=True),
    Column("settlement_id", String, nullable=False, unique=True),
    Column("lsn_after", BigInteger, nullable=False),
    Column("lsn_until", BigInteger, nullable=False),
    Column("fee_bps", Integer, nullable=False),
    Column("resale_bps", Integer, nullable=False),
    Column("sha256", String, nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("charge_pico", Pico, nullable=False),
    Column("fee_pico", Pico, nullable=False),
    Column("settled_at", Moment, nullable=False),
)

tenants = Table(
    "tenants",
    metadata,
    Column("tenant_id", String, primary_key=True),
    Column("created_at", Moment, nullable=False),
    Column("weight", Integer, nullable=False, server_default="1"),
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
    Column("policy", Text, nullable=False, server_default="{}"),
    # After a rotation the old secret works on until then.
    Column("previous_hash", String, unique=True),
    Column("previous_until", Moment),
)

# The most that a key or a tenant may spend in a period.
budgets = Table(
    "budgets",
    metadata,
    Column("subject", String, primary_key=True),
    Column("period", String, primary_key=True),
    Column("limit_pico", Pico, nullable=False),
)

# What was spent of a budget in the period that began at ``since``.
spends = Table(
    "spends",
    metadata,
    Column("subject", String, primary_key=True),
    Column("period", String, primary_key=True),
    Column("since", Moment, nullable=False),
    Column("spent_pico", Pico, nullable=False),
)

# Tokens of a model bought ahead. The money is on the account of the pack.
packs = Table(
    "packs",
    metadata,
    Column("pack_id", String, primary_key=True),
    Column("tenant_id", String, nullable=False),
    Column("model", String, nullable=False),
    Column("price_id", String, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("currency", String, nullable=False),
    Column("bought_at", Moment, nullable=False),
    Column("expires_at", Moment, nullable=False),
    Column("closed_at", Moment),
    Index("packs_by_tenant", "tenant_id"),
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
    Column("gpu_hour_pico", Pico, nullable=False),
    Index("rate_cards_by_model", "model", "valid_from"),
)
