// Weights that the next launch will read come into the device's cache while this one ends: a wave
// that has no tile to fetch any more asks for FM_AHEAD bytes of them instead, FM_STAGES - 1 times.
//
// The bus is busy then while a launch ends and the next one prepares its vectors. FM_AHEAD is 0, or
// a multiple of 16. Nothing depends on what has come: the next launch reads it as ever.
#pragma once

// A multiple of 16 bytes of device memory from a multiple of 16 on.
struct Span {
  const char* from;
  long long bytes;
};

// A wave's part of a span: pieces of FM_AHEAD bytes, all waves' first ones, then their second ones.
struct Ahead {
  Span span;
  int piece;

  FM_DEV Ahead(const Span& s) : span(s), piece(blockIdx.x * FM_WAVES + threadIdx.x / FM_WAVE) {}
  FM_DEV void take() {
    const long long at = (long long)piece * FM_AHEAD, left = span.bytes - at;
    if (left > 0) fm_fetch_ahead(span.from + at, left < FM_AHEAD ? (int)left : FM_AHEAD);
    piece += gridDim.x * FM_WAVES;
  }
};
