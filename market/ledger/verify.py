"""``market ledger verify``: recomputes everything and names the first thing that is wrong.

Runs in a process of its own over a picture of the books taken at one instant, so that neither a
long check nor what it finds can hurt the ledger. ``python -m market.ledger.verify PICTURE``.
"""

import json
import pickle
import sys
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from market import pricing
from market.accounts import Account, holder_of
from market.errors import MarketFault
from market.ledger.compaction import require_rows, rows_in
from market.ledger.files import sha256_of
from market.ledger.log import Frontier, leaf_bytes, leaf_hash, read_checkpoint
from market.ledger.manifest import KEYS, Dataset, Part
from market.ledger.publisher import GENESIS
from market.ledger.rating import check_tokens, money_column
from market.ledger.settling import stored_digest
from market.types import RateCard, RecordKind

NEGATED = ("input_tokens", "cached_input_tokens", "output_tokens", "charge")


@dataclass(frozen=True, slots=True)
class Finding:
    """The first thing that is wrong: where, in which row, and why."""

    where: str
    row: int | None
    reason: str


class Wrong(Exception):
    """Carries a Finding up."""

    def __init__(self, where: str, row: int | None, reason: str) -> None:
        super().__init__(where, row, reason)
        self.finding = Finding(where, row, reason)


@dataclass(frozen=True)
class Picture:
    """The books at one instant. ``live`` are rows that are in no file yet."""

    ledger_dir: Path
    settlement_files: dict[str, tuple[Path, str]]
    parts: dict[Dataset, list[Part]]
    leaf_hashes: dict[int, bytes]
    live: dict[Dataset, pa.Table]
    cards: dict[str, RateCard]
    accounts: list[Account]
    held: dict[str, int]
    marks: dict[str, tuple[int, int]]
    lease_totals: dict[tuple[str, str], int]
    checkpoints: list[tuple[int, bytes, str]]
    public_key: bytes


@dataclass
class Sums:
    """What the rows add up to."""

    charges: dict[tuple[str, str, str], int] = field(default_factory=lambda: defaultdict(int))
    paid: dict[tuple[str, str, str], int] = field(default_factory=lambda: defaultdict(int))
    debits: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    credits: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    producers: dict[tuple[str, int], int] = field(default_factory=lambda: defaultdict(int))
    leases: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    requests: list[np.ndarray[Any, Any]] = field(default_factory=list)
    corrections: list[dict[str, Any]] = field(default_factory=list)
    rows: int = 0
    hasher: duckdb.DuckDBPyConnection = field(
        default_factory=lambda: duckdb.connect(config={"threads": 1})
    )


def verify(picture: Picture) -> tuple[Finding | None, dict[str, Any]]:
    """The first finding, if any, and what was looked at."""
    started_s = time.perf_counter()
    sums = Sums()
    finding = None
    newer: list[str] = []
    try:
        newer = _no_strangers(picture)
        _settlements(picture)
        _log(picture)
        for dataset in Dataset:
            for where, rows in _ledger(picture, dataset):
                check = _usage_rows if dataset is Dataset.USAGE else _transfer_rows
                check(picture, sums, where, rows)
        _corrections(picture, sums)
        _books(picture, sums)
    except Wrong as wrong:
        finding = wrong.finding
    seconds = time.perf_counter() - started_s
    return finding, {
        "newer": newer,
        "rows": sums.rows,
        "parts": sum(map(len, picture.parts.values())),
        "files": len({(p.dataset, p.day, p.file) for ps in picture.parts.values() for p in ps}),
        "checkpoints": len(picture.checkpoints),
        "seconds": round(seconds, 3),
        "rows_per_s": round(sums.rows / seconds),
    }


# -- files and log --------------------------------------------------------------------------


def _no_strangers(picture: Picture) -> list[str]:
    """Nothing but the manifest's files may be where plain readers look.

    Returns files that look as if they were published after the picture: the manifest must know.
    """
    newer: list[str] = []
    known = {_path(picture, part) for parts in picture.parts.values() for part in parts}
    for path in sorted(picture.ledger_dir.rglob("*")):
        if path.is_dir() or path in known:
            continue
        if path.name != GENESIS:
            if _newer_part(picture, path):
                newer.append(str(path))
                continue
            raise Wrong(str(path), None, "this file is not in the manifest")
        try:
            rows = pq.read_metadata(path).num_rows
        except (pa.ArrowInvalid, OSError) as error:
            raise Wrong(str(path), None, f"unreadable: {error}") from error
        if rows:
            raise Wrong(str(path), None, "the empty first part has rows")
    return newer


def _newer_part(picture: Picture, path: Path) -> bool:
    """Whether ``path`` was published after the picture was taken."""
    try:
        dataset = Dataset(path.relative_to(picture.ledger_dir).parts[0])
        first = int(path.name.removeprefix("part-").split("-")[0])
    except (ValueError, IndexError):
        return False
    parts = picture.parts[dataset]
    return path.name.startswith("part-") and first > (parts[-1].hi if parts else 0)


def _path(picture: Picture, part: Part) -> Path:
    return picture.ledger_dir / part.dataset / f"date={part.day.isoformat()}" / part.file


def _settlements(picture: Picture) -> None:
    for period, (path, digest) in picture.settlement_files.items():
        if path.exists() and stored_digest(path) != digest:
            raise Wrong(str(path), None, f"not the lines that were settled for {period}")


def _log(picture: Picture) -> None:
    """Each leaf is what the manifest says now, and each checkpoint ever signed still holds."""
    by_leaf = {part.leaf: part for parts in picture.parts.values() for part in parts}
    public = Ed25519PublicKey.from_public_bytes(picture.public_key)
    notes = sorted(picture.checkpoints)
    frontier = Frontier()
    for leaf in range(len(by_leaf) + 1):
        while notes and notes[0][0] == leaf:
            _checkpoint(notes.pop(0), frontier, public)
        if leaf == len(by_leaf):
            break
        part = by_leaf.get(leaf)
        if part is None:
            raise Wrong("log", None, f"leaf {leaf} is missing")
        digest = leaf_hash(leaf_bytes(part.entry()))
        if digest != picture.leaf_hashes[leaf]:
            raise Wrong(part.file, part.lo, "the manifest's entry was changed after it was sealed")
        frontier.append(digest)
    if notes:
        raise Wrong(
            "log", None, f"a checkpoint was signed for {notes[0][0]} parts, there are fewer"
        )


def _checkpoint(
    checkpoint: tuple[int, bytes, str], frontier: Frontier, public: Ed25519PublicKey
) -> None:
    size, _, note = checkpoint
    try:
        signed = read_checkpoint(note, public)
    except ValueError as error:
        raise Wrong(f"checkpoint {size}", None, str(error)) from error
    if signed != (size, frontier.root()):
        raise Wrong(
            f"checkpoint {size}", None, "the log was rewritten after this checkpoint was signed"
        )


def _ledger(picture: Picture, dataset: Dataset) -> Iterator[tuple[str, pa.RecordBatch]]:
    """Every row of a dataset in order, its file checked against the manifest on the way."""
    parts = picture.parts[dataset]
    expected, booked_at = 1, None
    for path, inside in _by_file(picture, parts):
        if not path.exists():
            raise Wrong(str(path), inside[0].lo, "the file is missing")
        if sha256_of(path) != inside[0].sha256:
            reason = _what_changed(path, inside)
            raise Wrong(str(path), reason[0], reason[1])
        for part, rows in _readable(path, inside):
            where = str(path)
            booked_at = _in_order(where, rows, dataset, (expected, booked_at), part.day)
            try:
                require_rows(part, rows)
            except MarketFault as fault:
                raise Wrong(where, part.lo, str(fault)) from fault
            expected = part.hi + 1
            yield where, rows
    for rows in picture.live[dataset].to_batches(max_chunksize=65_536):
        booked_at = _in_order("unpublished rows", rows, dataset, (expected, booked_at), None)
        expected += rows.num_rows
        yield "unpublished rows", rows


def _readable(path: Path, parts: Sequence[Part]) -> Iterator[tuple[Part, pa.RecordBatch]]:
    """The rows of each part; a file that cannot be read as such is a finding."""
    part = parts[0]
    try:
        for part, rows in zip(parts, rows_in(path, parts), strict=True):
            yield part, rows
    except (MarketFault, pa.ArrowInvalid, OSError) as error:
        raise Wrong(str(path), part.lo, str(error)) from error


def _by_file(picture: Picture, parts: Sequence[Part]) -> Iterator[tuple[Path, list[Part]]]:
    inside: list[Part] = []
    for part in parts:
        if inside and (part.file, part.day) != (inside[0].file, inside[0].day):
            yield _path(picture, inside[0]), inside
            inside = []
        inside.append(part)
    if inside:
        yield _path(picture, inside[0]), inside


def _what_changed(path: Path, parts: Sequence[Part]) -> tuple[int | None, str]:
    """Narrow a changed file down to its first part, and row if possible."""
    part = parts[0]
    try:
        for part, rows in zip(parts, rows_in(path, parts), strict=True):
            keys = rows[KEYS[part.dataset]].to_numpy()
            wrong = np.flatnonzero(keys != np.arange(part.lo, part.lo + len(keys)))
            if len(wrong):
                return int(part.lo + wrong[0]), "rows are missing, doubled or out of order"
            require_rows(part, rows)
    except (MarketFault, pa.ArrowInvalid, OSError) as error:
        return part.lo, f"the file was changed: {error}"
    return None, "the file's bytes were changed, its rows were not"


def _in_order(
    where: str,
    rows: pa.RecordBatch,
    dataset: Dataset,
    before: tuple[int, datetime | None],
    day: date | None,
) -> datetime:
    """Rows follow each other without a gap, in time that never goes back, on their date."""
    expected, last = before
    keys = rows[KEYS[dataset]].to_numpy()
    wrong = np.flatnonzero(keys != np.arange(expected, expected + len(keys)))
    if len(wrong):
        row = expected + int(wrong[0])
        raise Wrong(where, row, f"expected row {row}, found {keys[wrong[0]]}")
    times = rows["booked_at"].cast(pa.int64()).to_numpy()
    back = np.flatnonzero(np.diff(times) < 0)
    first, end = rows["booked_at"][0].as_py(), rows["booked_at"][-1].as_py()
    if len(back) or (last is not None and first < last):
        row = expected + (int(back[0]) + 1 if len(back) else 0)
        raise Wrong(where, row, "booked before the row in front of it")
    if day is not None and (first.date(), end.date()) != (day, day):
        raise Wrong(where, expected, f"booked on {first.date()}, stored under {day}")
    return end  # type: ignore[no-any-return]


# -- rows -----------------------------------------------------------------------------------


def _usage_rows(picture: Picture, sums: Sums, where: str, rows: pa.RecordBatch) -> None:
    sums.rows += rows.num_rows
    first = rows["lsn"][0].as_py()
    bad = check_tokens(rows, picture.cards)
    if bad is not None:
        raise Wrong(where, first + bad.index, bad.reason)
    _sequence(sums, where, rows)
    others = pc.not_equal(rows["kind"], RecordKind.TOKENS)
    if pc.any(others, min_count=0).as_py():
        for row in rows.filter(others).to_pylist():
            _other_row(picture, sums, where, row)
    tokens = rows if not pc.any(others, min_count=0).as_py() else rows.filter(pc.invert(others))
    sums.requests.append(_hashes(sums.hasher, tokens["request_id"]))
    keys = ["tenant_id", "provider_id", "currency"]
    grouped = (
        pa.Table.from_batches([rows.select([*keys, "charge"])])
        .group_by(keys, use_threads=False)
        .aggregate([("charge", "sum")])
        .to_pylist()
    )
    for group in grouped:
        key = (group["tenant_id"], group["provider_id"], group["currency"])
        sums.charges[key] += pricing.to_pico(group["charge_sum"])


def _sequence(sums: Sums, where: str, rows: pa.RecordBatch) -> None:
    """Each producer's numbers go up by one: nothing of it lost, nothing twice."""
    names = rows["producer"].dictionary_encode()
    codes = names.indices.to_numpy().astype(np.int64) << 32 | rows["epoch"].to_numpy()
    seqs = rows["seq"].to_numpy()
    for code in np.unique(codes):
        places = np.flatnonzero(codes == code)
        producer = (names.dictionary[int(code) >> 32].as_py(), int(code) & 0xFFFFFFFF)
        expected = sums.producers[producer]
        wrong = np.flatnonzero(seqs[places] != np.arange(expected, expected + len(places)))
        if len(wrong):
            row = rows["lsn"][int(places[wrong[0]])].as_py()
            found = seqs[places[wrong[0]]]
            wanted = expected + int(wrong[0])
            reason = f"{producer[0]} of epoch {producer[1]} sent {found}, expected {wanted}"
            raise Wrong(where, row, reason)
        sums.producers[producer] = expected + len(places)


def _other_row(picture: Picture, sums: Sums, where: str, row: dict[str, Any]) -> None:
    """GPU time is re-rated per lease; corrections move only money that a refund moves."""
    if row["kind"] == RecordKind.GPU:
        key = (row["lease_id"], row["price_id"])
        card = picture.cards.get(row["price_id"])
        if card is None:
            raise Wrong(where, row["lsn"], f"unknown price {row['price_id']}")
        expected = pricing.gpu_charge(sums.leases[key], row["gpu_us"], card.gpu_hour_pico)
        if row["charge"] != pricing.to_decimal(expected):
            wanted = pricing.format_money(expected)
            reason = f"charge {row['charge']} of lease {key[0]} should be {wanted}"
            raise Wrong(where, row["lsn"], reason)
        sums.leases[key] += row["gpu_us"]
    elif row["reverses_lsn"] is not None:
        if row["reverses_lsn"] >= row["lsn"]:
            raise Wrong(where, row["lsn"], f"takes back row {row['reverses_lsn']}, which is later")
        sums.corrections.append(row)


def _hashes(connection: duckdb.DuckDBPyConnection, column: pa.Array) -> np.ndarray[Any, Any]:
    """64 bits of each request id, enough to notice a double one among billions of rows."""
    connection.register("ids", pa.table({"id": column}))
    found: np.ndarray[Any, Any] = connection.execute(
        "SELECT hash(id) AS h FROM ids WHERE id IS NOT NULL"
    ).fetchnumpy()["h"]
    return found


def _transfer_rows(picture: Picture, sums: Sums, where: str, rows: pa.RecordBatch) -> None:
    sums.rows += rows.num_rows
    columns = (rows[name].to_pylist() for name in ("kind", "debit_account", "credit_account"))
    picos = money_column(rows["amount"], whole=True)
    currencies = rows["currency"].to_pylist()
    for index, (kind, debit, credit, currency, pico) in enumerate(
        zip(*columns, currencies, picos, strict=True)
    ):
        if pico <= 0:
            raise Wrong(where, rows["tsn"][index].as_py(), "a transfer that moves nothing")
        if kind == "release":
            continue
        sums.debits[debit] += pico
        sums.credits[credit] += pico
        if kind == "charge":
            sums.paid[_parties(debit, credit, currency)] += pico
        elif kind == "refund":
            sums.paid[_parties(credit, debit, currency)] -= pico


def _parties(payer: str, provider: str, currency: str) -> tuple[str, str, str]:
    return holder_of(payer), provider.removeprefix("provider:"), currency


# -- books ----------------------------------------------------------------------------------


def _books(picture: Picture, sums: Sums) -> None:
    """Charges are what was paid, transfers make the balances, holds are what is held."""
    for key in sorted(sums.charges.keys() | sums.paid.keys()):
        if sums.charges[key] != sums.paid[key]:
            tenant, provider, currency = key
            charged, paid = (pricing.format_money(s[key]) for s in (sums.charges, sums.paid))
            raise Wrong(
                f"tenant {tenant}, provider {provider}",
                None,
                f"rows charge {charged} {currency}, transfers paid {paid}",
            )
    unknown = (sums.debits.keys() | sums.credits.keys()) - {a.account_id for a in picture.accounts}
    if unknown:
        raise Wrong(f"account {min(unknown)}", None, "has transfers but is not there")
    for account in picture.accounts:
        name = account.account_id
        found = (sums.debits[name], sums.credits[name], picture.held.get(name, 0))
        stored = (account.debits_pico, account.credits_pico, account.held_pico)
        if found != stored:
            raise Wrong(f"account {name}", None, f"transfers and holds give {found}, not {stored}")
    if sum(sums.debits.values()) != sum(sums.credits.values()):
        raise Wrong("transfers", None, "debits do not equal credits")
    overdrawn = [a for a in picture.accounts if not a.may_overdraw and a.available_pico < 0]
    if overdrawn:
        raise Wrong(f"account {overdrawn[0].account_id}", None, "is overdrawn")
    for producer, (epoch, next_seq) in picture.marks.items():
        if sums.producers.get((producer, epoch), 0) != next_seq:
            booked = sums.producers.get((producer, epoch), 0)
            raise Wrong(f"producer {producer}", None, f"booked {booked} records, mark {next_seq}")
    for producer, epoch in sorted(sums.producers):
        if picture.marks.get(producer, (0, 0))[0] < epoch:
            raise Wrong(f"producer {producer}", None, f"rows of epoch {epoch}, which is not known")
    for lease in sorted(sums.leases.keys() - picture.lease_totals.keys()):
        raise Wrong(f"lease {lease[0]}", None, "rows have GPU time, its total is not there")
    for lease, gpu_us in picture.lease_totals.items():
        if sums.leases[lease] != gpu_us:
            raise Wrong(f"lease {lease[0]}", None, f"rows have {sums.leases[lease]} of {gpu_us} us")
    if sums.requests:
        hashes = np.concatenate(sums.requests)
        double = len(hashes) - len(np.unique(hashes))
        if double:
            raise Wrong("usage", None, f"{double} request ids are there twice")


def _corrections(picture: Picture, sums: Sums) -> None:
    """No row gives back more than was charged, and a reversal is the row it takes back, negated."""
    given_back: dict[int, Decimal] = defaultdict(Decimal)
    for correction in sums.corrections:
        lsn = correction["reverses_lsn"]
        original = _row(picture, lsn)
        given_back[lsn] -= correction["charge"]
        if given_back[lsn] > original["charge"]:
            raise Wrong("usage", correction["lsn"], f"gives back more than row {lsn} charged")
        if correction["kind"] == RecordKind.REVERSAL and any(
            correction[name] != -(original[name] or 0) for name in NEGATED
        ):
            raise Wrong("usage", correction["lsn"], f"does not take back row {lsn} as it is")


def _row(picture: Picture, lsn: int) -> dict[str, Any]:
    parts = picture.parts[Dataset.USAGE]
    place = bisect_right(parts, lsn, key=lambda part: part.lo) - 1
    if place >= 0 and lsn <= parts[place].hi:
        path = _path(picture, parts[place])
        found = pq.read_table(path, filters=[("lsn", "==", lsn)], partitioning=None)
    else:
        live = picture.live[Dataset.USAGE]
        found = live.filter(pc.equal(live["lsn"], lsn))
    if found.num_rows != 1:
        raise Wrong("usage", lsn, "a correction refers to this row, which is not there")
    row: dict[str, Any] = found.to_pylist()[0]
    return row


def main(picture_file: str, load: Callable[[Any], Picture] = pickle.load) -> int:
    """Verify a picture; prints the result as JSON."""
    with Path(picture_file).open("rb") as file:
        picture = load(file)
    finding, looked_at = verify(picture)
    print(json.dumps({"finding": finding and asdict(finding), **looked_at}))
    return 1 if finding else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
