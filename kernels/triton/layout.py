"""The two packed integer arrays that a plan is lowered to, as records of a few words; see ``lower.py``.

``rows``, for programs that own query rows: the tiles in the order of their work, then the softmax sets, then the
entries. ``columns``, for programs that own keys: the tiles in the order of their work, then the entries. A kernel
finds each part from the numbers of tiles and sets, and reads a record in one access; a program needs two dependent
reads (tile, entry) before it can load its first keys.

A *position* is where the tokens of a tile begin: the first token of a contiguous plan, else a place in the table
of tokens. A *count* is the number of tokens of a tile, padding left out.
"""

import triton.language as tl

# A q tile in ``rows``.
Q_TILE_SIZE = tl.constexpr(8)
Q_TILE_POSITION = tl.constexpr(0)
Q_TILE_COUNT = tl.constexpr(1)
Q_TILE_FIRST_SET = tl.constexpr(2)  # its softmax sets, consecutive
Q_TILE_LAST_SET = tl.constexpr(3)  # last set + 1
Q_TILE_FIRST_ENTRY = tl.constexpr(4)  # of its first set; each set's entries follow those of the set before

# A softmax set in ``rows``.
SET_SIZE = tl.constexpr(4)
SET_LAST_ENTRY = tl.constexpr(0)  # last entry + 1
SET_POSITION = tl.constexpr(1)  # of the set's q tile
SET_COUNT = tl.constexpr(2)

# A kv tile in ``columns``.
KV_TILE_SIZE = tl.constexpr(4)
KV_TILE_POSITION = tl.constexpr(0)
KV_TILE_COUNT = tl.constexpr(1)
KV_TILE_FIRST_ENTRY = tl.constexpr(2)
KV_TILE_LAST_ENTRY = tl.constexpr(3)  # last entry + 1

# A visited tile, in both arrays; position and count are those of the other side's tile.
ENTRY_SIZE = tl.constexpr(4)
ENTRY_POSITION = tl.constexpr(0)
ENTRY_COUNT = tl.constexpr(1)
ENTRY_MASK = tl.constexpr(2)  # stored mask, or -1: no mask, and no padding on either side
ENTRY_SET = tl.constexpr(3)  # softmax set
