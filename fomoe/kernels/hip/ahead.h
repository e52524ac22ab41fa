// Weights that the next launch will read come into the device's cache while this one ends: a wave
// that has no tile to fetch any more asks for a piece of them instead, FM_STAGES - 1 times.
//
// The bus is busy then while a launch ends and the next one prepares its vectors. Nothing depends on
// what has come: the next launch reads it as ever. No device's tuning asks for it: on an NVIDIA H200
// it won nothing (kernels/gpu/tuning.py).
#pragma once

// A multiple of 16 bytes of device memory from a multiple of 16 on, and how much of it a wave asks
// for at a time: 0, or a multiple of 16.
struct Span {
  const char* from;
  long long bytes, piece;
};

// A wave's part of a span: all waves take their first pieces, then their second ones.
struct Ahead {
  Span span;
  int piece;

  FM_DEV Ahead(const Span& s) : span(s), piece(blockIdx.x * FM_WAVES + threadIdx.x / FM_WAVE) {}
  FM_DEV void take() {
    const long long at = piece * span.piece, left = span.bytes - at;
    if (span.piece && left > 0) fm_fetch_ahead(span.from + at, (int)(left < span.piece ? left : span.piece));
    piece += gridDim.x * FM_WAVES;
  }
};
