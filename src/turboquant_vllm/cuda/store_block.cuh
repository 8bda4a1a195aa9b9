// What the teams of a block store. Of few tokens a warp takes fewer vectors at a time than of many (`store_vectors.cuh`), in less
// code: a launch between others finds its code in no cache. Keys with offsets take another way: `store_keys.cuh`.

// Keys or values, FEW of a warp at a time, by team number `team` of `teams`.
__device__ __forceinline__ void store_few(const StoreParams& p, bool is_v, u32 team, u32 teams) {
  const u32 lane = threadIdx.x & 31, c = lane % FEW, g = lane / FEW;
  const Quantiser quantiser(p);
  Vector signs;
  read_vector(p.rotation, signs);  // its first row: see store_vectors.cuh
#pragma unroll 1
  for (u32 first = (team * TEAM + warp_of_team()) * FEW; first < p.rows; first += teams * TEAM * FEW) {
    const u32 row = min(first + c, p.rows - 1), token = divide(row, p.head_inverse, p.head_shift), head = row - token * p.heads;
    const u64 there = (u64)((const SLOT*)p.slots)[token];
    const bool live = first + c < p.rows && there < p.num_slots;
    const u32 slot = live ? (u32)there : 0, page = divide(slot, p.page_inverse, p.page_shift), place = slot - page * p.page_slots;
    const u64 from = (u64)token * (is_v ? p.v_token : p.k_token) + (u64)head * (is_v ? p.v_head : p.k_head);
    Vector y;
    from_halves(load16((is_v ? p.v : p.k) + from + 16 * g), y);
#pragma unroll
    for (int i = 0; i < 8; i++) y[i] = __uint_as_float(__float_as_uint(y[i]) ^ (__float_as_uint(signs[i]) & 0x80000000u));
    float back;
    const float square = square_in_range(y, back, live), inverse = inverse_length(square), length = root(square, inverse) * back;
    transform(y);
    char* to = p.pages + page * p.page_stride + head * chunk_bytes(p);
    const u64 codes = (is_v ? (u64)p.page_size * (D / 2) : 0) + (u64)place * (D / 2) + 4 * g;
    const float norm = quantiser.quantise(y, UNIT, inverse, length, live, to + codes);
    if (live && g == 0) *((float*)(to + (u64)p.page_size * (is_v ? D + 4 : D)) + place) = norm;
  }
}

// The first `vector_teams` teams store values, those behind them keys.
__device__ __forceinline__ void store_block(const StoreParams& p) {
  const u32 number = team_number(p, blockIdx.x);
  const bool is_v = number < p.vector_teams;
  const u32 team = is_v ? number : number - p.vector_teams;
#if OFFSETS
  if (!is_v) return store_groups(p, team);
#endif
#if TEAMS == 1 && !STORES  // else there are few
  if (!p.is_few) return store_vectors(p, is_v, team, p.vector_teams);
#endif
  store_few(p, is_v, team, p.vector_teams);
}
