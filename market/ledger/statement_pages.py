"""A statement as JSON, CSV, a printable HTML page and a terminal's tables.

It computes nothing but totals of what it shows. Programs get exact figures, people get the same
figures with thousands separators and without idle zeros.
"""

import csv
import io
import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal, localcontext
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from market.ledger.statement import DIGITS, DayTotal, Party, Statement, UsageLine

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

KEEP_CHECKPOINT = "Keep it: it proves the ledger was not rewritten later."
NO_USAGE = "No usage in this period."

_US_PER_HOUR = 3_600_000_000
_FORMULA_STARTS = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")
_CSV_COLUMNS = (
    *("section", "statement_id", "party", "name", "period", "status", "currency"),
    *("day", "kind", "model", "lane", "count"),
    *("input_tokens", "cached_input_tokens", "output_tokens", "gpu_us", "credited_us"),
    *("amount", "charge"),
)

_CHART_STYLE: dict[str, Any] = {
    "svg.hashsalt": "statement",
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    **{f"axes.spines.{side}": False for side in ("top", "right", "bottom", "left")},
    "grid.color": "#dfe4e8",
    "grid.linewidth": 0.6,
    **dict.fromkeys(("text.color", "xtick.color", "ytick.color"), "#4a5560"),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
}
_BAR_COLOR = "#2b5a86"
_DAY_TICKS = (1, 5, 10, 15, 20, 25, 30)
# Matplotlib's settings belong to the process: two drawings at once would mix them up.
_DRAWING = threading.Lock()


def as_json(statement: Statement) -> dict[str, Any]:
    """The whole statement, ready for ``json.dumps``; amounts are exact decimal strings."""
    value: dict[str, Any] = _plain(statement)
    value["preliminary"] = statement.preliminary
    for shown, line in zip(value["lines"], statement.lines, strict=True):
        if statement.party is Party.PROVIDER:
            shown["payout"] = _plain(line.payout)
        else:
            del shown["fee"], shown["share"]
    return value


def as_csv(statement: Statement) -> str:
    """One flat table, its kinds of rows told apart by the first column, ``section``.

    ``amount`` moves or is the balance, ``charge`` is usage; no column mixes the two.
    """
    shares = ("fee", "share", "payout") if statement.party is Party.PROVIDER else ()
    about = {
        "statement_id": statement.statement_id,
        "party": statement.party,
        "name": statement.name,
        "period": statement.period,
        "status": "preliminary" if statement.preliminary else "settled",
        "currency": statement.currency,
    }
    text = io.StringIO()
    # Lines end in CR LF as in RFC 4180; with LF alone the module leaves a CR in a cell unquoted.
    writer = csv.DictWriter(text, (*_CSV_COLUMNS, *shares), extrasaction="ignore")
    writer.writeheader()
    for row in _csv_rows(statement):
        writer.writerow({name: _csv_cell(value) for name, value in (about | row).items()})
    return text.getvalue()


def as_html(statement: Statement) -> str:
    """A page that needs nothing beside itself: no script, no font, no address to load from."""
    page = _environment().get_template("statement.html.j2")
    return page.render(
        statement=statement,
        opening=_money(statement.opening),
        closing=_money(statement.closing),
        start=_minute(statement.start),
        end=_minute(statement.end),
        rows=_ledger_rows(statement),
        balance=_balance_table(statement),
        usages=_usage_tables(statement),
        days=_day_table(statement),
        chart=_chart(statement),
        chart_text=_chart_text(statement),
        keep_checkpoint=KEEP_CHECKPOINT,
        no_usage=NO_USAGE,
    )


def as_table(statement: Statement) -> "Group":
    """The statement for a terminal, as something rich can print."""
    from rich.console import Group
    from rich.text import Text

    head = [
        Text(_printable(f"{statement.issuer}: statement {statement.statement_id}"), style="bold"),
        Text(_printable(f"{statement.party} {statement.name}, period {statement.period} (UTC)")),
    ]
    if statement.preliminary:
        head.append(Text("PRELIMINARY: this period is not settled yet", style="bold yellow"))
    body: list[Table | Text] = [_rich_table(_balance_table(statement))]
    body += [_rich_table(table) for table in _usage_tables(statement)] or [Text(NO_USAGE)]
    if statement.days:
        body.append(_rich_table(_day_table(statement)))
    foot = [Text(_ledger_rows(statement))]
    if statement.checkpoint:
        lines = "\n".join(_printable(line) for line in statement.checkpoint.splitlines())
        foot.append(Text(f"\nCheckpoint. {KEEP_CHECKPOINT}\n{lines}"))
    return Group(*head, *body, *foot)


def _plain(value: Any) -> Any:
    """A value of a statement in the types that JSON has."""
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return value


def _csv_rows(statement: Statement) -> Iterable[dict[str, Any]]:
    yield {"section": "opening", "amount": statement.opening}
    for movement in statement.movements:
        yield {"section": "movement", **_plain(movement)}
    yield {"section": "closing", "amount": statement.closing}
    for line in statement.lines:
        yield {
            "section": "usage",
            **_plain(line),
            "model": "" if line.model == "-" else line.model,
            "count": line.requests,
            "payout": line.payout,
        }
    for day in statement.days:
        yield {"section": "day", **_plain(day), "count": day.requests}


def _csv_cell(value: Any) -> str:
    """Text that no spreadsheet takes for a formula; a leading quote makes it plain text."""
    cell = "" if value is None else str(_plain(value))
    if cell.lstrip().startswith(_FORMULA_STARTS) and not _NUMBER.fullmatch(cell):
        return f"'{cell}"
    return cell


@dataclass(frozen=True, slots=True)
class _Table:
    """Cells as people read them; the first ``texts`` columns are words, the others numbers."""

    title: str
    texts: int
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    total: tuple[str, ...]


def _balance_table(statement: Statement) -> _Table:
    opening = ("Opening balance", "", _money(statement.opening))
    rows = (
        (movement.kind, f"{movement.count:,}", _money(movement.amount))
        for movement in statement.movements
    )
    return _Table(
        title="Balance",
        texts=1,
        columns=("Movement", "Transfers", f"Amount ({statement.currency})"),
        rows=(opening, *rows),
        total=("Closing balance", "", _money(statement.closing)),
    )


def _usage_tables(statement: Statement) -> list[_Table]:
    """None without usage. A provider's money has its own table: ten columns fit no A4 page."""
    lines, unit = statement.lines, statement.currency
    if not lines:
        return []
    total = _total(lines)
    provider = statement.party is Party.PROVIDER
    counts = ("Model", "Lane", "Requests", "Input tokens", "of them cached", "Output tokens")
    credits = total.credited_us > 0
    hours = ("GPU-hours", "credited") if credits else ("GPU-hours",)
    usage = _Table(
        title="Usage per model and lane",
        texts=2,
        columns=(*counts, *hours, *(() if provider else (f"Charge ({unit})",))),
        rows=tuple(_usage_cells(line, provider, credits) for line in lines),
        total=_usage_cells(total, provider, credits),
    )
    if not provider:
        return [usage]
    payout = _Table(
        title="Charge, fee, holders' share and payout per model and lane",
        texts=2,
        columns=(
            *("Model", "Lane", f"Charge ({unit})", f"Fee ({unit})"),
            *(f"Holders' share ({unit})", f"Payout ({unit})"),
        ),
        rows=tuple(_payout_cells(line) for line in lines),
        total=_payout_cells(total),
    )
    return [usage, payout]


def _usage_cells(line: UsageLine, provider: bool, credits: bool) -> tuple[str, ...]:
    counts = (line.requests, line.input_tokens, line.cached_input_tokens, line.output_tokens)
    charge = () if provider else (_money(line.charge),)
    shown = (f"{count:,}" for count in counts)
    credited = (_gpu_hours(line.credited_us),) if credits else ()
    return (line.model, line.lane, *shown, _gpu_hours(line.gpu_us), *credited, *charge)


def _payout_cells(line: UsageLine) -> tuple[str, ...]:
    amounts = (line.charge, line.fee, line.share, line.payout)
    return (line.model, line.lane, *map(_money, amounts))


def _day_table(statement: Statement) -> _Table:
    counts = ("Day (UTC)", "Requests", "Input tokens", "Output tokens")
    return _Table(
        title="Usage per day",
        texts=1,
        columns=(*counts, f"Charge ({statement.currency})"),
        rows=tuple(_day_cells(day.day.isoformat(), [day]) for day in statement.days),
        total=_day_cells("Total", statement.days),
    )


def _day_cells(title: str, days: Sequence[DayTotal]) -> tuple[str, ...]:
    return (
        title,
        f"{sum(day.requests for day in days):,}",
        f"{sum(day.input_tokens for day in days):,}",
        f"{sum(day.output_tokens for day in days):,}",
        _money(_sum(day.charge for day in days)),
    )


def _total(lines: Sequence[UsageLine]) -> UsageLine:
    fees = [line.fee for line in lines if line.fee is not None]
    shares = [line.share for line in lines if line.share is not None]
    return UsageLine(
        model="Total",
        lane="",
        requests=sum(line.requests for line in lines),
        input_tokens=sum(line.input_tokens for line in lines),
        cached_input_tokens=sum(line.cached_input_tokens for line in lines),
        output_tokens=sum(line.output_tokens for line in lines),
        gpu_us=sum(line.gpu_us for line in lines),
        charge=_sum(line.charge for line in lines),
        # A total over the known fees only would look like the whole.
        fee=_sum(fees) if len(fees) == len(lines) else None,
        share=_sum(shares) if len(shares) == len(lines) else None,
        credited_us=sum(line.credited_us for line in lines),
    )


def _sum(amounts: Iterable[Decimal]) -> Decimal:
    with localcontext(prec=DIGITS):
        return sum(amounts, Decimal(0))


def _money(amount: Decimal | None) -> str:
    """Exact, in groups of three, at least two decimals: 1234.500000 -> '1,234.50'."""
    if amount is None:
        return "-"
    whole, _, fraction = f"{amount if amount else abs(amount):,f}".partition(".")
    return f"{whole}.{fraction.rstrip('0').ljust(2, '0')}"


def _gpu_hours(gpu_us: int) -> str:
    """Rounded to four decimals for reading; JSON and CSV carry the exact microseconds."""
    if 0 < gpu_us < _US_PER_HOUR // 10_000:
        return "<0.0001"
    with localcontext(prec=DIGITS):
        return _money((Decimal(gpu_us) / _US_PER_HOUR).quantize(Decimal("0.0001")))


def _minute(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _ledger_rows(statement: Statement) -> str:
    if statement.lsn_lo is None or statement.lsn_hi is None:
        return "No usage ledger rows in this period."
    unit = "row" if statement.rows == 1 else "rows"
    span = f"lsn {statement.lsn_lo} to {statement.lsn_hi}"
    return f"{statement.rows:,} {unit} of the usage ledger, {span}."


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("market.ledger"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _chart(statement: Statement) -> Markup | None:
    """Charge per day as an SVG element that is the same on every run; None if all is zero.

    It holds nothing but numbers, so it may enter the page as it is.
    """
    if not any(day.charge for day in statement.days):
        return None
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    first = statement.start.astimezone(UTC).date()
    length = (statement.end.astimezone(UTC) - timedelta(microseconds=1)).date() - first
    xs = [(day.day - first).days + 1 for day in statement.days]
    # The only floats made of money: a bar's height on the screen.
    heights = [float(day.charge) for day in statement.days]
    svg = io.StringIO()
    with _DRAWING, matplotlib.style.context(["default", _CHART_STYLE]):
        figure = Figure(figsize=(7.2, 2.1), layout="constrained")
        axes = figure.add_subplot()
        axes.bar(xs, heights, width=0.72, color=_BAR_COLOR)
        axes.axhline(0, color="#8a949e", linewidth=0.8)
        axes.set_xlim(0.4, length.days + 1.6)
        axes.set_xticks([tick for tick in _DAY_TICKS if tick <= length.days + 1])
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(lambda value, _: f"{Decimal(f'{value:.10g}'):,f}")
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(svg, format="svg", metadata=nothing, transparent=True)
    drawn = svg.getvalue()
    # Without the XML declaration and document type, which HTML does not know.
    return Markup(drawn[drawn.index("<svg") :].strip())


def _chart_text(statement: Statement) -> str:
    """What the chart shows, for those who do not see it."""
    if not statement.days:
        return ""
    days, unit = statement.days, statement.currency
    top = max(days, key=lambda day: day.charge)
    low = min(days, key=lambda day: day.charge)
    return (
        f"Bar chart of the charge per day in {unit}, {statement.period}: "
        f"{len(days)} days with usage, {_money(_sum(day.charge for day in days))} in total; "
        f"highest {_money(top.charge)} on {top.day}, lowest {_money(low.charge)} on {low.day}. "
        "The table of days has every value."
    )


def _rich_table(shown: _Table) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=shown.title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        show_footer=True,
    )
    for place, (title, total) in enumerate(zip(shown.columns, shown.total, strict=True)):
        table.add_column(
            Text(_printable(title)),
            footer=Text(_printable(total), style="bold"),
            justify="left" if place < shown.texts else "right",
            overflow="fold",
        )
    for row in shown.rows:
        table.add_row(*(Text(_printable(cell)) for cell in row))
    return table


def _printable(text: str) -> str:
    """Without the control characters that a name could use to rewrite a terminal's screen."""
    return "".join(char if char.isprintable() else "?" for char in text)
