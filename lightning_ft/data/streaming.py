"""Rows of data that doesn't fit in memory: read, checked and tokenised as training asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import fsspec.asyn
import torch.utils.data
from datasets import Dataset, Features, load_dataset
from torch.utils.data import DataLoader

from lightning_ft.data.batching import LengthBucketedSampler
from lightning_ft.data.sources import (
    READERS,
    DataError,
    check_encoding,
    check_width,
    known_splits,
    load_from_hub,
    locate,
    numbered_rows,
    parser_of,
    why_unreadable,
)

if TYPE_CHECKING:
    from lightning_ft.data.targets import Columns, Target

CHUNK = 10_000  # rows that are looked at together where none are kept
READ = 1_000  # rows that are read at once; so many of a file's part that its parser reads, 10,000 of a CSV


class Stream(NamedTuple):
    """The rows of a split, one after another, each time from the start."""

    rows: datasets.IterableDataset
    source: str
    file: Path | None
    encoding: str
    builder: str = ""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            # By batches: in a worker's process, iterating over rows would leave out those of other workers, by files.
            for batch in self.rows.iter(READ):
                yield from (dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True))
        except Exception as error:
            if self.file is None:
                raise DataError(f"{self.source}: {error}") from error
            if self.file.suffix.lower() != ".parquet":
                check_encoding(self.file, self.encoding)  # which names the line
            raise DataError(why_unreadable(self.file, error, self.encoding, self.builder)) from error

    def chunk(self, rows: list[dict[str, Any]]) -> Dataset:
        """Some of the rows as a data set, with the types that the stream knows of."""
        features = self.rows.features
        known = features is not None and all(set(row) == set(features) for row in rows)
        return Dataset.from_list(rows, features=Features(features) if known and features is not None else None)


def open_streams(
    path: str | Path | Mapping[str, str | Path],
    encoding: str = "utf-8",
    name: str | None = None,
    format: str | None = None,
) -> dict[str, Stream]:
    """The splits at ``path``, unread; arguments as of :func:`lightning_ft.data.sources.read`.

    Raises:
        DataError: if one isn't there, or its first rows aren't in order.
    """
    files = locate(path, format)
    if files is None:
        splits = known_splits(load_from_hub(str(path), name, streaming=True))
        return {split: Stream(rows, str(path), None, encoding) for split, rows in splits.items()}
    return {split: _open(file.expanduser(), encoding, format) for split, file in files.items()}


def _open(file: Path, encoding: str, format: str | None) -> Stream:
    parser = parser_of(file, encoding, format)
    if parser.builder in READERS:
        raise DataError(f"'{file}' can't be streamed: only CSV, TSV, JSONL and Parquet can. Leave out data.streaming.")
    if parser.builder == "csv":
        check_width(file, encoding, parser.options["sep"])
    return Stream(
        load_dataset(parser.builder, streaming=True, **parser.options), str(file), file, encoding, parser.builder
    )


def first_rows(stream: Stream, limit: int) -> Dataset:
    """At most ``limit`` rows, in memory."""
    rows = list(islice(stream, limit))
    if not rows:
        raise DataError(f"'{stream.source}' holds no rows.")
    return stream.chunk(rows)


def read_facts(stream: Stream, target: Target, columns: Columns, where: str) -> tuple[dict[str, Any], int]:
    """What the task must know of the training rows, and their number, read in one pass in which each row is checked.

    Raises:
        DataError: naming the row; or if the target can't tell from a stream.
    """
    seen = 0

    def checked() -> Iterator[Dataset]:
        nonlocal seen
        rows = iter(stream)
        while some := list(islice(rows, CHUNK)):
            chunk = stream.chunk(some)
            with numbered_rows(seen + 1):
                target.check(chunk, columns, where)
            seen += len(some)
            yield chunk

    facts = target.facts_of_stream(checked(), columns, where)
    return facts, seen


class StreamedRows(torch.utils.data.IterableDataset[dict[str, Any]]):
    """The encoded rows of a stream, shuffled and bucketed by length in a buffer.

    ``buffer`` rows are read, checked, encoded and put into the order of a LengthBucketedSampler, and given before the
    next ones are read: so many are held, however many there are. The order depends on the seed and ``epoch`` alone.
    Rows further apart than the buffer is long never meet in a batch: a file that is sorted by label wants shuffling.

    Several processes, and each one's workers, read all rows and encode their share of them, one in so many. A last
    group that isn't enough for all to have one is left out, so that no process waits for another's batch.

    Args:
        stream: the rows.
        encode: checks and encodes some of them.
        batch_size: of the DataLoader.
        buffer: how many rows are held; rounded up to whole batches.
        seed: of the shuffling.
        num_replicas: how many processes share the rows.
        rank: which of them this is.

    Attributes:
        epoch: the number of the pass.
    """

    def __init__(
        self,
        stream: Stream,
        encode: Callable[[Dataset], Dataset],
        batch_size: int,
        buffer: int,
        seed: int,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        self.stream, self._encode, self.seed = stream, encode, seed
        self.batch_size, self.buffer = batch_size, -(-buffer // batch_size) * batch_size
        self.num_replicas, self.rank = num_replicas, rank
        self.epoch = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        if worker:
            fsspec.asyn.reset_lock()  # of files on the hub, which a forked process would wait for
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        shares, mine = self.num_replicas * workers, self.rank * workers + number
        rows = _dealt(self.stream, shares, mine)
        for block in count():
            held = list(islice(rows, self.buffer))
            if not held:
                return
            with numbered_rows(block * self.buffer * shares + mine + 1, shares):
                encoded = self._encode(self.stream.chunk(held))
            del held
            order = LengthBucketedSampler(encoded["length"][:], self.batch_size, self.seed + 1_000_003 * block)
            order.set_epoch(self.epoch)
            yield from encoded.remove_columns("length").select(list(order))


def _dealt(rows: Iterable[Any], shares: int, mine: int) -> Iterator[Any]:
    """Every ``shares``-th row, of the groups that are complete."""
    source = iter(rows)
    while len(group := list(islice(source, shares))) == shares:
        yield group[mine]


class StreamLoader(DataLoader[dict[str, Any]]):
    """A DataLoader that tells its StreamedRows which pass it is, as Lightning tells samplers.

    Its workers are new in each pass, and so know too.
    """

    def __init__(self, dataset: StreamedRows, epoch: Callable[[], int], **arguments: Any) -> None:
        super().__init__(dataset, **arguments)
        self.epoch = epoch

    def __iter__(self) -> Any:
        assert isinstance(self.dataset, StreamedRows)
        self.dataset.epoch = self.epoch()
        return super().__iter__()
