// A kernel that takes a given time and nothing else, for measurements of what runs beside it.

// Threads spin until the clock is `ticks` further: nanoseconds on NVIDIA, 10 ns each on AMD.
FM_KERNEL(64) void delay(unsigned long long ticks) {
    const unsigned long long start = fm_clock();
    while (fm_clock() - start < ticks) {
    }
}
