"""Device functions shared by the kernels: tiles of tokens, products, tile masks and dropout bits.

Vocabulary of all kernels here: a *tile* is one of the plan (``BLOCK_Q`` rows, ``BLOCK_KV`` keys); a *block* is
the part of a tile that one step computes (``BLOCK_M`` rows, ``BLOCK_N`` keys, powers of two). A tile is a whole
number of blocks, or one block that is larger than the tile and padded.
"""

import triton
import triton.language as tl

#: Arguments whose value must not enter the compilation: another batch size or plan would compile anew.
COUNTS = (
    "blocks_per_head",
    "dropout_threshold",
    "group",
    "heads",
    "kv_heads",
    "kv_tiles",
    "num_q",
    "num_sets",
    "q_tiles",
)


#: Whether Triton's interpreter runs the kernels, which is settled when this module is imported.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def block_tokens(p_tokens, position, offsets, inside, CONTIGUOUS: tl.constexpr):
    """Token ids of a block: consecutive from ``position``, or read from the token table; 0 where not ``inside``."""
    if CONTIGUOUS:
        return tl.where(inside, position + offsets, 0)
    else:
        return tl.load(p_tokens + position + offsets, mask=inside, other=0)


@triton.jit
def row_pointers(base, stride, tokens, o_d):
    """Pointers ``[rows, D]`` to the rows of tokens, with 64-bit arithmetic.

    Also in loops over tiles of consecutive tokens: offsets that do not change would be kept in registers.
    """
    return base + (tokens.to(tl.int64) * stride)[:, None] + o_d[None, :]


@triton.jit
def load_rows(pointers, inside, o_d, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """``[rows, D]``, 0 in rows that are not ``inside`` and beyond ``HEAD_DIM``."""
    mask = inside[:, None]
    if HEAD_DIM != D:
        mask = mask & (o_d < HEAD_DIM)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_rows(pointers, value, inside, o_d, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """The inverse of :func:`load_rows`, in the dtype of the tensor."""
    mask = inside[:, None]
    if HEAD_DIM != D:
        mask = mask & (o_d < HEAD_DIM)[None, :]
    tl.store(pointers, rounded(value, pointers.dtype.element_ty), mask=mask)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Float32 ``x`` in ``dtype``, to nearest even; the interpreter would cut bfloat16 off instead."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a b`` in float32 (``acc`` may be None); the interpreter would multiply the bit patterns of bfloat16."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def tile_mask(
    p_masks,
    mask_id,
    o_m,
    o_n,
    n_start,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Allowed pairs of a block, ``[rows, keys]`` bool, or ``[keys, rows]`` when ``TRANSPOSED``.

    A row of a mask is read as 32-bit words and its bits are taken in registers: one load per row and word
    instead of one per pair. Keys beyond ``BLOCK_KV`` get a neighbour's bits.
    """
    WORDS: tl.constexpr = (BLOCK_KV + 31) // 32
    first = n_start // 32  # a block is half a word (16 keys) or whole words
    p_row = p_masks + mask_id.to(tl.int64) * (BLOCK_Q * WORDS) + o_m * WORDS + first
    in_tile = o_m < BLOCK_Q
    words = tl.load(p_row, mask=in_tile, other=0)
    if TRANSPOSED:
        words = tl.broadcast_to(words[None, :], [o_n.shape[0], o_m.shape[0]])
    else:
        words = tl.broadcast_to(words[:, None], [o_m.shape[0], o_n.shape[0]])
    for w in tl.static_range(1, (BLOCK_N + 31) // 32):
        word = tl.load(p_row + w, mask=in_tile, other=0)
        here = o_n // 32 == first + w
        if TRANSPOSED:
            words = tl.where(here[:, None], word[None, :], words)
        else:
            words = tl.where(here[None, :], word[:, None], words)
    if TRANSPOSED:
        return ((words >> (o_n % 32)[:, None]) & 1) != 0
    else:
        return ((words >> (o_n % 32)[None, :]) & 1) != 0


@triton.jit
def mix32(x):
    """The finaliser of MurmurHash3 (32 bit), a bijection on uint32."""
    x = x ^ (x >> 16)
    x = x * 0x85EBCA6B
    x = x ^ (x >> 13)
    x = x * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def dropout_rows(p_seed, batch_head, q_tokens):
    """The part of the dropout hash that the query token determines, uint32."""
    seed = tl.load(p_seed)
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    stream = mix32(low ^ (batch_head.to(tl.uint32) * 0x9E3779B1))
    return mix32(stream ^ (q_tokens.to(tl.uint32) * 0x85EBCA77) ^ (high * 0x27D4EB2F))


@triton.jit
def dropout_keep(row, k_tokens, threshold):
    """Whether a pair is kept; ``row`` and ``k_tokens`` broadcast against each other."""
    return mix32(row ^ (k_tokens.to(tl.uint32) * 0xC2B2AE3D)) >= threshold.to(tl.uint32)


@triton.jit
def sigmoid2(x):
    """``1 / (1 + 2**-x)``, the logistic function of ``x * ln 2``; 0 at -inf."""
    return 1.0 / (1.0 + tl.math.exp2(-x))
