"""first tables"""

import sqlalchemy as sa
from alembic import op

import market.storage

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "accounts",
        sa.Column("account_id", sa.String(), nullable=False),
        sa.Column("side", sa.String(), nullable=False),
        sa.Column("may_overdraw", sa.Boolean(), nullable=False),
        sa.Column("currency", sa.String(), nullable=False),
        sa.Column("debits_pico", market.storage.Pico(), nullable=False),
        sa.Column("credits_pico", market.storage.Pico(), nullable=False),
        sa.Column("held_pico", market.storage.Pico(), nullable=False),
        sa.PrimaryKeyConstraint("account_id"),
    )
    op.create_table(
        "api_keys",
        sa.Column("api_key_id", sa.String(), nullable=False),
        sa.Column("key_hash", sa.String(), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("subject_id", sa.String(), nullable=False),
        sa.Column("created_at", market.storage.Moment(), nullable=False),
        sa.Column("revoked_at", market.storage.Moment(), nullable=True),
        sa.PrimaryKeyConstraint("api_key_id"),
        sa.UniqueConstraint("key_hash"),
    )
    op.create_table(
        "checkpoints",
        sa.Column("size", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("root", sa.LargeBinary(), nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("made_at", market.storage.Moment(), nullable=False),
        sa.PrimaryKeyConstraint("size"),
    )
    op.create_table(
        "compactions",
        sa.Column("dataset", sa.String(), nullable=False),
        sa.Column("date", sa.String(), nullable=False),
        sa.Column("file", sa.String(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("dataset", "date"),
    )
    op.create_table(
        "counters",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("next_entry", sa.BigInteger(), nullable=False),
        sa.Column("next_lsn", sa.BigInteger(), nullable=False),
        sa.Column("next_tsn", sa.BigInteger(), nullable=False),
        sa.Column("booked_at", market.storage.Moment(), nullable=False),
        sa.Column("head", sa.LargeBinary(), nullable=False),
        sa.Column("pruned_entry", sa.BigInteger(), nullable=False),
        sa.Column("pruned_head", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "holds",
        sa.Column("hold_id", sa.String(), nullable=False),
        sa.Column("producer", sa.String(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("request", sa.Text(), nullable=False),
        sa.Column("amount_pico", market.storage.Pico(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("posted_pico", market.storage.Pico(), nullable=False),
        sa.Column("changed_at", market.storage.Moment(), nullable=False),
        sa.PrimaryKeyConstraint("hold_id"),
    )
    op.create_index("holds_by_state", "holds", ["state", "changed_at"], unique=False)
    op.create_table(
        "journal",
        sa.Column("entry", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("booked_at", market.storage.Moment(), nullable=False),
        sa.Column("lsn_lo", sa.BigInteger(), nullable=False),
        sa.Column("lsn_hi", sa.BigInteger(), nullable=False),
        sa.Column("tsn_lo", sa.BigInteger(), nullable=False),
        sa.Column("tsn_hi", sa.BigInteger(), nullable=False),
        sa.Column("producer", sa.String(), nullable=True),
        sa.Column("epoch", sa.Integer(), nullable=True),
        sa.Column("first_seq", sa.BigInteger(), nullable=True),
        sa.Column("usage", sa.LargeBinary(), nullable=True),
        sa.Column("transfers", sa.LargeBinary(), nullable=True),
        sa.Column("head", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("entry"),
    )
    op.create_index("journal_by_lsn", "journal", ["lsn_hi"], unique=False)
    op.create_index("journal_by_tsn", "journal", ["tsn_hi"], unique=False)
    op.create_table(
        "lease_totals",
        sa.Column("lease_id", sa.String(), nullable=False),
        sa.Column("price_id", sa.String(), nullable=False),
        sa.Column("gpu_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("lease_id", "price_id"),
    )
    op.create_table(
        "parts",
        sa.Column("dataset", sa.String(), nullable=False),
        sa.Column("lo", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("hi", sa.BigInteger(), nullable=False),
        sa.Column("date", sa.String(), nullable=False),
        sa.Column("rows", sa.BigInteger(), nullable=False),
        sa.Column("amount_pico", market.storage.Pico(), nullable=False),
        sa.Column("rows_root", sa.LargeBinary(), nullable=False),
        sa.Column("head", sa.LargeBinary(), nullable=False),
        sa.Column("file", sa.String(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("leaf", sa.BigInteger(), nullable=True),
        sa.Column("leaf_hash", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("dataset", "lo"),
        sa.UniqueConstraint("leaf"),
    )
    op.create_index("parts_by_date", "parts", ["dataset", "date"], unique=False)
    op.create_table(
        "producers",
        sa.Column("producer", sa.String(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("next_seq", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("producer"),
    )
    op.create_table(
        "providers",
        sa.Column("provider_id", sa.String(), nullable=False),
        sa.Column("created_at", market.storage.Moment(), nullable=False),
        sa.PrimaryKeyConstraint("provider_id"),
    )
    op.create_table(
        "rate_cards",
        sa.Column("price_id", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("input_pico", market.storage.Pico(), nullable=False),
        sa.Column("cached_input_pico", market.storage.Pico(), nullable=False),
        sa.Column("output_pico", market.storage.Pico(), nullable=False),
        sa.Column("currency", sa.String(), nullable=False),
        sa.Column("valid_from", market.storage.Moment(), nullable=False),
        sa.Column("gpu_hour_pico", market.storage.Pico(), nullable=False),
        sa.PrimaryKeyConstraint("price_id"),
    )
    op.create_index("rate_cards_by_model", "rate_cards", ["model", "valid_from"], unique=False)
    op.create_table(
        "refunds",
        sa.Column("refund_id", sa.String(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("provider_id", sa.String(), nullable=False),
        sa.Column("reverses_lsn", sa.BigInteger(), nullable=True),
        sa.Column("lsn", sa.BigInteger(), nullable=False),
        sa.Column("amount_pico", market.storage.Pico(), nullable=False),
        sa.PrimaryKeyConstraint("refund_id"),
    )
    op.create_index("refunds_by_row", "refunds", ["reverses_lsn"], unique=False)
    op.create_table(
        "settlements",
        sa.Column("period", sa.String(), nullable=False),
        sa.Column("settlement_id", sa.String(), nullable=False),
        sa.Column("lsn_after", sa.BigInteger(), nullable=False),
        sa.Column("lsn_until", sa.BigInteger(), nullable=False),
        sa.Column("fee_bps", sa.Integer(), nullable=False),
        sa.Column("resale_bps", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("rows", sa.BigInteger(), nullable=False),
        sa.Column("charge_pico", market.storage.Pico(), nullable=False),
        sa.Column("fee_pico", market.storage.Pico(), nullable=False),
        sa.Column("settled_at", market.storage.Moment(), nullable=False),
        sa.PrimaryKeyConstraint("period"),
        sa.UniqueConstraint("settlement_id"),
    )
    op.create_table(
        "tenants",
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("created_at", market.storage.Moment(), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id"),
    )
    op.create_table(
        "transfers",
        sa.Column("transfer_id", sa.String(), nullable=False),
        sa.Column("tsn", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("debit_account", sa.String(), nullable=False),
        sa.Column("credit_account", sa.String(), nullable=False),
        sa.Column("amount_pico", market.storage.Pico(), nullable=False),
        sa.Column("currency", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("transfer_id"),
    )
