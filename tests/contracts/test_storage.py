"""The single writer's transactions, on each database."""

import pytest
from sqlalchemy import delete, select

from market import storage
from market.errors import InvalidRequest
from market.scheduler import tables
from market.storage import Stateless
from tests.samples import NOON


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request, tmp_path):
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'market.db'}"
    else:
        url = request.getfixturevalue("postgres_url")
    made = storage.connect(url, "scheduler")
    yield made
    made.dispose()


def keep(name="b", count=1):
    row = {"start_id": name, "seconds": 1.0, "count": count, "measured_at": NOON}
    return lambda connection: storage.upsert(connection, tables.starts, [row])


def names(connection):
    return list(connection.execute(select(tables.starts.c.start_id)).scalars())


class TestRunGroup:
    def test_value_that_fits_no_column_is_its_commands_own_refusal(self, engine):
        commands = [keep("a"), keep("b", 2**70), names, keep("c")]
        _, refused, seen, _ = storage.run_group(engine, Stateless(), commands)
        assert isinstance(refused, InvalidRequest)
        assert seen == ["a"]
        assert storage.run_group(engine, Stateless(), [names])[0] == ["a", "c"]

    def test_text_with_a_nul_ends_nothing(self, engine):
        gone = delete(tables.starts).where(tables.starts.c.start_id == "a\0b")
        refused, _ = storage.run_group(
            engine, Stateless(), [lambda c: c.execute(gone).close(), keep("a")]
        )
        expected = InvalidRequest if engine.dialect.name == "postgresql" else type(None)
        assert type(refused) is expected
        assert storage.run_group(engine, Stateless(), [names]) == [["a"]]
