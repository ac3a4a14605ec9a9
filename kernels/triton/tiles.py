"""Device functions shared by the kernels: loading tiles of tokens, tile masks and dropout bits.

Vocabulary of all kernels here: a *tile* is one of the plan (``block_q`` rows, ``block_kv`` keys); a *block* is
the part of a tile that one program computes at once (``BLOCK_M`` rows, ``BLOCK_N`` keys, powers of two). A tile
is cut into ``M_BLOCKS`` (``N_BLOCKS``) of them; a tile that is no multiple of 16 is one block with padding.
"""

import triton
import triton.language as tl


@triton.jit
def load_tokens(tokens, position, offsets, CONTIGUOUS: tl.constexpr):
    """Token ids of a block: consecutive from ``position``, or gathered from the token table at ``position``."""
    if CONTIGUOUS:
        return position + offsets
    else:
        return tl.load(tokens + position + offsets)


@triton.jit
def row_pointers(base, stride, tokens, position, offsets, o_d, CONTIGUOUS: tl.constexpr):
    """Pointers ``[rows, D]`` to the rows of a block; all products with a stride are 64-bit."""
    if CONTIGUOUS:
        # The tile's start is a scalar, so that the tensor part is the same for every tile of a loop.
        start = base + position.to(tl.int64) * stride
        return start + (offsets.to(tl.int64) * stride)[:, None] + o_d[None, :]
    else:
        rows = tl.load(tokens + position + offsets)
        # Padding (-1) is masked by the caller; 0 keeps even the unused address inside the tensor.
        return base + (tl.maximum(rows, 0).to(tl.int64) * stride)[:, None] + o_d[None, :]


@triton.jit
def load_rows(pointers, m_rows, o_d, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """``[rows, D]`` with 0 in rows outside ``m_rows`` and beyond ``HEAD_DIM``."""
    if HEAD_DIM == D:
        return tl.load(pointers, mask=m_rows[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=m_rows[:, None] & (o_d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def load_all_rows(pointers, o_d, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """``[rows, D]`` of a block without padding rows."""
    if HEAD_DIM == D:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(o_d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_rows(pointers, value, m_rows, o_d, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    value = value.to(pointers.dtype.element_ty)
    if HEAD_DIM == D:
        tl.store(pointers, value, mask=m_rows[:, None])
    else:
        tl.store(pointers, value, mask=m_rows[:, None] & (o_d < HEAD_DIM)[None, :])


@triton.jit
def load_mask_word(
    masks, mask_id, o_m, m_tile, word, BLOCK_Q: tl.constexpr, MASK_WORDS: tl.constexpr
):
    """32 keys of each row of a stored mask; all ones for ``mask_id == -1`` (a full tile)."""
    base = masks + tl.maximum(mask_id, 0).to(tl.int64) * (BLOCK_Q * MASK_WORDS)
    return tl.load(base + o_m * MASK_WORDS + word, mask=m_tile & (mask_id >= 0), other=-1)


@triton.jit
def tile_mask(
    masks,
    mask_id,
    o_m,
    o_n,
    n_start,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK_WORDS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Allowed pairs of a block, ``[rows, keys]`` bool, or ``[keys, rows]`` when ``TRANSPOSED``.

    Rows are loaded as 32-bit words, one per 32 keys, and the bits are taken in registers: one load per row
    instead of one per pair. Which word a key is in is known at compile time for most layouts.
    """
    m_tile = o_m < BLOCK_Q
    first = n_start // 32
    bit = o_n % 32
    word = load_mask_word(masks, mask_id, o_m, m_tile, first, BLOCK_Q, MASK_WORDS)
    if TRANSPOSED:
        words = tl.broadcast_to(word[None, :], (o_n.shape[0], o_m.shape[0]))
    else:
        words = tl.broadcast_to(word[:, None], (o_m.shape[0], o_n.shape[0]))
    # BLOCK_N is 16, or a multiple of 32 that starts at a multiple of 32; padded keys lie beyond MASK_WORDS.
    for w in tl.static_range(1, (BLOCK_N + 31) // 32):
        inside = m_tile & (first + w < MASK_WORDS)
        word = load_mask_word(masks, mask_id, o_m, inside, first + w, BLOCK_Q, MASK_WORDS)
        here = (o_n - n_start) // 32 == w
        if TRANSPOSED:
            words = tl.where(here[:, None], word[None, :], words)
        else:
            words = tl.where(here[None, :], word[:, None], words)
    if TRANSPOSED:
        return ((words >> bit[:, None]) & 1) != 0
    else:
        return ((words >> bit[None, :]) & 1) != 0


@triton.jit
def mix32(x):
    """The finaliser of MurmurHash3 (32 bit), a bijection on uint32."""
    x = x ^ (x >> 16)
    x = x * 0x85EBCA6B
    x = x ^ (x >> 13)
    x = x * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def dropout_rows(seed, batch_head, q_tokens):
    """The part of the dropout hash that a query token determines, uint32."""
    value = tl.load(seed)
    low = (value & 0xFFFFFFFF).to(tl.uint32)
    high = ((value >> 32) & 0xFFFFFFFF).to(tl.uint32)
    stream = mix32(low ^ (batch_head.to(tl.uint32) * 0x9E3779B1))
    return mix32(stream ^ (q_tokens.to(tl.uint32) * 0x85EBCA77) ^ (high * 0x27D4EB2F))


@triton.jit
def dropout_keep(rows, k_tokens, threshold):
    """Kept pairs; ``rows`` and ``k_tokens`` broadcast against each other."""
    return mix32(rows ^ (k_tokens.to(tl.uint32) * 0xC2B2AE3D)) >= threshold.to(tl.uint32)


@triton.jit
def exp2_scores(scores, scale_log2, shift):
    """``exp2(scores * scale_log2 - shift)``: one multiply-add and one exp2 per pair."""
    return tl.math.exp2(scores * scale_log2 - shift)


@triton.jit
def sigmoid_scores(scores, scale_log2):
    return 1.0 / (1.0 + tl.math.exp2(-scores * scale_log2))
