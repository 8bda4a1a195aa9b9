// Keys with offsets: the scores of what a group of 64 keys shares, eight groups in one product of 16 rows.
//
//   A: row r           offset of group `first` + r, 8 bits           C: s[n][0], s[n][1]   its scores with columns 2 * c, 2 * c + 1
//      row r + 8       outlier of that group                            s[n][2], s[n][3]   the outlier's
//
// Contracted over in the order of Q K^T (query.cuh), so that the query's fragments serve: there a lane reads 16 consecutive
// bytes of codes, here the 32 numbers that stand for their dimensions.
//
//   scores of a warp, in shared memory: for each group and row of the query   | offset | offset + outlier |
#define KEYS_OF_GROUP 64
#define GROUPS_AT_ONCE 8

#if OFFSETS
// Two of four signed bytes, as half2: 1152 = 1024 + 128 is in the exponent 0x64 what a byte of 0 is, once its sign is turned.
__device__ __forceinline__ u32 two_of(u32 turned, u32 selector) { return sub_half2(prmt(turned, 0x64646464u, selector), 0x64806480u); }

// Scores of the groups from `first` on of a pass, in log2. `query(q, n * KSTEPS + i)` gives the fragment of column tile
// n, step i;
// `unit` is what makes row c of row tile t a score.
template <class Query>
__device__ __forceinline__ void score_groups(const DecodeParams& p, u32 to, const Pass& pass, int first, const float* row_scales,
                                             float unit, Query query) {
  const int lane = threadIdx.x & 31, r = lane >> 2, c = lane & 3;
  // Groups that the pass does not have repeat its last one.
  const int group = min(first + r, (pass.kv_len - 1) / KEYS_OF_GROUP);
  const int head = p.heads.head_of(pass.index), b = p.heads.batch(head), h = head - b * p.heads.kv_heads;
#if PAGED
  const int of_page = p.page_tiles / 4, page_of = group / of_page;
  const i64 page = (i64)min(max(p.block_table[b * p.table_stride + page_of], 0), p.num_pages - 1) * p.k_b + h * p.k_h;
  const int place = group - page_of * of_page;
  const signed char* rows = p.groups + page + place * (2 * D);
  const float* steps = (const float*)((const char*)p.steps + page) + place * 4;
#else
  const signed char* rows = p.groups + times(b, p.g_b) + times(h, p.g_h) + times(group, p.g_g);
  const float* steps = p.steps + times(b, p.s_b) + times(h, p.s_h) + times(group, p.s_g);
#endif
  const float step = steps[0] * unit, outlier_step = steps[1] * unit;
  float s[NQ][4];
#pragma unroll
  for (int n = 0; n < NQ; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
#pragma unroll 1  // registers are short
  for (int i = 0; i < KSTEPS; i += 4) {  // 16 numbers of each row at a time
    const int at = D == 64 ? c * 16 : 128 * (i / 8) + c * 32 + 4 * (i % 8);
    const uint4 x = *(const uint4*)(rows + at), y = *(const uint4*)(rows + D + at);
    const u32 xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const u32 xj = xs[j] ^ 0x80808080u, yj = ys[j] ^ 0x80808080u;
      const u32 a0 = two_of(xj, 0x4140u), a1 = two_of(yj, 0x4140u), a2 = two_of(xj, 0x4342u), a3 = two_of(yj, 0x4342u);
#pragma unroll
      for (int n = 0; n < NQ; n++) {
        u32 q[2];
        query(q, n * KSTEPS + i + j);
        mma(s[n], a0, a1, a2, a3, q[0], q[1]);
      }
    }
  }
  __syncwarp();  // the scores of the groups before have served
#pragma unroll
  for (int t = 0; t < NT; t++) {
    const float offset = s[t / 2][t & 1] * (step * row_scales[t]), outlier = s[t / 2][2 + (t & 1)] * (outlier_step * row_scales[t]);
    sts2(to + ((r * NT + t) * 4 + c) * 8, offset, offset + outlier);
  }
}
#endif
