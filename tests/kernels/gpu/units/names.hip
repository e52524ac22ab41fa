// Every name that a prelude defines, in kernels whose results a test can say.

// out [11][n]: functions of x, one row each.
FM_KERNEL(64) void numbers(const float* x, float* out, int n) {
  for (int i = int(blockIdx.x * blockDim.x + threadIdx.x); i < n;
       i += int(gridDim.x * blockDim.x)) {
    const float v = x[i];
    const float values[] = {fm_exp(v),           fm_log(fm_abs(v)),
                            fm_sqrt(fm_abs(v)),  fm_rint(v),
                            fm_fma(v, v, -1.0f), fm_sin(v),
                            fm_cos(v),           fm_h2f(fm_f2h(v)),
                            fm_bf2f(fm_bits<unsigned>(v) >> 16),
                            fm_max(v, 1.0f),     fm_min(v, 1.0f)};
    FM_UNROLL
    for (int row = 0; row < 11; row++) out[row * n + i] = values[row];
  }
}

// One wave: sums, largest values, exchanges, and dot products of bytes; out [5][FM_WAVE].
FM_KERNEL(FM_WAVE) void lanes(const float* x, const int* a, const int* b, float* out) {
  const int lane = fm_lane();
  out[lane] = fm_wave_sum(x[lane]);
  out[FM_WAVE + lane] = fm_wave_max(x[lane]);
  out[2 * FM_WAVE + lane] = fm_wave_xor(x[lane], 1) + 1000.0f * fm_wave_xor(x[lane], FM_WAVE / 2);
  out[3 * FM_WAVE + lane] = float(fm_dp4a(a[lane], b[lane], lane));
  out[4 * FM_WAVE + lane] = x[fm_uniform(FM_WAVE - 1 - lane)];
}

// One wave: c [16][16] = a [16][64] b [16][64]^T, through shared memory with rows 80 bytes apart;
// then the same over k 0 to 15 alone, and over 16 to 31.
FM_KERNEL(FM_WAVE) void tiles(const signed char* a, const signed char* b, int* c) {
    FM_SHARED signed char rows[2][16 * 80];
    for (int i = fm_thread(); i < 64; i += FM_WAVE) {
        fm_copy16(rows[0] + i / 4 * 80 + i % 4 * 16, a + i * 16);
        fm_copy16(rows[1] + i / 4 * 80 + i % 4 * 16, b + i * 16);
    }
    fm_copy_commit();
    fm_copy_wait<0>();
    fm_barrier();
    fm_tile_c sum = fm_tile_zero();
    for (int k = 0; k < 64; k += 32)
        fm_tile_mma(sum, fm_tile_load_a(rows[0] + k, 80), fm_tile_load_b(rows[1] + k, 80));
    FM_UNROLL
    for (int i = 0; i < FM_TILE_REGS; i++) c[fm_tile_row(i) * 16 + fm_tile_col(i)] = sum[i];
    fm_tile_c halves[2] = {fm_tile_zero(), fm_tile_zero()};
    fm_tile_mma_half<0>(halves[0], fm_tile_load_a(rows[0], 80), fm_tile_load_b(rows[1], 80));
    fm_tile_mma_half<1>(halves[1], fm_tile_load_a(rows[0], 80), fm_tile_load_b(rows[1], 80));
    FM_UNROLL
    for (int half = 0; half < 2; half++)
        FM_UNROLL
        for (int i = 0; i < FM_TILE_REGS; i++)
            c[256 * (half + 1) + fm_tile_row(i) * 16 + fm_tile_col(i)] = halves[half][i];
}

// The last group to finish adds what all groups left; `count` starts at 0 and ends so.
FM_KERNEL(128) void last_group(const float* x, float* parts, unsigned* count, float* out) {
  FM_DYN_SHARED(unsigned, arrived);
  if (fm_thread() == 0) {
    parts[blockIdx.x] = x[blockIdx.x];
    fm_fence();
    arrived[0] = fm_atomic_add(count, 1u);
  }
  fm_barrier();
  if (arrived[0] != gridDim.x - 1) return;
  fm_fence();
  if (fm_thread() != 0) return;
  float sum = 0.0f;
  for (unsigned i = 0; i < gridDim.x; i++) sum += parts[i];
  out[0] = sum;
  *count = 0;
}

// 16 bytes at a time, by loads of whole words.
FM_KERNEL(64) void pass_on(const void* from, fm_u4* to) {
  const fm_u4 first = fm_load16(from);
  const fm_u4 second = fm_load16(static_cast<const fm_u4*>(from) + 1);
  if (fm_thread() == 0) {
    to[0] = first;
    to[1] = second;
    to[2] = fm_u4{unsigned(fm_clock() != 0), 0, 0, 0};
  }
}
