// Attention of few query rows over a packed cache, first kernel: every warp attends to its range of the keys. As a CLUSTER it
// does all of it: see cluster.cuh.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) tq4_decode(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(1024) char smem[];
#if STORES
  if (blockIdx.x < p.first_block) return store_first(p);
#endif
  const int tid = threadIdx.x, lane = tid & 31, warp = or_of_warp(tid >> 5);
  const float level = p.centroids[lane & 15];
#if CLUSTER
  const int team = warp / TEAM_WARPS, member = warp - team * TEAM_WARPS, block = block_of_call(p), number = p.by_blocks.divide(block);
  const int index = number * PASSES + team, worker = (block - number * p.blocks) * p.active + member;
  auto locate = [&](int) { return pass_of(p, index); };
#if PAGED
  prefetch_pages(p, p.heads.batch(index));
  if (!is_served(p, tokens_of(p, p.heads.batch(index)))) {
    if (block == number * p.blocks && tid == 0) forget_store(p);
    return leave();
  }
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
              (skip * 16 + norm_token(lane & 15)) * 4;
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
              times(token + norm_token(lane & 15), norm_step());
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
        copy4(norm_to, norm_at + (min(norm_token(lane & 15), there - 1) - norm_token(lane & 15)) * norm_step());
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
      if (is_late) wait_for_store(p);
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
    const Fragment* query = (const Fragment*)(p.fragments + (i64)pass.index * QUERY_BYTES) + lane;
    const float* scales = p.row_scales + pass.index * (4 * NT);
    auto load_query = [&](u32* to, int i) { take(to, query[i * 32]); };
#else
    const u32 query = base + QUERY + pass.index % PASSES * QUERY_BYTES + lane * (u32)sizeof(Fragment);
    const float* scales = (float*)(smem + ROW_SCALE) + pass.index % PASSES * 4 * NT;
    auto load_query = [&](u32* to, int i) { take(to, query + i * 32 * (u32)sizeof(Fragment)); };
#endif
    const Seen seen(p, pass, first_row);
    Sums sums;
    sums.begin(scales, load_query);
#pragma unroll 1
    for (int n0 = tile0 * 16; n0 < tile1 * 16; n0 += 16) {
#if OFFSETS
      if (n0 == tile0 * 16 || n0 % (GROUPS_AT_ONCE * KEYS_OF_GROUP) == 0)  // the pass is worked out anew: it takes no registers
        score_groups(p, ring + GROUP_SCORES, locate(now - 1), first_of_groups(n0), sums, inverse_power(level_scale),
                     [&](u32* to, int i) { HELD_QUERY ? sums.query_of(to, i, load_query) : load_query(to, i); });
#endif
      wait_copies<STAGES - 2>();
      __syncwarp();
      copy_next(stage == 0 ? STAGES - 1 : stage - 1);
      const u32 tile = ring + stage * TILE_BYTES;
      stage = stage + 1 == STAGES ? 0 : stage + 1;
      sums.add(p, pass, seen, n0, tile, ring + GROUP_SCORES, levels, load_query);
    }

    {
      // Where the segment's rows go is worked out here, and the thread's number read anew, so that none of it takes a register in
      // the loop above.
      const int warp = thread_number() / 32;
      const Pass pass = locate(now - 1);
#if CLUSTER
      if (IN_RING) __syncwarp();
      else __syncthreads();  // table, rings and queries have served
      float* part = (float*)(smem + RESULT(warp));
#else
      float* part = p.parts + (i64)work.slot(blockIdx.x * p.active + warp, pass.index, now - 1 - pass.start) * PART;
#endif
      sums.leave(part, p.heads.rows - p.heads.first_row(pass.index), level_scale);
    }
  }
#if CLUSTER
  finish(p, smem);
  leave();
#endif
}
