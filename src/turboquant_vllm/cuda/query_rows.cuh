// A tile of 16 tokens for 16 query rows of a pass or more: query rows are rows of both products' left sides, so that scores are
// weights where they come out, without a shuffle, and no product is half zeros.
//
// Tokens in an order in which reads of codes meet no bank twice, columns of Q K^T and what P V contracts over alike:
//
//   lane c of a quad holds      column 2 * c    2 * c + 1    of the first tile    2 * c    2 * c + 1   of the second
//   of tokens                          c        7 - c                             8 + c    15 - c
//
// Q K^T, step s of KSTEPS, over the dimensions of bytes b and b + 1 as in query.cuh; lane (r, c):
//
//   A: query             byte b      b + 1          B: K                 byte b    b + 1
//     row r                a0         a2              column r             b0        b1
//     row r + 8            a1         a3
//
// P V contracts over tokens; a byte's two dimensions are columns of two products:
//
//   A: weights           tokens c, 7 - c     8 + c, 15 - c
//     row r                a0                  a2
//     row r + 8            a1                  a3
//   B: V, tile j of D / 16, byte r * D / 16 + j          b0: tokens c, 7 - c     b1: 8 + c, 15 - c
//   C: sums              o[j][h][0], o[j][h][1]: row r, dimension 2 * b + h, b = 2 * c * D / 16 + j and (2 * c + 1) * D / 16 + j
//                        o[j][h][2], o[j][h][3]: row r + 8
#if MANY
#define ROW_TILES (NT / 4)   // of 16 query rows
#define BYTE_TILES (D / 16)  // of 8 bytes of a value

__device__ __forceinline__ float largest_of(const float* x) { return fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])); }

// Results of a segment so far.
struct Sums {
  // Sums of P V; of rows r and r + 8 the largest scores and the sums of weights; the power of two that values are weighted over.
  float o[ROW_TILES][BYTE_TILES][2][4], m[ROW_TILES][2], l[ROW_TILES][2], v_ref;
  float row_scales[ROW_TILES][2];
  u32 qf[Q_IN_REGISTERS ? ROW_TILES * KSTEPS : 1][4];

  // `load_query(to, i)` gives fragment i of the query, ROW_TILES * KSTEPS of them.
  template <class Load>
  __device__ __forceinline__ void begin(const float* scales, Load load_query) {
    const int r = (threadIdx.x & 31) >> 2;
    if (Q_IN_REGISTERS) {
#pragma unroll
      for (int i = 0; i < ROW_TILES * KSTEPS; i++) load_query(qf[i], i);
    }
    v_ref = 0;
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        row_scales[t][h] = scales[t * 16 + h * 8 + r];
        m[t][h] = LOWEST, l[t][h] = 0;
#pragma unroll
        for (int j = 0; j < BYTE_TILES; j++) o[t][j][h][0] = o[t][j][h][1] = o[t][j][h][2] = o[t][j][h][3] = 0;
      }
  }
  template <class Load>
  __device__ __forceinline__ void query_of(u32* to, int i, Load load_query) const {
    if (Q_IN_REGISTERS) to[0] = qf[i][0], to[1] = qf[i][1], to[2] = qf[i][2], to[3] = qf[i][3];
    else load_query(to, i);
  }

  // Tokens n0 .. n0 + 15 of a pass, whose tile is at `tile`, and what their groups share at `group_scores`.
  template <class Levels, class Load>
  __device__ __forceinline__ void add(const DecodeParams& p, const Pass& pass, const Seen& seen, int n0, u32 tile,
                                      u32 group_scores, Levels levels, Load load_query) {
    const int lane = threadIdx.x & 31, r = lane >> 2, c = lane & 3;
    auto token = [&](int k) { return (k & 2) * 4 + (k & 1 ? 7 - c : c); };

    // Q K^T
    float s[ROW_TILES][2][4], s2[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};  // of odd steps, which so need not wait for even ones
#pragma unroll
    for (int i = 0; i < ROW_TILES * 8; i++) s[i / 8][i / 4 % 2][i % 4] = 0;
    {
      u32 ka[KWORDS], kb[KWORDS];
      const int column = r & 1 ? 7 - r / 2 : r / 2;
      if (D == 64) {
        const u32 at = tile + column * (D / 2) + c * 8;
        lds2(ka, at), lds2(kb, at + 4 * D);
      } else {
#pragma unroll
        for (int i = 0; i < KWORDS / 4; i++) {
          const u32 at = tile + column * (D / 2) + place(i * 4 + c, column) * 16;
          lds4(ka + 4 * i, at), lds4(kb + 4 * i, at + 4 * D);
        }
      }
#pragma unroll
      for (int i = 0; i < KSTEPS; i++) {
        const u32 xa = ka[i >> 1], xb = kb[i >> 1], at = (i & 1) * 2;
        const u32 a0 = levels(xa, at), a1 = levels(xa, at + 1), b0 = levels(xb, at), b1 = levels(xb, at + 1);
#pragma unroll
        for (int t = 0; t < ROW_TILES; t++) {
          u32 q[4];
          query_of(q, t * KSTEPS + i, load_query);
          const bool aside = ROW_TILES == 1 && (i & 1);
          mma(aside ? s2[0] : s[t][0], q[0], q[1], q[2], q[3], a0, a1);
          mma(aside ? s2[1] : s[t][1], q[0], q[1], q[2], q[3], b0, b1);
        }
      }
    }
    if (ROW_TILES == 1) {
#pragma unroll
      for (int i = 0; i < 8; i++) s[0][i / 4][i % 4] += s2[i / 4][i % 4];
    }
    u32 norms[8];  // of token(0) .. token(3), of keys and of values
    lds4(norms, tile + NORM_PART + c * 16), lds4(norms + 4, tile + NORM_PART + 64 + c * 16);
    float kn[4], vn[4];
#pragma unroll
    for (int k = 0; k < 4; k++) kn[k] = __uint_as_float(norms[k]), vn[k] = __uint_as_float(norms[4 + k]);

#if MASKED
    if (n0 < seen.open_begin) {  // what no row's window shows has no part in the reference of the norms either
      const int hidden = seen.first_key(p, pass, 0) - n0;
#pragma unroll
      for (int k = 0; k < 4; k++)
        if (token(k) < hidden) vn[k] = 0;
    }
#endif
    // x: scores of row r + 8 * h and token(k), in log2
    const bool edge = seen.has_edge(n0);
    float x[ROW_TILES][2][4];
    bool raise = fmaxf(fmaxf(fabsf(vn[0]), fabsf(vn[1])), fmaxf(fabsf(vn[2]), fabsf(vn[3]))) > 16 * v_ref;
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
#if OFFSETS
        u32 shared[2];  // of a negative norm's key the score is another
        lds2(shared, group_scores + (n0 / KEYS_OF_GROUP % GROUPS_AT_ONCE * (4 * NT) + t * 16 + h * 8 + r) * 8);
#endif
#pragma unroll
        for (int k = 0; k < 4; k++) {
          float& score = x[t][h][k] = s[t][k / 2][2 * h + k % 2] * (kn[k] * row_scales[t][h]);
#if OFFSETS
          score = kn[k] < 0 ? __uint_as_float(shared[1]) : score + __uint_as_float(shared[0]);
#endif
#if MASKED
          if (p.cap > 0) score = soft_cap(score, p.cap, p.rate);
#endif
        }
        if (edge) {
          const int row = t * 16 + h * 8 + r, first = seen.first_key(p, pass, row) - n0, last = seen.last_key(p, pass, row) - n0;
#pragma unroll
          for (int k = 0; k < 4; k++)
            if (token(k) > last || token(k) < first) x[t][h][k] = -INFINITE;
        }
        raise |= largest_of(x[t][h]) > m[t][h] + 4;
      }
    if (__any_sync(~0u, raise)) {  // rare: both references follow, and what was summed is rescaled
      float largest = 0, keep_v = 1;
#pragma unroll
      for (int k = 0; k < 4; k++) largest = fmaxf(largest, fabsf(vn[k]) < INFINITE ? fabsf(vn[k]) : 0);
      largest = warp_max(largest, 1, 4);
      if (largest > 16 * v_ref) {
        const float ref = power_below(largest);
        keep_v = v_ref * inverse_power(ref);
        v_ref = ref;
      }
#pragma unroll
      for (int t = 0; t < ROW_TILES; t++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const float top = fmaxf(m[t][h], warp_max(largest_of(x[t][h]), 1, 4));
          const float keep = ex2(m[t][h] - top);
          m[t][h] = top, l[t][h] *= keep;
#pragma unroll
          for (int j = 0; j < BYTE_TILES * 4; j++) o[t][j / 4][j / 2 % 2][2 * h + j % 2] *= keep * keep_v;
        }
    }
    u32 weights[ROW_TILES][4];
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float w[4];
#pragma unroll
        for (int k = 0; k < 4; k++) w[k] = ex2(x[t][h][k] - m[t][h]);
        l[t][h] += (w[0] + w[1]) + (w[2] + w[3]);
#pragma unroll
        for (int k = 0; k < 4; k++) w[k] *= vn[k] * inverse_power(v_ref);
        if (edge) {  // a hidden norm may be NaN
          const int row = t * 16 + h * 8 + r, first = seen.first_key(p, pass, row) - n0, last = seen.last_key(p, pass, row) - n0;
#pragma unroll
          for (int k = 0; k < 4; k++)
            if (token(k) > last || token(k) < first) w[k] = 0;
        }
        weights[t][h] = half2_bits(w[0], w[1]), weights[t][2 + h] = half2_bits(w[2], w[3]);
      }

    // P V: words of a lane's four tokens, with the bytes of all tiles j
    u32 va[4][VWORDS];
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const u32 at = tile + V_PART + token(k) * (D / 2) + value_words(r, token(k));
      if (D == 64) va[k][0] = lds(at);
      else if (D == 128) lds2(va[k], at);
      else lds4(va[k], at);
    }
#pragma unroll
    for (int j = 0; j < BYTE_TILES; j++) {
      u32 pair[4];
#pragma unroll
      for (int k = 0; k < 4; k++) pair[k] = levels(va[k][j / 4], j % 4);
      const u32 even0 = prmt(pair[0], pair[1], 0x5410u), even1 = prmt(pair[2], pair[3], 0x5410u);
      const u32 odd0 = prmt(pair[0], pair[1], 0x7632u), odd1 = prmt(pair[2], pair[3], 0x7632u);
#pragma unroll
      for (int t = 0; t < ROW_TILES; t++) {
        mma(o[t][j][0], weights[t][0], weights[t][1], weights[t][2], weights[t][3], even0, even1);
        mma(o[t][j][1], weights[t][0], weights[t][1], weights[t][2], weights[t][3], odd0, odd1);
      }
    }
  }

  // The normalised rows, and the log2 of each row's sum of exp2, to `part`; `rows` of them are there.
  __device__ __forceinline__ void leave(float* part, int rows, float level_scale) const {
    const int lane = thread_number() % 32, r = lane / 4, c = lane % 4;
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float total = warp_sum(l[t][h], 1, 4), factor = total == 0 ? 0 : v_ref * (level_scale / total);
        float* row = part + (t * 16 + h * 8 + r) * PART_PITCH;
        if (t * 16 + h * 8 + r >= rows) continue;
        if (c == 0) row[D] = total == 0 ? -INFINITE : m[t][h] + lg2(total);
#pragma unroll
        for (int e = 0; e < 2; e++)
#pragma unroll
          for (int j = 0; j < BYTE_TILES; j += 2) {
            const auto& x = o[t][j];
            const auto& y = o[t][j + 1];
            const int at = 2 * h + e;
            *(float4*)(row + (2 * c + e) * (D / 8) + 2 * j) =
                make_float4(x[0][at] * factor, x[1][at] * factor, y[0][at] * factor, y[1][at] * factor);
          }
      }
  }
};
#endif
