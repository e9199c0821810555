"""Streaming a text in any pieces gives the text, with and without stop strings."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from serve_apps.engines.detokenizer import Detokenizer
from tests.unit.test_detokenizer import Bytes

texts = st.text(alphabet="ab€😀 é\n", max_size=40)
stops = st.lists(st.text(alphabet="ab€ ", min_size=1, max_size=4), max_size=3)


def pieces(text, cuts, stop):
    data = text.encode()
    bounds = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    detokenizer = Detokenizer(Bytes(), stop)
    out = ""
    for start, end in pairwise(bounds):
        out += detokenizer.add(list(data[start:end]))
        if detokenizer.stopped:
            return out, True
    return out + detokenizer.finish(), detokenizer.stopped


@given(texts, st.lists(st.integers(0, 200), max_size=10))
def test_pieces_add_up_to_the_text(text, cuts):
    assert pieces(text, cuts, ()) == (text, False)


@given(texts, stops)
def test_one_token_at_a_time_ends_before_the_first_stop_string(text, stop):
    out, stopped = pieces(text, range(200), stop)
    ends = {s: text.index(s) + len(s) for s in stop if s in text}
    assert stopped == bool(ends)
    if not ends:
        assert out == text
        return
    first_end = min(ends.values())
    found = [s for s, end in ends.items() if end == first_end]
    assert out == text[: first_end - max(map(len, found))]
