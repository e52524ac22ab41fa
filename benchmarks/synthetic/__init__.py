"""Parts of `synth.py`: model files with true shapes, random weights and realistic routing."""
