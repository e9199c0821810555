"""Alembic migrations of the ledger's and the scheduler's tables, run at every start."""
