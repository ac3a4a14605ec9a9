"""The forward kernel: all softmax sets of a block of query rows in one program."""

import triton
import triton.language as tl

from canvas_engineering.kernels.triton.layout import (
    ROWS_COUNT,
    ROWS_FULL_POSITION,
    ROWS_FULL_PTR,
    ROWS_PARTIAL_COUNT,
    ROWS_PARTIAL_MASK,
    ROWS_PARTIAL_POSITION,
    ROWS_PARTIAL_PTR,
    ROWS_POSITION,
    ROWS_SET_PTR,
    ROWS_WORK,
)
from canvas_engineering.kernels.triton.tiles import (
    dropout_keep,
    dropout_rows,
    load_all_rows,
    load_rows,
    load_tokens,
    row_pointers,
    sigmoid_scores,
    store_rows,
    tile_mask,
)

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def visit_entries(
    b_q,
    b_acc,
    b_m,
    b_l,
    begin,
    end,
    list_position,
    list_count,
    list_mask,
    p_k,
    p_v,
    stride_kn,
    stride_vn,
    p_tokens,
    p_masks,
    o_m,
    dropout_row,
    dropout_threshold,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK_WORDS: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    SIGMOID: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add the kv tiles ``begin:end`` of one list to the online softmax (accumulator, maximum, sum) of a set."""
    N_BLOCKS: tl.constexpr = (BLOCK_KV + BLOCK_N - 1) // BLOCK_N
    PADDED: tl.constexpr = N_BLOCKS * BLOCK_N != BLOCK_KV  # the block is larger than the tile
    o_d = tl.arange(0, D)
    for step in range(begin * N_BLOCKS, end * N_BLOCKS):
        entry = step // N_BLOCKS
        n_start = (step % N_BLOCKS) * BLOCK_N
        o_n = n_start + tl.arange(0, BLOCK_N)
        position = tl.load(list_position + entry)
        pointers_k = row_pointers(p_k, stride_kn, p_tokens, position, o_n, o_d, CONTIGUOUS)
        pointers_v = row_pointers(p_v, stride_vn, p_tokens, position, o_n, o_d, CONTIGUOUS)
        if MASKED:
            count = tl.load(list_count + entry)
            mask_id = tl.load(list_mask + entry)
            m_n = o_n < count
            b_k = load_rows(pointers_k, m_n, o_d, HEAD_DIM, D)  # [BLOCK_N, D]
        elif PADDED:
            m_n = o_n < BLOCK_KV
            b_k = load_rows(pointers_k, m_n, o_d, HEAD_DIM, D)
        else:
            b_k = load_all_rows(pointers_k, o_d, HEAD_DIM, D)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]

        if MASKED:
            allowed = m_n[None, :] & tile_mask(
                p_masks, mask_id, o_m, o_n, n_start, BLOCK_Q, BLOCK_N, MASK_WORDS, False
            )
        elif PADDED:
            allowed = m_n[None, :]

        if SIGMOID:
            b_p = sigmoid_scores(b_s, scale_log2)
            if MASKED or PADDED:
                b_p = tl.where(allowed, b_p, 0.0)
        else:
            b_s = b_s * scale_log2
            if MASKED or PADDED:
                b_s = tl.where(allowed, b_s, float("-inf"))
            b_max = tl.maximum(b_m, tl.max(b_s, 1))
            if MASKED:
                # A row without an allowed key so far: any finite shift gives exp2(-inf) = 0 instead of NaN.
                shift = tl.where(b_max == float("-inf"), 0.0, b_max)
            else:
                shift = b_max
            b_p = tl.math.exp2(b_s - shift[:, None])
            rescale = tl.math.exp2(b_m - shift)
            b_l = b_l * rescale + tl.sum(b_p, 1)
            b_acc = b_acc * rescale[:, None]
            b_m = b_max

        if DROPOUT:
            k_tokens = load_tokens(p_tokens, position, o_n, CONTIGUOUS)
            keep = dropout_keep(dropout_row[:, None], k_tokens[None, :], dropout_threshold)
            b_p = tl.where(keep, b_p, 0.0)

        if MASKED:
            b_v = load_rows(pointers_v, m_n, o_d, HEAD_DIM, D)  # [BLOCK_N, D]
        elif PADDED:
            b_v = load_rows(pointers_v, m_n, o_d, HEAD_DIM, D)
        else:
            b_v = load_all_rows(pointers_v, o_d, HEAD_DIM, D)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
    return b_acc, b_m, b_l


@triton.jit
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
    num_programs_per_head,
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
    MASK_WORDS: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    MANY_SETS: tl.constexpr,
    SIGMOID: tl.constexpr,
    DROPOUT: tl.constexpr,
    STORE_LSE: tl.constexpr,
    STORE_SETS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out[rows] = sum_s weight_s[rows] * softmax_s(q[rows] k^T) v`` for one block of rows of one head.

    Per set: online softmax, first over the tiles that need no mask, then over the others. The weighted sum over
    sets stays in registers. ``p_lse`` gets the natural log-sum-exp, per token ``(B*H, num_q)`` when a tile has
    at most one set, else per set row ``(B*H, num_sets, BLOCK_Q)``; ``p_set_out`` each set's own output
    ``(B*H, num_sets, BLOCK_Q, HEAD_DIM)``, which only the backward pass asks for.
    """
    M_BLOCKS: tl.constexpr = (BLOCK_Q + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    batch_head = program // num_programs_per_head
    work = program % num_programs_per_head
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    kv_head = head // group

    tile = tl.load(p_rows + tl.load(p_rows + ROWS_WORK) + work // M_BLOCKS)
    position = tl.load(p_rows + tl.load(p_rows + ROWS_POSITION) + tile)
    count = tl.load(p_rows + tl.load(p_rows + ROWS_COUNT) + tile)
    list_set_ptr = p_rows + tl.load(p_rows + ROWS_SET_PTR)
    list_full_ptr = p_rows + tl.load(p_rows + ROWS_FULL_PTR)
    list_full_position = p_rows + tl.load(p_rows + ROWS_FULL_POSITION)
    list_partial_ptr = p_rows + tl.load(p_rows + ROWS_PARTIAL_PTR)
    list_partial_position = p_rows + tl.load(p_rows + ROWS_PARTIAL_POSITION)
    list_partial_count = p_rows + tl.load(p_rows + ROWS_PARTIAL_COUNT)
    list_partial_mask = p_rows + tl.load(p_rows + ROWS_PARTIAL_MASK)

    o_m = (work % M_BLOCKS) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, D)
    m_m = o_m < count
    if CONTIGUOUS:
        q_tokens = position + o_m
    else:
        q_tokens = tl.load(p_tokens + position + o_m, mask=m_m, other=0)
    m_tile = o_m < BLOCK_Q
    rows64 = q_tokens.to(tl.int64)

    p_q += batch * stride_qb + head * stride_qh
    p_k += batch * stride_kb + kv_head * stride_kh
    p_v += batch * stride_vb + kv_head * stride_vh
    p_out += batch * stride_ob + head * stride_oh
    b_q = load_rows(p_q + (rows64 * stride_qn)[:, None] + o_d[None, :], m_m, o_d, HEAD_DIM, D)
    if DROPOUT:
        dropout_row = dropout_rows(p_seed, batch_head, q_tokens)
    else:
        dropout_row = o_m

    b_out = tl.zeros([BLOCK_M, D], tl.float32)
    first_set = tl.load(list_set_ptr + tile)
    last_set = tl.load(list_set_ptr + tile + 1)
    if not MANY_SETS:
        if STORE_LSE:
            # Rows of a tile without any set: nothing below writes them.
            if first_set == last_set:
                tl.store(
                    p_lse + batch_head.to(tl.int64) * num_q + rows64,
                    tl.full([BLOCK_M], float("-inf"), tl.float32),
                    mask=m_m,
                )
    for s in range(first_set, last_set):
        b_w = tl.load(p_weight + s.to(tl.int64) * BLOCK_Q + o_m, mask=m_m, other=0.0)
        # With gradients every set is computed: the derivative by a weight that is 0 need not be 0.
        if STORE_SETS or tl.sum((b_w != 0.0).to(tl.int32), 0) > 0:
            b_acc = tl.zeros([BLOCK_M, D], tl.float32)
            b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
            b_l = tl.zeros([BLOCK_M], tl.float32)
            b_acc, b_m, b_l = visit_entries(
                b_q,
                b_acc,
                b_m,
                b_l,
                tl.load(list_full_ptr + s),
                tl.load(list_full_ptr + s + 1),
                list_full_position,
                list_full_position,
                list_full_position,
                p_k,
                p_v,
                stride_kn,
                stride_vn,
                p_tokens,
                p_masks,
                o_m,
                dropout_row,
                dropout_threshold,
                scale_log2,
                HEAD_DIM,
                D,
                BLOCK_Q,
                BLOCK_KV,
                BLOCK_M,
                BLOCK_N,
                MASK_WORDS,
                CONTIGUOUS,
                SIGMOID,
                DROPOUT,
                PRECISION,
                MASKED=False,
            )
            b_acc, b_m, b_l = visit_entries(
                b_q,
                b_acc,
                b_m,
                b_l,
                tl.load(list_partial_ptr + s),
                tl.load(list_partial_ptr + s + 1),
                list_partial_position,
                list_partial_count,
                list_partial_mask,
                p_k,
                p_v,
                stride_kn,
                stride_vn,
                p_tokens,
                p_masks,
                o_m,
                dropout_row,
                dropout_threshold,
                scale_log2,
                HEAD_DIM,
                D,
                BLOCK_Q,
                BLOCK_KV,
                BLOCK_M,
                BLOCK_N,
                MASK_WORDS,
                CONTIGUOUS,
                SIGMOID,
                DROPOUT,
                PRECISION,
                MASKED=True,
            )
            if SIGMOID:
                inverse = tl.full([BLOCK_M], 1.0, tl.float32)
            else:
                inverse = tl.where(b_l > 0.0, 1.0 / b_l, 0.0)
            if DROPOUT:
                inverse = inverse * dropout_scale
            if STORE_LSE:
                b_lse = tl.where(b_l > 0.0, b_m * LN2 + tl.log(b_l), float("-inf"))
                if MANY_SETS:
                    o_lse = (batch_head.to(tl.int64) * num_sets + s) * BLOCK_Q + o_m
                    tl.store(p_lse + o_lse, b_lse, mask=m_tile)
                else:
                    tl.store(p_lse + batch_head.to(tl.int64) * num_q + rows64, b_lse, mask=m_m)
            if STORE_SETS:
                o_set = (batch_head.to(tl.int64) * num_sets + s) * BLOCK_Q + o_m
                store_rows(
                    p_set_out + (o_set * HEAD_DIM)[:, None] + o_d[None, :],
                    b_acc * inverse[:, None],
                    m_tile,
                    o_d,
                    HEAD_DIM,
                    D,
                )
            b_out += b_acc * (inverse * b_w)[:, None]
    store_rows(p_out + (rows64 * stride_on)[:, None] + o_d[None, :], b_out, m_m, o_d, HEAD_DIM, D)
