"""The text of one machine of several: a contiguous part, so that the parts in order are the whole.

Text and .jsonl files are cut between lines, by their bytes. Others, which must be read from their
beginning, and the shards of a data set belong to the machine in whose part their first byte lies.
"""

import dataclasses
import os
import re
from collections.abc import Sequence

from distil.data.text_sources import DATASET, OPENERS, Source
from utils import InputError


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part `number` (from 1) of `of`."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def path(self, stem: str) -> str:
        """Return the prefix of the shard's store, for the name of the whole without a suffix."""
        return f"{stem}.shard-{self.number}-of-{self.of}"


MAX_SHARDS = 100_000


def parse_shard(text: str) -> Shard:
    """Read I/N. Raises InputError."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
    shard = Shard(int(match[1]), int(match[2])) if match else None
    if shard is None or not 1 <= shard.number <= shard.of <= MAX_SHARDS:
        raise InputError(f"--shard {text}: expected I/N with I from 1 to N, such as 1/5 to 5/5")
    return shard


def part_of(sources: Sequence[Source], shard: Shard) -> list[Source]:
    """List the sources of a machine; some machines have none where few sources can't be cut."""
    pipes = [source.path for source in sources if source.is_pipe]
    if pipes:
        raise InputError(
            f"--shard {shard}: {pipes[0]} is a pipe, which no two machines can read; write it to a"
            " file"
        )
    sizes = [1 if source.kind == DATASET else source.num_bytes for source in sources]
    low, high = (sum(sizes) * number // shard.of for number in (shard.number - 1, shard.number))
    part, place = [], 0
    for source, size in zip(sources, sizes, strict=True):
        start, end = low - place, high - place
        place += size
        if _is_divisible(source):
            start, end = max(start, 0), min(end, size)
            if start < end:
                part.append(dataclasses.replace(source, start=start, end=end))
        elif start <= 0 < end:
            part.append(source)
    return part


def _is_divisible(source: Source) -> bool:
    is_packed = os.path.splitext(source.path)[1].lower() in OPENERS
    return source.kind in ("lines", "jsonl") and not is_packed
