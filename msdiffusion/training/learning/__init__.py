"""What a step of training computes."""
