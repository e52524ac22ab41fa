// Activations to int8, 32 at a time: d = max|x| / 127, q = x / d to the nearest, ties to even; the
// int8 and d are those of fomoe.kernels.reference.quantize_activations to the bit.
#pragma once

FM_DEV int quantized(float x, float d) {
    if (!(d > 0.0f)) return 0;
    // Beyond 127 only where d is so small that it has lost bits.
    return int(fm_max(-127.0f, fm_min(127.0f, fm_rint(x / d))));
}

FM_DEV unsigned packed(const int* four) {
    return (four[0] & 255) | (four[1] & 255) << 8 | (four[2] & 255) << 16 | unsigned(four[3] & 255) << 24;
}
