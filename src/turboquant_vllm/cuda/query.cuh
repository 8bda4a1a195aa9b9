// What the first kernel takes, and its query: rotated, scaled into fp16, laid out as its matrix instructions want it.
#define THREADS (WARPS * 32)
#define NQ ((NT + 1) / 2)      // column tiles of Q K^T, 8 rows each
#define KSTEPS (D / 16)        // steps of 16 dimensions in Q K^T
#define MTILES (D / 32)        // tiles of 16 bytes in P V
#define KWORDS (D / 32)        // words of a token that a lane looks up for K
#define VWORDS (D / 64)        // and for V
#define PIECES (D / 32)        // 16-byte pieces of a token's codes
#define COPIES (D / 64)        // pieces that a lane copies of each of K and V
#define COPY_ROWS (32 / PIECES)
#define V_PART (8 * D)         // where V codes begin in a tile
#define NORM_PART (16 * D)
#define TILE_BYTES (16 * D + 128)
#define RING 65536
#define GROUP_SCORES (STAGES * TILE_BYTES)  // of a warp, behind its ring
#define GROUP_ROWS (GROUP_SCORES + OFFSETS * 256 * NT)  // behind these, if AHEAD: what groups share, steps, pages
#define GROUP_PITCH (2 * D + 16)
#define WARP_BYTES (GROUP_ROWS + AHEAD * (8 * GROUP_PITCH + 96))
#define QUERY (RING + WARPS * WARP_BYTES)
#define QUERY_BYTES (NQ * 16 * D)
#define ROW_SCALE (QUERY + PASSES * QUERY_BYTES)
#define PART (4 * NT * PART_PITCH)  // floats of the results of one segment
#define TURNS ((D / 8 + WARPS - 1) / WARPS)  // groups of 8 columns of the rotation that a warp turns the query into
#define TURNS_HELD (D < 256 && WARPS == 8 ? TURNS : 1)  // of which it has in registers at first
#define HELD (WARPS == 16 && D < 256 ? 2 : WARPS == 12 ? 4 : 16 / WARPS)  // rows of the query that a warp loads at a time

struct DecodeParams {
  const void* q; const unsigned char* k; const float* k_norms; const unsigned char* v; const float* v_norms;
  const float* centroids; const float* rotation; float* parts;
  i64 q_b, q_h, q_n, q_d, k_b, k_h, k_n, kn_b, kn_h, kn_n, v_b, v_h, v_n, vn_b, vn_h, vn_n;
#if PAGED
  // k to v_norms point into the first page; strides of tokens are a page's, k_h to vn_h one head's, k_b one page's.
  const int* block_table; const int* seq_lens; const int* starts; char* fragments; float* row_scales; int* plan;
  i64 table_stride;
  int sequences, tokens, num_pages, page_tiles, max_len;
  Divisor by_page_tiles;
#else
  Work work;
#endif
  Heads heads;
  int active, kv_len, shift, is_causal, is_bf16, pre_rotated;
  float scale_log2;
#if MASKED
  const int* windows;  // of single sequences, or null
  int window;          // NO_WINDOW: none
  float cap, rate;     // scores, in units of log2, become cap * tanh(rate * score / (2 log2(e))); cap 0: they do not
#endif
#if OFFSETS
  const signed char* groups; const float* steps; const float* key_scales;  // the last may be null
#if !PAGED
  i64 g_b, g_h, g_g, s_b, s_h, s_g;  // over pages groups and steps lie in these, one behind the other
#endif
#endif
};
#define NO_WINDOW (1 << 30)

// cap * tanh(x / cap) by exponentials, with x * rate = 2 log2(e) x / cap; near zero, where these cancel, by a series.
__device__ __forceinline__ float soft_cap(float x, float cap, float rate) {
  const float z = x * rate, y = cap - 2 * cap * reciprocal(ex2(z) + 1), square = z * z;
  return square < 0.13f ? x * fmaf(square, fmaf(square, 0.00192363f, -0.04003775f), 1) : y;
}

// How many keys back from its own position a query of sequence s sees.
__device__ __forceinline__ int window_of(const DecodeParams& p, int s) {
#if MASKED
  return p.windows ? min(max(p.windows[s], 0), p.window) : p.window;
#else
  return NO_WINDOW;
#endif
}
// The first tile that a query of sequence s sees; the first query token's position is `shift`.
__device__ __forceinline__ int first_tile(const DecodeParams& p, int s, int shift, int len) {
  return MASKED ? min(max(shift - window_of(p, s) + 1, 0), len) / 16 : 0;
}

// Where the 16-byte piece p of a token lies in its row: spreads the reads below over all banks.
__device__ __forceinline__ int place(int p, int token) {
  return D == 256 ? p ^ ((token & 1) << 2 | (token & 2)) : D == 128 ? p ^ (token & 2) : p;
}

// Rows `done` + warp, + WARPS, ... below `all` of the queries of passes from `first` on, dimensions lane + 32 * j.
struct Rows { u32 at[HELD][D / 64]; };  // dimensions of j even and odd in one word
__device__ __forceinline__ void load_rows(Rows& rows, const DecodeParams& p, int first, int done, int all) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    const int at = done + (threadIdx.x >> 5) + i * WARPS, pass = first + at / (4 * NT), head = p.heads.head_of(pass);
    if (at >= all) break;
    const int row = p.heads.first_row(pass) + at % (4 * NT), b = p.heads.batch(head), h = head - b * p.heads.kv_heads;
#if PAGED
    const int first_token = first_token_of(p.starts, b, p.tokens);
    const bool there = p.heads.position(row) < first_token_of(p.starts, b + 1, p.tokens) - first_token;
#else
    const int first_token = 0;
    const bool there = row < p.heads.rows;
#endif
    const unsigned short* from = (const unsigned short*)p.q + times(b, p.q_b) + times(first_token + p.heads.position(row), p.q_n) +
                                 times(h * p.heads.group + p.heads.member(row), p.q_h) + times(lane, p.q_d);
#pragma unroll
    for (int j = 0; j < D / 64; j++)
      rows.at[i][j] = there ? from[64 * j * p.q_d] | (u32)from[(64 * j + 32) * p.q_d] << 16 : 0;
  }
}

// Rotate the queries of the passes from `first` on, `all` rows, scale each into fp16 and leave them as B fragments of
// Q K^T. `rows` holds the first of them, `turn` the first columns of the rotation that this warp turns
// them into.
//
// Q K^T, step s of KSTEPS. Lane 4 * r + c, of a quad r of lanes, contracts over the dimensions of two bytes, b and b + 1:
//   b = 64 * (s / 8) + c * min(16, D / 8) + 2 * (s % 8)        (any order serves that both sides use)
//
//   codes of a token, D = 128      |  bytes 0..15  |    16..31     |    32..47     |    48..63     |
//   read by lane                         c = 0           c = 1           c = 2           c = 3        16 bytes: steps 0..7
//
//   A: K                 byte b      b + 1         B: query          byte b    b + 1
//        token r           a0         a2             column r          x         y        the lane's uint2 of the fragment
//        token r + 8       a1         a3
//     each a register of two levels: high nibble = dimension 2 * b in its lower half, low nibble = 2 * b + 1 in its upper
//
//   C: scores            column      2 * c         2 * c + 1         column 2 * i + h is query row 8 * n + 4 * h + i of
//                        query row   8 * n + c     8 * n + 4 + c     column tile n, so that a lane's two columns are row c
//        token r                     s[n][0]       s[n][1]           of the row tiles t = 2 * n and 2 * n + 1
//        token r + 8                 s[n][2]       s[n][3]
__device__ __forceinline__ void rotate_query(const DecodeParams& p, char* smem, Rows& rows, Turn* turn, int first, int all,
                                             float scale, char* fragments, float* row_scales) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  float* raw = (float*)smem;
#pragma unroll 1
  for (int done = 0; done < all; done += HELD * WARPS) {
    const int tiles = min((all - done + 15) / 16, HELD * WARPS / 16);
    if (done) load_rows(rows, p, first, done, all);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
      if (done + warp + i * WARPS >= all) break;
      float* row = raw + (warp + i * WARPS) * ROW_PITCH;
      float largest = 0;
#if OFFSETS
      const int head = p.heads.head_of(first + (done + warp + i * WARPS) / (4 * NT));
      const int kv_head = head - p.heads.batch(head) * p.heads.kv_heads;
      const float* scales = p.key_scales && !p.pre_rotated ? p.key_scales + kv_head * D : nullptr;
#endif
#pragma unroll
      for (int j = 0; j < D / 32; j++) {
        float x = from_half(rows.at[i][j / 2] >> j % 2 * 16, p.is_bf16);
#if OFFSETS
        if (scales) x *= reciprocal(scales[lane + 32 * j]);  // a division takes registers
#endif
        row[lane + 32 * j] = x, largest = fmaxf(largest, fabsf(x));
      }
      // sqrt(D) times the largest magnitude bounds every rotated coordinate
      largest = power_below(warp_max(largest, 1) * (D == 64 ? 8 : 16));
      if (lane == 0) row[D] = largest;
    }
    __syncthreads();
#pragma unroll TURNS_HELD
    for (int group = 0; group < TURNS; group++) {
      const int n0 = (warp + group * WARPS) * 8;
      Turn& columns = turn[min(group, TURNS_HELD - 1)];
      for (int tile = 0; tile < tiles && n0 < D; tile++) {
        float y[4] = {0, 0, 0, 0};
#pragma unroll 1
        for (int k0 = 0; k0 < D; k0 += TURN) {
          if (TURNS > TURNS_HELD) load_turn(columns, p.rotation, n0, k0, false, p.pre_rotated);
          rotate_rows<!OFFSETS>(y, raw + tile * 16 * ROW_PITCH + k0, columns);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int at = done + tile * 16 + (lane >> 2) + 8 * i, row = at % (4 * NT);
          if (at >= all) continue;
          const float top = raw[(at - done) * ROW_PITCH + D], inverse = inverse_power(top);
          const int byte = n0 / 2 + (lane & 3), c = D == 64 ? byte >> 3 : (byte >> 4) & 3;
          const int step = D == 64 ? (byte & 7) >> 1 : 8 * (byte >> 6) + ((byte & 15) >> 1);
          const int column = 2 * (row & 3) + ((row >> 2) & 1);
          const int place = PAGED ? first + at / (4 * NT) : (first + at / (4 * NT)) % PASSES;
          ((u32*)(fragments + (i64)place * QUERY_BYTES))[(((row >> 3) * KSTEPS + step) * 32 + 4 * column + c) * 2 +
                                                               (byte & 1)] = half2_bits(y[2 * i] * inverse, y[2 * i + 1] * inverse);
          if (byte == 0) row_scales[place * 4 * NT + row] = top * scale;
        }
      }
    }
    __syncthreads();
  }
}

#define PASSES_A_BLOCK (HELD * WARPS < 4 * NT ? 1 : HELD * WARPS / (4 * NT))
#if PAGED
// The line of all sequences, worked out by every block in `room`; the first block leaves its copy for the second kernel.
__device__ __forceinline__ Line plan_line(const DecodeParams& p, int* room) {
  const int tid = threadIdx.x, lane = tid & 31, count = p.sequences;
  int *ends = room, *lens = room + count, *shifts = room + 2 * count;
  for (int s = tid; s < count; s += THREADS) {
    const int len = min(max(p.seq_lens[s], 0), p.max_len), tokens = first_token_of(p.starts, s + 1, p.tokens) - first_token_of(p.starts, s, p.tokens);
    lens[s] = len, shifts[s] = len - tokens;
    const int tiles = (len + 15) / 16 - first_tile(p, s, len - tokens, len);
    ends[s] = tokens > 0 && tokens * p.heads.group <= 4 * NT ? tiles * p.heads.kv_heads : 0;
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

// Before the first kernel: the rotated queries of all sequences, as B fragments in global memory.
extern "C" __global__ void __launch_bounds__(THREADS, 1) tq4_rotate(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(1024) char smem[];
  const int warp = threadIdx.x >> 5, each = PASSES_A_BLOCK, first = blockIdx.x * each;
  const int all = min(each, p.sequences * p.heads.kv_heads - first) * (4 * NT);
  let_next_start();
  Rows rows;
  load_rows(rows, p, first, 0, all);
  Turn turn[TURNS_HELD];
#pragma unroll
  for (int i = 0; i < TURNS_HELD; i++)
    if ((warp + i * WARPS) * 8 < D) load_turn(turn[i], p.rotation, (warp + i * WARPS) * 8, 0, false, p.pre_rotated);
  const float level_scale = power_below(warp_max(fabsf(p.centroids[threadIdx.x & 15]), 1));
  rotate_query(p, smem, rows, turn, first, all, level_scale * p.scale_log2, p.fragments, p.row_scales);
}
#endif
