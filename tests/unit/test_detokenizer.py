from serve_apps.engines.detokenizer import Detokenizer


class Bytes:
    """A tokenizer whose tokens are bytes: the worst case for UTF-8."""

    def decode(self, token_ids, *, skip_special_tokens):
        return bytes(token_ids).decode("utf-8", errors="replace")


def stream(text, stop=(), step=1):
    data = text.encode()
    detokenizer = Detokenizer(Bytes(), stop)
    pieces = []
    for start in range(0, len(data), step):
        pieces.append(detokenizer.add(data[start : start + step]))
        if detokenizer.stopped:
            break
    pieces.append(detokenizer.finish())
    return pieces, detokenizer.stopped


def test_characters_are_never_split():
    pieces, _ = stream("aß€😀z")
    assert "".join(pieces) == "aß€😀z"
    assert all("\ufffd" not in piece for piece in pieces)


def test_broken_end_is_given_as_replacement():
    detokenizer = Detokenizer(Bytes(), ())
    assert detokenizer.add([0xF0, 0x9F]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_text_ends_before_the_stop_string():
    pieces, stopped = stream("one two three", stop=("two",))
    assert ("".join(pieces), stopped) == ("one ", True)


def test_start_of_a_stop_string_is_held_back():
    detokenizer = Detokenizer(Bytes(), ("two",))
    given = "".join(detokenizer.add(bytes([byte])) for byte in b"one tw")
    assert given == "one "
    assert detokenizer.add(b"in") == "tw"
    assert detokenizer.finish() == "in"


def test_earliest_of_several_stop_strings_wins():
    pieces, _ = stream("abcdef", stop=("ef", "cd"), step=6)
    assert "".join(pieces) == "ab"


def test_stop_string_at_the_very_end_is_found():
    pieces, stopped = stream("answer END", stop=("END",))
    assert ("".join(pieces), stopped) == ("answer ", True)
