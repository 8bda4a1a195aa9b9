// Over pages: who serves which sequences, the line of work, and the rotation of all queries before it.
#if PAGED
template <class Params>
__device__ __forceinline__ int tokens_of(const Params& p, int sequence) {
  return first_token_of(p.starts, sequence + 1, p.tokens) - first_token_of(p.starts, sequence, p.tokens);
}
template <class Params>
__device__ __forceinline__ int length_of(const Params& p, int sequence) { return min(max(p.seq_lens[sequence], 0), p.max_len); }
// Whether a sequence has query rows, and no more than a pass takes: another kernel serves those.
template <class Params>
__device__ __forceinline__ bool is_served(const Params& p, int tokens) { return tokens > 0 && tokens * p.heads.group <= 4 * NT; }
// Tiles of each of its heads.
template <class Params>
__device__ __forceinline__ int tiles_of(const Params& p, int sequence, int tokens, int len) {
  return is_served(p, tokens) ? (len + 15) / 16 - first_tile(p, sequence, len - tokens, len) : 0;
}

#if CLUSTER
// Which pages a sequence has, and where a store writes, on their way while its length is.
__device__ __forceinline__ void prefetch_pages(const DecodeParams& p, int sequence) {
  const int line = threadIdx.x * 32;  // entries
  if (line * p.page_tiles < p.max_len / 16) prefetch(p.block_table + sequence * p.table_stride + line);
  if (threadIdx.x == 0 && p.new_tokens) prefetch(p.slots);
}
#endif

// Whether clusters serve, and not the line. Every warp works it out.
template <class Params>
__device__ __forceinline__ bool is_even(const Params& p) {
  if (p.even.slack < 0 || p.even.slack >= ALWAYS) return p.even.slack > 0;
  const int lane = threadIdx.x & 31;
  int longest = 0, all = 0;
  for (int s = lane; s < p.sequences; s += 32) {
    const int tiles = tiles_of(p, s, tokens_of(p, s), length_of(p, s));
    longest = max(longest, tiles), all += tiles;
  }
  for (int d = 1; d < 32; d <<= 1) {
    longest = max(longest, __shfl_sync(~0u, longest, lane ^ d));
    all += __shfl_sync(~0u, all, lane ^ d);
  }
  return p.even.serves(longest, all * p.heads.kv_heads);
}
#endif
#if PAGED && !CLUSTER
// The line of all sequences, worked out by every block in `room`; the first block leaves its copy for the second kernel.
__device__ __forceinline__ Line plan_line(const DecodeParams& p, int* room) {
  const int tid = threadIdx.x, lane = tid & 31, count = p.sequences;
  int *ends = room, *lens = room + count, *shifts = room + 2 * count;
  for (int s = tid; s < count; s += THREADS) {
    const int len = length_of(p, s), tokens = tokens_of(p, s);
    lens[s] = len, shifts[s] = len - tokens;
    ends[s] = tiles_of(p, s, tokens, len) * p.heads.kv_heads;
  }
  __syncthreads();
  for (int from = 0, before = 0; from < count && tid < 32; from += 32) {
    int x = from + lane < count ? ends[from + lane] : 0;
    for (int d = 1; d < 32; d <<= 1) {
      const int y = __shfl_up_sync(~0u, x, d);
      if (lane >= d) x += y;
    }
    if (from + lane < count) ends[from + lane] = before + x;
    before += __shfl_sync(~0u, x, 31);
  }
  __syncthreads();
  if (blockIdx.x == 0)
    for (int s = tid; s < 3 * count; s += THREADS) p.plan[s] = room[s];
  const int all = ends[count - 1], workers = gridDim.x * p.active;
  return Line{ends, lens, shifts, count, all / workers, all % workers};
}

// Before the first kernel: the rotated queries of all sequences, as fragments in global memory.
extern "C" __global__ void __launch_bounds__(THREADS, 1) tq4_rotate(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(1024) char smem[];
  const int each = PASSES_A_BLOCK, first = blockIdx.x * each;
  const int all = min(each, p.sequences * p.heads.kv_heads - first) * (4 * NT);
  const bool alone = p.even.slack < 0;  // else the next kernel waits for the store itself, and this one does not
  if (!alone) let_next_start();
  if (is_even(p)) return leave();
  Rows rows;
  ask_for_query(rows, p, first, all);
  if (alone) {
    wait_for_previous();  // the store of the step's own keys and values
    let_next_start();
  }
  const float level_scale = power_below(warp_max(fabsf(p.centroids[threadIdx.x & 15]), 1));
  rotate_query(p, smem, rows, first, all, level_scale * p.scale_log2, p.fragments, p.row_scales);
  leave();
}
#endif
