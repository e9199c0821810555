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
        "deployments",
        sa.Column("deployment_id", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("mode", sa.String(), nullable=False),
        sa.Column("engine", sa.String(), nullable=False),
        sa.Column("minimum", sa.Integer(), nullable=False),
        sa.Column("maximum", sa.Integer(), nullable=False),
        sa.Column("spend_max_pico", market.storage.Pico(), nullable=True),
        sa.Column("keep_alive_s", sa.Float(), nullable=True),
        sa.Column("created_at", market.storage.Moment(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=True),
        sa.Column("lease_id", sa.String(), nullable=True),
        sa.Column("policy", sa.Text(), nullable=True),
        sa.Column("stopping", sa.Boolean(), nullable=False),
        sa.Column("made", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("deployment_id"),
    )
    op.create_table(
        "join_tokens",
        sa.Column("token_hash", sa.String(), nullable=False),
        sa.Column("provider_id", sa.String(), nullable=False),
        sa.Column("expires_at", market.storage.Moment(), nullable=False),
        sa.Column("node_id", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("token_hash"),
    )
    op.create_table(
        "leases",
        sa.Column("lease_id", sa.String(), nullable=False),
        sa.Column("order_id", sa.String(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("api_key_id", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("engine", sa.String(), nullable=False),
        sa.Column("offer_id", sa.String(), nullable=False),
        sa.Column("provider_id", sa.String(), nullable=False),
        sa.Column("node_id", sa.String(), nullable=False),
        sa.Column("gpu_type", sa.String(), nullable=False),
        sa.Column("gpu_indices", sa.Text(), nullable=False),
        sa.Column("gpu_count", sa.Integer(), nullable=False),
        sa.Column("gpu_milli", sa.Integer(), nullable=False),
        sa.Column("price_id", sa.String(), nullable=False),
        sa.Column("gpu_hour_pico", market.storage.Pico(), nullable=False),
        sa.Column("currency", sa.String(), nullable=False),
        sa.Column("start", market.storage.Moment(), nullable=False),
        sa.Column("end", market.storage.Moment(), nullable=False),
        sa.Column("created_at", market.storage.Moment(), nullable=False),
        sa.Column("metered_until", market.storage.Moment(), nullable=False),
        sa.Column("hold_from", market.storage.Moment(), nullable=False),
        sa.Column("covered_until", market.storage.Moment(), nullable=False),
        sa.Column("floating", sa.Boolean(), nullable=False),
        sa.Column("resale", sa.Boolean(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("close_reason", sa.String(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("activated_at", market.storage.Moment(), nullable=True),
        sa.Column("closed_at", market.storage.Moment(), nullable=True),
        sa.Column("noticed_at", market.storage.Moment(), nullable=True),
        sa.Column("run_replica", sa.String(), nullable=True),
        sa.Column("run_since", market.storage.Moment(), nullable=True),
        sa.Column("healthy_us", sa.BigInteger(), nullable=False),
        sa.Column("credited_us", sa.BigInteger(), nullable=False),
        sa.Column("gpu_us", sa.BigInteger(), nullable=False),
        sa.Column("charged_pico", market.storage.Pico(), nullable=False),
        sa.Column("hold_index", sa.Integer(), nullable=False),
        sa.Column("ended_index", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("lease_id"),
    )
    op.create_index(op.f("ix_leases_tenant_id"), "leases", ["tenant_id"], unique=False)
    op.create_table(
        "node_keys",
        sa.Column("node_id", sa.String(), nullable=False),
        sa.Column("provider_id", sa.String(), nullable=False),
        sa.Column("key_hash", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("node_id"),
    )
    op.create_table(
        "offers",
        sa.Column("offer_id", sa.String(), nullable=False),
        sa.Column("provider_id", sa.String(), nullable=False),
        sa.Column("node_id", sa.String(), nullable=False),
        sa.Column("gpu_type", sa.String(), nullable=False),
        sa.Column("gpus", sa.Text(), nullable=False),
        sa.Column("cpu_count", sa.Integer(), nullable=False),
        sa.Column("memory_mib", sa.Integer(), nullable=False),
        sa.Column("ask_pico", market.storage.Pico(), nullable=False),
        sa.Column("currency", sa.String(), nullable=False),
        sa.Column("priced_at", market.storage.Moment(), nullable=False),
        sa.Column("region", sa.String(), nullable=False),
        sa.Column("logical", sa.Boolean(), nullable=False),
        sa.Column("models_dir", sa.Text(), nullable=False),
        sa.Column("available_from", market.storage.Moment(), nullable=True),
        sa.Column("available_until", market.storage.Moment(), nullable=True),
        sa.Column("term_min_s", sa.Integer(), nullable=False),
        sa.Column("term_max_s", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("offer_id"),
    )
    op.create_table(
        "orders",
        sa.Column("order_id", sa.String(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("api_key_id", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("engine", sa.String(), nullable=False),
        sa.Column("gpu_count", sa.Integer(), nullable=False),
        sa.Column("gpu_milli", sa.Integer(), nullable=False),
        sa.Column("start", market.storage.Moment(), nullable=True),
        sa.Column("term_s", sa.Integer(), nullable=False),
        sa.Column("created_at", market.storage.Moment(), nullable=False),
        sa.Column("gpu_type", sa.String(), nullable=True),
        sa.Column("gpu_memory_mib", sa.Integer(), nullable=True),
        sa.Column("max_price_pico", market.storage.Pico(), nullable=True),
        sa.Column("region", sa.String(), nullable=True),
        sa.Column("provider_id", sa.String(), nullable=True),
        sa.Column("resale", sa.Boolean(), nullable=False),
        sa.Column("policy", sa.Text(), nullable=True),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("lease_id", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("order_id"),
    )
    op.create_index(op.f("ix_orders_state"), "orders", ["state"], unique=False)
    op.create_table(
        "outbox",
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("lease_id", sa.String(), nullable=False),
        sa.Column("record", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("seq"),
    )
    op.create_table(
        "replicas",
        sa.Column("replica_id", sa.String(), nullable=False),
        sa.Column("deployment_id", sa.String(), nullable=False),
        sa.Column("offer_id", sa.String(), nullable=False),
        sa.Column("node_id", sa.String(), nullable=False),
        sa.Column("gpu_indices", sa.Text(), nullable=False),
        sa.Column("gpu_milli", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", market.storage.Moment(), nullable=False),
        sa.Column("process", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("replica_id"),
    )
    op.create_table(
        "starts",
        sa.Column("start_id", sa.String(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("measured_at", market.storage.Moment(), nullable=False),
        sa.PrimaryKeyConstraint("start_id"),
    )
    op.create_table(
        "sender",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("next_seq", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
