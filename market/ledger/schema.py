"""Arrow schemas of the ledgers and the batches that carry usage records to them."""

import hashlib
from collections.abc import Sequence

import msgspec
import pyarrow as pa

from market.errors import InvalidRequest
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

# What the ledger knows better: its own numbers, and the identity that the envelope carries.
ENVELOPE = ("lsn", "booked_at", "producer", "epoch", "seq")
# What a producer sends.
BATCH = pa.schema([field for field in USAGE if field.name not in ENVELOPE])

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


# Bytes in front of every payload. Batches carry no schema of their own (it would outweigh a short
# batch), so one of another version must be told by this.
MAGIC = hashlib.sha256(BATCH.serialize().to_pybytes()).digest()[:8]
_PLACES = {name: place for place, name in enumerate(UsageRecord.__struct_fields__)}
_CHARGE = _PLACES["charge_pico"]


def encode_batch(records: Sequence[UsageRecord]) -> bytes:
    """Usage records of one producer, in sequence, as a payload for ``append``."""
    values = list(zip(*map(msgspec.structs.astuple, records), strict=True))
    columns = []
    for field in BATCH:
        if field.name == "charge":
            columns.append(money_array(values[_CHARGE]))
        elif field.name == "attrs":
            attrs = [pairs or None for pairs in values[_PLACES["attrs"]]]
            columns.append(pa.array(attrs, type=field.type))
        else:
            columns.append(pa.array(values[_PLACES[field.name]], type=field.type))
    return encode(pa.RecordBatch.from_arrays(columns, schema=BATCH))


def encode(batch: pa.RecordBatch) -> bytes:
    """A record batch of BATCH as a payload."""
    message: bytes = batch.serialize().to_pybytes()
    return MAGIC + message


def decode(payload: bytes) -> pa.RecordBatch:
    """The batch in ``payload``. Raises InvalidRequest if it is damaged or of another version."""
    if payload[:8] != MAGIC:
        raise InvalidRequest("a batch of another schema version: gateway and ledger must match")
    try:
        batch = pa.ipc.read_record_batch(pa.py_buffer(payload)[8:], BATCH)
        batch.validate()
    except (pa.ArrowInvalid, OSError, EOFError) as error:
        raise InvalidRequest(f"a damaged batch: {error}") from error
    return batch


def money_array(picos: Sequence[int]) -> pa.Array:
    """Pico units as decimal128(38, 12), without going through Decimal objects."""
    words = b"".join([pico.to_bytes(16, "little", signed=True) for pico in picos])
    return pa.Array.from_buffers(MONEY, len(picos), [None, pa.py_buffer(words)])


def money_picos(column: pa.Array) -> list[int]:
    """The reverse of ``money_array``."""
    words = column.buffers()[1].to_pybytes()
    first = column.offset
    return [
        int.from_bytes(words[16 * n : 16 * n + 16], "little", signed=True)
        for n in range(first, first + len(column))
    ]
