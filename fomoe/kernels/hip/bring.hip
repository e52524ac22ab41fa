// Small things out of the host's memory, or into it, past the engine that copies experts: it takes copies in
// the order they were queued in, and what a layer waits for would stand behind megabytes.

// Words of pinned host memory to the device, or back.
FM_KERNEL(THREADS) void bring(const unsigned* from, unsigned* to, int words) {
  const int i = blockIdx.x * THREADS + threadIdx.x;
  if (i < words) to[i] = from[i];
}

// Floats of pinned host memory, added to those on the device.
FM_KERNEL(THREADS) void add(const float* from, float* to, int count) {
  const int i = blockIdx.x * THREADS + threadIdx.x;
  if (i < count) to[i] += from[i];
}
