// The query times a rotation by any matrix, on tf32 units.
#if !HADAMARD
#define TURNS ((D / 8 + WARPS - 1) / WARPS)  // groups of 8 columns of the rotation that a warp turns the query into
#define TURNS_HELD (D < 256 && WARPS == 8 ? TURNS : 1)  // of which it has in registers at first
#define HELD (WARPS == 16 && D < 256 ? 2 : WARPS == 12 ? 4 : 16 / WARPS)  // rows of the query that a warp loads at a time

// Rows `done` + warp, + WARPS, ... below `all` of the queries of passes from `first` on, dimensions lane + 32 * j.
struct Rows {
  u32 at[HELD][D / 64];   // dimensions of j even and odd in one word
  Turn turn[TURNS_HELD];  // the first columns of the rotation that this warp turns rows into
};
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

// Ask for what the rotation of the first rows waits for.
__device__ __forceinline__ void ask_for_query(Rows& rows, const DecodeParams& p, int first, int all) {
  const int warp = threadIdx.x >> 5;
  load_rows(rows, p, first, 0, all);
#pragma unroll
  for (int i = 0; i < TURNS_HELD; i++)
    if ((warp + i * WARPS) * 8 < D) load_turn(rows.turn[i], p.rotation, (warp + i * WARPS) * 8, 0, false, p.pre_rotated);
}

// Rotate the queries of the passes from `first` on, `all` rows, scale each into fp16 and leave them as fragments of Q K^T.
// `rows` holds the first of them.
__device__ __forceinline__ void rotate_query(const DecodeParams& p, char* smem, Rows& rows, int first, int all, float scale,
                                             char* fragments, float* row_scales) {
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
      Turn& columns = rows.turn[min(group, TURNS_HELD - 1)];
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
          const int byte = n0 / 2 + (lane & 3), place = PAGED ? first + at / (4 * NT) : (first + at / (4 * NT)) % PASSES;
          ((u32*)(fragments + (i64)place * QUERY_BYTES))[fragment_word(row, byte)] =
              half2_bits(y[2 * i] * inverse, y[2 * i + 1] * inverse);
          if (byte == 0) row_scales[place * 4 * NT + row] = top * scale;
        }
      }
    }
    __syncthreads();
  }
}

#define PASSES_A_BLOCK (HELD * WARPS < 4 * NT ? 1 : HELD * WARPS / (4 * NT))  // of the rotation as a kernel of its own
#endif
