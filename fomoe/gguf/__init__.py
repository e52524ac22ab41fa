"""GGUF files: header, tensor table, expert extents."""
