"""The forward kernel: all softmax sets of a block of query rows in one program."""

import triton
import triton.language as tl

from canvas_engineering.kernels.triton.layout import (
    ENTRY_COUNT,
    ENTRY_MASK,
    ENTRY_POSITION,
    ENTRY_SIZE,
    Q_TILE_COUNT,
    Q_TILE_FIRST_ENTRY,
    Q_TILE_FIRST_SET,
    Q_TILE_LAST_SET,
    Q_TILE_POSITION,
    Q_TILE_SIZE,
    SET_LAST_ENTRY,
    SET_SIZE,
)
from canvas_engineering.kernels.triton.tiles import (
    COUNTS,
    block_tokens,
    dropout_keep,
    dropout_rows,
    load_rows,
    product,
    rounded,
    row_pointers,
    sigmoid2,
    store_rows,
    tile_mask,
)

# The logarithm of 2, float32 and the rest. A log-sum-exp is as large as the scores, and what it is off by is a relative
# error of the backward pass's probabilities: it gets one rounding, not one for each operation.
LN2_HIGH = tl.constexpr(0.693147182464599609375)
LN2_LOW = tl.constexpr(-1.904654299957768e-09)


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    p_set_out,
    p_weight,
    p_seed,
    p_rows,
    p_tokens,
    p_masks,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_on,
    blocks_per_head,
    heads,
    group,
    num_q,
    num_sets,
    scale_log2,
    dropout_threshold,
    dropout_scale,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    MANY_SETS: tl.constexpr,
    SIGMOID: tl.constexpr,
    DROPOUT: tl.constexpr,
    STORE_LSE: tl.constexpr,
    STORE_SETS: tl.constexpr,
    SKIP_DEAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out[rows] = sum_s weight_s[rows] * softmax_s(q[rows] k^T) v`` for one block of rows of one head.

    Per set: online softmax over its kv tiles; tiles without a mask jump over the masking. The weighted sum over
    sets stays in registers. ``p_lse`` gets the natural log-sum-exp, per token ``(B*H, num_q)`` when a tile has
    at most one set, else per set row ``(B*H, num_sets, BLOCK_Q)``; ``p_set_out`` each set's own output
    ``(B*H, num_sets, BLOCK_Q, HEAD_DIM)``, which only the backward pass asks for. With ``SKIP_DEAD`` a set whose
    weights are 0 in the whole block costs one load; its log-sum-exp is -inf and its own output is not written.
    """
    M_BLOCKS: tl.constexpr = (BLOCK_Q + BLOCK_M - 1) // BLOCK_M
    N_BLOCKS: tl.constexpr = (BLOCK_KV + BLOCK_N - 1) // BLOCK_N
    KEYS_PADDED: tl.constexpr = N_BLOCKS * BLOCK_N != BLOCK_KV  # blocks reach beyond the tile
    program = tl.program_id(0)
    batch_head = (program // blocks_per_head).to(tl.int64)
    work = program % blocks_per_head
    batch = batch_head // heads
    head = batch_head % heads

    q_tiles = blocks_per_head // M_BLOCKS
    p_tile = p_rows + work // M_BLOCKS * Q_TILE_SIZE
    p_sets = p_rows + q_tiles * Q_TILE_SIZE
    p_entries = p_sets + num_sets * SET_SIZE
    position = tl.load(p_tile + Q_TILE_POSITION)
    count = tl.load(p_tile + Q_TILE_COUNT)
    first_set = tl.load(p_tile + Q_TILE_FIRST_SET)
    last_set = tl.load(p_tile + Q_TILE_LAST_SET)
    end = tl.load(p_tile + Q_TILE_FIRST_ENTRY)

    o_d = tl.arange(0, D)
    o_m = (work % M_BLOCKS) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < count
    q_tokens = block_tokens(p_tokens, position, o_m, m_m, CONTIGUOUS)

    p_q += batch * stride_qb + head * stride_qh
    p_k += batch * stride_kb + (head // group) * stride_kh
    p_v += batch * stride_vb + (head // group) * stride_vh
    p_out += batch * stride_ob + head * stride_oh
    b_q = load_rows(row_pointers(p_q, stride_qn, q_tokens, o_d), m_m, o_d, HEAD_DIM, D)
    if DROPOUT:
        dropout_row = dropout_rows(p_seed, batch_head, q_tokens)

    b_out = tl.zeros([BLOCK_M, D], tl.float32)
    if STORE_LSE and not MANY_SETS:
        # Rows that no set below reaches, or whose set is skipped.
        empty = tl.full([BLOCK_M], float("-inf"), tl.float32)
        if first_set == last_set:
            tl.store(p_lse + batch_head * num_q + q_tokens, empty, mask=m_m)

    for s in range(first_set, last_set):
        begin = end
        end = tl.load(p_sets + s * SET_SIZE + SET_LAST_ENTRY)
        o_set = (batch_head * num_sets + s) * BLOCK_Q + o_m
        if MANY_SETS:
            o_lse = o_set
            m_lse = o_m < BLOCK_Q
        else:
            o_lse = batch_head * num_q + q_tokens
            m_lse = m_m
        alive = True
        if SKIP_DEAD:
            b_w = tl.load(p_weight + s * BLOCK_Q + o_m, mask=m_m, other=0.0)
            alive = tl.sum((b_w != 0.0).to(tl.int32), 0) > 0
        if alive:
            b_acc = tl.zeros([BLOCK_M, D], tl.float32)
            b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
            b_sum = tl.zeros([BLOCK_M], tl.float32)
            # Entries are read one step ahead, so that the loads of k and v can be pipelined.
            p_next = p_entries + begin * ENTRY_SIZE
            next_position = tl.load(p_next + ENTRY_POSITION)
            next_count = tl.load(p_next + ENTRY_COUNT)
            next_mask = tl.load(p_next + ENTRY_MASK)
            if not CONTIGUOUS:
                o_next = tl.arange(0, BLOCK_N)
                next_tokens = block_tokens(p_tokens, next_position, o_next, o_next < next_count, False)
            for step in range(begin * N_BLOCKS, end * N_BLOCKS):
                n_start = (step % N_BLOCKS) * BLOCK_N
                o_n = n_start + tl.arange(0, BLOCK_N)
                kv_position = next_position
                m_n = o_n < next_count
                mask_id = next_mask
                p_next = p_entries + ((step + 1) // N_BLOCKS) * ENTRY_SIZE
                next_position = tl.load(p_next + ENTRY_POSITION)
                next_count = tl.load(p_next + ENTRY_COUNT)
                next_mask = tl.load(p_next + ENTRY_MASK)

                if CONTIGUOUS:
                    k_tokens = kv_position + o_n
                else:
                    k_tokens = next_tokens
                    o_next = ((step + 1) % N_BLOCKS) * BLOCK_N + tl.arange(0, BLOCK_N)
                    next_tokens = block_tokens(p_tokens, next_position, o_next, o_next < next_count, False)
                p_k_rows = row_pointers(p_k, stride_kn, k_tokens, o_d)
                p_v_rows = row_pointers(p_v, stride_vn, k_tokens, o_d)
                b_k = load_rows(p_k_rows, m_n, o_d, HEAD_DIM, D)  # [BLOCK_N, D]
                b_s = product(b_q, tl.trans(b_k), None, PRECISION)  # [BLOCK_M, BLOCK_N]

                if mask_id >= 0:
                    allowed = tile_mask(p_masks, mask_id, o_m, o_n, n_start, BLOCK_Q, BLOCK_KV, BLOCK_N, False)
                    b_s = tl.where(allowed, b_s, float("-inf"))
                if KEYS_PADDED:
                    b_s = tl.where(m_n[None, :], b_s, float("-inf"))

                if SIGMOID:
                    b_p = sigmoid2(b_s * scale_log2)
                else:
                    b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
                    # No allowed key so far: any finite shift makes exp2(-inf) = 0 instead of NaN.
                    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
                    b_p = tl.math.exp2(tl.math.fma(b_s, scale_log2, -b_shift[:, None]))
                    rescale = tl.math.exp2(b_max - b_shift)
                    b_sum = b_sum * rescale + tl.sum(b_p, 1)
                    b_acc = b_acc * rescale[:, None]
                    b_max = b_new
                if DROPOUT:
                    keep = dropout_keep(dropout_row[:, None], k_tokens[None, :], dropout_threshold)
                    b_p = tl.where(keep, b_p, 0.0)
                b_v = load_rows(p_v_rows, m_n, o_d, HEAD_DIM, D)  # [BLOCK_N, D]
                b_acc = product(rounded(b_p, b_v.dtype), b_v, b_acc, PRECISION)

            # The barrier ends the loop's software pipeline before registers are needed for the sum over sets; without
            # it the compiler overlaps the two and spills.
            tl.debug_barrier()
            b_w = tl.load(p_weight + s * BLOCK_Q + o_m, mask=m_m, other=0.0)
            if SIGMOID:
                inverse = tl.full([BLOCK_M], 1.0, tl.float32)
            else:
                # A row without keys has sum 0 and maximum -inf: output 0 / 1.
                b_sum = tl.where(b_sum > 0.0, b_sum, 1.0)
                inverse = 1.0 / b_sum
                if STORE_LSE:
                    keyless = b_max == float("-inf")
                    b_max = tl.where(keyless, 0.0, b_max)
                    b_lse = tl.math.fma(b_max, LN2_HIGH, tl.math.fma(b_max, LN2_LOW, tl.log(b_sum)))
                    tl.store(p_lse + o_lse, tl.where(keyless, float("-inf"), b_lse), mask=m_lse)
            if DROPOUT:
                inverse = inverse * dropout_scale
            if STORE_SETS:
                p_set_rows = p_set_out + (o_set * HEAD_DIM)[:, None] + o_d[None, :]
                store_rows(p_set_rows, b_acc * inverse[:, None], o_m < BLOCK_Q, o_d, HEAD_DIM, D)
            if MANY_SETS:
                b_out += b_acc * (inverse * b_w)[:, None]
            else:
                b_out = b_acc * (inverse * b_w)[:, None]
        else:
            if STORE_LSE:
                # -inf means probability 0 to the backward kernels.
                tl.store(p_lse + o_lse, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=m_lse)
            if not MANY_SETS:
                b_out = tl.zeros([BLOCK_M, D], tl.float32)

    # The addresses of the output again, rather than kept through the loop: there registers are short.
    position = tl.load(p_tile + Q_TILE_POSITION)
    m_m = o_m < tl.load(p_tile + Q_TILE_COUNT)
    q_tokens = block_tokens(p_tokens, position, o_m, m_m, CONTIGUOUS)
    store_rows(row_pointers(p_out, stride_on, q_tokens, o_d), b_out, m_m, o_d, HEAD_DIM, D)
