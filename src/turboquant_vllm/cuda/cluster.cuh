// Attention in one launch: `blocks` blocks have one pass, whose tiles their warps share evenly. It needs a rotation by a Hadamard
// matrix (hadamard.cuh), where one warp can turn a row. As a cluster:
//
//   block 0   |  rotate  |  tiles of warp 0, 1, ...  |  join warps, send rows  |  join rows 0, blocks, ...       rotate back  |
//   block 1   |  rotate  |  tiles                    |  join warps, send rows  |       rows 1, blocks + 1, ...   rotate back  |
//             ^ all have begun                                                 ^ all have sent
//
// Warps are joined in their order in shared memory. Row i is sent to block i % blocks, which joins the blocks in their order.
//
// As many clusters as a device has multiprocessors for seldom fit. Blocks that are SPREAD meet nowhere: each leaves its rows in
// global memory and is counted, and the last, whichever that is, joins all of them in the order of the blocks:
//
//   block 0   |  rotate  |  tiles  |  join warps, leave rows, count  |  the last: join rows 0, 1, ...   rotate back  |
//
// Where there are more passes than multiprocessors, two teams of a block's warps have a pass each: they share the table, and so
// have room for longer rings than two blocks of a multiprocessor would, of which the hardware serves the older one first.
//
// A step may STORE its own keys and values in the same launch. The first blocks do that, and count themselves when they have; warps
// that read what these write wait for the count, which is zero again behind the last cluster. Blocks start in the order of their
// numbers, so none waits for one that has no place.
//
// So the bits repeat; they depend on how many blocks and warps share a pass, which follows from the sizes of a call.
#if CLUSTER
#define TEAM_WARPS (WARPS / PASSES)
// A warp's results lie in its ring, or, where that is too short, over all that has served.
#define IN_RING (PART * 4 <= WARP_BYTES)
#define RESULT(warp) (IN_RING ? RING + (warp) * WARP_BYTES : (warp) * PART * 4)
// Rows that were sent, behind all else in a block's shared memory: at (row / blocks * blocks + sender) * PART_PITCH floats.
#define USED (ROW_SCALE + PASSES * 16 * NT)
#define SENT (USED > RESULT(WARPS) ? USED : RESULT(WARPS))

// The number of a block among those that attend.
__device__ __forceinline__ int block_of_call(const DecodeParams& p) {
#if STORES
  return blockIdx.x - p.first_block;
#else
  return blockIdx.x;
#endif
}

#if STORES
// What the blocks before those do.
__device__ __forceinline__ void store_first(const DecodeParams& p) {
  if (blockIdx.x >= p.store_blocks) return;  // there to fill a cluster
  if (store::team_of_block() < p.store.teams) store::store_block(p.store);
  __syncthreads();  // all lanes have written theirs
  if (threadIdx.x == 0) arrive_of(p.stored, p.store_blocks + p.sequences * p.heads.kv_heads);
}
#endif
// One lane of a cluster, when none of the others waits for the store any more.
__device__ __forceinline__ void forget_store(const DecodeParams& p) {
#if STORES
  wait_for_store(p);
  arrive_of(p.stored, p.store_blocks + p.sequences * p.heads.kv_heads);
#endif
}

// The team of a thread, and a barrier of it.
__device__ __forceinline__ int team_of_thread() { return thread_number() / (TEAM_WARPS * 32); }
__device__ __forceinline__ void meet() {
  if (PASSES == 1) __syncthreads();
  else team_barrier(1 + team_of_thread(), TEAM_WARPS * 32);
}

// Tiles of a pass, from `first` on: `share` of them each warp of a cluster, the first `more` one more.
struct Share {
  int first, share, more;
  __device__ __forceinline__ int begin(int worker) const { return first + worker * share + min(worker, more); }
};

__device__ __forceinline__ Pass pass_of(const DecodeParams& p, int index) {
#if PAGED
  const int s = p.heads.batch(index), len = length_of(p, s);
  return {index, 0, (len + 15) / 16, len, len - tokens_of(p, s)};
#else
  return {index, 0, p.work.tiles, p.kv_len, p.shift};
#endif
}
__device__ __forceinline__ Share share_of(const DecodeParams& p, const Pass& pass) {
  const int first = PAGED ? first_tile(p, p.heads.batch(pass.index), pass.shift, pass.kv_len) : 0, tiles = pass.tiles - first;
  const int share = p.by_workers.divide(tiles);
  return {first, share, tiles - share * p.blocks * p.active};
}

#if PAGED
#define AT_A_TIME (OFFSETS ? GROUPS_AT_ONCE * KEYS_OF_GROUP / 16 : 1)  // tiles, of which what they share is read together
// Whether a lane has found that its warp must wait for the store of the step's own keys and values before it reads tiles
// `first` .. `end` - 1 of a pass: that writes one of their pages, or more than 32 tokens.
__device__ __forceinline__ bool needs_store(const DecodeParams& p, const Pass& pass, int first, int end) {
  const int lane = threadIdx.x & 31;
  bool wait = p.new_tokens > 32;
  if (!wait && p.new_tokens) {
    const i64 slot = lane >= p.new_tokens ? -1 : p.slot_bytes == 8 ? ((const i64*)p.slots)[lane] : ((const int*)p.slots)[lane];
    const bool is_kept = slot >= 0 && slot / 16 < (i64)p.num_pages * p.page_tiles;
    const int written = is_kept ? p.by_page_tiles.divide((int)(slot / 16)) : -1;
    const int from = p.by_page_tiles.divide(first - first % AT_A_TIME), last = (end + AT_A_TIME - 1) / AT_A_TIME * AT_A_TIME - 1;
    const int to = p.by_page_tiles.divide(min(last, pass.tiles - 1));
    const int* entries = p.block_table + p.heads.batch(pass.index) * p.table_stride;
#pragma unroll 1
    for (int page = from; page <= to; page += 32) {
      const int number = min(max(entries[min(page + lane, to)], 0), p.num_pages - 1);
#pragma unroll 1
      for (int i = 0; i < p.new_tokens; i++) wait |= number == __shfl_sync(~0u, written, i);
    }
  }
  return wait;
}
#endif

// What a warp without tiles leaves for the others to join.
__device__ __forceinline__ void leave_nothing(char* smem) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  if (lane < 4 * NT) ((float*)(smem + RESULT(warp)))[lane * PART_PITCH + D] = -INFINITE;
}

// The rows that each warp of a team has left in `smem`, or nothing, joined: `keep(row, dim, x, y, lse)` takes two dimensions of
// one.
template <class Keep>
__device__ __forceinline__ void join_warps(const char* smem, int rows, Keep keep) {
#pragma unroll 1
  for (int i = thread_number() % (TEAM_WARPS * 32); i < rows * (D / 2); i += TEAM_WARPS * 32) {
    const int row = i / (D / 2), dim = i % (D / 2) * 2, pitch = (RESULT(1) - RESULT(0)) / 4;
    const float* mine = (const float*)(smem + RESULT(team_of_thread() * TEAM_WARPS)) + row * PART_PITCH;
    float top = LOWEST, total = 0, x = 0, y = 0;
#pragma unroll
    for (int w = 0; w < TEAM_WARPS; w++) top = fmaxf(top, mine[w * pitch + D]);
#pragma unroll
    for (int w = 0; w < TEAM_WARPS; w++) {
      const float lse = mine[w * pitch + D], weight = ex2(lse - top);
      if (lse == -INFINITE) continue;  // saw no key
      const float2 pair = *(const float2*)(mine + w * pitch + dim);
      total += weight, x += weight * pair.x, y += weight * pair.y;
    }
    const float inverse = total == 0 ? 0 : reciprocal(total);
    keep(row, dim, x * inverse, y * inverse, total == 0 ? -INFINITE : top + lg2(total));
  }
}

// Row i of pass `index`, joined over its blocks, rotated back and stored. `lse_of(block)`, `pair_of(block, dim)`: what these kept.
template <class Lse, class Pair>
__device__ __forceinline__ void store_row(const DecodeParams& p, int index, int i, const float* signs, Lse lse_of, Pair pair_of) {
  const int lane = thread_number() % 32;
  const QueryRow row = row_of(p, index, i);
  const float lse = lane < p.blocks ? lse_of(lane) : -INFINITE;
  float x[OF_LANE], top = fmaxf(LOWEST, warp_max(lse, 1));
  const float weight = lse == -INFINITE ? 0 : ex2(lse - top);
  float total = warp_sum(weight, 1);
#pragma unroll
  for (int j = 0; j < OF_LANE; j++) x[j] = 0;
#pragma unroll (SPREAD ? 8 : 4)
  for (int block = 0; block < p.blocks; block++) {
    const float share = __shfl_sync(~0u, weight, block);
#pragma unroll
    for (int j = 0; j < OF_LANE; j += 2) {
      const float2 pair = pair_of(block, lane * OF_LANE + j);
      x[j] += share * pair.x, x[j + 1] += share * pair.y;
    }
  }
  if (MASKED && p.sinks) {  // one more key, without a value
    const float sink = p.sinks[row.head] * 1.4426950408889634f, higher = fmaxf(top, sink), keep = ex2(top - higher);
    top = higher, total = total * keep + ex2(sink - higher);
#pragma unroll
    for (int j = 0; j < OF_LANE; j++) x[j] *= keep;
  }
  const float inverse = total == 0 ? 0 : reciprocal(total);
#pragma unroll
  for (int j = 0; j < OF_LANE; j++) x[j] *= inverse;
  hadamard(x);
  if (!row.there) return;
  u32* out = (u32*)p.out + (times(row.batch, p.out_b) + times(row.head, p.out_h) + times(row.token, p.out_n)) / 2;
#pragma unroll
  for (int j = 0; j < OF_LANE; j += 2)
    out[(lane * OF_LANE + j) / 2] = half_pair(x[j] * signs[j], x[j + 1] * signs[j + 1], p.is_bf16);
  if (lane == 0 && p.lse)
    p.lse[times(row.batch, p.lse_b) + times(row.head, p.lse_h) + times(row.token, p.lse_n)] =
        total == 0 ? -INFINITE : (top + lg2(total)) * 0.6931471805599453f;
}

// Join what the warps have left in `smem`, then the blocks, rotate back and store.
__device__ __forceinline__ void finish(const DecodeParams& p, char* smem) {
  const int block = block_of_call(p), number = p.by_blocks.divide(block), team = team_of_thread(), index = number * PASSES + team;
  const int warp = thread_number() / 32 % TEAM_WARPS;
  const int count = min(4 * NT, p.heads.rows - p.heads.first_row(index));
  float signs[OF_LANE];
  load_part(signs, p.rotation);
#if SPREAD
  meet();  // all warps have left theirs
  float* parts = p.parts + (i64)index * p.blocks * PART;  // [blocks, 4 * NT, PART_PITCH]
  const int mine = (block - index * p.blocks) * PART;
  join_warps(smem, count, [&](int row, int dim, float x, float y, float lse) {
    float* to = parts + mine + row * PART_PITCH;
    *(float2*)(to + dim) = make_float2(x, y);
    if (dim == 0) to[D] = lse;
  });
  meet();  // all rows are there
  if (thread_number() == 0) *(u32*)smem = arrive_of(p.counters + index, p.blocks);
  meet();  // which block is the last
  if (*(const u32*)smem != p.blocks - 1) return;
#pragma unroll 1
  for (int i = warp; i < count; i += WARPS) {
    const float* from = parts + i * PART_PITCH;
    store_row(p, index, i, signs, [&](int block) { return from[block * PART + D]; },
              [&](int block, int dim) { return *(const float2*)(from + block * PART + dim); });
  }
#else
  const int rank = block - number * p.blocks;
  const u32 sent = shared_address(smem) + SENT + team * PART * 4;
  if (p.blocks > 1) cluster_wait();  // all have begun
  meet();  // all warps have left theirs
  join_warps(smem, count, [&](int row, int dim, float x, float y, float lse) {
    const int group = p.by_blocks.divide(row) * p.blocks;
    const u32 to = sent + (group + rank) * PART_PITCH * 4;
    if (p.blocks > 1) {
      sts2_of(to + dim * 4, row - group, x, y);
      if (dim == 0) sts_of(to + D * 4, row - group, lse);
    } else {
      sts2(to + dim * 4, x, y);
      if (dim == 0) sts(to + D * 4, lse);
    }
  });
  if (p.blocks > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    meet();
  }
  if (rank == p.blocks - 1 && thread_number() == TEAM_WARPS * 32 - 1) forget_store(p);  // seldom a warp that has a row to join
#pragma unroll 1
  for (int i = rank + warp * p.blocks; i < count; i += TEAM_WARPS * p.blocks) {
    const u32 from = sent + (i - rank) * PART_PITCH * 4;
    store_row(p, index, i, signs, [&](int block) { return __uint_as_float(lds(from + (block * PART_PITCH + D) * 4)); },
              [&](int block, int dim) {
                u32 pair[2];
                lds2(pair, from + (block * PART_PITCH + dim) * 4);
                return make_float2(__uint_as_float(pair[0]), __uint_as_float(pair[1]));
              });
  }
#endif
}
#endif
