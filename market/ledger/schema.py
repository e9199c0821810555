"""Arrow schemas of the ledgers and the batches that carry usage records to them."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from market.pricing import to_decimal
from market.types import UsageRecord

MONEY = pa.decimal128(38, 12)
TIME = pa.timestamp("us", tz="UTC")

USAGE = pa.schema(
    [
        pa.field("lsn", pa.int64(), nullable=False),
        pa.field("booked_at", TIME, nullable=False),
        pa.field("producer", pa.string(), nullable=False),
        pa.field("epoch", pa.int32(), nullable=False),
        pa.field("seq", pa.int64(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("reverses_lsn", pa.int64()),
        pa.field("request_id", pa.string()),
        pa.field("tenant_id", pa.string(), nullable=False),
        pa.field("api_key_id", pa.string()),
        pa.field("model", pa.string()),
        pa.field("adapter", pa.string()),
        pa.field("lane", pa.string(), nullable=False),
        pa.field("deployment_id", pa.string()),
        pa.field("lease_id", pa.string()),
        pa.field("slice_id", pa.string()),
        pa.field("provider_id", pa.string(), nullable=False),
        pa.field("node_id", pa.string()),
        pa.field("gpu_type", pa.string()),
        pa.field("gpu_milli", pa.int32()),
        pa.field("started_at", TIME, nullable=False),
        pa.field("finished_at", TIME, nullable=False),
        pa.field("input_tokens", pa.int64(), nullable=False),
        pa.field("cached_input_tokens", pa.int64(), nullable=False),
        pa.field("output_tokens", pa.int64(), nullable=False),
        pa.field("claimed_output_tokens", pa.int64()),
        pa.field("gpu_us", pa.int64()),
        pa.field("queue_ms", pa.int32()),
        pa.field("ttft_ms", pa.int32()),
        pa.field("duration_ms", pa.int32()),
        pa.field("finish_reason", pa.string()),
        pa.field("usage_quality", pa.string(), nullable=False),
        pa.field("price_id", pa.string(), nullable=False),
        pa.field("charge", MONEY, nullable=False),
        pa.field("currency", pa.string(), nullable=False),
        pa.field("attrs", pa.map_(pa.string(), pa.string())),
    ]
)

# What a producer sends: the ledger alone decides lsn and booking time.
BATCH = pa.schema([field for field in USAGE if field.name not in ("lsn", "booked_at")])

TRANSFERS = pa.schema(
    [
        pa.field("tsn", pa.int64(), nullable=False),
        pa.field("booked_at", TIME, nullable=False),
        pa.field("transfer_id", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("debit_account", pa.string(), nullable=False),
        pa.field("credit_account", pa.string(), nullable=False),
        pa.field("amount", MONEY, nullable=False),
        pa.field("currency", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("made_by", pa.string(), nullable=False),
        pa.field("lsn_lo", pa.int64()),
        pa.field("lsn_hi", pa.int64()),
    ]
)


def encode_batch(records: Sequence[UsageRecord]) -> bytes:
    """Usage records of one producer as an Arrow IPC stream of one batch."""
    columns = [pa.array([_value(r, f.name) for r in records], type=f.type) for f in BATCH]
    batch = pa.RecordBatch.from_arrays(columns, schema=BATCH)
    return serialize(batch)


def serialize(batch: pa.RecordBatch) -> bytes:
    """One record batch as IPC bytes, as the journal keeps it."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, BATCH) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue().to_pybytes())


def decode_batch(payload: bytes) -> pa.RecordBatch:
    """The batch in ``payload``. Raises ValueError if it is not of this version's schema."""
    table = pa.ipc.open_stream(payload).read_all()
    if table.schema != BATCH:
        raise ValueError(f"usage batch has another schema: {table.schema}")
    batches = table.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=BATCH)


def _value(record: UsageRecord, name: str) -> Any:
    if name == "charge":
        return to_decimal(record.charge_pico)
    if name == "attrs":
        return list(record.attrs)
    return getattr(record, name)
