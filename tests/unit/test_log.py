"""The log's tree and notes against RFC 6962 written down plainly, and what rows hash to."""

import base64
import hashlib
import importlib.util
import random
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import pyarrow as pa
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from market.errors import MarketFault
from market.ledger.audit import plain_row
from market.ledger.digest import leaf_hashes, map_text, row_path, rows_root
from market.ledger.log import (
    ORIGIN,
    Frontier,
    Signer,
    check_inclusion,
    inclusion_path,
    leaf_hash,
    read_checkpoint,
    root_of,
)
from market.ledger.schema import MONEY, TIME, USAGE
from market.pricing import to_decimal

SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 70)
HASH = hashlib.sha256


@cache
def verifier():
    path = Path(__file__).parents[2] / "scripts" / "verify_proof.py"
    spec = importlib.util.spec_from_file_location("verify_proof", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def leaves_of(size, seed=""):
    return [leaf_hash(f"{seed}{n}".encode()) for n in range(size)]


def naive_root(leaves):
    """MTH of RFC 6962, section 2.1, word for word."""
    if not leaves:
        return HASH(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    return HASH(b"\x01" + naive_root(leaves[:k]) + naive_root(leaves[k:])).digest()


def naive_path(leaves, index):
    """PATH of RFC 6962, section 2.1.1, word for word."""
    if len(leaves) == 1:
        return []
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    if index < k:
        return [*naive_path(leaves[:k], index), naive_root(leaves[k:])]
    return [*naive_path(leaves[k:], index - k), naive_root(leaves[:k])]


class TestTree:
    def test_leaves_and_nodes_are_told_apart_by_their_first_byte(self):
        assert leaf_hash(b"") == HASH(b"\x00").digest()
        one, two = leaves_of(2)
        assert root_of([one, two]) == HASH(b"\x01" + one + two).digest()

    def test_root_of_an_empty_log_is_the_hash_of_nothing(self):
        assert Frontier().root() == HASH(b"").digest() == root_of([])

    def test_root_is_that_of_the_definition_after_every_leaf(self):
        leaves = leaves_of(71)
        frontier = Frontier()
        for size in range(71):
            assert frontier.size == size
            assert frontier.root() == naive_root(leaves[:size])
            frontier.append(leaves[size])

    @given(st.lists(st.binary(max_size=4), max_size=70))
    @settings(deadline=None)
    def test_root_is_that_of_the_definition_for_any_leaves(self, contents):
        leaves = [leaf_hash(content) for content in contents]
        assert root_of(leaves) == naive_root(leaves)

    @given(st.integers(1, 70), st.data())
    @settings(deadline=None)
    def test_root_of_a_prefix_is_what_was_signed_when_the_log_was_that_long(self, size, data):
        leaves = leaves_of(size)
        shorter = data.draw(st.integers(0, size))
        frontier = Frontier()
        for leaf in leaves[:shorter]:
            frontier.append(leaf)
        signed = frontier.root()
        for leaf in leaves[shorter:]:
            frontier.append(leaf)
        assert signed == root_of(leaves[:shorter])
        assert (frontier.root() == signed) == (shorter == size)

    @given(st.integers(1, 70), st.data())
    @settings(deadline=None)
    def test_change_of_any_leaf_changes_the_root(self, size, data):
        leaves = leaves_of(size)
        changed = data.draw(st.integers(0, size - 1))
        other = [*leaves[:changed], leaf_hash(b"other"), *leaves[changed + 1 :]]
        assert root_of(other) != root_of(leaves)


class TestInclusion:
    @pytest.mark.parametrize("size", SIZES[1:])
    def test_path_of_every_leaf_is_that_of_the_definition_and_leads_to_the_root(self, size):
        leaves = leaves_of(size)
        for index, leaf in enumerate(leaves):
            path = inclusion_path(leaves, index)
            assert path == naive_path(leaves, index)
            assert check_inclusion(leaf, index, size, path) == naive_root(leaves)

    @given(st.integers(1, 70), st.data())
    @settings(deadline=None)
    def test_wrong_index_size_leaf_or_path_never_leads_to_the_root(self, size, data):
        leaves = leaves_of(size)
        index = data.draw(st.integers(0, size - 1))
        path, root = inclusion_path(leaves, index), root_of(leaves)
        other = data.draw(st.integers(0, size + 3).filter(lambda n: n != index))
        wrong = [(leaves[index], other, size, path), (leaf_hash(b"?"), index, size, path)]
        wrong.append((leaves[index], index, size, [*path, path[-1] if path else root]))
        if path:
            place = data.draw(st.integers(0, len(path) - 1))
            wrong.append((leaves[index], index, size, path[:place] + path[place + 1 :]))
            forged = [*path[:place], leaf_hash(b"?"), *path[place + 1 :]]
            wrong.append((leaves[index], index, size, forged))
        for leaf, at, of, along in wrong:
            assert not leads_to(root, leaf, at, of, along)

    @pytest.mark.parametrize(("index", "size"), [(-1, 4), (4, 4), (5, 4), (0, 0), (1, 1)])
    def test_index_outside_the_log_is_refused(self, index, size):
        with pytest.raises(ValueError, match="leaf"):
            check_inclusion(leaf_hash(b"0"), index, size, [])

    def test_path_of_another_length_is_refused(self):
        leaves = leaves_of(8)
        path = inclusion_path(leaves, 3)
        with pytest.raises(ValueError, match="too short"):
            check_inclusion(leaves[3], 3, 8, path[:-1])
        with pytest.raises(ValueError, match="too long"):
            check_inclusion(leaves[3], 3, 8, [*path, path[0]])

    @pytest.mark.parametrize("size", SIZES[1:])
    def test_script_climbs_to_the_same_root(self, size):
        leaves = leaves_of(size)
        for index, leaf in enumerate(leaves):
            path = [digest.hex() for digest in inclusion_path(leaves, index)]
            assert verifier().climb_log(leaf, index, size, path) == naive_root(leaves)

    @pytest.mark.parametrize(("index", "size"), [(1, 1), (-1, 1), (2, 2), (6, 4), (-4, 4)])
    def test_script_refuses_an_index_outside_the_log(self, index, size):
        leaves = leaves_of(size)
        path = [digest.hex() for digest in inclusion_path(leaves, index % size)]
        with pytest.raises(ValueError, match="leaf"):
            verifier().climb_log(leaves[index % size], index, size, path)


def leads_to(root, leaf, index, size, path):
    try:
        return check_inclusion(leaf, index, size, path) == root
    except ValueError:
        return False


class TestSignedNote:
    @pytest.fixture
    def signer(self, tmp_path):
        return Signer.load(tmp_path / "ledger.key")

    @pytest.mark.parametrize("size", [0, 1, 2**40])
    def test_says_the_size_and_root_it_was_made_for(self, signer, size):
        root = root_of(leaves_of(3))
        assert read_checkpoint(signer.checkpoint(size, root), signer.public) == (size, root)

    def test_has_the_form_of_c2sp(self, signer):
        root = root_of([])
        lines = signer.checkpoint(7, root).split("\n")
        assert lines[:4] == [ORIGIN, "7", base64.b64encode(root).decode(), ""]
        assert lines[4].startswith(f"— {ORIGIN} ")
        assert lines[5:] == [""]
        name, key_id, key = signer.verifier().split("+", 2)
        raw = base64.b64decode(key)
        assert (name, raw[:1], len(raw)) == (ORIGIN, b"\x01", 33)
        assert HASH(f"{ORIGIN}\n".encode() + raw).digest()[:4].hex() == key_id
        assert base64.b64decode(lines[4].split()[-1])[:4].hex() == key_id

    def test_script_reads_it_with_the_verifier_alone(self, signer):
        root = root_of(leaves_of(5))
        note = signer.checkpoint(5, root)
        assert verifier().read_checkpoint(note, signer.verifier()) == (5, root)

    def test_key_is_kept_and_only_its_owner_may_read_it(self, tmp_path, signer):
        path = tmp_path / "ledger.key"
        assert path.stat().st_mode & 0o777 == 0o600
        assert Signer.load(path).verifier() == signer.verifier()

    def test_file_that_is_no_key_is_refused(self, tmp_path):
        (tmp_path / "bad.key").write_text("not a key")
        with pytest.raises(MarketFault, match="no ledger key"):
            Signer.load(tmp_path / "bad.key")

    def test_another_key_does_not_check_it(self, tmp_path, signer):
        note = signer.checkpoint(1, root_of([]))
        stranger = Signer.load(tmp_path / "stranger.key")
        with pytest.raises(ValueError, match="another key"):
            read_checkpoint(note, stranger.public)
        with pytest.raises(ValueError, match="another key"):
            verifier().read_checkpoint(note, stranger.verifier())

    def test_signature_of_another_key_under_this_keys_id_does_not_check(self, tmp_path, signer):
        stranger = Signer.load(tmp_path / "stranger.key")
        mine, theirs = (one.checkpoint(1, root_of([])) for one in (signer, stranger))
        raw = [base64.b64decode(note.split()[-1]) for note in (mine, theirs)]
        forged = base64.b64encode(raw[0][:4] + raw[1][4:]).decode()
        note = mine.replace(mine.split()[-1], forged)
        with pytest.raises(ValueError, match="does not match"):
            read_checkpoint(note, signer.public)

    @given(st.data())
    @settings(max_examples=60, deadline=None)
    def test_change_of_any_character_of_the_text_is_refused(self, data):
        signer = Signer(Ed25519PrivateKey.from_private_bytes(bytes(32)))
        note = signer.checkpoint(12, root_of(leaves_of(12)))
        text = note.split("\n\n")[0]
        place = data.draw(st.integers(0, len(text) - 1))
        other = data.draw(st.characters(codec="ascii").filter(lambda c: c != text[place]))
        with pytest.raises(ValueError):  # noqa: PT011  # several reasons are right
            read_checkpoint(note[:place] + other + note[place + 1 :], signer.public)

    @pytest.mark.parametrize("note", ["", "hello", "a\n1\nb\n", "a\n1\nb\n\n— other AAAA\n"])
    def test_what_is_no_note_is_refused(self, signer, note):
        with pytest.raises(ValueError, match="not a signed note"):
            read_checkpoint(note, signer.public)

    def test_line_added_to_the_text_is_refused(self, signer):
        note = signer.checkpoint(1, root_of([]))
        with pytest.raises(ValueError, match="does not match"):
            read_checkpoint(note.replace("\n\n", "\nmore\n\n"), signer.public)


# -- rows -----------------------------------------------------------------------------------

TRICKY = pa.schema(
    [
        ("number", pa.int64()),
        ("small", pa.int32()),
        ("at", TIME),
        ("amount", MONEY),
        ("one", pa.string()),
        ("two", pa.string()),
        ("attrs", pa.map_(pa.string(), pa.string())),
    ]
)


def batch_of(*rows):
    """Rows given as (number, small, at, amount in pico units, one, two, attrs)."""
    columns = [list(values) for values in zip(*rows, strict=True)]
    columns[3] = [None if pico is None else to_decimal(pico) for pico in columns[3]]
    arrays = [pa.array(v, field.type) for v, field in zip(columns, TRICKY, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=TRICKY)


def hashes(*rows):
    packed = leaf_hashes(batch_of(*rows))
    return [packed[n : n + 32] for n in range(0, len(packed), 32)]


texts = st.none() | st.text("ab\x00\xff☃", max_size=3)
micros = st.integers(-(2**40), 2**40).map(
    lambda us: datetime.fromtimestamp(us // 10**6, UTC).replace(microsecond=us % 10**6)
)
tricky_rows = st.tuples(
    st.none() | st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63)]),
    st.none() | st.sampled_from([0, 1, -1, 2**31 - 1]),
    st.none() | micros,
    st.none() | st.sampled_from([0, 1, -1, 2**64, 10**27, -(10**27)]),
    texts,
    texts,
    st.none()
    | st.lists(st.tuples(st.text("ab,", max_size=2), st.text('ab"', max_size=2)), max_size=2),
)


class TestRowDigest:
    @given(tricky_rows, tricky_rows)
    @settings(max_examples=300, deadline=None)
    def test_rows_have_the_same_digest_only_if_they_are_the_same(self, one, two):
        first, second = hashes(one, two)
        assert (first == second) == (one == two)

    @pytest.mark.parametrize(
        ("one", "two"),
        [
            ((0, 0, None, 0, None, None, None), (0, 0, None, 0, "", "", None)),
            ((0, 0, None, 0, "ab", "", None), (0, 0, None, 0, "a", "b", None)),
            ((0, 0, None, 0, "ab", "", None), (0, 0, None, 0, "", "ab", None)),
            ((0, 0, None, 0, "a", None, None), (0, 0, None, 0, None, "a", None)),
            ((0, None, None, 0, "", "", None), (None, 0, None, 0, "", "", None)),
            ((0, 0, None, None, "", "", None), (0, 0, None, 0, "", "", None)),
            ((0, 0, None, 0, "", "", None), (0, 0, None, 0, "", "", [])),
            ((0, 0, None, 0, "", "", [("a", "")]), (0, 0, None, 0, "", "", [("", "a")])),
            (
                (0, 0, None, 0, "", "", [("a", "b"), ("c", "d")]),
                (0, 0, None, 0, "", "", [("c", "d"), ("a", "b")]),
            ),
            ((0, 0, None, 2**64, "", "", None), (0, 0, None, 0, "", "", None)),
            ((0, 0, None, -1, "", "", None), (0, 0, None, 2**64 - 1, "", "", None)),
            ((0, 0, None, 0, "a\x00", "", None), (0, 0, None, 0, "a", "\x00", None)),
        ],
    )
    def test_tricky_neighbours_are_told_apart(self, one, two):
        first, second = hashes(one, two)
        assert first != second

    @given(st.lists(tricky_rows, min_size=1, max_size=6), st.data())
    @settings(deadline=None)
    def test_digest_does_not_depend_on_the_rows_beside_it(self, rows, data):
        place = data.draw(st.integers(0, len(rows) - 1))
        assert hashes(rows[place]) == [hashes(*rows)[place]]

    @given(st.lists(tricky_rows, min_size=2, max_size=9), st.data())
    @settings(deadline=None)
    def test_slice_of_a_batch_has_the_digests_of_a_copy(self, rows, data):
        batch = batch_of(*rows)
        start = data.draw(st.integers(0, len(rows) - 1))
        count = data.draw(st.integers(1, len(rows) - start))
        sliced = batch.slice(start, count)
        copied = batch.take(pa.array(range(start, start + count)))
        whole = leaf_hashes(batch)[32 * start : 32 * (start + count)]
        assert leaf_hashes(sliced) == leaf_hashes(copied) == whole

    @given(tricky_rows)
    @settings(deadline=None)
    def test_script_encodes_a_row_the_same_way(self, row):
        (leaf,) = hashes(row)
        batch = batch_of(row)
        assert HASH(b"\x00" + verifier().encode(plain_row(batch))).digest() == leaf

    def test_no_rows_have_no_digests(self):
        empty = pa.RecordBatch.from_arrays([pa.array([], f.type) for f in USAGE], schema=USAGE)
        assert leaf_hashes(empty) == b""

    def test_map_has_one_text_whatever_is_in_it(self):
        assert map_text(None) is None
        assert map_text([]) == "[]"
        assert map_text([("a", 'b"\n☃')]) == '[["a","b\\"\\n\\u2603"]]'


def naive_rows_root(leaves):
    level = leaves
    if not level:
        return HASH(b"").digest()
    while len(level) > 1:
        level = [
            HASH(b"\x01" + b"".join(level[n : n + 16])).digest() for n in range(0, len(level), 16)
        ]
    return level[0]


class TestRowsTree:
    @pytest.mark.parametrize("size", [0, 1, 2, 15, 16, 17, 31, 33, 255, 256, 257, 4097])
    def test_root_is_that_of_the_plain_definition(self, size):
        leaves = leaves_of(size, "row")
        assert rows_root(b"".join(leaves)) == naive_rows_root(leaves)

    @pytest.mark.parametrize("size", [1, 2, 16, 17, 255, 257])
    def test_path_of_every_row_climbs_to_the_root(self, size):
        leaves = leaves_of(size, "row")
        packed = b"".join(leaves)
        root = rows_root(packed)
        for index, leaf in enumerate(leaves):
            assert verifier().climb_rows(leaf, index, row_path(packed, index)) == root

    @pytest.mark.parametrize("size", [2, 16, 17, 257])
    def test_path_does_not_climb_from_another_place_or_row(self, size):
        leaves = leaves_of(size, "row")
        packed = b"".join(leaves)
        root = rows_root(packed)
        for index in random.Random(0).sample(range(size), min(size, 20)):
            path = row_path(packed, index)
            assert verifier().climb_rows(leaf_hash(b"?"), index, path) != root
            with pytest.raises((ValueError, IndexError)):
                verifier().climb_rows(leaves[index], index + 1, path)

    def test_change_loss_and_order_of_rows_change_the_root(self):
        leaves = leaves_of(40, "row")
        root = rows_root(b"".join(leaves))
        assert rows_root(b"".join(leaves[:-1])) != root
        assert rows_root(b"".join([*leaves, leaves[-1]])) != root
        assert rows_root(b"".join([leaves[1], leaves[0], *leaves[2:]])) != root
