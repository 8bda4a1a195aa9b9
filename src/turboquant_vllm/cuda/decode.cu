// Attention of few query rows over a packed cache, first kernel: every warp attends to its range of the keys. As a CLUSTER it
// does all of it: see cluster.cuh.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) tq4_decode(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(1024) char smem[];
  const int tid = threadIdx.x, lane = tid & 31, warp = or_of_warp(tid >> 5), r = lane >> 2, c = lane & 3;
  const float level = p.centroids[lane & 15];
#if CLUSTER
  const int team = warp / TEAM_WARPS, member = warp - team * TEAM_WARPS, number = p.by_blocks.divide(blockIdx.x);
  const int index = number * PASSES + team, worker = (blockIdx.x - number * p.blocks) * p.active + member;
  auto locate = [&](int) { return pass_of(p, index); };
#if PAGED
  prefetch_pages(p, p.heads.batch(index));
  if (!is_served(p, tokens_of(p, p.heads.batch(index)))) return leave();
#endif
  const int first_pass = number * PASSES, rows = PASSES * 4 * NT;
  const Share work = share_of(p, locate(0));
#else
  const int worker = blockIdx.x * p.active + warp, member = warp;
  // The next kernel's blocks may take their places as soon as blocks of this one leave them.
  let_next_start();
#if PAGED
  if (is_even(p)) return leave();  // clusters will serve
  const Line work = plan_line(p, (int*)(smem + QUERY));
  auto locate = [&](int tile) {
    const int s = work.sequence_of(tile), start = work.start_of(s), len = work.lens[s], shift = work.shifts[s];
    const int first = first_tile(p, s, shift, len), end = (len + 15) / 16, h = (tile - start) / (end - first);
    return Pass{s * p.heads.kv_heads + h, start + h * (end - first) - first, end, len, shift};
  };
#else
  const Work& work = p.work;
  auto locate = [&](int tile) {
    const int pass = p.work.pass_of(tile);
    return Pass{pass, pass * p.work.tiles, p.work.tiles, p.kv_len, p.shift};
  };
  const int first_pass = p.work.pass_of(p.work.begin(blockIdx.x * p.active));
  const int last_pass = p.work.pass_of(p.work.begin((blockIdx.x + 1) * p.active) - 1);
  const int rows = (last_pass - first_pass + 1) * 4 * NT;
#endif
#endif
#define ROTATES (CLUSTER || !PAGED)  // else a kernel before has done it
#if ROTATES  // what that waits for is asked for before the keys and values, which would delay it
  Rows query_rows;
  ask_for_query(query_rows, p, first_pass, rows);
#endif
#if PAGED && CLUSTER
  if (!is_even(p)) return leave();  // the line has served; asked here, it takes fewer registers
#endif
#if CLUSTER
  if (!SPREAD && p.blocks > 1) cluster_arrive();
#endif
  const u32 base = shared_address(smem);
  const u32 ring = base + RING + warp * WARP_BYTES;
  int now = work.begin(worker);
  const int end = member < p.active ? work.begin(worker + 1) : now;
#if PAGED && CLUSTER
  const bool is_late = or_of_warp(now < end && needs_store(p, locate(now), now, end));
#else
  const bool is_late = false;
#endif

  // Producer: the next tile to copy, tiles left of its pass, and where this lane's pieces lie.
  int next = now, left = 0;
  const char *k_at = 0, *norm_at = 0;
  const u32 lane4 = lane * 4;
  const int copy_row = lane / PIECES, piece = lane % PIECES;
  const u32 place_of_piece = copy_row * (D / 2) + place(piece, copy_row) * 16;
#if PAGED
#define THERE (tail + pass_left * 16)
#define VALUES_AT (k_at + (p.v - p.k))  // as far behind the keys in every page
#else
  const char* v_at = 0;
#define THERE (p.kv_len - (p.work.tiles - left) * 16)
#define VALUES_AT v_at
#endif
  auto norm_step = [&]() { return 4 * (lane < 16 ? p.kn_n : p.vn_n); };
#if PAGED
  // `left` counts to the end of the page or of the pass; `tail`, what the pass's last tile lacks, is known in its last page;
  // `ahead` is the page to open next, asked for while there is still something to copy from the one before.
  int tail = 0, pass_left = 0, ahead = 0;
  const int* entry = 0;
  i64 head_at = 0;
  auto open_page = [&](int skip) {
    const char* page = (const char*)p.k + min(max(ahead, 0), p.num_pages - 1) * p.k_b + head_at;
    left = min(p.page_tiles - skip, pass_left);
    if (left < pass_left) ahead = *++entry;
    k_at = page + (skip * 16 + copy_row) * p.k_n + piece * 16;
    norm_at = page + (lane < 16 ? (const char*)p.k_norms - (const char*)p.k : (const char*)p.v_norms - (const char*)p.k) +
              (skip * 16 + (lane & 15)) * 4;
  };
  auto open_pass = [&]() {
    int skip = 0;
    if (pass_left == 0) {
      const Pass pass = locate(next);
      const int s = p.heads.batch(pass.index), tile = next - pass.start, page = p.by_page_tiles.divide(tile);
      skip = tile - page * p.page_tiles;
      entry = p.block_table + s * p.table_stride + page;
      ahead = *entry;
      head_at = (pass.index - s * p.heads.kv_heads) * p.k_h;
      pass_left = pass.tiles - tile;
      tail = pass.kv_len - pass.tiles * 16;
    }
    open_page(skip);
  };
#else
  auto open_pass = [&]() {
    const Pass pass = locate(next);
    const int head = p.heads.head_of(pass.index), token = (next - pass.start) * 16;
    const int b = p.heads.batch(head), h = head - b * p.heads.kv_heads;
    const bool key = lane < 16;
    left = pass.start + pass.tiles - next;
    k_at = (const char*)p.k + times(b, p.k_b) + times(h, p.k_h) + times(token + copy_row, p.k_n) + piece * 16;
    v_at = (const char*)p.v + times(b, p.v_b) + times(h, p.v_h) + times(token + copy_row, p.v_n) + piece * 16;
    norm_at = (const char*)((key ? p.k_norms : p.v_norms) + times(b, key ? p.kn_b : p.vn_b) + times(h, key ? p.kn_h : p.vn_h)) +
              times(token + (lane & 15), norm_step());
  };
#endif
  auto copy_next = [&](int stage) {
    if (next < end) {
      const u32 norm_to = ring + stage * TILE_BYTES + NORM_PART + lane4, to = ring + stage * TILE_BYTES + place_of_piece;
      const int there = THERE;
      if (there >= 16) {
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
          copy16(to + i * 512, k_at + i * COPY_ROWS * p.k_n);
          copy16(to + V_PART + i * 512, VALUES_AT + i * COPY_ROWS * p.v_n);
        }
        copy4(norm_to, norm_at);
      } else {  // rows past the end repeat the last one
        for (int i = 0; i < COPIES; i++) {
          const int row = copy_row + i * COPY_ROWS, back = min(row, there - 1) - copy_row;
          copy16(to + i * 512, k_at + back * p.k_n);
          copy16(to + V_PART + i * 512, VALUES_AT + back * p.v_n);
        }
        copy4(norm_to, norm_at + (min(lane & 15, there - 1) - (lane & 15)) * norm_step());
      }
      next++;
#if PAGED
      pass_left--;
#else
      v_at += 16 * p.v_n;
#endif
      if (--left > 0) {
        k_at += 16 * p.k_n;
        norm_at += 16 * norm_step();
      } else if ((PAGED || !CLUSTER) && next < end) {
        open_pass();
      }
    }
    commit_copies();
  };
#if PAGED && !CLUSTER
  if (p.even.slack >= 0)  // else this has started after that
    wait_for_previous();  // the store of the step's own keys and values
#endif
  if (next < end) open_pass();

  // Levels in fp16, over a power of two that the row scales and the result give back.
  const float level_scale = power_below(warp_max(fabsf(level), 1));
  auto rotate = [&]() {
#if ROTATES
    rotate_query(p, smem, query_rows, first_pass, rows, level_scale * p.scale_log2, smem + QUERY, (float*)(smem + ROW_SCALE));
#endif
  };
  // A warp that must wait for the store does so behind the block's table and query: then the other warps do not wait for it.
#pragma unroll 1
  for (int turn = 0; turn < 1 + (PAGED && CLUSTER); turn++) {
    if (turn == is_late) {
      if (is_late) wait_for_previous();  // the store of the step's own keys and values
#pragma unroll 1
      for (int i = 0; i < STAGES - 1; i++) copy_next(i);
    }
    if (turn) break;
    if (!HADAMARD) rotate();  // where the table will be
    const float scaled = (OFFSETS ? p.centroids[lane & 15] : level) * inverse_power(level_scale);  // kept, it would be spilled
    fill_table(smem, half2_bits(scaled, scaled));
    if (HADAMARD) rotate();
    __syncthreads();
  }
#if PAGED && !CLUSTER
  wait_for_previous();
#endif
  const u32 table = shared_address(smem);  // again: see there
  auto levels = [&](u32 word, int byte) { return lds_table(prmt(word, lane4, 0x5504u | (byte << 4)) + table); };

  // Of P V's right side, drawn in query.cuh.
  const u32 select_low = (r & 1) ? 0x1044u : 0x4410u, select_high = (r & 1) ? 0x3244u : 0x4432u;
  const int source = c * 4 + (r >> 1);

#if CLUSTER
  if (now == end) {  // this warp has nothing to do: it only meets the others
    if (!IN_RING) __syncthreads();
    leave_nothing(smem);
  }
#endif
  int stage = 0;
#pragma unroll 1
  while (now < end) {
    const Pass pass = locate(now);
    const int tile0 = now - pass.start, first_row = p.heads.first_row(pass.index);
    int tile1 = min(pass.tiles, tile0 + end - now);
#if !PAGED && !CLUSTER
    if (p.work.fixed) tile1 = min(tile1, p.work.piece_end(tile0));
#endif
    now += tile1 - tile0;
#if PAGED && !CLUSTER
    const uint2* query = (const uint2*)(p.fragments + (i64)pass.index * QUERY_BYTES) + lane;
    const float* scales = p.row_scales + pass.index * (4 * NT);
#else
    const u32 query = base + QUERY + pass.index % PASSES * QUERY_BYTES + lane * 8;
    const float* scales = (float*)(smem + ROW_SCALE) + pass.index % PASSES * 4 * NT;
#endif
    auto load_query = [&](u32* to, int i) {
#if PAGED && !CLUSTER
      const uint2 x = query[i * 32];
      to[0] = x.x, to[1] = x.y;
#else
      lds2(to, query + i * 256);
#endif
    };
    u32 qf[Q_IN_REGISTERS ? NQ : 1][KSTEPS][2];
    auto query_of = [&](u32* to, int i) {
      if (Q_IN_REGISTERS) to[0] = qf[i / KSTEPS][i % KSTEPS][0], to[1] = qf[i / KSTEPS][i % KSTEPS][1];
      else load_query(to, i);
    };
    float row_scales[NT];
    if (Q_IN_REGISTERS) {
#pragma unroll
      for (int i = 0; i < NQ * KSTEPS; i++) load_query(qf[i / KSTEPS][i % KSTEPS], i);
    }
#pragma unroll
    for (int t = 0; t < NT; t++) row_scales[t] = scales[t * 4 + c];

    // The last key that lane's row of tile t sees; before `open_end` every row sees every key.
    auto last_key = [&](int t) {
      return p.is_causal ? min(pass.shift + p.heads.position(first_row + t * 4 + c), pass.kv_len - 1) : pass.kv_len - 1;
    };
    const int open_end = p.is_causal ? min(pass.shift + 1, pass.kv_len) : pass.kv_len;
    // The first key that it sees; from `open_begin` on no row's window hides a key.
    const int window = window_of(p, p.heads.batch(p.heads.head_of(pass.index))), open_begin = pass.kv_len - window;
    auto first_key = [&](int t) {
      return MASKED ? pass.shift + p.heads.position(first_row + t * 4 + c) - window + 1 : -NO_WINDOW;
    };

    // Sums of P V, C fragment of tile j: lane (r, c) holds dimensions r * D / 8 + 4 * j + 0..3 of row c
    float o[NT][MTILES][4], m[NT], l[NT], v_ref = 0;
#pragma unroll
    for (int t = 0; t < NT; t++) {
      m[t] = LOWEST, l[t] = 0;
#pragma unroll
      for (int j = 0; j < MTILES; j++) o[t][j][0] = o[t][j][1] = o[t][j][2] = o[t][j][3] = 0;
    }
#pragma unroll 1
    for (int n0 = tile0 * 16; n0 < tile1 * 16; n0 += 16) {
#if OFFSETS
      if (n0 == tile0 * 16 || n0 % (GROUPS_AT_ONCE * KEYS_OF_GROUP) == 0)  // the pass is worked out anew: it takes no registers
        score_groups(p, ring + GROUP_SCORES, locate(now - 1), first_of_groups(n0), row_scales, inverse_power(level_scale),
                     [&](u32* to, int i) { HELD_QUERY ? query_of(to, i) : load_query(to, i); });
#endif
      wait_copies<STAGES - 2>();
      __syncwarp();
      copy_next(stage == 0 ? STAGES - 1 : stage - 1);
      const u32 tile = ring + stage * TILE_BYTES;
      stage = stage + 1 == STAGES ? 0 : stage + 1;

      // Q K^T: words of tokens r and r + 8, laid out as drawn at rotate_query
      u32 ka[KWORDS], kb[KWORDS];
      if (D == 64) {
        lds2(ka, tile + lane * 8), lds2(kb, tile + 256 + lane * 8);
      } else {
#pragma unroll
        for (int i = 0; i < KWORDS / 4; i++) {
          const u32 at = tile + r * (D / 2) + place(i * 4 + c, r) * 16;
          lds4(ka + 4 * i, at), lds4(kb + 4 * i, at + 4 * D);
        }
      }
      float s[NQ][4], s2[4] = {0, 0, 0, 0};
#pragma unroll
      for (int n = 0; n < NQ; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
#pragma unroll
      for (int i = 0; i < KSTEPS; i++) {
        const u32 xa = ka[i >> 1], xb = kb[i >> 1], at = (i & 1) * 2;
        const u32 a0 = levels(xa, at), a1 = levels(xb, at), a2 = levels(xa, at + 1), a3 = levels(xb, at + 1);
#pragma unroll
        for (int n = 0; n < NQ; n++) {
          u32 q[2];
          query_of(q, n * KSTEPS + i);
          mma(NT == 1 && (i & 1) ? s2 : s[n], a0, a1, a2, a3, q[0], q[1]);
        }
      }
      const u32 norms = tile + NORM_PART + r * 4;
      const float kn0 = __uint_as_float(lds(norms)), kn1 = __uint_as_float(lds(norms + 32));
      float vn0 = __uint_as_float(lds(norms + 64)), vn1 = __uint_as_float(lds(norms + 96));
      if (NT == 1) s[0][0] += s2[0], s[0][1] += s2[1], s[0][2] += s2[2], s[0][3] += s2[3];

#if MASKED
      if (n0 < open_begin) {  // what no row's window shows has no part in the reference of the norms either
        const int hidden = pass.shift + p.heads.position(first_row) - window + 1 - n0 - r;
        if (hidden > 0) vn0 = 0;
        if (hidden > 8) vn1 = 0;
      }
#endif
      // x0, x1: scores of tokens r and r + 8, row c of tile t, in log2
      const bool edge = n0 + 16 > open_end || (MASKED && n0 < open_begin);
      float x0[NT], x1[NT];
      bool raise = fmaxf(fabsf(vn0), fabsf(vn1)) > 16 * v_ref;
#pragma unroll
      for (int t = 0; t < NT; t++) {
        x0[t] = s[t / 2][t & 1] * (kn0 * row_scales[t]);
        x1[t] = s[t / 2][2 + (t & 1)] * (kn1 * row_scales[t]);
#if OFFSETS
        u32 shared[2];  // of a negative norm's key the score is another
        lds2(shared, ring + GROUP_SCORES + ((n0 / KEYS_OF_GROUP % GROUPS_AT_ONCE * NT + t) * 4 + c) * 8);
        x0[t] = kn0 < 0 ? __uint_as_float(shared[1]) : x0[t] + __uint_as_float(shared[0]);
        x1[t] = kn1 < 0 ? __uint_as_float(shared[1]) : x1[t] + __uint_as_float(shared[0]);
#endif
      }
#if MASKED
      if (p.cap > 0) {
#pragma unroll
        for (int t = 0; t < NT; t++) {
          x0[t] = soft_cap(x0[t], p.cap, p.rate);
          x1[t] = soft_cap(x1[t], p.cap, p.rate);
        }
      }
#endif
      if (edge) {
#pragma unroll
        for (int t = 0; t < NT; t++) {
          const int first = first_key(t), last = last_key(t);
          if (n0 + r > last || n0 + r < first) x0[t] = -INFINITE;
          if (n0 + r + 8 > last || n0 + r + 8 < first) x1[t] = -INFINITE;
        }
      }
#pragma unroll
      for (int t = 0; t < NT; t++) raise |= fmaxf(x0[t], x1[t]) > m[t] + 4;
      if (__any_sync(~0u, raise)) {  // rare: both references follow, and what was summed is rescaled
        float largest = fmaxf(fabsf(vn0) < INFINITE ? fabsf(vn0) : 0, fabsf(vn1) < INFINITE ? fabsf(vn1) : 0);
        largest = warp_max(largest, 4);
        float keep_v = 1;
        if (largest > 16 * v_ref) {
          const float ref = power_below(largest);
          keep_v = v_ref * inverse_power(ref);
          v_ref = ref;
        }
#pragma unroll
        for (int t = 0; t < NT; t++) {
          const float top = fmaxf(m[t], warp_max(fmaxf(x0[t], x1[t]), 4));
          const float keep = ex2(m[t] - top);
          m[t] = top, l[t] *= keep;
#pragma unroll
          for (int j = 0; j < MTILES * 4; j++) o[t][j / 4][j % 4] *= keep * keep_v;
        }
      }
      const float g0 = vn0 * inverse_power(v_ref), g1 = vn1 * inverse_power(v_ref);
      u32 weights[NT], b[NT][2][2];
#pragma unroll
      for (int t = 0; t < NT; t++) {
        const float p0 = ex2(x0[t] - m[t]), p1 = ex2(x1[t] - m[t]);
        l[t] += p0 + p1;
        weights[t] = half2_bits(p0 * g0, p1 * g1);
      }
      if (edge) {  // a hidden norm may be NaN
#pragma unroll
        for (int t = 0; t < NT; t++) {
          const int first = first_key(t), last = last_key(t);
          if (n0 + r > last || n0 + r < first) weights[t] &= 0xffff0000u;
          if (n0 + r + 8 > last || n0 + r + 8 < first) weights[t] &= 0xffffu;
        }
      }
#pragma unroll
      for (int t = 0; t < NT; t++) {
        const u32 y0 = __shfl_sync(~0u, weights[t], source), y1 = __shfl_sync(~0u, weights[t], source + 16);
        b[t][0][0] = prmt(y0, 0, select_low), b[t][0][1] = prmt(y1, 0, select_low);
        b[t][1][0] = prmt(y0, 0, select_high), b[t][1][1] = prmt(y1, 0, select_high);
      }

      // P V: words of tokens c and c + 4, with the bytes of all tiles j
#pragma unroll
      for (int u = 0; u < 2; u++) {
        u32 va[VWORDS], vb[VWORDS];
        const u32 at = tile + V_PART + (8 * u + c) * (D / 2) +
                       (D == 64 ? r * 4 : D == 128 ? (r * 8) ^ ((c & 2) << 4) : place(r, c) * 16);
        if (D == 64) va[0] = lds(at), vb[0] = lds(at + 2 * D);
        else if (D == 128) lds2(va, at), lds2(vb, at + 2 * D);
        else lds4(va, at), lds4(vb, at + 2 * D);
#pragma unroll
        for (int j = 0; j < MTILES; j++) {
          const u32 xa = va[j >> 1], xb = vb[j >> 1], byte = (j & 1) * 2;
          const u32 a0 = levels(xa, byte), a1 = levels(xa, byte + 1), a2 = levels(xb, byte), a3 = levels(xb, byte + 1);
#pragma unroll
          for (int t = 0; t < NT; t++) mma(o[t][j], a0, a1, a2, a3, b[t][u][0], b[t][u][1]);
        }
      }
    }

    {
      // The segment's normalised rows, and the log2 of each row's sum of exp2. Where they go is worked out here, and the
      // thread's number read anew, so that none of it takes a register in the loop above.
      const int tid = thread_number(), r = tid % 32 / 4, c = tid % 4;
      const Pass pass = locate(now - 1);
      const int first_row = p.heads.first_row(pass.index);
#if CLUSTER
      if (IN_RING) __syncwarp();
      else __syncthreads();  // table, rings and queries have served
      float* part = (float*)(smem + RESULT(tid / 32));
#else
      const int worker = blockIdx.x * p.active + tid / 32;
      float* part = p.parts + (i64)work.slot(worker, pass.index, now - 1 - pass.start) * PART;
#endif
#pragma unroll
      for (int t = 0; t < NT; t++) {
        const float total = warp_sum(l[t], 4), factor = total == 0 ? 0 : v_ref * (level_scale / total);
        float* row = part + (t * 4 + c) * PART_PITCH;
        if (first_row + t * 4 + c >= p.heads.rows) continue;
        if (r == 0) row[D] = total == 0 ? -INFINITE : m[t] + lg2(total);
#pragma unroll
        for (int j = 0; j < MTILES; j++)
          ((float4*)row)[r * (D / 32) + j] =
              make_float4(o[t][j][0] * factor, o[t][j][1] * factor, o[t][j][2] * factor, o[t][j][3] * factor);
      }
    }
  }
#if CLUSTER
  finish(p, smem);
  leave();
#endif
}
