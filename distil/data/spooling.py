"""Text to a spool of token ids on the disk, in reading order, with its tally.

For a data set the state is saved from time to time, and an interrupted run continues from it.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Iterator

from tqdm import tqdm

from distil.data.encoding import Encoding, WorkerPool, divide_work
from distil.data.partial import Partial, Place, place_behind
from distil.data.shuffle import Spool
from distil.data.tally import Tally
from distil.data.text_sources import BLOCK_BYTES, DATASET, Block, Source, read_blocks
from distil.system.files import naming
from utils import bar_options, logger

TALLIED = ("num_words", "num_blank", "num_bad", "num_bytes")  # what the ids alone do not tell


def spool_ids(
    sources: list[Source], encoding: Encoding, num_cores: int, partial: Partial
) -> tuple[Spool, Tally]:
    """Tokenize all sources into a spool in the partial folder, and count them."""
    spool, tally, place = _begin(partial, encoding, len(sources))
    total = sum(source.part_bytes for source in sources)
    if total or not sources:
        num_workers, block_bytes = divide_work(total, num_cores)
    else:  # of unknown size
        num_workers, block_bytes = num_cores, BLOCK_BYTES
    # The libraries that read data sets have started threads, with which a process can't be forked.
    is_forked = not any(source.kind == DATASET for source in sources)
    places: collections.deque[Place] = collections.deque()  # behind each block in work
    with (
        naming(partial.folder),
        contextlib.closing(spool),
        WorkerPool(encoding, num_workers, is_forked=is_forked) as pool,
        tqdm(
            total=total or None,
            initial=tally.num_bytes,
            unit="B",
            unit_scale=True,
            desc="tokenize",
            **bar_options(),
        ) as bar,
    ):
        for block in pool.map(_blocks(sources, encoding, block_bytes, place, places)):
            spool.append(block.ids_M, block.lengths_N)
            tally.add(block)
            bar.update(block.num_bytes)
            place, before = places.popleft(), place
            if partial.is_due or (partial.can_continue and place.source > before.source):
                _save(partial, spool, tally, place)
    return spool, tally


def _blocks(
    sources: list[Source],
    encoding: Encoding,
    block_bytes: int,
    start: Place,
    places: collections.deque[Place],
) -> Iterator[Block]:
    """Yield the blocks of all sources, one source after the other, and note the place behind."""
    for number, source in enumerate(sources):
        if number < start.source:
            continue
        if number == start.source and start.rows:
            source = dataclasses.replace(source, start=start.rows)
        for block in read_blocks(source, encoding.text_field, encoding.flag, block_bytes):
            places.append(place_behind(number, block, is_record=source.kind == DATASET))
            yield block


def _begin(partial: Partial, encoding: Encoding, num_sources: int) -> tuple[Spool, Tally, Place]:
    """Make the spool, or open an interrupted run's, and count what is in it."""
    path, tally, state = partial.folder / "spool", Tally(encoding), partial.state
    kept = state.get("num_sequences", 0), state.get("num_ids", 0)
    if not state or not Spool.holds(path, encoding.dtype, kept):
        return Spool(path, encoding.dtype), tally, Place()
    spool = Spool(path, encoding.dtype, kept)
    tally.add_spool(spool)
    for name in TALLIED:
        setattr(tally, name, state[name])
    place = Place(state["source"], state["rows"])
    next_row = f"shard {place.source + 1}, row {place.rows + 1} is next"
    logger.info(
        "Continuing an interrupted run: %s sequences are there; %s.",
        f"{spool.num_sequences:,}",
        next_row if place.source < num_sources else "all text is tokenized",
    )
    return spool, tally, place


def _save(partial: Partial, spool: Spool, tally: Tally, place: Place) -> None:
    spool.flush()
    counts = {"num_sequences": spool.num_sequences, "num_ids": spool.num_ids}
    tallied = {name: getattr(tally, name) for name in TALLIED}
    partial.save({**dataclasses.asdict(place), **counts, **tallied})
