"""Where each list stands in the packed integer arrays that a plan is lowered to; see ``lower.py``.

A lowered plan is two int32 arrays, one for programs that own query rows (``rows``) and one for programs that own
keys (``columns``). Each starts with a header of offsets, so that a kernel takes one pointer instead of a dozen.
"""

import triton.language as tl

# Header of the ``rows`` array: queries own the loop, entries are kv tiles.
ROWS_WORK = tl.constexpr(0)  # (q_tiles,) q tiles, most work first
ROWS_POSITION = tl.constexpr(1)  # (q_tiles,) first token of the tile, or its place in the token table
ROWS_COUNT = tl.constexpr(2)  # (q_tiles,) tokens of the tile, padding left out
ROWS_SET_PTR = tl.constexpr(3)  # (q_tiles + 1,) softmax sets of the tile
ROWS_SET_TILE = tl.constexpr(4)  # (sets,) q tile of the set
ROWS_FULL_PTR = tl.constexpr(5)  # (sets + 1,) entries without any mask of the set
ROWS_FULL_POSITION = tl.constexpr(6)  # (full entries,) place of the entry's kv tile
ROWS_PARTIAL_PTR = tl.constexpr(7)  # (sets + 1,) entries with a mask, or with padding keys
ROWS_PARTIAL_POSITION = tl.constexpr(8)  # (partial entries,)
ROWS_PARTIAL_COUNT = tl.constexpr(9)  # (partial entries,) keys of the kv tile, padding left out
ROWS_PARTIAL_MASK = tl.constexpr(10)  # (partial entries,) mask, or -1 for padding only
ROWS_FIELDS = tl.constexpr(11)

# Header of the ``columns`` array: keys own the loop, entries are (softmax set, q tile) pairs.
COLUMNS_WORK = tl.constexpr(0)  # (kv_tiles,) kv tiles, most work first
COLUMNS_POSITION = tl.constexpr(1)  # (kv_tiles,)
COLUMNS_COUNT = tl.constexpr(2)  # (kv_tiles,)
COLUMNS_FULL_BEGIN = tl.constexpr(3)  # (kv_tiles,) first and last + 1 entry; two lists rather than one of
COLUMNS_FULL_END = tl.constexpr(4)  # pointers, so that entries can be left out without moving the others
COLUMNS_FULL_POSITION = tl.constexpr(5)  # (full entries,) place of the entry's q tile
COLUMNS_FULL_SET = tl.constexpr(6)  # (full entries,) softmax set of the entry
COLUMNS_PARTIAL_BEGIN = tl.constexpr(7)
COLUMNS_PARTIAL_END = tl.constexpr(8)
COLUMNS_PARTIAL_POSITION = tl.constexpr(9)
COLUMNS_PARTIAL_SET = tl.constexpr(10)
COLUMNS_PARTIAL_COUNT = tl.constexpr(11)  # (partial entries,) rows of the q tile, padding left out
COLUMNS_PARTIAL_MASK = tl.constexpr(12)
COLUMNS_FIELDS = tl.constexpr(13)
