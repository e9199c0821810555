"""What ``market ledger verify`` says and returns."""

import pytest
from typer.testing import CliRunner

from market.cli import api
from market.cli.main import app

SOUND = {"finding": None, "rows": 3, "parts": 1}
BROKEN = SOUND | {"finding": {"where": "part-1.parquet", "row": 2, "reason": "charge is wrong"}}


class Answer:
    def __init__(self, body):
        self._body = body

    def json(self):
        return self._body


@pytest.mark.parametrize("form", ["table", "json"])
@pytest.mark.parametrize(("report", "code"), [(SOUND, 0), (BROKEN, 1)])
def test_finding_is_named_and_ends_with_1(monkeypatch, form, report, code):
    monkeypatch.setattr(api, "fetch", lambda *_arguments, **_options: Answer(report))
    done = CliRunner().invoke(app, ["ledger", "verify", "--output", form])
    assert done.exit_code == code
    if code:
        assert "NOT VERIFIED: part-1.parquet, row 2: charge is wrong" in done.stderr
