"""Forms with bracketed names, and JSON that is taken or not."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import support.serve_packages  # noqa: F401 - skips where they are missing
from vstar_engine.serving.errors import ApiError
from vstar_engine.serving.http.request_body import parse_json, unflatten

NAMES = st.text("abc", min_size=1, max_size=3)
LEAVES = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
OBJECTS = st.recursive(
    st.dictionaries(NAMES, LEAVES | st.lists(LEAVES, min_size=1, max_size=3), min_size=1, max_size=3),
    lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3),
    max_leaves=8,
)


def taken(read):
    """Returns what is read, or the body of the refusal; any other error is a fault."""
    try:
        return read()
    except ApiError as error:
        return error.body()


def flattened(value, name=""):
    """Spells an object as OpenAI's clients do."""
    if isinstance(value, dict):
        for key, held in value.items():
            yield from flattened(held, f"{name}[{key}]" if name else key)
    elif isinstance(value, list):
        for held in value:
            yield from flattened(held, f"{name}[]")
    else:
        yield name, value


@given(OBJECTS)
def test_a_form_is_the_object_it_spells(value):
    assert unflatten(list(flattened(value))) == value


ROWS = [("s[][text]", "a"), ("s[][at]", "0"), ("s[][text]", "b"), ("s[][at]", "1"), ("t[x][]", "1"), ("t[x][]", "2")]


@pytest.mark.parametrize("fields", [ROWS, sorted(ROWS)], ids=["object-by-object", "name-by-name"])
def test_lists_of_objects(fields):
    assert unflatten(fields) == {"s": [{"text": "a", "at": "0"}, {"text": "b", "at": "1"}], "t": {"x": ["1", "2"]}}


@pytest.mark.parametrize(
    "fields",
    [
        [("a", "1"), ("a", "2")],
        [("a", "1"), ("a[]", "2")],
        [("a", "1"), ("a[b]", "2")],
        [("a[]", "1"), ("a[b]", "2")],
        [("a[b]", "1"), ("a[]", "2")],
        [("a[", "1")],
        [("a[b]c", "1")],
        [("a]b[", "1")],
        [("a[[b]]", "1")],
        [("a" + "[b]" * 40, "1")],
        [("a[][]", "1")],
        [("a[][b][]", "1")],
        [("a[][b]", "1"), ("a[][b]", "2"), ("a[][c]", "3")],
        [("a[][b]", "1"), ("a", "2")],
        [("", "1"), ("", "2")],
    ],
)
def test_forms_that_spell_nothing(fields):
    with pytest.raises(ApiError):
        unflatten(fields)


@given(st.lists(st.tuples(st.text(max_size=12), st.text(max_size=3)), max_size=8))
def test_any_form_is_read_or_refused(fields):
    assert isinstance(taken(lambda: unflatten(fields)), dict)


@given(st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode(errors="surrogatepass")))
def test_any_body_is_read_or_refused(body):
    assert json.dumps(taken(lambda: parse_json(body))).encode()
