"""Runs mixture-of-experts models several times larger than VRAM + RAM.

`from fomoe.llm import LLM` is the Python API; `fomoe serve` the command.
"""

__version__ = "0.1.0"
