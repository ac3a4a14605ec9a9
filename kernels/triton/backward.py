"""The backward kernels, free of atomics: dQ by query rows, dK and dV by key columns.

With ``p`` the probabilities of set ``s``, ``w`` its row weights and ``delta_s = sum_j p_j (do . v_j)``,
``ds = p * (w * (do . v) - w * delta_s)``. ``delta_s`` equals ``do . o_s``, ``o_s`` being the set's own output,
so there are two ways to get it when a row stands in several sets:

* *recompute*: one more pass over the set's tiles, two products of ``2 D`` FLOPs per pair, before dQ;
* *store*: the forward pass writes ``o_s`` (``D`` elements per row and set) and ``delta_kernel`` reads it.

Per row and set of ``n`` keys, 16 bit: recomputing costs ``4 D n`` FLOPs, storing ``4 D`` bytes of traffic. A GPU
that does 100 FLOPs in the time of one byte (H200: about 500 TFLOP/s reached, 4.8 TB/s) breaks even at 100 keys.
Regions and frames have hundreds to thousands, where recomputing adds two products to the seven of the backward
pass (29 %) and storing less than 4 %. So ``o_s`` is stored, in the dtype of the inputs, and only when it is
needed: with one set per row the output itself gives ``w * delta = do . out`` (the usual trick), and without
gradients nothing is stored. The log-sum-exp is stored too: 4 bytes per row and set against a pass over the keys.
"""

import triton
import triton.language as tl

from canvas_engineering.kernels.triton.layout import (
    ENTRY_COUNT,
    ENTRY_MASK,
    ENTRY_POSITION,
    ENTRY_SET,
    ENTRY_SIZE,
    KV_TILE_COUNT,
    KV_TILE_FIRST_ENTRY,
    KV_TILE_LAST_ENTRY,
    KV_TILE_POSITION,
    KV_TILE_SIZE,
    Q_TILE_COUNT,
    Q_TILE_FIRST_ENTRY,
    Q_TILE_FIRST_SET,
    Q_TILE_LAST_SET,
    Q_TILE_POSITION,
    Q_TILE_SIZE,
    SET_COUNT,
    SET_LAST_ENTRY,
    SET_POSITION,
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

# The binary logarithm of e, float32 and the rest: one rounding, as in the forward kernel.
LOG2E_HIGH = tl.constexpr(1.44269502162933349609375)
LOG2E_LOW = tl.constexpr(1.925962991126618e-08)


@triton.jit(do_not_specialize=COUNTS)
def delta_kernel(
    p_out,
    p_grad_out,
    p_grad_lse,
    p_lse,
    p_weight,
    p_delta,
    p_shift,
    p_grad_weight,
    p_rows,
    p_tokens,
    stride_ob,
    stride_oh,
    stride_on,
    stride_gb,
    stride_gh,
    stride_gn,
    q_tiles,
    blocks_per_head,
    heads,
    num_q,
    num_sets,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    MANY_SETS: tl.constexpr,
    SIGMOID: tl.constexpr,
    PER_SET: tl.constexpr,
    GRAD_LSE: tl.constexpr,
    GRAD_WEIGHT: tl.constexpr,
):
    """What the other two kernels need of every set row: ``w * delta``, and the log-sum-exp as a shift of ``exp2``.

    ``delta`` itself is the gradient of the row weight. The shift of rows without keys is +inf: probability 0.

    ``p_out`` holds the outputs of the single sets ``(B*H, num_sets, BLOCK_Q, HEAD_DIM)`` when ``PER_SET``, else
    the attention's output with the given strides. ``p_grad_weight`` gets ``(B*H, num_sets, BLOCK_Q)`` partial
    sums, to be added over batch and heads in a fixed order.
    """
    M_BLOCKS: tl.constexpr = (BLOCK_Q + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    batch_head = (program // blocks_per_head).to(tl.int64)
    s = (program % blocks_per_head) // M_BLOCKS
    batch = batch_head // heads
    head = batch_head % heads
    o_d = tl.arange(0, D)
    o_m = (program % blocks_per_head) % M_BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)

    p_set = p_rows + q_tiles * Q_TILE_SIZE + s * SET_SIZE
    position = tl.load(p_set + SET_POSITION)
    m_m = o_m < tl.load(p_set + SET_COUNT)
    q_tokens = block_tokens(p_tokens, position, o_m, m_m, CONTIGUOUS)
    o_set = (batch_head * num_sets + s) * BLOCK_Q + o_m

    p_grad_out += batch * stride_gb + head * stride_gh
    b_do = load_rows(row_pointers(p_grad_out, stride_gn, q_tokens, o_d), m_m, o_d, HEAD_DIM, D)
    if PER_SET:
        p_out_rows = p_out + (o_set * HEAD_DIM)[:, None] + o_d[None, :]
    else:
        p_out_rows = row_pointers(p_out + batch * stride_ob + head * stride_oh, stride_on, q_tokens, o_d)
    b_o = load_rows(p_out_rows, m_m, o_d, HEAD_DIM, D)
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)  # [BLOCK_M]

    if GRAD_WEIGHT:
        tl.store(p_grad_weight + o_set, b_delta, mask=o_m < BLOCK_Q)
    if not SIGMOID:
        if MANY_SETS:
            o_lse = o_set
        else:
            o_lse = batch_head * num_q + q_tokens
        if PER_SET:
            b_delta = b_delta * tl.load(p_weight + s * BLOCK_Q + o_m, mask=m_m, other=0.0)
        if GRAD_LSE:
            # d lse / d score = p, which enters ds with the opposite sign of delta.
            b_delta = b_delta - tl.load(p_grad_lse + o_lse, mask=m_m, other=0.0)
        b_lse = tl.load(p_lse + o_lse, mask=m_m, other=float("-inf"))
        empty = b_lse == float("-inf")
        # Rows without keys and sets that were skipped have no part in the result, whatever the gradient is there and
        # whatever the memory holds that was not written: 0 * NaN would be NaN.
        tl.store(p_delta + o_lse, tl.where(empty, 0.0, b_delta), mask=m_m)
        b_shift = tl.math.fma(b_lse, LOG2E_HIGH, b_lse * LOG2E_LOW)
        tl.store(p_shift + o_lse, tl.where(empty, float("inf"), b_shift), mask=m_m)


@triton.jit(do_not_specialize=COUNTS)
def backward_q_kernel(
    p_q,
    p_k,
    p_v,
    p_grad_out,
    p_shift,
    p_delta,
    p_grad_q,
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
    stride_gb,
    stride_gh,
    stride_gn,
    stride_dqb,
    stride_dqh,
    stride_dqn,
    blocks_per_head,
    heads,
    group,
    num_q,
    num_sets,
    scale,
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
    GRAD_LSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``dq = scale * sum_s ds_s k`` for one block of rows of one head."""
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
    p_grad_out += batch * stride_gb + head * stride_gh
    p_grad_q += batch * stride_dqb + head * stride_dqh
    b_q = load_rows(row_pointers(p_q, stride_qn, q_tokens, o_d), m_m, o_d, HEAD_DIM, D)
    b_do = load_rows(row_pointers(p_grad_out, stride_gn, q_tokens, o_d), m_m, o_d, HEAD_DIM, D)
    if DROPOUT:
        dropout_row = dropout_rows(p_seed, batch_head, q_tokens)

    b_dq = tl.zeros([BLOCK_M, D], tl.float32)
    for s in range(first_set, last_set):
        begin = end
        end = tl.load(p_sets + s * SET_SIZE + SET_LAST_ENTRY)
        if MANY_SETS:
            o_lse = (batch_head * num_sets + s) * BLOCK_Q + o_m
        else:
            o_lse = batch_head * num_q + q_tokens
        b_w = tl.load(p_weight + s * BLOCK_Q + o_m, mask=m_m, other=0.0)
        alive = True
        if not GRAD_LSE:
            alive = tl.sum((b_w != 0.0).to(tl.int32), 0) > 0
        if alive:
            if not SIGMOID:
                b_shift = tl.load(p_shift + o_lse, mask=m_m, other=0.0)
                b_delta = tl.load(p_delta + o_lse, mask=m_m, other=0.0)
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
                b_v = load_rows(p_v_rows, m_n, o_d, HEAD_DIM, D)  # [BLOCK_N, D]
                b_s = product(b_q, tl.trans(b_k), None, PRECISION)  # [BLOCK_M, BLOCK_N]
                b_dp = product(b_do, tl.trans(b_v), None, PRECISION)  # [BLOCK_M, BLOCK_N]
                if mask_id >= 0:
                    # Before exp2, which may overflow for a pair that its row's log-sum-exp leaves out.
                    allowed = tile_mask(p_masks, mask_id, o_m, o_n, n_start, BLOCK_Q, BLOCK_KV, BLOCK_N, False)
                    b_s = tl.where(allowed, b_s, float("-inf"))
                if KEYS_PADDED:
                    b_s = tl.where(m_n[None, :], b_s, float("-inf"))
                if SIGMOID:
                    b_p = sigmoid2(b_s * scale_log2)
                else:
                    b_p = tl.math.exp2(tl.math.fma(b_s, scale_log2, -b_shift[:, None]))
                if DROPOUT:
                    keep = dropout_keep(dropout_row[:, None], k_tokens[None, :], dropout_threshold)
                    b_dp = tl.where(keep, b_dp * dropout_scale, 0.0)
                if SIGMOID:
                    b_ds = b_p * (1.0 - b_p) * (b_dp * b_w[:, None])
                else:
                    b_ds = b_p * tl.math.fma(b_dp, b_w[:, None], -b_delta[:, None])
                b_dq = product(rounded(b_ds, b_k.dtype), b_k, b_dq, PRECISION)

    # The addresses of the output again, rather than kept through the loop: there registers are short.
    position = tl.load(p_tile + Q_TILE_POSITION)
    m_m = o_m < tl.load(p_tile + Q_TILE_COUNT)
    q_tokens = block_tokens(p_tokens, position, o_m, m_m, CONTIGUOUS)
    store_rows(row_pointers(p_grad_q, stride_dqn, q_tokens, o_d), b_dq * scale, m_m, o_d, HEAD_DIM, D)


@triton.jit(do_not_specialize=COUNTS)
def backward_kv_kernel(
    p_q,
    p_k,
    p_v,
    p_grad_out,
    p_shift,
    p_delta,
    p_grad_k,
    p_grad_v,
    p_weight,
    p_seed,
    p_columns,
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
    stride_gb,
    stride_gh,
    stride_gn,
    stride_dkb,
    stride_dkh,
    stride_dkn,
    stride_dvb,
    stride_dvh,
    stride_dvn,
    blocks_per_head,
    kv_heads,
    num_q,
    num_sets,
    scale,
    scale_log2,
    dropout_threshold,
    dropout_scale,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    MANY_SETS: tl.constexpr,
    SIGMOID: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``dv = sum_s (w p)^T do`` and ``dk = scale * sum_s ds^T q`` for one block of keys of one kv head.

    The ``GROUP`` query heads of a kv head are added in the program, in order: grouped heads need no atomics either.
    Scores are computed transposed, ``[keys, rows]``, so that ``p`` and ``ds`` are left operands from registers.
    """
    M_BLOCKS: tl.constexpr = (BLOCK_Q + BLOCK_M - 1) // BLOCK_M
    N_BLOCKS: tl.constexpr = (BLOCK_KV + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    batch_kv_head = (program // blocks_per_head).to(tl.int64)
    work = program % blocks_per_head
    batch = batch_kv_head // kv_heads
    kv_head = batch_kv_head % kv_heads

    p_tile = p_columns + work // N_BLOCKS * KV_TILE_SIZE
    p_entries = p_columns + blocks_per_head // N_BLOCKS * KV_TILE_SIZE
    position = tl.load(p_tile + KV_TILE_POSITION)
    count = tl.load(p_tile + KV_TILE_COUNT)
    begin = tl.load(p_tile + KV_TILE_FIRST_ENTRY)
    end = tl.load(p_tile + KV_TILE_LAST_ENTRY)

    o_d = tl.arange(0, D)
    n_start = (work % N_BLOCKS) * BLOCK_N
    o_n = n_start + tl.arange(0, BLOCK_N)
    m_n = o_n < count
    k_tokens = block_tokens(p_tokens, position, o_n, m_n, CONTIGUOUS)

    p_k += batch * stride_kb + kv_head * stride_kh
    p_v += batch * stride_vb + kv_head * stride_vh
    b_k = load_rows(row_pointers(p_k, stride_kn, k_tokens, o_d), m_n, o_d, HEAD_DIM, D)
    b_v = load_rows(row_pointers(p_v, stride_vn, k_tokens, o_d), m_n, o_d, HEAD_DIM, D)

    b_dk = tl.zeros([BLOCK_N, D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, D], tl.float32)
    # One loop over the query heads of the group and their entries, so that the pipeline never drains between heads.
    steps = (end - begin) * M_BLOCKS
    p_next = p_entries + begin * ENTRY_SIZE
    next_position = tl.load(p_next + ENTRY_POSITION)
    next_count = tl.load(p_next + ENTRY_COUNT)
    next_mask = tl.load(p_next + ENTRY_MASK)
    next_set = tl.load(p_next + ENTRY_SET)
    if not CONTIGUOUS:
        o_next = tl.arange(0, BLOCK_M)
        next_tokens = block_tokens(p_tokens, next_position, o_next, o_next < next_count, False)
    for step in range(GROUP * steps):
        head = kv_head * GROUP
        next_step = step + 1
        if GROUP > 1:
            head += step // steps
            next_step = next_step % steps
        p_q_head = p_q + batch * stride_qb + head * stride_qh
        p_do_head = p_grad_out + batch * stride_gb + head * stride_gh
        batch_head = batch * (kv_heads * GROUP) + head
        o_m = (step % M_BLOCKS) * BLOCK_M + tl.arange(0, BLOCK_M)
        q_position = next_position
        m_m = o_m < next_count
        mask_id = next_mask
        s = next_set.to(tl.int64)
        p_next = p_entries + (begin + next_step // M_BLOCKS) * ENTRY_SIZE
        next_position = tl.load(p_next + ENTRY_POSITION)
        next_count = tl.load(p_next + ENTRY_COUNT)
        next_mask = tl.load(p_next + ENTRY_MASK)
        next_set = tl.load(p_next + ENTRY_SET)

        if CONTIGUOUS:
            q_tokens = q_position + o_m
        else:
            q_tokens = next_tokens
            o_next = ((step + 1) % M_BLOCKS) * BLOCK_M + tl.arange(0, BLOCK_M)
            next_tokens = block_tokens(p_tokens, next_position, o_next, o_next < next_count, False)
        p_q_rows = row_pointers(p_q_head, stride_qn, q_tokens, o_d)
        p_do_rows = row_pointers(p_do_head, stride_gn, q_tokens, o_d)
        b_q = load_rows(p_q_rows, m_m, o_d, HEAD_DIM, D)  # [BLOCK_M, D]
        b_do = load_rows(p_do_rows, m_m, o_d, HEAD_DIM, D)  # [BLOCK_M, D]
        b_w = tl.load(p_weight + s * BLOCK_Q + o_m, mask=m_m, other=0.0)

        b_s = product(b_k, tl.trans(b_q), None, PRECISION)  # [BLOCK_N, BLOCK_M]
        if mask_id >= 0:
            allowed = tile_mask(p_masks, mask_id, o_m, o_n, n_start, BLOCK_Q, BLOCK_KV, BLOCK_N, True)
            b_s = tl.where(allowed, b_s, float("-inf"))
        if SIGMOID:
            b_p = sigmoid2(b_s * scale_log2)
        else:
            if MANY_SETS:
                o_lse = (batch_head * num_sets + s) * BLOCK_Q + o_m
            else:
                o_lse = batch_head * num_q + q_tokens
            b_shift = tl.load(p_shift + o_lse, mask=m_m, other=0.0)
            b_delta = tl.load(p_delta + o_lse, mask=m_m, other=0.0)
            b_p = tl.math.exp2(tl.math.fma(b_s, scale_log2, -b_shift[None, :]))

        b_dp = product(b_v, tl.trans(b_do), None, PRECISION)  # [BLOCK_N, BLOCK_M]
        b_pw = b_p * b_w[None, :]
        if DROPOUT:
            dropout_row = dropout_rows(p_seed, batch_head, q_tokens)
            keep = dropout_keep(dropout_row[None, :], k_tokens[:, None], dropout_threshold)
            b_pw = tl.where(keep, b_pw * dropout_scale, 0.0)
            b_dp = tl.where(keep, b_dp * dropout_scale, 0.0)
        b_dv = product(rounded(b_pw, b_do.dtype), b_do, b_dv, PRECISION)
        if SIGMOID:
            b_ds = b_p * (1.0 - b_p) * (b_dp * b_w[None, :])
        else:
            b_ds = b_p * tl.math.fma(b_dp, b_w[None, :], -b_delta[None, :])
        b_dk = product(rounded(b_ds, b_q.dtype), b_q, b_dk, PRECISION)

    position = tl.load(p_tile + KV_TILE_POSITION)
    m_n = o_n < tl.load(p_tile + KV_TILE_COUNT)
    k_tokens = block_tokens(p_tokens, position, o_n, m_n, CONTIGUOUS)
    p_grad_k += batch * stride_dkb + kv_head * stride_dkh
    p_grad_v += batch * stride_dvb + kv_head * stride_dvh
    store_rows(row_pointers(p_grad_k, stride_dkn, k_tokens, o_d), b_dk * scale, m_n, o_d, HEAD_DIM, D)
    store_rows(row_pointers(p_grad_v, stride_dvn, k_tokens, o_d), b_dv, m_n, o_d, HEAD_DIM, D)


@triton.jit(do_not_specialize=COUNTS)
def compact_kernel(p_columns, p_alive, p_out, kv_tiles, BLOCK: tl.constexpr):
    """Leave out the entries of one kv tile whose softmax set has only zero weights; the order stays.

    ``p_out`` starts as a copy of ``p_columns``; the tile's entries move to the front of its own range, and the
    end of the range moves with them. A branch per entry in the dK/dV loop would cost its software pipelining.
    """
    p_tile = tl.program_id(0) * KV_TILE_SIZE
    begin = tl.load(p_columns + p_tile + KV_TILE_FIRST_ENTRY)
    end = tl.load(p_columns + p_tile + KV_TILE_LAST_ENTRY)
    p_entries = kv_tiles * KV_TILE_SIZE
    written = begin
    for start in range(begin, end, BLOCK):
        o_e = start + tl.arange(0, BLOCK)
        inside = o_e < end
        s = tl.load(p_columns + p_entries + o_e * ENTRY_SIZE + ENTRY_SET, mask=inside, other=0)
        keep = tl.load(p_alive + s, mask=inside, other=0)  # 1 or 0
        place = written + tl.cumsum(keep, 0) - 1
        for word in tl.static_range(ENTRY_SIZE):
            value = tl.load(p_columns + p_entries + o_e * ENTRY_SIZE + word, mask=inside, other=0)
            tl.store(p_out + p_entries + place * ENTRY_SIZE + word, value, mask=keep != 0)
        written += tl.sum(keep, 0)
    tl.store(p_out + p_tile + KV_TILE_LAST_ENTRY, written)
