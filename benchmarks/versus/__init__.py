"""Parts of `vs_llama_cpp.py`: two engines as child processes, memory limits, settings, results."""
