// A kernel for the tests of compiler, launch and the CPU stand-in.
#include "step.h"

// Each group sums its part of x, through its waves and shared memory; SCALE is a define.
FM_KERNEL(256) void sums(const fm_step* step, const float* x, float* out, int n) {
    FM_SHARED float parts[256 / FM_WAVE];
    const int wave = fm_thread() / FM_WAVE, waves = int(blockDim.x) / FM_WAVE;
    const int i = int(blockIdx.x * blockDim.x) + fm_thread();
    const float sum = fm_wave_sum(i < n ? x[i] : 0.0f);
    if (fm_lane() == 0) parts[wave] = sum;
    fm_barrier();
    if (fm_thread() == 0) {
        float total = 0.0f;
        for (int w = 0; w < waves; w++) total += parts[w];
        out[blockIdx.x] = total * SCALE + float(step->position);
    }
}
