"""llama.cpp behind JSON lines on standard input and output; runs in llama.cpp's own environment.

    {"op": "load", "path": ..., "threads": 2, "ctx": 4096, "settings": {...}}
    {"op": "run", "first": 0, "prompt": 512, "decode": 64}

It drives the low-level API, so that no Python is charged to llama.cpp but one call per batch:
logits are computed for the last token of a batch and never copied.
"""

import ctypes
import json
import os
import sys
import time

import llama_cpp

LOAD_MODES = {
    "mmap": llama_cpp.LLAMA_LOAD_MODE_MMAP,
    "read": llama_cpp.LLAMA_LOAD_MODE_NONE,
    "direct": llama_cpp.LLAMA_LOAD_MODE_DIRECT_IO,
}


@llama_cpp.llama_log_callback
def _silent(level, text, user_data):
    """Drop what llama.cpp logs."""


class Runner:
    """One model and one context."""

    def __init__(self):
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._context = None

    def load(self, path, threads, ctx, settings):
        """Load a model; `settings` are repack, flash, ubatch, load and lazy."""
        start = time.perf_counter()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = settings["repack"]
        params.load_mode = LOAD_MODES[settings["load"]]
        if settings["lazy"]:
            params.lazy_mode = llama_cpp.LLAMA_LAZY_MODE_ON
        model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = context.n_batch = ctx
        context.n_ubatch = settings["ubatch"]
        context.n_threads = context.n_threads_batch = threads
        context.flash_attn_type = int(settings["flash"])
        self._context = llama_cpp.llama_init_from_model(model, context)
        if not self._context:
            raise RuntimeError("llama.cpp makes no context")
        return {
            "load_ms": (time.perf_counter() - start) * 1e3,
            "version": llama_cpp.__version__,
            "system": llama_cpp.llama_print_system_info().decode(),
        }

    def run(self, first, prompt, decode):
        """Process a new text: ids `first`.. as prompt, the following ones token by token."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        start = time.perf_counter()
        self._decode(range(first, first + prompt))
        prompt_end = time.perf_counter()
        for token in range(first + prompt, first + prompt + decode):
            self._decode((token,))
        end = time.perf_counter()
        return {"prompt_ms": (prompt_end - start) * 1e3, "decode_ms": (end - prompt_end) * 1e3}

    def _decode(self, ids):
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        batch = llama_cpp.llama_batch_get_one(tokens, len(ids))
        code = llama_cpp.llama_decode(self._context, batch)
        if code:
            raise RuntimeError(f"llama_decode of {len(ids)} tokens returned {code}")
        llama_cpp.llama_synchronize(self._context)


def main():
    """Answer requests until the input ends; what others print goes to standard error."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    runner = Runner()
    for line in sys.stdin:
        request = json.loads(line)
        op = {"load": runner.load, "run": runner.run}[request.pop("op")]
        try:
            answer = op(**request)
        except Exception as error:  # the other side decides what an error means
            answer = {"error": str(error)}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
