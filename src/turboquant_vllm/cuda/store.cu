// Storing keys and values: rotate by a randomized Hadamard matrix, quantise, pack, straight into pages.
extern "C" __global__ void __launch_bounds__(MOST_TEAMS * TEAM_THREADS, 1) tq4_store(const __grid_constant__ StoreParams p) {
  let_next_start();
  store_block(p);
}
