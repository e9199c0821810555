"""Alembic runs this to migrate the scheduler's tables."""

from market.migrations.environment import run
from market.scheduler.tables import metadata

run(metadata)
