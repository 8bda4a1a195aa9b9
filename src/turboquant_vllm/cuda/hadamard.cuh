// Rotation by a Sylvester-Hadamard matrix times signs, by additions: a row of D coordinates in one warp. Nothing of the matrix
// is read but its row 0, the signs over sqrt(D), since row 0 of the Hadamard matrix is all ones.
#if HADAMARD
#define OF_LANE (D / 32)  // coordinates of a row that a lane has: lane * OF_LANE and the next ones
#define ROWS_HELD ((4 * NT + WARPS - 1) / WARPS)  // rows of the query that a warp loads at a time

// x times the Hadamard matrix.
__device__ __forceinline__ void hadamard(float* x) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int h = 1; h < OF_LANE; h <<= 1)
#pragma unroll
    for (int j = 0; j < OF_LANE; j++) {
      if (j & h) continue;
      const float a = x[j], b = x[j + h];
      x[j] = a + b, x[j + h] = a - b;
    }
#pragma unroll
  for (int d = 1; d < 32; d <<= 1)
#pragma unroll
    for (int j = 0; j < OF_LANE; j++) {
      const float other = __shfl_xor_sync(~0u, x[j], d);
      x[j] = lane & d ? other - x[j] : x[j] + other;
    }
}

// A lane's part of a row of floats.
__device__ __forceinline__ void load_part(float* x, const float* row) {
#pragma unroll
  for (int j = 0; j < OF_LANE; j++) x[j] = row[(threadIdx.x & 31) * OF_LANE + j];
}

// Row i of the passes from `first` on: whether there is such a query, of which sequence and head, at which token.
struct QueryRow { bool there; int batch, kv_head, head, token; };
__device__ __forceinline__ QueryRow row_of(const DecodeParams& p, int first, int i) {
  const int pass = first + i / (4 * NT), of_all = p.heads.head_of(pass), b = p.heads.batch(of_all);
  const int kv_head = of_all - b * p.heads.kv_heads;
  const int row = p.heads.first_row(pass) + i % (4 * NT), position = p.heads.position(row);
  const int head = kv_head * p.heads.group + p.heads.member(row);
#if PAGED
  const int token = first_token_of(p.starts, b, p.tokens), tokens = first_token_of(p.starts, b + 1, p.tokens) - token;
  return {position < tokens, 0, kv_head, head, token + position};
#else
  return {row < p.heads.rows, b, kv_head, head, position};
#endif
}

// Rows `done` + warp, + WARPS, ... below `all` of the queries of passes from `first` on; two coordinates in a word.
struct Rows {
  u32 at[ROWS_HELD][OF_LANE / 2];
  float signs[OF_LANE];
#if OFFSETS
  float scales[ROWS_HELD][OF_LANE];
#endif
};
__device__ __forceinline__ void load_rows(Rows& rows, const DecodeParams& p, int first, int done, int all) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
  for (int i = 0; i < ROWS_HELD; i++) {
    if (done + warp + i * WARPS >= all) break;
    const QueryRow row = row_of(p, first, done + warp + i * WARPS);
    const unsigned short* from = (const unsigned short*)p.q + times(row.batch, p.q_b) + times(row.token, p.q_n) +
                                 times(row.head, p.q_h) + times(lane * OF_LANE, p.q_d);
#pragma unroll
    for (int j = 0; j < OF_LANE / 2; j++)
      rows.at[i][j] = row.there ? from[2 * j * p.q_d] | (u32)from[(2 * j + 1) * p.q_d] << 16 : 0;
#if OFFSETS
    if (p.key_scales) load_part(rows.scales[i], p.key_scales + row.kv_head * D);
#endif
  }
}

// Ask for what the rotation of the first rows waits for.
__device__ __forceinline__ void ask_for_query(Rows& rows, const DecodeParams& p, int first, int all) {
  load_rows(rows, p, first, 0, all);
  if ((threadIdx.x >> 5) < all) load_part(rows.signs, p.rotation);
}

// Rotate the queries of the passes from `first` on, `all` rows, scale each into fp16 and leave them as fragments of Q K^T.
// `rows` holds the first of them.
__device__ __forceinline__ void rotate_query(const DecodeParams& p, char*, Rows& rows, int first, int all, float scale,
                                             char* fragments, float* row_scales) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll 1
  for (int done = 0; done < all; done += ROWS_HELD * WARPS) {
    if (done) load_rows(rows, p, first, done, all);
#pragma unroll
    for (int i = 0; i < ROWS_HELD; i++) {
      const int at = done + warp + i * WARPS, row = at % (4 * NT), pass = first + at / (4 * NT);
      if (at >= all) break;
      float x[OF_LANE], largest = 0;
#pragma unroll
      for (int j = 0; j < OF_LANE; j++) {
        x[j] = from_half(rows.at[i][j / 2] >> j % 2 * 16, p.is_bf16) * rows.signs[j];
#if OFFSETS
        if (p.key_scales) x[j] *= reciprocal(rows.scales[i][j]);  // a division takes registers
#endif
      }
      hadamard(x);
#pragma unroll
      for (int j = 0; j < OF_LANE; j++) largest = fmaxf(largest, fabsf(x[j]));
      const float top = power_below(warp_max(largest, 1)), inverse = inverse_power(top);
      const int place = PAGED && !CLUSTER ? pass : pass % PASSES;
#pragma unroll
      for (int j = 0; j < OF_LANE / 2; j++) {
        ((u32*)(fragments + (i64)place * QUERY_BYTES))[fragment_word(row, lane * (OF_LANE / 2) + j)] =
            half2_bits(x[2 * j] * inverse, x[2 * j + 1] * inverse);
      }
      if (lane == 0) row_scales[place * 4 * NT + row] = top * scale;
    }
  }
}

#define PASSES_A_BLOCK (ROWS_HELD * WARPS / (4 * NT))  // of the rotation as a kernel of its own
#endif
