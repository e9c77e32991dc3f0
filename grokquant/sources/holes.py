"""Holes: parts of a file that were never written and read as zeros, as an unfinished torrent or a
disk that was full leaves them.

    row   0 |3 1 4 1 5 9 2 6|
          1 |5 3 5 0 0 0 0 0|   a hole begins and ends anywhere in a row,
          2 |0 0 0 0 0 0 0 0|
          3 |0 0 0 0 0 9 7 9|
          4 |0 0 0 0 0 0 0 0|   zeros of a model fill whole rows
          5 |0 0 0 0 0 0 0 0|

Pages and pieces of a download are no multiple of a row from where an array begins, since a header
of an odd size comes before it. So a long run of zeros is a hole if it cuts a row. Rows of unused
tokens, pruned neurons and whole experts of zeros are none.
"""

import numpy as np
import torch
from torch import Tensor

# Torrents have pieces of 256 KiB and more, and a gap is seldom a single piece.
SHORTEST_HOLE = 1 << 20
# Real values beside zeros of a model may be zero as well: so many in a row are not chance.
_CUT = 64


def find_hole(raw: np.ndarray, row_bytes: int, shortest: int = SHORTEST_HOLE) -> range | None:
    """The bytes of the first hole in an array of rows, `raw` uint8 [rows * row_bytes]."""
    step = shortest // 2  # every run of `shortest` bytes covers a whole step
    whole = len(raw) // step
    steps = raw[: whole * step].reshape(whole, step)
    end = 0
    for index in np.flatnonzero(steps[:, 0] == 0):
        first = int(index) * step
        if first < end or steps[index].any():
            continue
        run = _grown(raw, first, first + step)
        end = run.stop
        if len(run) >= shortest and _cuts_a_row(run, row_bytes, len(raw)):
            return run
    return None


def _grown(raw: np.ndarray, start: int, stop: int) -> range:
    """The run of zeros around the zeros from `start` to before `stop`."""
    piece = stop - start
    return range(
        start - _leading_zeros(raw[:start][::-1], piece), stop + _leading_zeros(raw[stop:], piece)
    )


def _leading_zeros(values: np.ndarray, piece: int) -> int:
    """How many zeros `values` begins with, looked for piece by piece."""
    for first in range(0, len(values), piece):
        found = values[first : first + piece] != 0
        if found.any():
            return first + int(found.argmax())
    return len(values)


def _cuts_a_row(run: range, row_bytes: int, size: int) -> bool:
    """Whether the run begins or ends well within a row that has other values, too."""
    before = -run.start % row_bytes  # bytes of the run before its first whole row
    after = run.stop % row_bytes
    begins_within = run.start > 0 and before >= _CUT
    ends_within = run.stop < size and after >= _CUT
    return begins_within or ends_within


def contradiction(codes: Tensor, scales: Tensor) -> str | None:
    """What no quantizer writes, of codes [in, out] and their scales [groups, out]; None if all is
    well. A scale follows from the largest code of its group, so both are zero or neither is."""
    if not codes[0].any() and not codes.any():  # the first row tells it of nearly all
        alike = bool((scales == scales.flatten()[0]).all())
        return None if alike else "all codes are zero, but their scales are not"
    absent = scales == 0
    if not absent.any():
        return None
    grouped = codes.unflatten(0, (len(scales), -1))  # (groups, in / groups, out)
    lost = absent & (grouped.amax(1).ne(0) | grouped.amin(1).ne(0))
    count = int(torch.count_nonzero(lost))
    return f"{count} scales are zero, but their codes are not" if count >= _CUT else None
