"""SQL tables of the scheduler: what is offered, ordered, leased, and what should run."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

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
    Column("priced_at", Moment, nullable=False),
    Column("region", String, nullable=False),
    Column("logical", Boolean, nullable=False),
    Column("models_dir", Text, nullable=False),
    Column("available_from", Moment),
    Column("available_until", Moment),
    Column("term_min_s", Integer, nullable=False),
    Column("term_max_s", Integer, nullable=False),
    Column("state", String, nullable=False),
    Column("reason", Text, nullable=False),
)

# How a node proves later that it is the one that joined.
node_keys = Table(
    "node_keys",
    metadata,
    Column("node_id", String, primary_key=True),
    Column("provider_id", String, nullable=False),
    Column("key_hash", String, nullable=False),
)

join_tokens = Table(
    "join_tokens",
    metadata,
    Column("token_hash", String, primary_key=True),
    Column("provider_id", String, nullable=False),
    Column("expires_at", Moment, nullable=False),
    Column("node_id", String),
)

orders = Table(
    "orders",
    metadata,
    Column("order_id", String, primary_key=True),
    Column("tenant_id", String, nullable=False),
    Column("api_key_id", String, nullable=False),
    Column("model", String, nullable=False),
    Column("engine", String, nullable=False),
    Column("gpu_count", Integer, nullable=False),
    Column("gpu_milli", Integer, nullable=False),
    Column("start", Moment),
    Column("term_s", Integer, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("gpu_type", String),
    Column("gpu_memory_mib", Integer),
    Column("max_price_pico", Pico),
    Column("region", String),
    Column("provider_id", String),
    Column("resale", Boolean, nullable=False),
    Column("policy", Text),
    Column("state", String, nullable=False, index=True),
    Column("reason", Text, nullable=False),
    Column("lease_id", String),
)

leases = Table(
    "leases",
    metadata,
    Column("lease_id", String, primary_key=True),
    Column("order_id", String, nullable=False),
    Column("tenant_id", String, nullable=False, index=True),
    Column("api_key_id", String, nullable=False),
    Column("model", String, nullable=False),
    Column("engine", String, nullable=False),
    Column("offer_id", String, nullable=False),
    Column("provider_id", String, nullable=False),
    Column("node_id", String, nullable=False),
    Column("gpu_type", String, nullable=False),
    Column("gpu_indices", Text, nullable=False),
    Column("gpu_count", Integer, nullable=False),
    Column("gpu_milli", Integer, nullable=False),
    Column("price_id", String, nullable=False),
    Column("gpu_hour_pico", Pico, nullable=False),
    Column("currency", String, nullable=False),
    Column("start", Moment, nullable=False),
    Column("end", Moment, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("metered_until", Moment, nullable=False),
    Column("hold_from", Moment, nullable=False),
    Column("covered_until", Moment, nullable=False),
    Column("floating", Boolean, nullable=False),
    Column("resale", Boolean, nullable=False),
    Column("state", String, nullable=False),
    Column("close_reason", String),
    Column("reason", Text, nullable=False),
    Column("activated_at", Moment),
    Column("closed_at", Moment),
    Column("noticed_at", Moment),
    Column("run_replica", String),
    Column("run_since", Moment),
    Column("healthy_us", BigInteger, nullable=False),
    Column("credited_us", BigInteger, nullable=False),
    Column("gpu_us", BigInteger, nullable=False),
    Column("charged_pico", Pico, nullable=False),
    Column("hold_index", Integer, nullable=False),
    Column("ended_index", Integer, nullable=False),
)

deployments = Table(
    "deployments",
    metadata,
    Column("deployment_id", String, primary_key=True),
    Column("model", String, nullable=False),
    Column("mode", String, nullable=False),
    Column("engine", String, nullable=False),
    Column("minimum", Integer, nullable=False),
    Column("maximum", Integer, nullable=False),
    Column("spend_max_pico", Pico),
    Column("keep_alive_s", Float),
    Column("created_at", Moment, nullable=False),
    Column("tenant_id", String),
    Column("lease_id", String),
    Column("policy", Text),
    Column("stopping", Boolean, nullable=False),
    Column("made", Integer, nullable=False),
)

replicas = Table(
    "replicas",
    metadata,
    Column("replica_id", String, primary_key=True),
    Column("deployment_id", String, nullable=False),
    Column("offer_id", String, nullable=False),
    Column("node_id", String, nullable=False),
    Column("gpu_indices", Text, nullable=False),
    Column("gpu_milli", Integer, nullable=False),
    Column("state", String, nullable=False),
    Column("reason", Text, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("process", String, nullable=False),
)

# How long starts took: what waking a model costs is measured, not assumed.
starts = Table(
    "starts",
    metadata,
    Column("start_id", String, primary_key=True),
    Column("seconds", Float, nullable=False),
    Column("count", Integer, nullable=False),
    Column("measured_at", Moment, nullable=False),
)

# What an operator added to the shipped catalog.
models = Table(
    "models",
    metadata,
    Column("name", String, primary_key=True),
    Column("source", Text, nullable=False),
    Column("licence", Text, nullable=False),
    Column("parameters", BigInteger, nullable=False),
    Column("weights_bytes", BigInteger, nullable=False),
    Column("context_tokens", BigInteger, nullable=False),
    Column("layers", Integer, nullable=False),
    Column("kv_heads", Integer, nullable=False),
    Column("head_dim", Integer, nullable=False),
    Column("input_price", String, nullable=False),
    Column("cached_input_price", String, nullable=False),
    Column("output_price", String, nullable=False),
    Column("embeds", Boolean, nullable=False),
    Column("tool_parser", String, nullable=False),
    Column("reasoning_parser", String, nullable=False),
    Column("forgotten", Boolean, nullable=False),
)

# Lease segments on their way to the ledger, in the transaction that metered them.
outbox = Table(
    "outbox",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("lease_id", String, nullable=False),
    Column("record", LargeBinary, nullable=False),
)

# Under which epoch the scheduler sends, and the number of the next segment.
sender = Table(
    "sender",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("epoch", Integer, nullable=False),
    Column("next_seq", BigInteger, nullable=False),
)
