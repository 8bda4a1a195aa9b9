// Storing many keys and values: a warp takes 8 vectors at a time, and nothing is shared between warps but the signs of the rotation.
//
// The rotation is H diag(s) / sqrt(D). H is a Kronecker product over the bits of a coordinate's number, so each bit may be
// taken where it suits: bits 0, 3, 4, 5 by a matrix instruction with the 16 x 16 Hadamard matrix, whose entries +-1 are
// exact; bits 1 and 2 by adding four such products, with the matrix or its negative; bits 6 and 7 by additions in float32.
//
//   matrix instruction m16n8k16, D = A B + C; lane = 4 * g + c
//   A  the Hadamard matrix: row bits 0, 1, 2, 3 are bits 3, 4, 5, 0 of the coordinate that comes out
//   B  8 vectors, vector g held by lanes 4 g ... 4 g + 3; k bits 0, 1, 2, 3 are bits 0, 3, 4, 5 of the one that goes in
//   D  vectors 2 c and 2 c + 1, coordinates 8 g ... 8 g + 7 of each 64: one word of codes
//
// The squared lengths are the diagonal of the 8 vectors' products with each other. For m16n8k8, the two registers of B are an
// A whose rows g and g + 8 are the two halves of vector g: times either half, one half of the rows is of use.

// Two entries of the 16 x 16 Hadamard matrix, in row `row`, columns `column` and `column` + 1.
__device__ __forceinline__ u32 hadamard_pair(int row, int column) {
  const u32 one = BF16 ? 0x3f80u : 0x3c00u;
  // Row bit 3 meets column bit 0, row bits 0, 1, 2 meet column bits 1, 2, 3.
  const u32 sign = (__popc(row & 7 & (column >> 1)) & 1) << 15;
  return (one | sign) | (one | (sign ^ ((row & 8) << 12))) << 16;
}

// Keys or values, by team number `team` of `teams`, each of which is a block.
__device__ __forceinline__ void store_vectors(const StoreParams& p, bool is_v, u32 team, u32 teams) {
  __shared__ uint4 signs[D / 8];
  const int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
  const char* from = (is_v ? p.v : p.k) + 16 * c;
  const u32 from_token = is_v ? p.v_token : p.k_token, from_head = is_v ? p.v_head : p.k_head;
  const u64 chunk = chunk_bytes(p);
  const u64 codes_part = (is_v ? (u64)p.page_size * (D / 2) : 0) + 4 * g, norms_part = (u64)p.page_size * (is_v ? D + 4 : D);
  const u32 tiles = (p.rows + 7) / 8, step = teams * TEAM;
  u32 tile = team * TEAM + warp_of_team();

  uint4 x[OUTER * 2];
  auto load = [&](u32 tile) {
    if (tile >= tiles) return;
    const u32 row = min(tile * 8 + g, p.rows - 1);
    const u32 token = divide(row, p.head_inverse, p.head_shift), head = row - token * p.heads;
    const char* at = from + (u64)token * from_token + (u64)head * from_head;
#pragma unroll
    for (int i = 0; i < OUTER * 2; i++) x[i] = load16(at + 64 * i);
  };
  load(tile);

  // The first row of H is all ones, so the first row of the rotation is s.
  for (int i = thread_of_team(); i < D / 2; i += TEAM_THREADS) {
    const float2 s = ((const float2*)p.rotation)[i];
    ((u32*)signs)[i] = (__float_as_uint(s.x) >> 31 << 15) | (__float_as_uint(s.y) >> 31 << 31);
  }
  const Quantiser quantiser(p);
  u32 a[2][4];  // the matrix and its negative
#pragma unroll
  for (int i = 0; i < 4; i++) {
    a[0][i] = hadamard_pair(g + (i & 1) * 8, 2 * c + (i & 2) * 4);
    a[1][i] = a[0][i] ^ 0x80008000u;
  }
  meet();

#pragma unroll 1
  for (; tile < tiles; tile += step) {
    float y[OUTER][4][4] = {}, gram[2][4] = {};
#pragma unroll
    for (int o = 0; o < OUTER; o++) {
      const uint4 s0 = signs[o * 8 + c], s1 = signs[o * 8 + 4 + c];
      const u32 b[2][4] = {{x[2 * o].x ^ s0.x, x[2 * o].y ^ s0.y, x[2 * o].z ^ s0.z, x[2 * o].w ^ s0.w},
                           {x[2 * o + 1].x ^ s1.x, x[2 * o + 1].y ^ s1.y, x[2 * o + 1].z ^ s1.z, x[2 * o + 1].w ^ s1.w}};
#pragma unroll
      for (int in = 0; in < 4; in++) {
#pragma unroll
        for (int out = 0; out < 4; out++) mma(y[o][out], a[(in & out) % 3 != 0], b[0][in], b[1][in]);
        mma_short(gram[0], b[0][in], b[1][in], b[0][in]);
        mma_short(gram[1], b[0][in], b[1][in], b[1][in]);
      }
    }
    load(tile + step);
    // Where the two vectors go, known before it is needed.
    u32 head[2], slot[2];
#pragma unroll
    for (int v = 0; v < 2; v++) {
      const u32 row = tile * 8 + 2 * c + v, token = divide(min(row, p.rows - 1), p.head_inverse, p.head_shift);
      head[v] = row - token * p.heads;
      const u64 there = row < p.rows ? (u64)((const SLOT*)p.slots)[token] : ~0ull;
      slot[v] = there < p.num_slots ? (u32)there : ~0u;
    }

    // What is left: bits 6 and 7.
#pragma unroll
    for (int bit = 1; bit < OUTER; bit <<= 1) {
#pragma unroll
      for (int i = 0; i < OUTER * 16; i++) {
        const int o = i / 16;
        if (o & bit) continue;
        float& low = y[o][i / 4 % 4][i % 4];
        float& high = y[o | bit][i / 4 % 4][i % 4];
        const float sum = low + high;
        high = low - high;
        low = sum;
      }
    }

    // Lane 4 g + c holds the products of vector g with vectors 2 c and 2 c + 1, in two halves.
    float sum[2], back[2] = {1, 1};
#pragma unroll
    for (int v = 0; v < 2; v++) sum[v] = __shfl_sync(FULL_MASK, gram[0][v] + gram[1][v + 2], 9 * c + 4 * v);
#if BF16  // squares of fp16 stay in range
    const bool extreme = __any_sync(FULL_MASK, !(is_usual(sum[0]) && is_usual(sum[1])));
#else
    const bool extreme = false;
#endif

#pragma unroll
    for (int v = 0; v < 2; v++) {
      float z[OUTER * 8];
#pragma unroll
      for (int i = 0; i < OUTER * 8; i++) z[i] = y[i / 8][i / 2 % 4][v + i % 2 * 2];
      if (extreme) sum[v] = rescale(z, back[v]) * (1.0f / D);
      const float inverse = inverse_length(sum[v]), length = root(sum[v], inverse) * back[v];
      const bool live = slot[v] < p.num_slots;
      const u32 page = divide(slot[v], p.page_inverse, p.page_shift), place = slot[v] - page * p.page_slots;
      char* to = p.pages + page * p.page_stride + head[v] * chunk;
      const float norm = quantiser.quantise(z, UNIT, inverse, length, live, to + (codes_part + (u64)place * (D / 2)));
      if (live && g == 0) *(float*)(to + (norms_part + (u64)place * 4)) = norm;
    }
  }
}
