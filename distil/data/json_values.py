"""The values of a JSON file: of an array, or one after the other; one of them at a time in memory.

Not by the `datasets` library, which makes texts of numbers beside texts; pyarrow, below it, ends
the process where a file begins with null.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

CHARS = 2**20  # read at a time
MAX_CHARS = 2**26  # of a value
CUTS = ("", ".", "e", "E")  # where a number may be cut
SPACE = re.compile(r"[ \t\r\n]*")
scan = json.JSONDecoder().raw_decode


def json_values(file: TextIO) -> Iterator[Any]:
    """Yield the values. Raises ValueError, RecursionError."""
    rest = _Rest(file)
    closing = "]" if rest.next_char() == "[" else ""  # of the array, or of the file
    rest.place += len(closing)
    while rest.next_char() != closing:
        yield rest.value()
        if closing and rest.next_char() == ",":
            rest.place += 1
        elif closing and rest.next_char() != closing:
            raise ValueError(f"{rest.next_char()!r} behind a record of the array")
    rest.place += len(closing)
    if rest.next_char():
        raise ValueError(f"{rest.next_char()!r} behind the array")


class _Rest:
    """What is left of a file, a part of it in memory."""

    def __init__(self, file: TextIO):
        self.file, self.text, self.place = file, "", 0

    def next_char(self) -> str:
        """Skip white space; return the next character, or "" at the end."""
        while True:
            self.place = SPACE.match(self.text, self.place).end()
            if self.place < len(self.text) or not self._has_more():
                return self.text[self.place : self.place + 1]

    def value(self) -> Any:
        """Parse the next value."""
        while True:
            try:
                value, end = scan(self.text, self.place)
            except ValueError:  # cut at the end of what is in memory?
                if not self._has_more():
                    raise
                continue
            # A number may go on behind what is in memory.
            if self.text[end : end + 1] not in CUTS or not self._has_more():
                self.place = end
                return value

    def _has_more(self) -> bool:
        kept = self.text[self.place :]
        if len(kept) > MAX_CHARS:
            raise ValueError(f"a record has more than {MAX_CHARS >> 20} million characters")
        more = self.file.read(max(CHARS, len(kept)))
        self.text, self.place = kept + more, 0
        return bool(more)
