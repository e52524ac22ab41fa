// Sine and cosine in float32 for every device, within 1.5e-7 for |x| up to 2^20. Needs fm_fma and
// fm_rint. Polynomials: S. Moshier, Cephes Math Library, sinf.c.
#pragma once

struct fm_angle {
    float rest;       // in [-pi/4, pi/4]
    int quarter;      // of pi/2, from 0 to 3
};

// x less a multiple of pi/2, which is the sum of three floats: the first product cancels exactly.
FM_DEV fm_angle fm_reduce_angle(float x) {
    const float k = fm_rint(x * 0.636619772367581343f);
    float rest = fm_fma(-k, 1.57079637050628662109375f, x);
    rest = fm_fma(-k, -4.37113882867379e-8f, rest);
    rest = fm_fma(-k, -1.7151245100059e-15f, rest);
    return {rest, int(k) & 3};
}
FM_DEV float fm_small_sin(float x) {
    const float z = x * x;
    float p = fm_fma(z, -1.9515295891e-4f, 8.3321608736e-3f);
    p = fm_fma(z, p, -1.6666654611e-1f);
    return fm_fma(z * x, p, x);
}
FM_DEV float fm_small_cos(float x) {
    const float z = x * x;
    float p = fm_fma(z, 2.443315711809948e-5f, -1.388731625493765e-3f);
    p = fm_fma(z, p, 4.166664568298827e-2f);
    return fm_fma(z * z, p, fm_fma(z, -0.5f, 1.0f));
}
FM_DEV float fm_sin_of(fm_angle a) {
    const float value = a.quarter & 1 ? fm_small_cos(a.rest) : fm_small_sin(a.rest);
    return a.quarter & 2 ? -value : value;
}
FM_DEV float fm_sin(float x) { return fm_sin_of(fm_reduce_angle(x)); }
FM_DEV float fm_cos(float x) {
    const fm_angle a = fm_reduce_angle(x);
    return fm_sin_of({a.rest, (a.quarter + 1) & 3});
}
