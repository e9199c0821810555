"""Migrations make exactly the tables that the code uses, on both databases."""

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, inspect, text

from market import storage
from market.errors import MarketFault
from market.ledger import tables as ledger_tables
from market.scheduler import tables as scheduler_tables

COMPONENTS = {"ledger": ledger_tables.metadata, "scheduler": scheduler_tables.metadata}


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "postgresql":
        return request.getfixturevalue("postgres_url")
    return f"sqlite:///{tmp_path / 'market.db'}"


@pytest.mark.parametrize("component", COMPONENTS)
def test_newest_revision_is_what_the_code_says(url, component):
    storage.connect(url, component).dispose()
    engine = create_engine(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={"version_table": f"{component}_version", "compare_type": True},
        )
        differences = compare_metadata(context, COMPONENTS[component])
    engine.dispose()
    assert differences == []


def test_both_components_share_a_database(url):
    for component in COMPONENTS:
        storage.connect(url, component).dispose()
    engine = create_engine(url)
    names = set(inspect(engine).get_table_names())
    engine.dispose()
    wanted = {table for metadata in COMPONENTS.values() for table in metadata.tables}
    assert names == wanted | {"ledger_version", "scheduler_version"}


def test_migrating_again_changes_nothing(url):
    for _ in range(2):
        storage.connect(url, "ledger").dispose()


def test_tables_of_a_newer_program_are_refused(url):
    storage.connect(url, "ledger").dispose()
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("update ledger_version set version_num = '9999'"))
    engine.dispose()
    with pytest.raises(MarketFault, match="newer version"):
        storage.connect(url, "ledger")


def test_network_file_system_is_refused(tmp_path, monkeypatch):
    class Mount:
        mountpoint, fstype = str(tmp_path), "nfs4"

    monkeypatch.setattr(storage.psutil, "disk_partitions", lambda all: [Mount])
    with pytest.raises(MarketFault, match="nfs4"):
        storage.connect(f"sqlite:///{tmp_path / 'state' / 'market.db'}", "ledger")
