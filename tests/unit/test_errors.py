import pickle

import pytest

from market import errors


def all_errors():
    pending, found = [errors.MarketError], []
    while pending:
        kind = pending.pop()
        found.append(kind)
        pending.extend(kind.__subclasses__())
    return [kind for kind in found if kind.__module__ == "market.errors"]


@pytest.mark.parametrize("kind", all_errors())
def test_survives_the_way_between_processes_with_everything(kind):
    error = kind("text", code="c", param="p", metadata={"a": 1}, retry_after_s=2.5)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == "text"
    assert copy.body() == error.body()
    assert copy.retry_after_s == 2.5


@pytest.mark.parametrize("kind", all_errors())
def test_body_has_all_four_keys_of_openai(kind):
    assert set(kind("text").body()["error"]) == {"message", "type", "param", "code"}


def test_tree_in_the_docstring_names_every_error():
    for kind in all_errors():
        assert kind.__name__ in errors.__doc__
