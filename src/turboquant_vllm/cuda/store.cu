// Storing keys and values: rotate by a randomized Hadamard matrix, quantise, pack, straight into pages.
extern "C" __global__ void __launch_bounds__(TEAMS * TEAM_THREADS, BLOCKS) tq4_store(const __grid_constant__ StoreParams p) {
  let_next_start();
  store_block(p);
}
