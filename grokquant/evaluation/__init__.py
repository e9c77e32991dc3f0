"""What quantization cost: both models on the same tokens. `run.py` leads through it."""
