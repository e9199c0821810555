"""slices that grow, budgets, token packs, key policies, tenants' weights"""

import sqlalchemy as sa
from alembic import op

import market.storage

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.add_column(
        "holds", sa.Column("version", sa.BigInteger(), nullable=False, server_default="0")
    )
    op.add_column("tenants", sa.Column("weight", sa.Integer(), nullable=False, server_default="1"))
    with op.batch_alter_table("api_keys") as keys:
        keys.add_column(sa.Column("policy", sa.Text(), nullable=False, server_default="{}"))
        keys.add_column(sa.Column("previous_hash", sa.String(), nullable=True))
        keys.add_column(sa.Column("previous_until", market.storage.Moment(), nullable=True))
        keys.create_unique_constraint("api_keys_previous_hash_key", ["previous_hash"])
    op.create_table(
        "budgets",
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("period", sa.String(), nullable=False),
        sa.Column("limit_pico", market.storage.Pico(), nullable=False),
        sa.PrimaryKeyConstraint("subject", "period"),
    )
    op.create_table(
        "spends",
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("period", sa.String(), nullable=False),
        sa.Column("since", market.storage.Moment(), nullable=False),
        sa.Column("spent_pico", market.storage.Pico(), nullable=False),
        sa.PrimaryKeyConstraint("subject", "period"),
    )
    op.create_table(
        "packs",
        sa.Column("pack_id", sa.String(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("price_id", sa.String(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.String(), nullable=False),
        sa.Column("bought_at", market.storage.Moment(), nullable=False),
        sa.Column("expires_at", market.storage.Moment(), nullable=False),
        sa.Column("closed_at", market.storage.Moment(), nullable=True),
        sa.PrimaryKeyConstraint("pack_id"),
    )
    op.create_index("packs_by_tenant", "packs", ["tenant_id"])
