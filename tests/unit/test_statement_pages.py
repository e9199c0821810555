import csv
import io
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal

import pytest
from rich.console import Console

from market.ledger import statement_pages as pages
from market.ledger.statement import DayTotal, Movement, Party, Statement, UsageLine

# 38 digits, the most a ledger column holds; arithmetic in the default context would round it.
HUGE = Decimal("12345678901234567890123456.123456789012")
TINY = Decimal("0.000000000001")
CHECKPOINT = "market.example/log\n1042\nq2hlY2twb2ludA==\n\n— market.example/log c2lnbmF0dXJl\n"
SETTLED = Statement(
    statement_id="st-2026-11-acme",
    party=Party.TENANT,
    name="acme",
    issuer="Compute Market",
    period="2026-11",
    start=datetime(2026, 11, 1, tzinfo=UTC),
    end=datetime(2026, 12, 1, tzinfo=UTC),
    currency="USD",
    opening=Decimal("250.000000000000"),
    closing=Decimal("1250.25"),
    movements=(
        Movement("deposit", 2, Decimal("1500")),
        Movement("charge", 41, Decimal("-499.750000000000")),
    ),
    lines=(
        UsageLine("qwen-7b", "tokens", 1200, 3_000_000, 400_000, 900_000, 0, HUGE, None),
        UsageLine("-", "job", 0, 0, 0, 0, 7_200_000_001, TINY, None),
    ),
    days=(
        DayTotal(date(2026, 11, 3), 700, 2_000_000, 500_000, Decimal("300.5")),
        DayTotal(date(2026, 11, 17), 500, 1_000_000, 400_000, Decimal("199.25")),
    ),
    lsn_lo=1001,
    lsn_hi=9999,
    rows=1200,
    settlement_id="settle-2026-11",
    checkpoint=CHECKPOINT,
)
PRELIMINARY = replace(SETTLED, settlement_id=None)
UNUSED = replace(SETTLED, lines=(), days=(), lsn_lo=None, lsn_hi=None, rows=0)
PROVIDER = replace(
    SETTLED,
    party=Party.PROVIDER,
    name="gpu-farm",
    lines=(replace(SETTLED.lines[0], fee=TINY),),
)
HOSTILE = '<script>alert("x")</script>'


def read_csv(statement):
    return list(csv.DictReader(io.StringIO(pages.as_csv(statement))))


def in_section(rows, section):
    return [row for row in rows if row["section"] == section]


def terminal_text(statement):
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    console.print(pages.as_table(statement))
    return console.file.getvalue()


class TestJson:
    def test_keeps_every_digit(self):
        value = json.loads(json.dumps(pages.as_json(SETTLED)))
        assert [line["charge"] for line in value["lines"]] == [str(HUGE), "0.000000000001"]
        assert value["opening"] == "250.000000000000"
        assert value["movements"][1] == {
            "kind": "charge",
            "count": 41,
            "amount": "-499.750000000000",
        }

    def test_writes_no_exponents(self):
        value = pages.as_json(replace(SETTLED, opening=Decimal("1E+3"), closing=Decimal("1E-12")))
        assert (value["opening"], value["closing"]) == ("1000", "0.000000000001")

    def test_writes_moments_in_utc_and_days_as_dates(self):
        value = pages.as_json(SETTLED)
        assert (value["start"], value["end"]) == ("2026-11-01T00:00:00Z", "2026-12-01T00:00:00Z")
        assert value["days"][0]["day"] == "2026-11-03"

    def test_carries_the_checkpoint_byte_for_byte(self):
        assert json.loads(json.dumps(pages.as_json(SETTLED)))["checkpoint"] == CHECKPOINT

    def test_shows_fee_and_payout_to_providers_only(self):
        line = pages.as_json(PROVIDER)["lines"][0]
        assert line["fee"] == "0.000000000001"
        assert line["payout"] == "12345678901234567890123456.123456789011"
        assert {"fee", "payout"}.isdisjoint(pages.as_json(SETTLED)["lines"][0])

    def test_says_whether_it_is_preliminary(self):
        assert pages.as_json(PRELIMINARY)["preliminary"] is True
        assert pages.as_json(SETTLED)["preliminary"] is False


class TestCsv:
    def test_keeps_every_digit(self):
        rows = read_csv(SETTLED)
        charges = [Decimal(row["charge"]) for row in in_section(rows, "usage")]
        assert charges == [HUGE, TINY]
        assert [row["amount"] for row in in_section(rows, "movement")] == [
            "1500",
            "-499.750000000000",
        ]
        assert in_section(rows, "usage")[1]["gpu_us"] == "7200000001"

    def test_amounts_of_opening_and_movements_add_up_to_closing(self):
        rows = read_csv(SETTLED)
        before = [row for row in rows if row["section"] in ("opening", "movement")]
        (closing,) = in_section(rows, "closing")
        assert sum(Decimal(row["amount"]) for row in before) == Decimal(closing["amount"])

    def test_every_row_has_the_same_columns_and_says_where_it_belongs(self):
        table = list(csv.reader(io.StringIO(pages.as_csv(PRELIMINARY))))
        assert {len(row) for row in table} == {len(table[0])}
        assert table[0][0] == "section"
        assert {(row["name"], row["status"]) for row in read_csv(PRELIMINARY)} == {
            ("acme", "preliminary")
        }

    def test_shows_fee_and_payout_to_providers_only(self):
        (row,) = in_section(read_csv(PROVIDER), "usage")
        assert row["fee"] == "0.000000000001"
        assert row["payout"] == "12345678901234567890123456.123456789011"
        assert {"fee", "payout"}.isdisjoint(read_csv(SETTLED)[0])

    @pytest.mark.parametrize(
        "name", ["=1+1", "+SUM(A1)", "-1+1", "@import", "\t=1+1", "\r=1", " =1", "＝1+1", "-1\n"]
    )
    def test_no_name_becomes_a_formula(self, name):
        hostile = replace(
            SETTLED, name=name, lines=(replace(SETTLED.lines[0], model=name, lane=name),)
        )
        (row,) = in_section(read_csv(hostile), "usage")
        assert {row["name"], row["model"], row["lane"]} == {f"'{name}"}

    def test_no_cell_starts_like_a_formula_unless_it_is_a_number(self):
        for row in read_csv(SETTLED):
            for cell in row.values():
                assert not cell.startswith(("=", "+", "-", "@")) or Decimal(cell).is_finite()


class TestHtml:
    def test_has_every_part(self):
        page = pages.as_html(SETTLED)
        assert page.startswith("<!DOCTYPE html>")
        for part in ("acme", "Compute Market", "2026-11", "1,250.25 USD", "-499.75", "qwen-7b"):
            assert part in page
        assert "1,200 rows of the usage ledger, lsn 1001 to 9999" in page
        assert "12,345,678,901,234,567,890,123,456.123456789012" in page
        assert CHECKPOINT in page
        assert "it proves the ledger was not rewritten later" in page

    def test_has_a_chart_with_a_text_alternative(self):
        page = pages.as_html(SETTLED)
        assert page.count("<svg") == 1
        (text,) = re.findall(r'role="img" aria-label="([^"]+)"', page)
        assert "highest 300.50 on 2026-11-03, lowest 199.25 on 2026-11-17" in text

    def test_escapes_hostile_names(self):
        hostile = replace(
            PRELIMINARY,
            name=HOSTILE,
            issuer=HOSTILE,
            currency=HOSTILE,
            statement_id=HOSTILE,
            checkpoint=f"</pre>{HOSTILE}",
            lines=(replace(SETTLED.lines[0], model=HOSTILE, lane=HOSTILE),),
            movements=(Movement(HOSTILE, 1, Decimal(1)),),
        )
        page = pages.as_html(hostile)
        assert "<script" not in page
        assert 'aria-label="Bar chart of the charge per day in &lt;script&gt;alert(&#34;' in page

    def test_loads_nothing_from_anywhere(self):
        page = re.sub(r'xmlns(:\w+)?="[^"]*"', "", pages.as_html(SETTLED))
        for word in ("http:", "https:", "//", "@import", "url(http", "<link", "src=", "<script"):
            assert word not in page

    def test_is_the_same_on_every_run(self):
        page = pages.as_html(SETTLED)
        assert pages.as_html(SETTLED) == page
        code = (
            "import sys; from tests.unit.test_statement_pages import SETTLED, pages;"
            "sys.stdout.buffer.write(pages.as_html(SETTLED).encode())"
        )
        other = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE)
        assert other.stdout.decode() == page

    def test_is_the_same_when_several_are_drawn_at_once(self):
        with ThreadPoolExecutor(4) as pool:
            drawn = set(pool.map(pages.as_html, [SETTLED] * 6))
        assert drawn == {pages.as_html(SETTLED)}

    def test_drawing_leaves_the_settings_of_matplotlib_as_they_were(self):
        import matplotlib as mpl

        before = dict(mpl.rcParams)
        pages.as_html(SETTLED)
        assert dict(mpl.rcParams) == before

    def test_marks_a_period_that_is_not_settled(self):
        assert "PRELIMINARY" in pages.as_html(PRELIMINARY)
        assert "PRELIMINARY" not in pages.as_html(SETTLED)

    def test_shows_fee_and_payout_to_providers_only(self):
        page = pages.as_html(PROVIDER)
        assert "Fee (USD)" in page
        assert "12,345,678,901,234,567,890,123,456.123456789011" in page
        assert "Payout" not in pages.as_html(SETTLED)

    def test_an_unknown_fee_is_a_dash_also_in_the_total(self):
        page = pages.as_html(replace(PROVIDER, lines=(*PROVIDER.lines, SETTLED.lines[1])))
        money = page[page.index("Charge, fee, holders&#39; share") :]
        total = money[money.index('<th scope="row">Total</th>') :]
        assert total[: total.index("</tr>")].count('<td class="number">-</td>') == 3

    def test_a_statement_without_usage_has_no_chart(self):
        page = pages.as_html(UNUSED)
        assert "No usage in this period." in page
        assert "<svg" not in page
        assert "No usage ledger rows in this period." in page

    def test_days_without_charge_need_no_chart_but_keep_their_table(self):
        page = pages.as_html(replace(SETTLED, days=(replace(SETTLED.days[0], charge=Decimal(0)),)))
        assert "<svg" not in page
        assert "2026-11-03" in page

    def test_corrections_below_zero_are_drawn_too(self):
        days = (replace(SETTLED.days[0], charge=Decimal("-1e-9")),)
        page = pages.as_html(replace(SETTLED, days=days))
        assert "<svg" in page
        assert "-0.000000001" in page


class TestTerminal:
    def test_shows_the_figures(self):
        text = terminal_text(PRELIMINARY)
        for part in ("PRELIMINARY", "1,250.25", "qwen-7b", "2026-11-17", "lsn 1001 to 9999"):
            assert part in text
        assert "c2lnbmF0dXJl" in text
        assert "Payout" not in text

    def test_shows_payouts_to_providers(self):
        assert "Payout (USD)" in terminal_text(PROVIDER)

    def test_a_statement_without_usage_says_so(self):
        assert "No usage in this period." in terminal_text(UNUSED)

    def test_a_name_is_neither_markup_nor_an_escape_sequence(self):
        text = terminal_text(replace(SETTLED, name="[red]a[/red]\x1b[2J"))
        assert "[red]a[/red]?[2J" in text


class TestFigures:
    @pytest.mark.parametrize(
        ("amount", "shown"),
        [
            ("0", "0.00"),
            ("-0.000", "0.00"),
            ("1234.500000000000", "1,234.50"),
            ("-1234567", "-1,234,567.00"),
            ("0.000000000001", "0.000000000001"),
            ("1E+3", "1,000.00"),
        ],
    )
    def test_money_is_exact_and_has_at_least_two_decimals(self, amount, shown):
        assert pages._money(Decimal(amount)) == shown

    @pytest.mark.parametrize(
        ("gpu_us", "shown"),
        [
            (0, "0.00"),
            (1, "<0.0001"),
            (359_999, "<0.0001"),
            (360_000, "0.0001"),
            (3_600_000_000, "1.00"),
            (5_400_000_000_000, "1,500.00"),
        ],
    )
    def test_gpu_time_is_read_in_hours(self, gpu_us, shown):
        assert pages._gpu_hours(gpu_us) == shown
