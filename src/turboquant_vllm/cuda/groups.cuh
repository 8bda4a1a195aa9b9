// Keys with offsets: the scores of what a group of 64 keys shares, eight groups in one product of 16 rows.
//
//   A: row r           offset of group `first` + r, 8 bits           C: s[n][0], s[n][1]   its scores with columns 2 * c, 2 * c + 1
//      row r + 8       outlier of that group                            s[n][2], s[n][3]   the outlier's
//
// Where query rows are rows (query_rows.cuh), they are columns of two products, of the offsets and of the outliers, and lane
// (r, c) has scores of groups 2 * c and 2 * c + 1.
//
// Contracted over in the order of Q K^T (query.cuh), so that the query's fragments serve: there a lane reads 16 consecutive bytes
// of codes, here the 32 numbers that stand for their dimensions.
//
//   scores of a warp, in shared memory: for each group and row of the query   | offset | offset + outlier |
#define KEYS_OF_GROUP 64
#define GROUPS_AT_ONCE 8
// Whether the query is taken from registers: else it is read again from shared memory, and takes none.
#define HELD_QUERY (Q_IN_REGISTERS && (MANY || (PAGED && !CLUSTER)))

#if OFFSETS
// Two of four signed bytes, as half2: 1152 = 1024 + 128 is in the exponent 0x64 what a byte of 0 is, once its sign is turned.
__device__ __forceinline__ u32 two_of(u32 turned, u32 selector) { return sub_half2(prmt(turned, 0x64646464u, selector), 0x64806480u); }

// The first of the groups that are scored together with that of token n.
__device__ __forceinline__ int first_of_groups(int n) { return n / (GROUPS_AT_ONCE * KEYS_OF_GROUP) * GROUPS_AT_ONCE; }

struct Group { const signed char* rows; const float* steps; };

// The group that row r of the product from group `first` on is of. Groups that a pass does not have repeat its last.
__device__ __forceinline__ int group_of(const Pass& pass, int first) {
  return min(first + (int)(threadIdx.x % 32 / 4), (pass.kv_len - 1) / KEYS_OF_GROUP);
}
#if PAGED
// Where the number of its page is.
__device__ __forceinline__ const int* page_of(const DecodeParams& p, const Pass& pass, int group) {
  return p.block_table + p.heads.batch(pass.index) * p.table_stride + p.by_page_tiles.divide(group * 4);
}
#endif

// Where a group lies; over pages, `number` is its page's.
__device__ __forceinline__ Group find_group(const DecodeParams& p, const Pass& pass, int group, int number) {
  const int head = p.heads.head_of(pass.index), b = p.heads.batch(head), h = head - b * p.heads.kv_heads;
#if PAGED
  const i64 page = (i64)min(max(number, 0), p.num_pages - 1) * p.k_b;
  const int of_page = p.page_tiles / 4;
  const i64 place = times(h, of_page) + group - p.by_page_tiles.divide(group * 4) * of_page;  // behind codes and norms of all heads
  return {p.groups + page + place * (2 * D), (const float*)((const char*)p.steps + page) + place * 4};
#else
  return {p.groups + times(b, p.g_b) + times(h, p.g_h) + times(group, p.g_g),
          p.steps + times(b, p.s_b) + times(h, p.s_h) + times(group, p.s_g)};
#endif
}

// Scores of the groups from `first` on of a pass, in log2. `query(q, n * KSTEPS + i)` gives the fragment of step i of the query's
// tile n, of 8 rows as columns, or of 16 as rows, where a tile takes two products; `unit` is what makes a row's sum a score.
template <class Sums, class Query>
__device__ __forceinline__ void score_groups(const DecodeParams& p, u32 to, const Pass& pass, int first, const Sums& sums,
                                             float unit, Query query) {
  const int lane = threadIdx.x & 31, r = lane >> 2, c = lane & 3;
  int number = 0;
#if PAGED
  number = *page_of(p, pass, group_of(pass, first));
#endif
  const Group from = find_group(p, pass, group_of(pass, first), number);
  const float step = from.steps[0] * unit, outlier_step = from.steps[1] * unit;
  auto numbers = [&](u32* x, int at) {
    const uint4 found = *(const uint4*)(from.rows + at);
    x[0] = found.x, x[1] = found.y, x[2] = found.z, x[3] = found.w;
  };
  float s[NQ][4];  // where query rows are rows: of their tile n / 2, with offsets where n is even, else with outliers
#pragma unroll
  for (int n = 0; n < NQ; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
#pragma unroll D == 256 && !HELD_QUERY ? 1 : KSTEPS  // registers are short
  for (int i = 0; i < KSTEPS; i += 4) {  // 16 numbers of each row at a time
    const int at = D == 64 ? c * 16 : 128 * (i / 8) + c * 32 + 4 * (i % 8);
    u32 xs[4], ys[4];
    numbers(xs, at), numbers(ys, D + at);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const u32 xj = xs[j] ^ 0x80808080u, yj = ys[j] ^ 0x80808080u;
      const u32 a0 = two_of(xj, 0x4140u), a1 = two_of(yj, 0x4140u), a2 = two_of(xj, 0x4342u), a3 = two_of(yj, 0x4342u);
#pragma unroll
      for (int n = 0; n < NQ; n += 1 + MANY) {
        u32 q[4];
        query(q, n / (1 + MANY) * KSTEPS + i + j);
        if (MANY) {
          mma(s[n], q[0], q[1], q[2], q[3], a0, a2);
          mma(s[n + MANY], q[0], q[1], q[2], q[3], a1, a3);
        } else {
          mma(s[n], a0, a1, a2, a3, q[0], q[1]);
        }
      }
    }
  }
  __syncwarp();  // the scores of the groups before have served
  auto leave = [&](int group, int row, float offset, float outlier) {
    sts2(to + (group * 4 * NT + row) * 8, offset, offset + outlier);
  };
#if MANY
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const int group = 2 * c + e;
    const float of_offset = __shfl_sync(~0u, step, group * 4), of_outlier = __shfl_sync(~0u, outlier_step, group * 4);
#pragma unroll
    for (int i = 0; i < NQ; i++) {  // row i % 2 * 8 + r of row tile i / 2
      const float scale = sums.row_scales[i / 2][i % 2];
      const int at = i % 2 * 2 + e;
      leave(group, i * 8 + r, s[i / 2 * 2][at] * (of_offset * scale), s[i / 2 * 2 + 1][at] * (of_outlier * scale));
    }
  }
#else
#pragma unroll
  for (int t = 0; t < NT; t++) {
    const float scale = sums.row_scales[t];
    leave(r, t * 4 + c, s[t / 2][t & 1] * (step * scale), s[t / 2][2 + (t & 1)] * (outlier_step * scale));
  }
#endif
}
#endif
