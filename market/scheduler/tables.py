"""SQL tables of the scheduler: what is offered and what should run."""

from sqlalchemy import Column, Integer, MetaData, String, Table, Text

from market.storage import Moment, Pico

metadata = MetaData()

offers = Table(
    "offers",
    metadata,
    Column("offer_id", String, primary_key=True),
    Column("provider_id", String, nullable=False),
    Column("node_id", String, nullable=False),
    Column("gpu_type", String, nullable=False),
    Column("gpus", Text, nullable=False),
    Column("cpu_count", Integer, nullable=False),
    Column("memory_mib", Integer, nullable=False),
    Column("ask_pico", Pico, nullable=False),
    Column("currency", String, nullable=False),
)

deployments = Table(
    "deployments",
    metadata,
    Column("deployment_id", String, primary_key=True),
    Column("model", String, nullable=False),
    Column("mode", String, nullable=False),
    Column("engine", String, nullable=False),
    Column("replicas", Integer, nullable=False),
    Column("offer_id", String, nullable=False),
    Column("gpu_milli", Integer, nullable=False),
    Column("state", String, nullable=False),
    Column("reason", Text, nullable=False),
    Column("created_at", Moment, nullable=False),
)
