// Products of matrices with the vector of one token, several matrices in one launch.
//
// Groups belong to one matrix each, in proportion to its bytes, and their waves take its rows in
// turns. A group prepares the vector for itself while its first tiles are on their way.
// Defines: those of tiles.h, FM_COLS, FM_PARTS matrices at most, FM_TYPES (bit t: type t occurs),
// FM_INPUT_BYTES of shared memory for the vector.
#include "stream.h"

struct Part {
  const void* weights;
  float* out;
  int rows, type;
  int first, groups;  // which groups it has
};
struct Parts {
  Part part[FM_PARTS];
};

// The matrix of a group. Parts are named by constants: an index would put them into memory.
FM_DEV Part part_of(const Parts& parts, int group) {
  Part found = parts.part[0];
  FM_UNROLL for (int i = 1; i < FM_PARTS; ++i)
    if (group >= parts.part[i].first) found = parts.part[i];
  return found;
}

constexpr int kScratchBytes = 256;  // sums of the waves
static_assert(FM_WAVES * 4 <= kScratchBytes, "a sum for each wave");

// Calls body.run<F>() for the format of `type`; only types of FM_TYPES are compiled.
template <int kType, class Body>
FM_DEV void run_if(int type, const Body& body) {
  if constexpr ((FM_TYPES >> kType & 1) != 0)
    if (type == kType) body.template run<Product<kType>>();
}
template <class Body>
FM_DEV void run_as(int type, const Body& body) {
  run_if<F32>(type, body), run_if<F16>(type, body), run_if<BF16>(type, body);
  run_if<Q4_K>(type, body), run_if<Q5_K>(type, body), run_if<Q6_K>(type, body);
  run_if<Q8_0>(type, body), run_if<Q5_0>(type, body), run_if<IQ4_XS>(type, body);
}

template <class F>
FM_DEV MatrixStream<F, FM_COLS> stream_of(const Part& part, char* memory) {
  static_assert(InputSize<F, FM_COLS>::kBytes <= FM_INPUT_BYTES, "room for the vector");
  // Neighbouring rows go to different groups, so that no core has all of what is left over.
  const int wave = wave_index() * part.groups + (int)blockIdx.x - part.first;
  const Ring ring(memory + kScratchBytes + FM_INPUT_BYTES);
  return MatrixStream<F, FM_COLS>(ring, part.weights, part.rows, wave, part.groups * FM_WAVES);
}

struct Normed {
  const float *x, *norm;
  float eps;
  float* hx;         // where the normalised vector goes as well, or null
  unsigned* hq;
  fm_f2* hs;
  Part part;
  char* memory;

  // Each group writes the blocks of 32 values whose turn it is.
  FM_DEV void keep(int quad, const Quantised& q, const fm_f4& value) const {
    if (!hx || quad / 8 % (int)gridDim.x != (int)blockIdx.x) return;
    ((fm_f4*)hx)[quad] = value;
    hq[quad] = q.word;
    if (quad % 8 == 0) hs[quad / 8] = q.scale;
  }

  template <class F>
  FM_DEV void run() const {
    Spread<FM_COLS> v, weight;
    weight.read(norm);
    auto stream = stream_of<F>(part, memory);
    stream.start();
    fm_release_next();
    fm_wait_before();
    v.read(x);
    normalise(v, weight, eps, (float*)memory);
    const Input input = InputSize<F, FM_COLS>::in(memory + kScratchBytes);
    FM_UNROLL for (int j = 0; j < Spread<FM_COLS>::kEach; ++j) {
      const int quad = (int)threadIdx.x + j * kThreads;
      const Quantised q = quantise(v.at[j]);
      if (quad >= Spread<FM_COLS>::kQuads) continue;
      put_quad<F, FM_COLS>(input, quad, q, v.at[j]);
      keep(quad, q, v.at[j]);
    }
    fm_barrier();
    stream.template multiply<false>(Held<F, FM_COLS>(input), part.out);
  }
};

// y = W h for each matrix, where h = x * norm / sqrt(mean(x^2) + eps); h is written where asked for.
FM_KERNEL(FM_WAVES * FM_WAVE)
void project(const float* x, const float* norm, float eps, float* hx, unsigned* hq, fm_f2* hs, Parts parts) {
  FM_DYN_SHARED(char, memory);
  const Part part = part_of(parts, blockIdx.x);
  run_as(part.type, Normed{x, norm, eps, hx, hq, hs, part, memory});
}

template <bool kAdd>
struct Taken {
  Rows rows;
  Part part;
  char* memory;

  template <class F>
  FM_DEV void run() const {
    auto stream = stream_of<F>(part, memory);
    stream.start();
    fm_release_next();
    fm_wait_before();
    const Input input = InputSize<F, FM_COLS>::in(memory + kScratchBytes);
    take_row<F, FM_COLS>(input, rows);
    fm_barrier();
    stream.template multiply<kAdd>(Held<F, FM_COLS>(input), part.out);
  }
};

// y = W h, or y += W h (FM_ADD), for a vector that is there in the form that W needs.
FM_KERNEL(FM_WAVES * FM_WAVE)
void project_rows(const float* x, const signed char* q, const fm_f2* s, Parts parts) {
  FM_DYN_SHARED(char, memory);
  const Part part = part_of(parts, blockIdx.x);
  run_as(part.type, Taken<FM_ADD != 0>{Rows{x, q, s}, part, memory});
}
