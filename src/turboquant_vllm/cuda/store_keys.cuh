// Storing keys that share an offset and an outlier with their group of 64 (`reference_keys.py` defines them).
//
// A run is what a launch stores in one group: rows one behind the other, those left out aside, in the order of their slots. A
// team looks for runs that begin in its span of the tokens, for one head. A run of few rows that goes on with a begun group is
// one warp's; any other is the whole team's, and always if the group begins. All warps find the same runs in the same order, so
// barriers meet. No run reads what another one of the launch writes: of the group before, if that is written now, rows as they
// came or the offset of long ago.
#if OFFSETS
// A team stores runs of one head.
__device__ __forceinline__ u32 head_of_team(const StoreParams& p) {
  const u32 team = team_number(p, block_number()) - p.vector_teams;
  return team - divide(team, p.head_inverse, p.head_shift) * p.heads;
}

// What one head of one page has: codes and norms from its first byte on, and what groups share behind those of all heads.
struct Chunk {
  const StoreParams& p;
  char* at;
  u32 place;  // where in the page the group begins

  __device__ __forceinline__ Chunk(const StoreParams& p, u32 slot, u32 head) : p(p) {
    const u32 page = divide(slot, p.page_inverse, p.page_shift);
    at = p.pages + page * p.page_stride + head * chunk_bytes(p);
    place = (slot - page * p.page_slots) & ~(GROUP - 1u);
  }
  // Groups of the heads before, and of this one. The head is worked out anew, which takes no register meanwhile.
  __device__ __forceinline__ u64 group() const { return (u64)head_of_team(p) * (p.page_slots / GROUP) + place / GROUP; }
  __device__ __forceinline__ char* groups() const { return at + (p.heads - head_of_team(p)) * chunk_bytes(p); }
  // Of the key at `i` in the group.
  __device__ __forceinline__ char* codes(u32 i) const { return at + (u64)(place + i) * (D / 2); }
  __device__ __forceinline__ float* norm(u32 i) const { return (float*)(at + (u64)p.page_size * D) + place + i; }
  // Of the group: offset and outlier, and four numbers.
  __device__ __forceinline__ char* shared() const { return groups() + group() * (2 * D); }
  __device__ __forceinline__ float* steps() const {
    return (float*)(groups() + (u64)p.heads * (p.page_slots / GROUP) * (2 * D)) + group() * 4;
  }
};

__device__ __forceinline__ u32 slot_of(const StoreParams& p, u32 row) {
  const u64 slot = row < p.tokens ? (u64)((const SLOT*)p.slots)[row] : ~0ull;
  return slot < p.num_slots ? (u32)slot : NOWHERE;
}
__device__ __forceinline__ u32 highest(u32 bits) { return bits ? 31 - __clz(bits) : 0; }
// Whether a row goes on with the run of the one before it; false if either is left out.
__device__ __forceinline__ bool follows(u32 before, u32 slot) { return before < slot && before / GROUP == slot / GROUP; }

// The last slot before a row that is in the cache. One warp.
__device__ __forceinline__ u32 slot_before(const StoreParams& p, u32 row) {
  const u32 lane = threadIdx.x & 31;
#pragma unroll 1
  for (u32 gone = 0; gone < row; gone += 128) {
    u32 found = NOWHERE;
#pragma unroll
    for (int i = 3; i >= 0; i--) {
      const u32 back = gone + 4 * lane + i, slot = back < row ? slot_of(p, row - 1 - back) : NOWHERE;
      if (slot != NOWHERE) found = slot;
    }
    const u32 lanes = __ballot_sync(FULL_MASK, found != NOWHERE);
    if (lanes) return __shfl_sync(FULL_MASK, found, __ffs(lanes) - 1);
  }
  return NOWHERE;
}

// Lists the rows of a run, from `start` on in steps of `step`, 1 or -1, of `left` that there are. One warp.
__device__ __forceinline__ Rows list_rows(const StoreParams& p, u32 start, u32 step, u32 left, Row* list) {
  const u32 lane = threadIdx.x & 31, lower = (1u << lane) - 1;
  Rows rows = {0, NOWHERE, NOWHERE};
#pragma unroll 1
  for (u32 gone = 0; gone < left; gone += 32) {
    const u32 number = start + step * (gone + lane), slot = gone + lane < left ? slot_of(p, number) : NOWHERE;
    const u32 kept = __ballot_sync(FULL_MASK, slot != NOWHERE);
    if (!kept) continue;
    const u32 neighbour = __shfl_sync(FULL_MASK, slot, highest(kept & lower));
    const u32 other = kept & lower ? neighbour : rows.last;
    const bool is_first = rows.count == 0 && !(kept & lower);
    const bool leaves = slot != NOWHERE && !is_first && !(step == 1 ? follows(other, slot) : follows(slot, other));
    const u32 leaving = __ballot_sync(FULL_MASK, leaves), those = kept & (leaving ? (leaving & -leaving) - 1 : FULL_MASK);
    if (!those) break;
    if (those >> lane & 1) list[rows.count + __popc(those & lower)] = {number, slot};
    if (rows.count == 0) rows.first = __shfl_sync(FULL_MASK, slot, __ffs(those) - 1);
    rows.last = __shfl_sync(FULL_MASK, slot, highest(those));
    rows.count += __popc(those);
    if (leaving || rows.last % GROUP == (step == 1 ? GROUP - 1 : 0)) break;  // beyond that nothing can follow
  }
  return rows;
}

// The mean of a group up to the key in `slot`, but for its outlier, as it reads back; zeros of nothing. The whole team.
__device__ __forceinline__ void read_mean(const StoreParams& p, Shared& s, u32 head, u32 slot, Vector& mean) {
  const u32 lane = threadIdx.x & 31, warp = warp_of_team(), count = slot % GROUP + 1;
  const Chunk chunk(p, slot, head);
  const float step = chunk.steps()[0], some_level = p.centroids[lane % 16];
  u32 good = 0;
  Vector sum = {};
#pragma unroll 1
  for (u32 round = 0; round < ROUNDS; round++) {
    const u32 first = (round * TEAM + warp) * FEW, at = min(first + lane % FEW, count - 1);
    if (first >= count) break;
    const float found = *chunk.norm(at);
    const bool counts = first + lane % FEW < count && found >= 0 && found < INFINITE;
    const float norm = counts ? found : 0;
    good += counts;
    const u32 word = *(const u32*)(chunk.codes(at) + lane / FEW * 4);
#pragma unroll
    for (int i = 0; i < 8; i++) {  // the higher half of a byte comes first
      const float level = __shfl_sync(FULL_MASK, some_level, word >> (i / 2 * 8 + (i + 1) % 2 * 4) & 15);
      sum[i] = fmaf(norm, level, sum[i]);
    }
  }
  meet();  // what was gathered before has been read
  publish(s, sum, good);
  meet();
  good = gather(s, sum);
  const bool any = good > 0 && step < INFINITE;
  const float share = any ? reciprocal(good) : 0;
  read_offset(chunk.shared(), any ? step : 0, mean);
#pragma unroll
  for (int i = 0; i < 8; i++) mean[i] = any ? fmaf(sum[i], share, mean[i]) : 0;
}

// The offset of a group that begins with `plan.count` rows, which are loaded then. The whole team.
__device__ __forceinline__ void begin_group(const StoreParams& p, Shared& s, u32 head, Plan plan, const Chunk& chunk) {
  float* own = s.offset[warp_of_team()];
  Vector prior = {}, sum;
  if (plan.source == OFFSET_BEFORE) {
    const Chunk before(p, plan.previous, head);
    read_offset(before.shared(), before.steps()[0], prior);
  } else if (plan.source == PAGES_BEFORE) {
    read_mean(p, s, head, plan.previous, prior);
  }
  write_vector(own, prior);
  u32 kept = 0;
#pragma unroll 1
  for (bool is_own = plan.source != ROWS_BEFORE;; is_own = true) {
    const u32 count = is_own ? plan.count : plan.before;
    load_rows<TEAM>(p, s, head, is_own ? s.own : s.before, count);
    kept = sum_but_outlier(s, count, sum);
    transform(sum);
    if (is_own) break;
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] *= UNIT * reciprocal(max(kept, 1u));
    write_vector(own, sum);
  }
  __syncwarp();
  read_vector(own, prior);
  const float weight = plan.source == NO_PRIOR ? 0 : PRIOR_WEIGHT, share = reciprocal(fmaxf(kept + weight, 1));
#pragma unroll
  for (int i = 0; i < 8; i++)
    sum[i] = fmaf(sum[i], UNIT, weight * prior[i]) * share;
  const bool writes = warp_of_team() == 0 && threadIdx.x % FEW == 0;
  const float step = eight_bits(sum, chunk.shared(), writes);
  __syncwarp();  // the prior has been read
  write_vector(own, sum);
  if (thread_of_team() == 0) chunk.steps()[0] = step, chunk.steps()[3] = 0;
}

// Row `round` of this lane's, rotated, less the offset.
__device__ __forceinline__ void residual(const Shared& s, int round, Vector& y) {
  Vector offset;
  scaled_row(s, round, y);
  transform(y);
  read_vector(s.offset[warp_of_team()], offset);
#pragma unroll
  for (int i = 0; i < 8; i++) y[i] = fmaf(y[i], UNIT, -offset[i]);
}

// Stores a run: codes and norms of its rows, and the outlier if that is among them. RUN_WARPS: one, or all of a team.
template <int RUN_WARPS>
__device__ __forceinline__ void store_run(const StoreParams& p, const Quantiser& quantiser, Shared& s, u32 head, const Row* list,
                                          Plan plan) {
  const u32 lane = threadIdx.x & 31, c = lane % FEW, warp = RUN_WARPS > 1 ? warp_of_team() : 0, count = plan.count;
  const u32 slot = list[0].slot, places = slot % GROUP;
  const Chunk chunk(p, slot, head);
  float distance = -1;  // of the outlier that there is
  if (RUN_WARPS == 1 || places) {
    bool marked = false;  // all that is there is asked for before any of it is needed
#pragma unroll
    for (u32 i = lane; i < GROUP; i += 32) marked |= i < places && *chunk.norm(i) < 0;
    const float step = chunk.steps()[0], there = chunk.steps()[2];
    Vector offset;
    read_offset(chunk.shared(), step, offset);
    load_rows<RUN_WARPS>(p, s, head, list, count);
    write_vector(s.offset[warp_of_team()], offset);
    if (__any_sync(FULL_MASK, marked)) distance = there;
  } else {
    begin_group(p, s, head, plan, chunk);
  }
  __syncwarp();

  Farthest farthest = {0, NOWHERE};
  bool is_outlier = false;
#pragma unroll 1
  for (u32 round = 0;; round++) {  // the rows, and the one that lies farthest once more: the same code, which may be in no cache
    const u32 first = (round * RUN_WARPS + warp) * FEW, at = min(first + c, count - 1);
    if (first >= count) {
      if (RUN_WARPS == 1) __syncwarp();  // every lane has read what is written below
      farthest = farthest_of<RUN_WARPS>(s, farthest);
      if (!(farthest.distance > distance)) return;
      for (u32 i = lane; i < places && warp == 0; i += 32) {
        float& norm = *chunk.norm(i);
        if (norm < 0) norm = -norm;
      }
      const u32 index = farthest.index == NOWHERE ? 0 : farthest.index;
      if (index / FEW % RUN_WARPS != warp) return;
      round = index / FEW / RUN_WARPS, is_outlier = true;
    }
    Vector y;
    residual(s, round, y);
    if (is_outlier) {
      const bool found = farthest.index != NOWHERE;
      const u32 index = found ? farthest.index : 0;
#pragma unroll
      for (int i = 0; i < 8; i++) y[i] = found ? y[i] : 0;
      const float step = eight_bits(y, chunk.shared() + D, c == index % FEW);
      if (lane != index % FEW) return;
      chunk.steps()[1] = step, chunk.steps()[2] = farthest.distance;
      if (found) {
        float& norm = *chunk.norm(list[index].slot % GROUP);
        norm = -norm;
      }
      return;
    }
    float back;
    const bool live = first + c < count;
    const float square = square_in_range(y, back, live), inverse = inverse_length(square), length = root(square, inverse) * back;
    const u32 place = list[at].slot % GROUP;
    const float norm = quantiser.quantise(y, 1, inverse, length, live, chunk.codes(place) + lane / FEW * 4);
    if (live && lane < FEW) *chunk.norm(place) = norm;
    if (live && length > farthest.distance && length < INFINITE) farthest = {length, at};
  }
}

// The run that begins with row `row`, which is longer than a warp's or begins a group. The whole team.
__device__ __forceinline__ void store_long_run(const StoreParams& p, const Quantiser& quantiser, Shared& s, u32 head, u32 row) {
  meet();  // the run before has been stored
  if (warp_of_team() == 0) {
    const Rows own = list_rows(p, row, 1, p.tokens - row, s.own);
    Plan plan = {own.count, NO_PRIOR, NOWHERE, 0};
    if (own.first % GROUP == 0 && own.count < GROUP) {
      const u32 place = own.first - divide(own.first, p.page_inverse, p.page_shift) * p.page_slots;
      u64 previous = place ? own.first - 1 : ~0ull;
      if (p.previous_slots) previous = (u64)((const SLOT*)p.previous_slots)[row];
      if (previous < p.num_slots) {
        const Rows before = list_rows(p, row - 1, ~0u, row, s.before);
        const Source now = before.last % GROUP == 0 ? ROWS_BEFORE : OFFSET_BEFORE;
        plan.source = before.count && before.first == previous ? now : PAGES_BEFORE;
        plan.previous = (u32)previous, plan.before = before.count;
      }
    }
    if (thread_of_team() == 0) s.plan = plan;
  }
  meet();
  store_run<TEAM>(p, quantiser, s, head, s.own, s.plan);
}

// The runs that begin in span number `team` / heads, for one head.
__device__ __forceinline__ void store_groups(const StoreParams& p, u32 team) {
  extern __shared__ __align__(1024) char smem[];
  static_assert(sizeof(Shared) == TEAM_BYTES);
  Shared& s = ((Shared*)smem)[team_of_block()];
  const u32 lane = threadIdx.x & 31, lower = (1u << lane) - 1;
  const u32 number = divide(team, p.head_inverse, p.head_shift), head = team - number * p.heads;
  u32 base = number * p.span, slot = slot_of(p, base + lane);
  const Quantiser quantiser(p);
  for (u32 i = thread_of_team(); i < D; i += TEAM_THREADS) {
    const float scale = p.key_scales ? p.key_scales[head * D + i] : 1.0f;
    s.scales[i] = __uint_as_float(__float_as_uint(scale) ^ (__float_as_uint(p.rotation[i]) & 0x80000000u));
  }
  meet();
  const u32 stop = min((number + 1) * p.span, p.tokens);
#pragma unroll 1
  for (; base < stop; base += 32, slot = slot_of(p, base + lane)) {
    const u32 last = slot_before(p, base);
    const u32 kept = __ballot_sync(FULL_MASK, slot != NOWHERE), neighbour = __shfl_sync(FULL_MASK, slot, highest(kept & lower));
    const bool leads = slot != NOWHERE && !follows(kept & lower ? neighbour : last, slot);
    // What a lane that leads a run knows of it.
    const u32 leaders = __ballot_sync(FULL_MASK, leads), next = leaders & ~lower & ~(1u << lane);
    const u32 rows = kept & ~lower & (next ? (next & -next) - 1 : FULL_MASK), end = __shfl_sync(FULL_MASK, slot, highest(rows));
    const bool ends = next || base + 32 >= p.tokens || end % GROUP == GROUP - 1;
    const bool is_short = ends && __popc(rows) <= SHORT && slot % GROUP;
    const bool here = leads && base + lane < stop;
    const u32 all_short = __ballot_sync(FULL_MASK, here && is_short);
    u32 mine = __ballot_sync(FULL_MASK, all_short >> lane & 1 && __popc(all_short & lower) % TEAM == warp_of_team());
    u32 all_long = __ballot_sync(FULL_MASK, here && !is_short);
#pragma unroll 1
    for (; mine; mine &= mine - 1) {
      const u32 those = __shfl_sync(FULL_MASK, rows, __ffs(mine) - 1);
      Row* list = s.few[warp_of_team()];
      __syncwarp();  // the run before has been stored
      if (those >> lane & 1) list[__popc(those & lower)] = {base + lane, slot};
      __syncwarp();
      store_run<1>(p, quantiser, s, head, list, {(u32)__popc(those), NO_PRIOR, NOWHERE, 0});
    }
#pragma unroll 1
    for (; all_long; all_long &= all_long - 1) store_long_run(p, quantiser, s, head, base + __ffs(all_long) - 1);
  }
}
#endif
