"""Alembic runs this to migrate the ledger's tables."""

from market.ledger.tables import metadata
from market.migrations.environment import run

run(metadata)
