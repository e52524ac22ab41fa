"""The model, exactly: specification, blocks, architectures, tokenizer."""
