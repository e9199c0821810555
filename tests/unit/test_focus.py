"""The FOCUS export over small ledgers: the rules of the specification that a reader can check.

Each test builds usage, transfers and rate cards with the ledger's own schemas; integers of pico
units worked out in Python are what the exported decimals are held to.
"""

import re
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import duckdb
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from market.errors import InvalidRequest, MarketFault
from market.ledger.focus import FOCUS_VERSIONS, FocusContext, focus_table, write_focus
from market.ledger.schema import TRANSFERS, USAGE

START = datetime(2026, 11, 1, tzinfo=UTC)
END = datetime(2026, 12, 1, tzinfo=UTC)
NOON = datetime(2026, 11, 3, 12, 10, tzinfo=UTC)
HOUR = timedelta(hours=1)
SETTLED = 100

RATE_CARDS = pa.schema(
    {name: pa.string() for name in ("price_id", "model", "currency")}
    | {f"{name}_pico": pa.decimal128(38, 0) for name in ("input", "cached_input", "output")}
    | {"gpu_hour_pico": pa.decimal128(38, 0), "valid_from": pa.timestamp("us", tz="UTC")}
)
PRICES = (150_000, 30_000, 600_000)
GPU_HOUR = 2_490_000_000_001
NEVER_NULL = """BilledCost EffectiveCost ListCost ContractedCost BillingCurrency BillingAccountId
    BillingAccountName BillingAccountType BillingPeriodStart BillingPeriodEnd ChargePeriodStart
    ChargePeriodEnd ChargeCategory ChargeDescription ChargeFrequency InvoiceIssuerName ProviderName
    PublisherName ServiceCategory ServiceName ServiceSubcategory"""
ADDED = """AllocatedMethodId AllocatedMethodDetails AllocatedResourceId AllocatedResourceName
    AllocatedTags ContractApplied ServiceProviderName HostProviderName"""
MANDATORY = {*NEVER_NULL.split(), "ChargeClass", "PricingQuantity", "PricingUnit"}


def card(price_id="price-tiny", prices=PRICES, gpu_hour=0, model="tiny"):
    values = (price_id, model, "USD", *map(Decimal, (*prices, gpu_hour)), START)
    return dict(zip(RATE_CARDS.names, values, strict=True))


GPU_CARD = card("price-gpu", (0, 0, 0), GPU_HOUR, "offer-1")
CARDS = (card(), GPU_CARD)


def usage(lsn, **changes):
    """A billed request of 1000 tokens in, 200 of them cached, and 50 out."""
    row = dict.fromkeys(USAGE.names)
    row |= {"lsn": lsn, "booked_at": NOON, "producer": "gw0", "epoch": 1, "seq": lsn}
    row |= {"kind": "tokens", "request_id": f"req-{lsn}", "tenant_id": "acme"}
    row |= {"api_key_id": "key-1", "model": "tiny", "lane": "tokens", "deployment_id": "tiny-1"}
    row |= {"provider_id": "gpus-r-us", "node_id": "node-1", "gpu_type": "H200"}
    row |= {"started_at": NOON, "finished_at": NOON, "usage_quality": "engine"}
    row |= {"input_tokens": 1000, "cached_input_tokens": 200, "output_tokens": 50}
    row |= {"price_id": "price-tiny", "currency": "USD"} | changes
    if "charge" not in changes:
        row["charge"] = money(token_cost(row))
    return row


def gpu(lsn, gpu_us=60 * 10**6, **changes):
    """A minute of a whole leased GPU, charged as the ledger does: in whole pico units."""
    pico = gpu_us * GPU_HOUR // (3600 * 10**6)
    values = {"kind": "gpu", "lane": "lease", "lease_id": "lease-1", "request_id": None}
    values |= {"input_tokens": 0, "cached_input_tokens": 0, "output_tokens": 0}
    values |= {"gpu_us": gpu_us, "charge": money(pico), "price_id": "price-gpu"}
    return usage(lsn, **values | changes)


def reversal(lsn, of, **changes):
    counts = ("input_tokens", "cached_input_tokens", "output_tokens", "gpu_us", "charge")
    opposite = {name: -of[name] for name in counts if of[name] is not None}
    values = {"lsn": lsn, "seq": lsn, "kind": "reversal", "reverses_lsn": of["lsn"]}
    return of | opposite | values | changes


def adjustment(lsn, charge, **changes):
    values = {"kind": "adjustment", "charge": Decimal(charge), "provider_id": "market"}
    values |= {"input_tokens": 0, "cached_input_tokens": 0, "output_tokens": 0}
    return usage(lsn, **values | changes)


def transfer(tsn, amount, kind="deposit", to="tenant:acme", booked_at=NOON, currency="USD"):
    values = (tsn, booked_at, f"transfer-{tsn}", kind, "cash", to, Decimal(amount), currency)
    return dict(zip(TRANSFERS.names, (*values, "test", "key-op", None, None), strict=True))


def token_cost(row, prices=PRICES):
    fresh = row["input_tokens"] - row["cached_input_tokens"]
    counts = (fresh, row["cached_input_tokens"], row["output_tokens"])
    return sum(count * price for count, price in zip(counts, prices, strict=True))


def pick(row, names):
    return tuple(row[name] for name in names.split())


def money(pico):
    return Decimal(pico).scaleb(-12)


def export(rows=(), transfers=(), cards=CARDS, version="1.2", zone="UTC", start=START):
    tables = {
        "usage": pa.Table.from_pylist(list(rows), schema=USAGE),
        "transfers": pa.Table.from_pylist(list(transfers), schema=TRANSFERS),
        "rate_cards": pa.Table.from_pylist(list(cards), schema=RATE_CARDS),
    }
    context = FocusContext(start, END, "The Market", "USD", {"acme": "2026-11-acme"}, SETTLED)
    with duckdb.connect(config={"threads": 1}) as connection:
        connection.execute(f"SET TimeZone = '{zone}'")
        for name, table in tables.items():
            connection.register(name, table)
        return focus_table(connection, context, version)


def exported(*arguments, **keywords):
    return export(*arguments, **keywords).to_pylist()


def total(rows, column, by="BillingAccountId"):
    sums = defaultdict(Decimal)
    for row in rows:
        sums[row[by]] += row[column]
    return dict(sums)


CREDIT, CORRECTION = ("Credit", None), ("Usage", "Correction")
OTHERWISE = {"tenant_id": "bolt", "api_key_id": "key-2", "provider_id": "other", "lane": "spill"}
OTHERWISE |= {"adapter": "legal", "deployment_id": "tiny-2", "node_id": "node-2"}
OTHERWISE |= {"charge": Decimal(0), "booked_at": NOON + HOUR}
# A bit of everything; the rows up to lsn 100 are of a closed period.
OLD = usage(7, booked_at=START - HOUR)
MIXED = (
    OLD,
    usage(101),
    usage(102),
    usage(103, charge=Decimal(0), finish_reason="provider_error"),
    usage(104, charge=Decimal(0), lane="lease", lease_id="lease-1"),
    usage(105, tenant_id="bolt", api_key_id=None, adapter="legal", booked_at=NOON + HOUR),
    gpu(106),
    gpu(107, 1),
    gpu(108, charge=Decimal(0)),
    gpu(109, lane="job", lease_id="job-1"),
    reversal(110, OLD, booked_at=NOON),
    reversal(111, usage(102)),
    reversal(112, gpu(106)),
    adjustment(113, "-0.000000000007", reverses_lsn=7),
    adjustment(114, "-2.5", reverses_lsn=101),
    adjustment(115, "1.25", tenant_id="bolt"),
)
DEPOSITS = (transfer(1, "10"), transfer(2, "0.5", to="tenant:bolt"))


@pytest.fixture(scope="module", params=FOCUS_VERSIONS)
def mixed(request):
    return exported(MIXED, DEPOSITS, version=request.param)


class TestSums:
    def test_billed_cost_of_a_tenant_is_the_sum_of_its_charges(self, mixed):
        assert total(mixed, "BilledCost") == total(MIXED[1:], "charge", by="tenant_id")

    def test_billed_cost_of_an_invoice_is_the_statement_of_its_tenant(self, mixed):
        charges = total(MIXED[1:], "charge", by="tenant_id")
        # Nothing is invoiced to bolt yet; deposits are on no invoice and add nothing.
        invoices = {"2026-11-acme": charges["acme"], None: charges["bolt"]}
        assert total(mixed, "BilledCost", by="InvoiceId") == invoices

    def test_costs_are_unit_price_times_pricing_quantity(self, mixed):
        for row in mixed:
            # Nothing is amortised and no price is negotiated.
            assert row["EffectiveCost"] == row["BilledCost"]
            assert row["ContractedCost"] == row["ListCost"]
            assert row["ContractedUnitPrice"] == row["ListUnitPrice"]
            if row["ListUnitPrice"] is None:
                assert row["ListCost"] == row["BilledCost"]
            else:
                product = row["ListUnitPrice"] * row["PricingQuantity"]
                # Hours of GPU time are not finite decimals; half a last place may be lost.
                assert abs(product - row["ListCost"]) <= Decimal("0.5e-12")

    @settings(max_examples=40, deadline=None)
    @given(data=st.data())
    def test_meters_of_a_row_sum_to_its_charge_for_any_price_and_count(self, data):
        price = st.integers(0, 10**9)
        count = st.integers(0, 10**12)
        cards, rows, costs = [], [], {}
        for number in range(data.draw(st.integers(1, 4))):
            prices = data.draw(st.tuples(price, price, price))
            cards.append(card(f"price-{number}", prices))
            fresh, cached, output = data.draw(st.tuples(count, count, count))
            counts = {"input_tokens": fresh + cached, "cached_input_tokens": cached}
            row = usage(200 + number, price_id=f"price-{number}", output_tokens=output, **counts)
            cost = token_cost(row, prices) if data.draw(st.booleans()) else 0
            repeats = data.draw(st.integers(1, 3))
            rows += [row | {"charge": money(cost)}] * repeats
            if fresh + cached + output:
                costs[f"price-{number}"] = repeats * money(cost)
        assert total(exported(rows, cards=cards), "BilledCost", by="x_PriceId") == costs


class TestUsage:
    def test_request_has_one_row_per_meter(self):
        cached, fresh, output = exported([usage(101)])
        assert pick(cached, "SkuMeter BilledCost") == ("Cached Input Tokens", Decimal("6e-6"))
        assert pick(fresh, "SkuMeter BilledCost") == ("Input Tokens", Decimal("120e-6"))
        assert pick(output, "SkuMeter BilledCost") == ("Output Tokens", Decimal("30e-6"))
        assert pick(fresh, "ConsumedQuantity ConsumedUnit") == (800, "Tokens")
        assert pick(fresh, "PricingQuantity PricingUnit") == (Decimal("8e-4"), "1000000 Tokens")
        assert fresh["ListUnitPrice"] == Decimal("0.15")
        text = "Input Tokens of tiny at 0.15 USD per 1000000 Tokens"
        assert fresh["ChargeDescription"] == text

    def test_meter_without_quantity_is_left_out(self):
        rows = exported([usage(101, cached_input_tokens=0, output_tokens=0)])
        assert [row["SkuMeter"] for row in rows] == ["Input Tokens"]

    def test_requests_of_an_hour_are_one_row_per_meter(self):
        rows = exported([usage(101), usage(102, booked_at=NOON + HOUR / 2), usage(103)])
        assert [row["x_Requests"] for row in rows] == [3, 3, 3]
        output = next(row for row in rows if row["SkuMeter"] == "Output Tokens")
        assert output["ConsumedQuantity"] == 150

    @pytest.mark.parametrize(("name", "value"), OTHERWISE.items())
    def test_rows_that_differ_in_a_dimension_stay_apart(self, name, value):
        assert len(exported([usage(101), usage(102, **{name: value})])) == 6

    def test_usage_that_was_not_billed_is_shown_at_no_cost(self):
        rows = exported([usage(101, charge=Decimal(0), finish_reason="market_fault")])
        assert sum(row["ConsumedQuantity"] for row in rows) == 1050
        for row in rows:
            assert pick(row, "ChargeCategory x_Billed") == ("Usage", False)
            assert pick(row, "BilledCost ListCost PricingQuantity") == (0, 0, 0)
            assert row["ListUnitPrice"] > 0
            assert row["ChargeDescription"].endswith(", not billed")

    def test_gpu_time_is_consumed_in_seconds_and_priced_in_hours(self):
        (row,) = exported([gpu(101, 90 * 60 * 10**6)])
        assert pick(row, "SkuMeter ServiceName ResourceType") == ("GPU Time", *["GPU Lease"] * 2)
        assert pick(row, "ConsumedQuantity ConsumedUnit") == (5400, "GPU-Seconds")
        assert pick(row, "PricingQuantity PricingUnit") == (Decimal("1.5"), "GPU-Hours")
        assert pick(row, "ListUnitPrice BilledCost") == (money(GPU_HOUR), money(GPU_HOUR * 3 // 2))
        assert pick(row, "ResourceId CapacityReservationId") == ("lease-1", "lease-1")

    @settings(max_examples=20, deadline=None)
    @given(gpu_us=st.integers(1, 10**15))
    def test_gpu_time_and_its_reversal_mirror_each_other(self, gpu_us):
        segment = gpu(101, gpu_us)
        sold, returned = exported([segment, reversal(102, segment)])
        assert {sold["x_RecordKind"], returned["x_RecordKind"]} == {"gpu", "reversal"}
        for column in ("BilledCost", "ListCost", "PricingQuantity"):
            assert sold[column] == -returned[column]
        seconds = Decimal(gpu_us).scaleb(-6)
        assert sold["ConsumedQuantity"] == seconds
        assert abs(sold["PricingQuantity"] - seconds / 3600) <= Decimal("0.5e-12")

    def test_a_price_has_one_sku(self, mixed):
        skus = {pick(row, "SkuPriceId SkuId SkuMeter") for row in mixed}
        assert len(skus) == len({price for price, _, _ in skus})
        assert (None, None, None) in skus

    def test_row_without_a_rate_card_is_a_fault(self):
        with pytest.raises(MarketFault, match=r"usage row 101: .* rate card price-lost"):
            export([usage(101, price_id="price-lost")])

    def test_charge_that_does_not_follow_from_its_price_is_a_fault(self):
        with pytest.raises(MarketFault, match="usage row 102: charge 7"):
            export([usage(101), usage(102, charge=Decimal(7))])


class TestCorrections:
    def test_reversal_of_this_period_is_a_credit(self):
        rows = exported([reversal(102, usage(101))])
        assert {pick(row, "ChargeCategory ChargeClass") for row in rows} == {CREDIT}
        assert sum(row["BilledCost"] for row in rows) == -usage(101)["charge"]
        assert {row["ConsumedQuantity"] for row in rows} == {None}

    def test_reversal_of_a_closed_period_is_a_correction_of_usage(self):
        rows = exported([reversal(102, usage(SETTLED))])
        assert {pick(row, "ChargeCategory ChargeClass") for row in rows} == {CORRECTION}
        assert sum(row["ConsumedQuantity"] for row in rows) == -1050

    @pytest.mark.parametrize(
        ("lsn", "found"), [(None, CREDIT), (SETTLED + 1, CREDIT), (SETTLED, CORRECTION)]
    )
    def test_adjustment_has_its_charge_and_no_quantity(self, lsn, found):
        (row,) = exported([adjustment(102, "-0.25", reverses_lsn=lsn)])
        assert pick(row, "ChargeCategory ChargeClass") == found
        assert pick(row, "BilledCost ListCost") == (Decimal("-0.25"), Decimal("-0.25"))
        assert pick(row, "PricingQuantity ConsumedQuantity SkuId") == (None, None, None)

    def test_reversed_adjustment_is_charged_again(self):
        goodwill = adjustment(102, "-0.25")
        rows = exported([goodwill, reversal(103, goodwill)])
        assert sorted(row["BilledCost"] for row in rows) == [Decimal("-0.25"), Decimal("0.25")]


class TestDeposits:
    def test_deposit_is_a_prepaid_purchase_that_is_not_billed_again(self):
        (row,) = exported(transfers=[transfer(1, "10")])
        kind = pick(row, "ChargeCategory ChargeFrequency PricingCategory")
        assert kind == ("Purchase", "One-Time", "Standard")
        assert pick(row, "EffectiveCost BilledCost InvoiceId") == (0, 0, None)
        assert pick(row, "ListCost ContractedCost PricingQuantity") == (10, 10, 10)
        assert pick(row, "ListUnitPrice PricingUnit") == (1, "Credits")
        assert pick(row, "BillingAccountId x_TransferId") == ("acme", "transfer-1")
        assert row["ChargeDescription"] == "Deposit of 10 USD"

    def test_other_transfers_are_left_out(self):
        others = ("charge", "refund", "release", "fee", "settle")
        transfers = [transfer(tsn, "1", kind) for tsn, kind in enumerate(others)]
        assert exported(transfers=[*transfers, transfer(9, "1", to="provider:local")]) == []


class TestPeriod:
    def test_ends_are_exclusive_and_utc(self, mixed):
        for row in mixed:
            assert (row["BillingPeriodStart"], row["BillingPeriodEnd"]) == (START, END)
            assert row["ChargePeriodEnd"] - row["ChargePeriodStart"] == HOUR
            assert START <= row["ChargePeriodStart"] < row["ChargePeriodEnd"] <= END

    def test_rows_outside_the_period_are_left_out(self):
        last = END - timedelta(microseconds=1)
        times = (START - timedelta(microseconds=1), START, last, END)
        rows = exported(
            [usage(lsn, booked_at=time) for lsn, time in enumerate(times, 101)],
            [transfer(tsn, "1", booked_at=time) for tsn, time in enumerate(times)],
        )
        assert {row["ChargePeriodStart"] for row in rows} == {START, END - HOUR}
        assert {row["x_TransferId"] for row in rows} == {None, "transfer-1", "transfer-2"}
        assert sum(row["BilledCost"] for row in rows) == 2 * usage(101)["charge"]

    def test_other_currencies_are_left_out(self):
        other = usage(101, currency="EUR", price_id="price-euro")
        assert exported([other], [transfer(1, "1", currency="EUR")]) == []

    def test_session_time_zone_changes_nothing(self):
        assert export(MIXED, DEPOSITS, zone="Asia/Kolkata").equals(export(MIXED, DEPOSITS))

    def test_empty_period_has_the_columns_and_no_row(self):
        table = export()
        assert table.num_rows == 0
        assert table.schema.equals(export(MIXED).schema)

    @pytest.mark.parametrize("start", [END, START.replace(tzinfo=None)])
    def test_impossible_period_is_refused(self, start):
        with pytest.raises(InvalidRequest, match="period"):
            export(start=start)


class TestColumns:
    def test_mandatory_columns_are_present_and_not_null(self, mixed):
        assert mixed[0].keys() >= MANDATORY | {"InvoiceId", "AvailabilityZone"}
        for row in mixed:
            assert None not in pick(row, NEVER_NULL)

    def test_custom_columns_are_prefixed_and_come_last(self, mixed):
        names = list(mixed[0])
        custom = [name for name in names if name.startswith("x_")]
        assert names[-len(custom) :] == custom
        assert all(re.fullmatch(r"(x_)?([A-Z][a-z]*)+", name) for name in names)
        assert len(set(names)) == len(names)

    def test_nulls_follow_the_category(self, mixed):
        for row in mixed:
            if row["ChargeCategory"] != "Usage":
                assert row["ConsumedQuantity"] is None
            elif row["ChargeClass"] is None:
                assert row["ConsumedQuantity"] is not None
            if row["ChargeClass"] is None and row["ChargeCategory"] != "Credit":
                needed = "SkuId SkuPriceId ListUnitPrice PricingQuantity PricingCategory"
                assert None not in pick(row, needed)
            for pair in (
                *("ConsumedQuantity ConsumedUnit", "PricingQuantity PricingUnit"),
                *("SubAccountId SubAccountName", "SubAccountId SubAccountType"),
                *("ResourceId ResourceType", "SkuId SkuMeter"),
            ):
                one, other = pick(row, pair)
                assert (one is None) == (other is None)

    def test_reserved_capacity_of_usage_has_a_status(self, mixed):
        names = "CapacityReservationId ChargeCategory CapacityReservationStatus"
        reserved = {pick(row, names) for row in mixed if row["CapacityReservationId"]}
        assert reserved == {("lease-1", "Usage", "Used"), ("lease-1", "Credit", None)}

    def test_units_have_the_unit_format(self, mixed):
        units = {row[name] for row in mixed for name in ("ConsumedUnit", "PricingUnit")} - {None}
        assert units == {"Tokens", "GPU-Seconds", "1000000 Tokens", "GPU-Hours", "Credits"}

    def test_money_and_quantities_are_decimals_and_times_are_utc(self):
        for field in export(MIXED).schema:
            if field.name.endswith(("Cost", "UnitPrice", "Quantity")):
                assert field.type == pa.decimal128(38, 12)
            if field.name.endswith(("PeriodStart", "PeriodEnd")):
                assert field.type == pa.timestamp("us", tz="UTC")

    def test_version_1_3_only_adds_columns(self):
        old, new = export(MIXED, DEPOSITS), export(MIXED, DEPOSITS, version="1.3")
        assert new.select(old.column_names).equals(old)
        assert set(new.column_names) - set(old.column_names) == set(ADDED.split())
        for row in new.to_pylist():
            assert row["ServiceProviderName"] == row["ProviderName"] == "The Market"
            assert row["HostProviderName"] == row["x_ProviderId"]
        assert new.schema.metadata == {b"FocusVersion": b"1.3"}

    @pytest.mark.parametrize("version", ["1.1", "1.20", "", "2"])
    def test_unknown_version_is_refused(self, version):
        with pytest.raises(InvalidRequest, match=r"FOCUS version .* 1\.2, 1\.3"):
            export(version=version)

    def test_order_does_not_depend_on_the_order_of_the_ledger(self):
        table = export(MIXED, DEPOSITS)
        assert export(reversed(MIXED), reversed(DEPOSITS)).equals(table)


class TestFiles:
    def test_parquet_gives_the_table_back(self, tmp_path):
        table = export(MIXED, DEPOSITS)
        write_focus(table, tmp_path / "focus.parquet")
        assert pq.read_table(tmp_path / "focus.parquet").equals(table, check_metadata=True)
        assert [path.name for path in tmp_path.iterdir()] == ["focus.parquet"]

    def test_csv_gives_the_table_back(self, tmp_path):
        table = export(MIXED, DEPOSITS)
        write_focus(table, tmp_path / "focus.CSV")
        types = pc.ConvertOptions(column_types=table.schema, strings_can_be_null=True)
        assert pc.read_csv(tmp_path / "focus.CSV", convert_options=types).equals(table)
        text = (tmp_path / "focus.CSV").read_text()
        assert ",2026-11-01T00:00:00Z,2026-12-01T00:00:00Z," in text
        assert "\n-0.000000000007," in text

    def test_other_suffixes_are_refused(self, tmp_path):
        with pytest.raises(InvalidRequest, match=r"\.parquet or \.csv"):
            write_focus(export(), tmp_path / "focus.xlsx")
        assert list(tmp_path.iterdir()) == []
