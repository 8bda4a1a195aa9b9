// What the first kernel takes, and how its shared memory is laid out.
//
//   shared memory of a block        table   256 entries of half2 (level of the high nibble, of the low nibble), each
//                                           32 times side by side: entry b, copy of lane l at b * 256 + l * 4
//                                   ring    per warp, STAGES tiles of 16 tokens: K codes, V codes, norms
//                                   query   per pass, fragments of the rotated rows in fp16, then one scale per row;
//                                           a block touches PASSES consecutive passes at most, of a CLUSTER so many teams
//                                           of its warps one each
//                                           behind each ring, of keys with offsets, scores of what groups share: groups.cuh
//                                   in the end, of a CLUSTER, in each ring or over all: a warp's results (cluster.cuh)
//
//   a stage of the ring   | K codes, 16 rows of D / 2 bytes | V codes, likewise | 16 K norms | 16 V norms |
//   at                      0                                 8 * D               16 * D       16 * D + 64
//
//   the 16-byte pieces of a row are turned round, by place(), so that lanes read from all banks (D = 128):
//     tokens 0, 1, 4, 5, ...   | 0 | 1 | 2 | 3 |            tokens 2, 3, 6, 7, ...   | 2 | 3 | 0 | 1 |
//
//   from tile to tile, STAGES = 3:   | in use | landing | asked for |   ->   | asked for | in use | landing |   ->   ...
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
#define WARP_BYTES (GROUP_SCORES + OFFSETS * 256 * NT)
#define QUERY (RING + WARPS * WARP_BYTES)
#define QUERY_BYTES (NQ * 16 * D)
#define ROW_SCALE (QUERY + PASSES * QUERY_BYTES)
#define PART (4 * NT * PART_PITCH)  // floats of the results of one segment

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
  Even even;
#elif CLUSTER
  struct { int tiles; } work;  // of each pass
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
#if CLUSTER
  u32* counters;  // of blocks of each pass that have ended, where these are spread
  void* out; float* lse; const float* sinks;  // the last of the query heads of a sequence, or null
  i64 out_b, out_h, out_n, lse_b, lse_h, lse_n;
  int blocks;  // of a cluster
  Divisor by_blocks, by_workers;  // by the working warps of a cluster
#if PAGED
  const void* slots;  // of what a store that may yet run writes
  int new_tokens, slot_bytes;
#if STORES
  store::StoreParams store;
  u32* stored;       // of blocks that have stored; zero before and behind a launch
  int store_blocks;  // these
  int first_block;   // of those that attend: a cluster's first
#endif
#endif
#endif
};
#define NO_WINDOW (1 << 30)

// Until the step's own keys and values are stored.
__device__ __forceinline__ void wait_for_store(const DecodeParams& p) {
#if STORES
  wait_for_count(p.stored, p.store_blocks);
#else
  wait_for_previous();  // the store of the step's own keys and values
#endif
}

// cap * tanh(x / cap) by exponentials, with x * rate = 2 log2(e) x / cap; near zero, where these cancel, by a series.
__device__ __forceinline__ float soft_cap(float x, float cap, float rate) {
  const float z = x * rate, y = cap - 2 * cap * reciprocal(ex2(z) + 1), square = z * z;
  return square < 0.13f ? x * fmaf(square, fmaf(square, 0.00192363f, -0.04003775f), 1) : y;
}

// How many keys back from its own position a query of sequence s sees.
template <class Params>
__device__ __forceinline__ int window_of(const Params& p, int s) {
#if MASKED
  return p.windows ? min(max(p.windows[s], 0), p.window) : p.window;
#else
  return NO_WINDOW;
#endif
}
// The first tile that a query of sequence s sees; the first query token's position is `shift`.
template <class Params>
__device__ __forceinline__ int first_tile(const Params& p, int s, int shift, int len) {
  return MASKED ? min(max(shift - window_of(p, s) + 1, 0), len) / 16 : 0;
}

// How many query rows a pass has decides which side of the products they are on: query_columns.cuh, query_rows.cuh.
#define MANY (NT >= 4)

// Which keys rows of a pass see.
struct Seen {
  // Before `open_end` every row sees every key; from `open_begin` on no row's window hides one.
  int first_row, window, open_end, open_begin;
  __device__ __forceinline__ Seen(const DecodeParams& p, const Pass& pass, int first_row) : first_row(first_row) {
    open_end = p.is_causal ? min(pass.shift + 1, pass.kv_len) : pass.kv_len;
    window = window_of(p, p.heads.batch(p.heads.head_of(pass.index))), open_begin = pass.kv_len - window;
  }
  // Whether some row does not see some of 16 keys.
  __device__ __forceinline__ bool has_edge(int n0) const { return n0 + 16 > open_end || (MASKED && n0 < open_begin); }
  // The first and the last key that row i of the pass sees.
  __device__ __forceinline__ int first_key(const DecodeParams& p, const Pass& pass, int i) const {
    return MASKED ? pass.shift + p.heads.position(first_row + i) - window + 1 : -NO_WINDOW;
  }
  __device__ __forceinline__ int last_key(const DecodeParams& p, const Pass& pass, int i) const {
    return p.is_causal ? min(pass.shift + p.heads.position(first_row + i), pass.kv_len - 1) : pass.kv_len - 1;
  }
};

// Where the 16-byte piece p of a token lies in its row: spreads the reads below over all banks.
__device__ __forceinline__ int place(int p, int token) {
  return D == 256 ? p ^ ((token & 1) << 2 | (token & 2)) : D == 128 ? p ^ (token & 2) : p;
}

// Where lane (r, c) finds the VWORDS words of a token's value that it looks up, c or token being which of 8 tokens it is.
__device__ __forceinline__ u32 value_words(int r, int token) {
  return D == 64 ? r * 4 : D == 128 ? (r * 8) ^ ((token & 2) << 4) : place(r, token) * 16;
}
// The token of a tile whose norm is at place i.
__device__ __forceinline__ int norm_token(int i) { return MANY ? (i & 2) * 4 + (i & 1 ? 7 - i / 4 : i / 4) : i; }

// Fill the table; `level`: that of lane % 16 in both halves. A warp writes four entries at a time, a lane four copies of one.
__device__ __forceinline__ void fill_table(char* smem, u32 level) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
  for (int b = warp * 4 + (lane >> 3), i = 0; i < 64; b += WARPS * 4, i += WARPS) {
    const u32 entry = prmt(__shfl_sync(~0u, level, b >> 4), __shfl_sync(~0u, level, b & 15), 0x5410);
    if (256 % (WARPS * 4) && b >= 256) break;
    *(uint4*)(smem + b * 256 + (lane & 7) * 16) = make_uint4(entry, entry, entry, entry);
  }
}

// The query as fragments, which rotate_query() makes of it: the right side of Q K^T in query_columns.cuh, the left in query_rows.cuh.
//
// Step s of KSTEPS. Lane 4 * r + c, of a quad r of lanes, contracts over the dimensions of two bytes, b and b + 1:
//   b = 64 * (s / 8) + c * min(16, D / 8) + 2 * (s % 8)        (any order serves that both sides use)
//
//   codes of a token, D = 128      |  bytes 0..15  |    16..31     |    32..47     |    48..63     |
//   read by lane                         c = 0           c = 1           c = 2           c = 3        16 bytes: steps 0..7
//
// A byte is looked up as two levels: high nibble = dimension 2 * b in the lower half, low nibble = 2 * b + 1 in the upper.

// What a lane has of a fragment of the query, and where a word of it is that holds the dimensions of a byte of row `row`.
#if MANY
typedef uint4 Fragment;
__device__ __forceinline__ void take(u32* to, const Fragment& x) { to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w; }
__device__ __forceinline__ void take(u32* to, u32 from) { lds4(to, from); }
#else
typedef uint2 Fragment;
__device__ __forceinline__ void take(u32* to, const Fragment& x) { to[0] = x.x, to[1] = x.y; }
__device__ __forceinline__ void take(u32* to, u32 from) { lds2(to, from); }
#endif
__device__ __forceinline__ int fragment_word(int row, int byte) {
  const int c = D == 64 ? byte >> 3 : (byte >> 4) & 3, step = D == 64 ? (byte & 7) >> 1 : 8 * (byte >> 6) + ((byte & 15) >> 1);
  if (MANY) return (((row >> 4) * KSTEPS + step) * 32 + 4 * (row & 7) + c) * 4 + (byte & 1) * 2 + ((row >> 3) & 1);
  const int column = 2 * (row & 3) + ((row >> 2) & 1);
  return (((row >> 3) * KSTEPS + step) * 32 + 4 * column + c) * 2 + (byte & 1);
}
