// A tile of 16 tokens for up to 8 query rows of a pass: tokens are rows of both products' left sides, query rows columns.
//
// Q K^T, step s of KSTEPS, over the dimensions of bytes b and b + 1 as in query.cuh; lane (r, c):
//
//   A: K                 byte b      b + 1         B: query          byte b    b + 1
//        token r           a0         a2             column r          x         y        the lane's uint2 of the fragment
//        token r + 8       a1         a3
//
//   C: scores            column      2 * c         2 * c + 1         column 2 * i + h is query row 8 * n + 4 * h + i of
//                        query row   8 * n + c     8 * n + 4 + c     column tile n, so that a lane's two columns are row c
//        token r                     s[n][0]       s[n][1]           of the row tiles t = 2 * n and 2 * n + 1
//        token r + 8                 s[n][2]       s[n][3]
//
// P V contracts over (token, nibble), 8 tokens a step u; tokens count from 8 * u. The nibble is on both sides of the
// product, so that a byte is looked up once and its two dimensions still end in columns of their own.
//
//   A: V                            token c    token c + 4     (lower half: level of the high nibble, upper: of the low)
//     byte b = r * D / 16 + 2 * j     a0          a2
//     byte b + 1                      a1          a3
//   B: weights                      b0: token c               b1: token c + 4
//     column r even                   (w, 0)                    (w, 0)        w: of query row r / 2 of the row tile
//     column r odd                    (0, w)                    (0, w)
//   C: sums                         column 2 * c              column 2 * c + 1, both of query row c
//     byte b                          o[0]: dimension 2 * b     o[1]: 2 * b + 1
//     byte b + 1                      o[2]: 2 * b + 2           o[3]: 2 * b + 3
#if !MANY
// Results of a segment so far.
struct Sums {
  // Sums of P V, C fragment of tile j: lane (r, c) holds dimensions r * D / 8 + 4 * j + 0..3 of row c of row tile t; largest
  // scores and sums of weights of these rows; the power of two that values are weighted over.
  float o[NT][MTILES][4], m[NT], l[NT], v_ref;
  float row_scales[NT];
  u32 qf[Q_IN_REGISTERS ? NQ : 1][KSTEPS][2];

  // `load_query(to, i)` gives fragment i of the query, NQ * KSTEPS of them.
  template <class Load>
  __device__ __forceinline__ void begin(const float* scales, Load load_query) {
    const int c = threadIdx.x & 3;
    if (Q_IN_REGISTERS) {
#pragma unroll
      for (int i = 0; i < NQ * KSTEPS; i++) load_query(qf[i / KSTEPS][i % KSTEPS], i);
    }
    v_ref = 0;
#pragma unroll
    for (int t = 0; t < NT; t++) row_scales[t] = scales[t * 4 + c];
#pragma unroll
    for (int t = 0; t < NT; t++) {
      m[t] = LOWEST, l[t] = 0;
#pragma unroll
      for (int j = 0; j < MTILES; j++) o[t][j][0] = o[t][j][1] = o[t][j][2] = o[t][j][3] = 0;
    }
  }
  template <class Load>
  __device__ __forceinline__ void query_of(u32* to, int i, Load load_query) const {
    if (Q_IN_REGISTERS) to[0] = qf[i / KSTEPS][i % KSTEPS][0], to[1] = qf[i / KSTEPS][i % KSTEPS][1];
    else load_query(to, i);
  }

  // Tokens n0 .. n0 + 15 of a pass, whose tile is at `tile`, and what their groups share at `group_scores`.
  template <class Levels, class Load>
  __device__ __forceinline__ void add(const DecodeParams& p, const Pass& pass, const Seen& seen, int n0, u32 tile,
                                      u32 group_scores, Levels levels, Load load_query) {
    const int lane = threadIdx.x & 31, r = lane >> 2, c = lane & 3;
    // Of P V's right side.
    const u32 select_low = (r & 1) ? 0x1044u : 0x4410u, select_high = (r & 1) ? 0x3244u : 0x4432u;
    const int source = c * 4 + (r >> 1);

    // Q K^T: words of tokens r and r + 8
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
        query_of(q, n * KSTEPS + i, load_query);
        mma(NT == 1 && (i & 1) ? s2 : s[n], a0, a1, a2, a3, q[0], q[1]);
      }
    }
    const u32 norms = tile + NORM_PART + r * 4;
    const float kn0 = __uint_as_float(lds(norms)), kn1 = __uint_as_float(lds(norms + 32));
    float vn0 = __uint_as_float(lds(norms + 64)), vn1 = __uint_as_float(lds(norms + 96));
    if (NT == 1) s[0][0] += s2[0], s[0][1] += s2[1], s[0][2] += s2[2], s[0][3] += s2[3];

#if MASKED
    if (n0 < seen.open_begin) {  // what no row's window shows has no part in the reference of the norms either
      const int hidden = seen.first_key(p, pass, 0) - n0 - r;
      if (hidden > 0) vn0 = 0;
      if (hidden > 8) vn1 = 0;
    }
#endif
    // x0, x1: scores of tokens r and r + 8, row c of tile t, in log2
    const bool edge = seen.has_edge(n0);
    float x0[NT], x1[NT];
    bool raise = fmaxf(fabsf(vn0), fabsf(vn1)) > 16 * v_ref;
#pragma unroll
    for (int t = 0; t < NT; t++) {
      x0[t] = s[t / 2][t & 1] * (kn0 * row_scales[t]);
      x1[t] = s[t / 2][2 + (t & 1)] * (kn1 * row_scales[t]);
#if OFFSETS
      u32 shared[2];  // of a negative norm's key the score is another
      lds2(shared, group_scores + ((n0 / KEYS_OF_GROUP % GROUPS_AT_ONCE * NT + t) * 4 + c) * 8);
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
        const int first = seen.first_key(p, pass, t * 4 + c), last = seen.last_key(p, pass, t * 4 + c);
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
        const int first = seen.first_key(p, pass, t * 4 + c), last = seen.last_key(p, pass, t * 4 + c);
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
      const u32 at = tile + V_PART + (8 * u + c) * (D / 2) + value_words(r, c);
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

  // The normalised rows, and the log2 of each row's sum of exp2, to `part`; `rows` of them are there.
  __device__ __forceinline__ void leave(float* part, int rows, float level_scale) const {
    const int lane = thread_number() % 32, r = lane / 4, c = lane % 4;
#pragma unroll
    for (int t = 0; t < NT; t++) {
      const float total = warp_sum(l[t], 4), factor = total == 0 ? 0 : v_ref * (level_scale / total);
      float* row = part + (t * 4 + c) * PART_PITCH;
      if (t * 4 + c >= rows) continue;
      if (r == 0) row[D] = total == 0 ? -INFINITE : m[t] + lg2(total);
#pragma unroll
      for (int j = 0; j < MTILES; j++)
        ((float4*)row)[r * (D / 32) + j] =
            make_float4(o[t][j][0] * factor, o[t][j][1] * factor, o[t][j][2] * factor, o[t][j][3] * factor);
    }
  }
};
#endif
