"""The usage ledger as a FOCUS "cost and usage" dataset (FinOps Open Cost and Usage Specification).

What a row means:

- ``tokens`` and ``gpu`` records: Usage, one row per meter and hour. ``EffectiveCost`` equals
  ``BilledCost``: time and tokens are charged as they are used, nothing is amortised. A lease is
  therefore a capacity reservation here, not a commitment discount.
- Not billed usage (faults, tokens on a lease): ``ConsumedQuantity`` as measured, but nothing of
  it was priced, so ``PricingQuantity`` and every cost are 0.
- ``reversal`` and ``adjustment`` records: Usage of class Correction if they correct a row of a
  closed period, else Credit. Credits may carry no ``ConsumedQuantity``, says the specification.
- Deposits: Purchase, one row each, in units of "Credits" (one unit of the currency). A statement
  is the sum of its usage charges and a deposit is money paid ahead of them, so ``BilledCost`` is
  0 and there is no ``InvoiceId``: otherwise deposits would be billed again as usage. The amount
  stands in ``ListCost`` and ``ContractedCost``, as for any purchase of credits; sums of these
  two must leave either purchases or usage out.

So per tenant and per invoice, the sum of ``BilledCost`` is the sum of the ledger's charges, to the
last of twelve decimals. Money and quantities are integers of DuckDB until one exact scaling.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from market.errors import InvalidRequest, MarketFault

FOCUS_VERSIONS = ("1.2", "1.3")

_DECIMAL = pa.decimal128(38, 12)
_TEXT = pa.string()
_TIME = pa.timestamp("us", tz="UTC")
_SUFFIXES = (".parquet", ".csv")


@dataclass(frozen=True, slots=True)
class FocusContext:
    """The billing period ``[period_start, period_end)`` of one market in one currency.

    ``invoice_ids`` maps a tenant to its statement of the period; a tenant missing there has none
    yet. Usage rows up to ``settled_until_lsn`` belong to periods closed before this one.
    """

    period_start: datetime
    period_end: datetime
    issuer: str
    currency: str
    invoice_ids: Mapping[str, str]
    settled_until_lsn: int


def focus_table(
    connection: duckdb.DuckDBPyConnection, context: FocusContext, version: str = "1.2"
) -> pa.Table:
    """The charges of the period in the context's currency, sorted by hour and tenant.

    Reads the tables ``usage``, ``transfers`` and ``rate_cards`` (one row per ``price_id``) of
    ``connection``. Decimals have twelve places, times are UTC and ends exclusive. ``x_Requests``
    counts the requests behind a row and repeats in the rows of its other meters.

    Raises InvalidRequest for another version or period, MarketFault if a row of the ledger does
    not follow from its price: the sums could not be right.
    """
    if version not in FOCUS_VERSIONS:
        raise InvalidRequest(
            f"FOCUS version {version!r} is not known; choose from {', '.join(FOCUS_VERSIONS)}",
            param="version",
        )
    parameters = _parameters(context)
    _require_prices(connection, parameters)
    columns = _FOCUS_1_2 + (_ADDED_1_3 if version == "1.3" else ()) + _CUSTOM
    selected = ", ".join(f'{expression} AS "{name}"' for name, _, expression in columns)
    query = f"{_CHARGES} SELECT {selected} FROM charges LEFT JOIN invoices USING (tenant_id) "
    order = ", ".join(f"{key} NULLS FIRST" for key in (*_KEYS, "meter", "transfer_id"))
    rows = connection.sql(f"{query} ORDER BY {order}", params=parameters).to_arrow_table()
    schema = pa.schema([pa.field(name, kind) for name, kind, _ in columns])
    return rows.cast(schema).replace_schema_metadata({"FocusVersion": version})


def write_focus(table: pa.Table, path: Path) -> None:
    """Write ``table`` as Parquet or CSV, as the suffix of ``path`` says; all of it or nothing.

    Raises InvalidRequest for another suffix.
    """
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise InvalidRequest(
            f"cannot write FOCUS to {path.name!r}; the name must end in {' or '.join(_SUFFIXES)}",
            param="path",
        )
    part = path.with_name(f"{path.name}.part")
    try:
        if suffix == ".parquet":
            pq.write_table(table, part, compression="zstd")
        else:
            _write_csv(table, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _write_csv(table: pa.Table, path: Path) -> None:
    # DuckDB writes decimals in full and tells null from empty; without a zone it needs no tables
    # of zones to write the UTC times.
    zoneless = [
        pa.field(field.name, pa.timestamp("us") if field.type == _TIME else field.type)
        for field in table.schema
    ]
    with duckdb.connect(config={"threads": 1}) as connection:
        connection.register("charges", table.cast(pa.schema(zoneless)))
        connection.execute(
            "COPY charges TO $path "
            "(FORMAT csv, HEADER, TIMESTAMPFORMAT '%Y-%m-%dT%H:%M:%SZ', PRESERVE_ORDER true)",
            {"path": str(path)},
        )


def _parameters(context: FocusContext) -> dict[str, Any]:
    """The values of the queries. Raises InvalidRequest for a period without zone or length."""
    start, end = context.period_start, context.period_end
    if start.tzinfo is None or end.tzinfo is None or start >= end:
        raise InvalidRequest(f"{start} to {end} is no period; give its start and end in UTC")
    return {
        "start": start,
        "end": end,
        "period_start": start.astimezone(UTC).replace(tzinfo=None),
        "period_end": end.astimezone(UTC).replace(tzinfo=None),
        "issuer": context.issuer,
        "currency": context.currency,
        "settled_until": context.settled_until_lsn,
        "tenants": list(context.invoice_ids),
        "invoices": list(context.invoice_ids.values()),
    }


def _require_prices(connection: duckdb.DuckDBPyConnection, parameters: Mapping[str, Any]) -> None:
    """Raises MarketFault for a row without a rate card and for tokens charged another price."""
    named = {key: parameters[key] for key in ("start", "end", "currency", "settled_until")}
    bad = connection.execute(_UNPRICED, named).fetchone()
    if bad is not None:
        lsn, price_id, charge = bad
        raise MarketFault(
            f"usage row {lsn}: charge {charge} does not follow from the rate card {price_id}"
        )


def _pico(expression: str) -> str:
    """SQL that reads an integer of pico units as an exact decimal: a shift, no division."""
    return f"CAST(CAST({expression} AS DECIMAL(38, 0)) * {_ONE_PICO} AS DECIMAL(38, 12))"


def _micro(expression: str) -> str:
    """SQL that reads an integer of millionths as an exact decimal."""
    return f"CAST(CAST({expression} AS DECIMAL(38, 0)) * {_ONE_MICRO} AS DECIMAL(38, 12))"


def _plain(expression: str) -> str:
    """SQL that writes a decimal without trailing zeros."""
    return f"rtrim(rtrim(CAST({expression} AS VARCHAR), '0'), '.')"


_ONE_PICO = "CAST('0.000000000001' AS DECIMAL(12, 12))"
_ONE_MICRO = "CAST('0.000001' AS DECIMAL(6, 6))"
_HOUR_US = 3_600_000_000

# What one row of the export is about. ``metered`` says how a record was measured: a reversal
# repeats the columns of what it reverses, so these decide and not its kind.
_KEYS = (
    *("hour", "tenant_id", "api_key_id", "provider_id", "model", "adapter", "lane"),
    *("deployment_id", "lease_id", "node_id", "gpu_type", "price_id", "kind", "metered"),
    *("corrects_closed", "billed"),
)

_BOOKED = f"""
WITH booked AS (
    SELECT *,
        epoch_us(booked_at) // {_HOUR_US} AS hour,
        CASE WHEN kind IN ('tokens', 'gpu') THEN kind
             WHEN kind = 'adjustment' THEN 'flat'
             WHEN input_tokens <> 0 OR output_tokens <> 0 THEN 'tokens'
             WHEN coalesce(gpu_us, 0) <> 0 THEN 'gpu'
             ELSE 'flat' END AS metered,
        kind IN ('reversal', 'adjustment')
            AND coalesce(reverses_lsn <= $settled_until, false) AS corrects_closed,
        charge <> 0 AS billed
    FROM usage
    WHERE booked_at >= $start AND booked_at < $end AND currency = $currency
)
"""

_TOKEN_COST = """
    CAST(input_tokens - cached_input_tokens AS HUGEINT) * CAST(c.input_pico AS HUGEINT)
    + CAST(cached_input_tokens AS HUGEINT) * CAST(c.cached_input_pico AS HUGEINT)
    + CAST(output_tokens AS HUGEINT) * CAST(c.output_pico AS HUGEINT)
"""

_UNPRICED = f"""
{_BOOKED}
SELECT lsn, price_id, charge FROM booked LEFT JOIN rate_cards c USING (price_id)
WHERE metered <> 'flat'
    AND (c.price_id IS NULL OR (metered = 'tokens' AND billed AND charge <> {_pico(_TOKEN_COST)}))
ORDER BY lsn LIMIT 1
"""

# A GPU-hour is 36e8 micro-GPU-seconds: pico-GPU-hours are gpu_us * 2500 / 9, rounded to the
# nearest (ninths have no half). Division truncates towards zero, so it sees magnitudes only.
_GPU_HOURS = "sign(quantity) * ((abs(quantity) * 2500 + 4) // 9)"
# List cost is the product of the two published numbers, so that readers can check it.
_GPU_COST = f"sign(quantity) * ((abs({_GPU_HOURS}) * rate + 500000000000) // 1000000000000)"

_CHARGES = f"""
{_BOOKED}, grouped AS (
    SELECT {", ".join(_KEYS)},
        sum(input_tokens - cached_input_tokens) AS fresh,
        sum(cached_input_tokens) AS cached,
        sum(output_tokens) AS output,
        coalesce(sum(gpu_us), 0) AS gpu_us,
        sum(charge) AS charge,
        count(request_id) AS requests
    FROM booked GROUP BY ALL
), meters AS (
    SELECT g.*, c.model AS priced, unnest(CASE metered
        WHEN 'tokens' THEN [
            {{'meter': 'Input Tokens', 'quantity': fresh, 'rate': c.input_pico}},
            {{'meter': 'Cached Input Tokens', 'quantity': cached, 'rate': c.cached_input_pico}},
            {{'meter': 'Output Tokens', 'quantity': output, 'rate': c.output_pico}}]
        WHEN 'gpu' THEN [{{'meter': 'GPU Time', 'quantity': gpu_us, 'rate': c.gpu_hour_pico}}]
        ELSE [{{'meter': NULL, 'quantity': NULL, 'rate': NULL}}] END) AS m
    FROM grouped g LEFT JOIN rate_cards c USING (price_id)
), measured AS (
    SELECT * EXCLUDE (m), m.meter AS meter, CAST(m.quantity AS HUGEINT) AS quantity,
        CAST(m.rate AS HUGEINT) AS rate
    FROM meters
    WHERE m.quantity <> 0 OR (metered <> 'tokens' AND billed)
), priced AS (
    SELECT *,
        CASE metered WHEN 'tokens' THEN {_micro("rate")} WHEN 'gpu' THEN {_pico("rate")}
            END AS unit_price,
        CASE WHEN metered = 'flat' THEN NULL WHEN NOT billed THEN 0
             WHEN metered = 'tokens' THEN {_micro("quantity")}
             ELSE {_pico(_GPU_HOURS)} END AS pricing_quantity,
        CASE WHEN NOT billed THEN 0 WHEN metered = 'flat' THEN charge
             WHEN metered = 'tokens' THEN {_pico("quantity * rate")}
             ELSE {_pico(_GPU_COST)} END AS list_cost
    FROM measured
), charges AS (
    SELECT *, CASE metered WHEN 'tokens' THEN list_cost ELSE charge END AS billed_cost,
        CASE WHEN kind IN ('tokens', 'gpu') OR corrects_closed THEN 'Usage' ELSE 'Credit'
            END AS category
    FROM priced
    UNION ALL BY NAME
    SELECT epoch_us(booked_at) // {_HOUR_US} AS hour, substr(credit_account, 8) AS tenant_id,
        kind, 'credit' AS metered, 'Purchase' AS category, false AS corrects_closed,
        false AS billed, 'Account Credit' AS meter, transfer_id, 1 AS unit_price,
        amount AS pricing_quantity, amount AS list_cost, 0 AS billed_cost
    FROM transfers
    WHERE kind = 'deposit' AND starts_with(credit_account, 'tenant:')
        AND booked_at >= $start AND booked_at < $end AND currency = $currency
), invoices AS (
    SELECT unnest(CAST($tenants AS VARCHAR[])) AS tenant_id,
        unnest(CAST($invoices AS VARCHAR[])) AS invoice_id
)
"""

_CONSUMED = "category = 'Usage' AND metered IN ('tokens', 'gpu')"
_CONSUMED_QUANTITY = f"""CASE WHEN {_CONSUMED} THEN CASE metered
    WHEN 'tokens' THEN CAST(quantity AS DECIMAL(38, 12)) ELSE {_micro("quantity")} END END"""
_CONSUMED_UNIT = f"""CASE WHEN {_CONSUMED} THEN CASE metered
    WHEN 'tokens' THEN 'Tokens' ELSE 'GPU-Seconds' END END"""
_PRICING_UNIT = """CASE metered WHEN 'tokens' THEN '1000000 Tokens' WHEN 'gpu' THEN 'GPU-Hours'
    WHEN 'credit' THEN 'Credits' END"""
_DESCRIPTION = f"""concat(
    CASE WHEN corrects_closed THEN 'Correction of an earlier period: '
         WHEN category = 'Credit' THEN 'Credit: ' END,
    CASE metered
        WHEN 'tokens' THEN concat(meter, ' of ', coalesce(model, priced), ' + ' || adapter,
            ' at ', {_plain("unit_price")}, ' ', $currency, ' per 1000000 Tokens')
        WHEN 'gpu' THEN concat(meter, ' on ' || gpu_type,
            ' at ', {_plain("unit_price")}, ' ', $currency, ' per GPU-Hour')
        WHEN 'credit' THEN concat('Deposit of ', {_plain("pricing_quantity")}, ' ', $currency)
        ELSE concat('Adjustment', ' for ' || model) END,
    CASE WHEN metered IN ('tokens', 'gpu') AND NOT billed THEN ', not billed' END)"""

# A deployment is called by its model; leases and jobs have no name besides their id.
_ON_LEASE = "lease_id IS NOT NULL AND (metered = 'gpu' OR deployment_id IS NULL)"
_RESOURCE_NAME = f"CASE WHEN NOT ({_ON_LEASE}) AND deployment_id <> model THEN model END"
_GPU_NAME = "CASE lane WHEN 'job' THEN 'GPU Job' ELSE 'GPU Lease' END"
_RESOURCE_TYPE = f"""CASE WHEN {_ON_LEASE} THEN {_GPU_NAME}
    WHEN deployment_id IS NOT NULL THEN 'Model Deployment' END"""

# One price id covers three meters, but a price may have one SKU only: the meter tells them
# apart in both ids, and x_PriceId keeps the ledger's own.
_METER_SLUG = "lower(replace(meter, ' ', '-'))"
_SKU_ID = f"coalesce(priced || '/', '') || {_METER_SLUG}"
_SKU_PRICE_ID = f"coalesce(price_id, $currency) || '/' || {_METER_SLUG}"
_SKU_DETAILS = """CASE WHEN metered = 'gpu' AND gpu_type IS NOT NULL
    THEN CAST(json_object('GpuCount', 1, 'x_GpuType', gpu_type) AS VARCHAR) END"""
_RESERVED = "lane = 'lease' AND lease_id IS NOT NULL"


def _service(credit: str, gpu: str, tokens: str) -> str:
    """SQL that chooses among three SQL values by what the row charges for."""
    is_gpu = "metered = 'gpu' OR (metered = 'flat' AND lane IN ('lease', 'job'))"
    return f"CASE WHEN metered = 'credit' THEN {credit} WHEN {is_gpu} THEN {gpu} ELSE {tokens} END"


# (column, type, SQL over ``charges``), in the order of the export.
_Columns = tuple[tuple[str, pa.DataType, str], ...]

_FOCUS_1_2: _Columns = (
    ("BilledCost", _DECIMAL, "billed_cost"),
    ("EffectiveCost", _DECIMAL, "billed_cost"),
    ("ListCost", _DECIMAL, "list_cost"),
    ("ContractedCost", _DECIMAL, "list_cost"),
    ("ListUnitPrice", _DECIMAL, "unit_price"),
    ("ContractedUnitPrice", _DECIMAL, "unit_price"),
    ("BillingCurrency", _TEXT, "$currency"),
    ("PricingQuantity", _DECIMAL, "pricing_quantity"),
    ("PricingUnit", _TEXT, _PRICING_UNIT),
    ("ConsumedQuantity", _DECIMAL, _CONSUMED_QUANTITY),
    ("ConsumedUnit", _TEXT, _CONSUMED_UNIT),
    ("PricingCategory", _TEXT, "CASE WHEN metered <> 'flat' THEN 'Standard' END"),
    ("BillingAccountId", _TEXT, "tenant_id"),
    ("BillingAccountName", _TEXT, "tenant_id"),
    ("BillingAccountType", _TEXT, "'Tenant'"),
    ("SubAccountId", _TEXT, "api_key_id"),
    ("SubAccountName", _TEXT, "api_key_id"),
    ("SubAccountType", _TEXT, "CASE WHEN api_key_id IS NOT NULL THEN 'API Key' END"),
    ("BillingPeriodStart", _TIME, "CAST($period_start AS TIMESTAMP)"),
    ("BillingPeriodEnd", _TIME, "CAST($period_end AS TIMESTAMP)"),
    ("ChargePeriodStart", _TIME, f"make_timestamp(hour * {_HOUR_US})"),
    ("ChargePeriodEnd", _TIME, f"make_timestamp((hour + 1) * {_HOUR_US})"),
    ("ChargeCategory", _TEXT, "category"),
    ("ChargeClass", _TEXT, "CASE WHEN corrects_closed THEN 'Correction' END"),
    ("ChargeDescription", _TEXT, _DESCRIPTION),
    ("ChargeFrequency", _TEXT, "if(category = 'Usage', 'Usage-Based', 'One-Time')"),
    ("InvoiceId", _TEXT, "CASE WHEN metered <> 'credit' THEN invoice_id END"),
    ("InvoiceIssuerName", _TEXT, "$issuer"),
    ("ProviderName", _TEXT, "$issuer"),
    ("PublisherName", _TEXT, "coalesce(provider_id, $issuer)"),
    ("AvailabilityZone", _TEXT, "NULL"),
    ("ResourceId", _TEXT, f"CASE WHEN {_ON_LEASE} THEN lease_id ELSE deployment_id END"),
    ("ResourceName", _TEXT, _RESOURCE_NAME),
    ("ResourceType", _TEXT, _RESOURCE_TYPE),
    ("ServiceCategory", _TEXT, _service("'Other'", "'Compute'", "'AI and Machine Learning'")),
    ("ServiceName", _TEXT, _service("'Account Credit'", _GPU_NAME, "'Token Inference'")),
    (
        "ServiceSubcategory",
        _TEXT,
        _service("'Other (Other)'", "'Other (Compute)'", "'Generative AI'"),
    ),
    ("SkuId", _TEXT, _SKU_ID),
    ("SkuMeter", _TEXT, "meter"),
    ("SkuPriceId", _TEXT, _SKU_PRICE_ID),
    ("SkuPriceDetails", _TEXT, _SKU_DETAILS),
    ("CapacityReservationId", _TEXT, f"CASE WHEN {_RESERVED} THEN lease_id END"),
    (
        "CapacityReservationStatus",
        _TEXT,
        f"CASE WHEN {_RESERVED} AND category = 'Usage' THEN 'Used' END",
    ),
)

# Nothing is split among resources here and contracts are not exported, so most stay null.
_ADDED_1_3: _Columns = (
    ("AllocatedMethodId", _TEXT, "NULL"),
    ("AllocatedMethodDetails", _TEXT, "NULL"),
    ("AllocatedResourceId", _TEXT, "NULL"),
    ("AllocatedResourceName", _TEXT, "NULL"),
    ("AllocatedTags", _TEXT, "NULL"),
    ("ContractApplied", _TEXT, "NULL"),
    ("ServiceProviderName", _TEXT, "$issuer"),
    ("HostProviderName", _TEXT, "provider_id"),
)

_CUSTOM: _Columns = (
    ("x_RecordKind", _TEXT, "kind"),
    ("x_Lane", _TEXT, "lane"),
    ("x_Model", _TEXT, "model"),
    ("x_Adapter", _TEXT, "adapter"),
    ("x_ProviderId", _TEXT, "provider_id"),
    ("x_NodeId", _TEXT, "node_id"),
    ("x_PriceId", _TEXT, "price_id"),
    ("x_Billed", pa.bool_(), "billed"),
    ("x_Requests", pa.int64(), "requests"),
    ("x_TransferId", _TEXT, "transfer_id"),
)
