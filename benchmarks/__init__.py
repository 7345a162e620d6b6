"""Speed of perdure as ratios to hand-written PyTorch loops."""
