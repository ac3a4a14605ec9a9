"""Where each list stands in the packed integer arrays that a plan is lowered to; see ``lower.py``.

A lowered plan is two int32 arrays, one for programs that own query rows (``rows``) and one for programs that own
keys (``columns``). Each starts with a header of offsets, so that a kernel takes one pointer instead of ten.
"""

import triton.language as tl

# Header of the ``rows`` array: queries own the loop, entries are kv tiles.
ROWS_WORK = tl.constexpr(0)  # (q_tiles,) q tiles, most work first
ROWS_POSITION = tl.constexpr(1)  # (q_tiles,) first token of the tile, or its place in the token table
ROWS_COUNT = tl.constexpr(2)  # (q_tiles,) tokens of the tile, padding left out
ROWS_SET_PTR = tl.constexpr(3)  # (q_tiles + 1,) softmax sets of the tile
ROWS_SET_TILE = tl.constexpr(4)  # (sets,) q tile of the set
ROWS_BEGIN = tl.constexpr(5)  # (sets,) first entry of the set
ROWS_END = tl.constexpr(6)  # (sets,) last entry + 1
ROWS_ENTRY = tl.constexpr(7)  # (entries, ENTRY_SIZE)
ROWS_FIELDS = tl.constexpr(8)

# Header of the ``columns`` array: keys own the loop, entries are (softmax set, q tile) pairs.
COLUMNS_WORK = tl.constexpr(0)  # (kv_tiles,) kv tiles, most work first
COLUMNS_POSITION = tl.constexpr(1)  # (kv_tiles,)
COLUMNS_COUNT = tl.constexpr(2)  # (kv_tiles,)
COLUMNS_BEGIN = tl.constexpr(3)  # (kv_tiles,) first entry of the tile. Begin and end are two lists rather than one
COLUMNS_END = tl.constexpr(4)  # of pointers, so that entries can be left out without moving those of other tiles
COLUMNS_ENTRY = tl.constexpr(5)  # (entries, ENTRY_SIZE)
COLUMNS_FIELDS = tl.constexpr(6)

# One entry: a record of four words.
ENTRY_SIZE = tl.constexpr(4)
ENTRY_POSITION = tl.constexpr(0)  # place of the other side's tile, as in *_POSITION
ENTRY_COUNT = tl.constexpr(1)  # tokens of that tile, padding left out
ENTRY_MASK = tl.constexpr(2)  # stored mask, or -1: no mask and no padding on either side
ENTRY_SET = tl.constexpr(3)  # softmax set
