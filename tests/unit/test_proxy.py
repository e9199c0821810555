from serve_apps.proxy import first_only


def test_first_request_id_is_kept_and_others_dropped():
    headers = [(b"a", b"1"), (b"x-request-id", b"req-1"), (b"X-Request-ID", b"uuid"), (b"a", b"2")]
    assert first_only(headers) == [(b"a", b"1"), (b"x-request-id", b"req-1"), (b"a", b"2")]


def test_a_single_one_stays():
    assert first_only([(b"X-Request-ID", b"uuid")]) == [(b"X-Request-ID", b"uuid")]
