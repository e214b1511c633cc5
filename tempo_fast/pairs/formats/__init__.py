"""Preference data as others lay it out, and as we do, in files of any size.

Formats are layouts of a row: ``native`` (PreferenceRecord), ``trl``, ``ms-swift``, ``llama-factory``, ``rrpo``,
``llava-hound``; each module says what is read and written, and from which source. Containers are JSON lines, JSON
arrays, Parquet, Arrow and Hugging Face folders; any layout goes into any of them.
"""

from tempo_fast.pairs.formats.layouts import FORMATS
from tempo_fast.pairs.formats.reading import iter_pairs, read_pairs
from tempo_fast.pairs.formats.rows import Problem
from tempo_fast.pairs.formats.rrpo import mask, unmask
from tempo_fast.pairs.formats.writing import write_pairs

__all__ = ["FORMATS", "Problem", "iter_pairs", "mask", "read_pairs", "unmask", "write_pairs"]
