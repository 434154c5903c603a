"""JSON files that others may have written: what is refused, and in which words."""

import os

import pytest

from distil.system.json_files import Above, load_json, parse_json, read_json, type_problem
from utils import InputError

TABLE = {
    "step": int,
    "rates": [float],
    "best": ({"figures": {...: float}}, None),
    "size": (Above(0), None),
}
WRONG = {
    "an empty file": (b"", "Expecting value"),
    "null": (b"null", "it is absent or null, expected an object"),
    "a list": (b"[1]", "it is a list, expected an object"),
    "bytes": (b"\xff\x00", "can't decode byte 0xff"),
    "two values": (b'{"step": 1, "step": 2}', "step has two values"),
    "NaN": (b'{"step": 1, "x": NaN}', "NaN is no finite number"),
    "1e400": (b'{"step": 1, "x": [1e400]}', "1e400 is no finite number"),
    "10^5000": (b'{"step": 1' + b"0" * 5000 + b"}", "4300 digits"),
    "nested": (b"[" * 10**5, "nested more than 100 deep"),
    "nested, whole": (b'{"a":' * 200 + b"1" + b"}" * 200, "nested more than 100 deep"),
    "half a pair": (b'{"step": 1, "name": "\\ud800"}', "half of a surrogate pair"),
    "an absent entry": (b'{"rates": []}', "step is absent or null, expected a whole number"),
    "a truth": (b'{"step": true, "rates": []}', "step is True, expected a whole number"),
    "2^63": (b'{"step": 9223372036854775808, "rates": []}', "step is a whole number of 64 bits"),
    "a text": (b'{"step": 1, "rates": [1, "2"]}', "rates.1 is '2', expected a finite number"),
    "10^400": (
        b'{"step": 1, "rates": [1' + b"0" * 400 + b"]}",
        "rates.0 is a whole number",
    ),
    "a part": (
        b'{"step": 1, "rates": [], "best": {"figures": {"k l": []}}}',
        "best.figures.'k l' is a list, expected a finite number",
    ),
    "no object": (b'{"step": 1, "rates": [], "best": 3}', "best is 3, expected an object or null"),
    "zero": (b'{"step": 1, "rates": [], "size": 0}', "size is 0, expected a number above 0 or"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_in_one_line(name, tmp_path):
    content, expected = WRONG[name]
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError) as error:
        read_json(tmp_path / "a.json", "--flag a.json", "make it again", TABLE)
    text = str(error.value)
    assert text.startswith("--flag a.json: is no readable JSON (") and expected in text, text
    assert text.endswith("); make it again") and "\n" not in text and len(text) < 260


def test_what_fits_is_returned_as_it_is(tmp_path):
    text = '{"step": 1, "rates": [1, 2.5], "best": {"figures": {"a": 1}}, "c": [null, "\\udcff"]}'
    found = parse_json(text, TABLE)
    assert found["best"] == {"figures": {"a": 1}} and found["c"] == [None, "\udcff"]
    assert parse_json('{"a": 1, "a": 2, "b": Infinity}', strict=False)["a"] == 2
    assert type_problem([1, 2], [int]) is None and type_problem(True, (bool, None)) is None


def test_pipes_and_large_files_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no regular file"):
        load_json(tmp_path / "pipe")
    (tmp_path / "large").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="has 8 bytes, expected at most 5"):
        load_json(tmp_path / "large", max_bytes=5)
