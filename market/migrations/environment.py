"""What the env.py files of the migrations share."""

from alembic import context
from sqlalchemy import MetaData


def run(metadata: MetaData) -> None:
    """Migrate over the connection that the caller put into the configuration."""
    attributes = context.config.attributes
    context.configure(
        connection=attributes["connection"],
        target_metadata=metadata,
        version_table=attributes["version_table"],
        user_module_prefix="market.storage.",
        include_name=attributes.get("include_name"),
    )
    context.run_migrations()
