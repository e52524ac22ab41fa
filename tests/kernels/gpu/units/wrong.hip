// Kernels that are wrong on a GPU, each in one way; the engine of the CPU stand-in must say so.

FM_KERNEL(128) void part_barrier(float* out) {
    if (fm_thread() < 64) fm_barrier();
    out[fm_thread()] = 0.0f;
}

FM_KERNEL(128) void part_wave(float* out) {
    if (fm_lane() < 3) out[fm_lane()] = fm_wave_sum(1.0f);
}

FM_KERNEL(128) void two_operations(float* out) {
    out[fm_lane()] = fm_lane() % 2 ? fm_wave_sum(1.0f) : fm_wave_max(1.0f);
}

FM_KERNEL(128) void unaligned(float* out) {
    const fm_u4 v = fm_load16(out + 1);
    out[fm_thread()] = float(v.x);
}

FM_KERNEL(128) void forgotten_copy(float* out) {
    FM_SHARED float part[128 * 4];
    fm_copy16(part + 4 * fm_thread(), out);
    fm_copy_commit();
}

// Reads what was copied before it has arrived: -1 in every bit, a NaN.
FM_KERNEL(64) void early_read(float* out) {
    FM_SHARED float part[128 * 4];
    fm_copy16(part + 4 * fm_thread(), out);
    fm_copy_commit();
    const float early = part[4 * fm_thread()];
    fm_copy_wait<0>();
    out[fm_thread()] = early;
}

// Shared memory that nobody wrote is a NaN as well.
FM_KERNEL(64) void unwritten(float* out) {
    FM_SHARED float part[64];
    FM_DYN_SHARED(float, more);
    out[fm_thread()] = fm_thread() % 2 ? part[fm_thread()] : more[fm_thread()];
}

// A wave reads what another one writes without a barrier: which it gets depends on the order.
FM_KERNEL(128) void race(float* out) {
    FM_SHARED float part[2];
    if (fm_thread() % 64 == 0) part[fm_thread() / 64] = 1.0f;
    out[fm_thread()] = part[1 - fm_thread() / 64];
}
