// Top-k of the router's scores for the tokens of a prompt.
#include "choose.h"
#include "step.h"

// Scores float [T, EXPERTS] to ids int [T, TOP_K], ascending, and their weights. A group per token.
FM_KERNEL(THREADS)
void choose_rows(const fm_step* step, const float* scores, int* ids, float* weights) {
  FM_SHARED Choice<EXPERTS, TOP_K> choice;
  const int t = blockIdx.x;
  if (t >= step->tokens) return;
  choose(scores + (long long)t * EXPERTS, choice, ids + t * TOP_K, weights + t * TOP_K);
}
