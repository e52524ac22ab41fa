// Times llama.cpp on one GPU: prompts and decode of a run of token ids, with flash attention and without.
//
// Build against a llama.cpp tree: g++ -O2 -std=c++17 llama_cpp.cpp -Iinclude -Iggml/include -lllama.
// Usage: llama_cpp MODEL FIRST_ID PROMPT[,PROMPT...] DECODED
// Prints one JSON object a line: {"flash":..,"ubatch":..,"prompt":..,"ms":..} or {"decode":..}; times
// are medians in milliseconds, a prompt's of the whole, decode's of a token after 512 of context.

#include <llama.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

namespace {

using Tokens = std::vector<llama_token>;
constexpr int kContext = 4096, kPromptRuns = 5, kDecodeAfter = 512;

double now_ms() {
  using namespace std::chrono;
  return duration<double, std::milli>(steady_clock::now().time_since_epoch()).count();
}

double median(std::vector<double> v) {
  std::nth_element(v.begin(), v.begin() + v.size() / 2, v.end());
  return v[v.size() / 2];
}

void decode(llama_context* ctx, llama_token* ids, int n) {
  if (llama_decode(ctx, llama_batch_get_one(ids, n)) != 0) {
    std::fprintf(stderr, "llama_decode failed for %d tokens\n", n);
    std::exit(1);
  }
}

llama_context* open(llama_model* model, bool flash, int ubatch) {
  llama_context_params p = llama_context_default_params();
  p.n_ctx = kContext;
  p.n_batch = p.n_ubatch = ubatch;
  p.flash_attn_type = flash ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
  p.no_perf = true;
  return llama_init_from_model(model, p);
}

void feed(llama_context* ctx, Tokens& ids, int n, int ubatch) {
  for (int at = 0; at < n; at += ubatch) decode(ctx, ids.data() + at, std::min(ubatch, n - at));
}

void time_prompt(llama_context* ctx, Tokens& ids, int n, bool flash, int ubatch) {
  std::vector<double> times;
  for (int run = 0; run <= kPromptRuns; ++run) {
    llama_memory_clear(llama_get_memory(ctx), true);
    llama_synchronize(ctx);
    const double start = now_ms();
    feed(ctx, ids, n, ubatch);
    llama_synchronize(ctx);
    if (run) times.push_back(now_ms() - start);  // the first one warms up
  }
  std::printf("{\"flash\":%d,\"ubatch\":%d,\"prompt\":%d,\"ms\":%.4f}\n", flash, ubatch, n,
              median(times));
}

void time_decode(llama_context* ctx, Tokens& ids, int n, bool flash, int ubatch) {
  llama_memory_clear(llama_get_memory(ctx), true);
  feed(ctx, ids, kDecodeAfter, ubatch);
  std::vector<double> times;
  for (int i = 0; i < n; ++i) {
    llama_synchronize(ctx);
    const double start = now_ms();
    decode(ctx, ids.data() + kDecodeAfter + i, 1);
    llama_synchronize(ctx);
    if (i >= 16) times.push_back(now_ms() - start);
  }
  std::printf("{\"flash\":%d,\"decode\":%d,\"ms\":%.4f}\n", flash, n, median(times));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "usage: llama_cpp MODEL FIRST_ID PROMPT[,PROMPT...] DECODED\n");
    return 2;
  }
  llama_log_set([](ggml_log_level level, const char* text, void*) {
    if (level >= GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
  }, nullptr);
  ggml_backend_load_all();
  llama_model_params p = llama_model_default_params();
  p.n_gpu_layers = 999;
  llama_model* model = llama_model_load_from_file(argv[1], p);
  if (!model) return 1;
  Tokens ids(kContext);
  std::iota(ids.begin(), ids.end(), std::atoi(argv[2]));
  for (const bool flash : {false, true})
    for (const int ubatch : {512, 2048}) {
      llama_context* ctx = open(model, flash, ubatch);
      if (!ctx) continue;
      for (char* at = argv[3]; at; at = std::strchr(at, ',') ? std::strchr(at, ',') + 1 : nullptr)
        time_prompt(ctx, ids, std::atoi(at), flash, ubatch);
      if (ubatch == 512) time_decode(ctx, ids, std::atoi(argv[4]), flash, ubatch);
      llama_free(ctx);
      std::fflush(stdout);
    }
  llama_model_free(model);
  return 0;
}
