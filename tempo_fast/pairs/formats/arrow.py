"""Parquet and Arrow files: read batch by batch, and written in row groups. The only module here that needs pyarrow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, BinaryIO, get_args, get_origin

import pyarrow as pa
import pyarrow.parquet as pq

from tempo_fast.pairs.formats.rows import Row, RowError, dumps, plain

ROWS = 1000
"""Rows of a row group."""

_PLAIN = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}


def arrow_type(spec: Any) -> pa.DataType:
    """The Arrow type of a type hint, a dataclass (its fields; dictionaries as JSON strings), ``[item]`` or a mapping of
    names to such."""
    if isinstance(spec, dict):
        return pa.struct([(name, arrow_type(s)) for name, s in spec.items()])
    if isinstance(spec, list):
        return pa.list_(arrow_type(spec[0]))
    if get_origin(spec) is list:
        return pa.list_(arrow_type(get_args(spec)[0]))
    return _PLAIN[spec] if spec in _PLAIN else pa.string()


def read_arrow(f: BinaryIO, magic: bytes) -> Iterator[tuple[int, Row | RowError]]:
    """Yield (number from 1, row); null fields are left out. What cannot be read is a RowError, and the file's last."""
    number = 0
    try:
        for batch in _batches(f, magic):
            for row in _rows(batch):
                number += 1
                yield number, row
    except (pa.ArrowException, OSError) as e:
        yield number + 1, RowError("", f"the file is damaged from here on ({' '.join(str(e).split())[:200]})")


def _batches(f: BinaryIO, magic: bytes) -> Iterator[pa.RecordBatch]:
    # a mapped file would count as memory in use, page by page; OSFile reads
    with pa.OSFile(f.name) as source:
        if magic[:4] == b"PAR1":
            yield from pq.ParquetFile(source).iter_batches(batch_size=256, use_threads=False)
        elif magic[:6] == b"ARROW1":
            reader = pa.ipc.open_file(source)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            yield from pa.ipc.open_stream(source)


def _rows(batch: pa.RecordBatch) -> Iterator[Row | RowError]:
    for start in range(0, batch.num_rows, 256):
        part = batch.slice(start, 256)
        try:
            rows: list[Any] = part.to_pylist()
        except UnicodeDecodeError:
            rows = [_one(part.slice(i, 1)) for i in range(part.num_rows)]
        yield from (row if isinstance(row, RowError) else plain(row, nulls=False) for row in rows)


def _one(part: pa.RecordBatch) -> Row | RowError:
    try:
        return part.to_pylist()[0]
    except UnicodeDecodeError as e:
        return RowError("", f"not UTF-8 text ({e.reason})")


def write_parquet(f: BinaryIO, rows: Iterable[Row], schema: dict[str, Any]) -> None:
    """Write the columns of ``schema``; an object where it wants text is written as JSON."""
    fields = pa.schema([(name, arrow_type(spec)) for name, spec in schema.items()])
    texts = [name for name in schema if fields.field(name).type == pa.string()]
    rows = iter(rows)
    # statistics would hold the first and last text of every group, in memory until the end
    with pq.ParquetWriter(f, fields, compression="zstd", write_statistics=False) as writer:
        while group := list(islice(rows, ROWS)):
            for row in group:
                row.update({n: dumps(row[n]) for n in texts if not isinstance(row.get(n), (str, type(None)))})
            writer.write_batch(pa.RecordBatch.from_pylist(group, schema=fields))
            pa.default_memory_pool().release_unused()  # else the allocator's reserve creeps up with the file
