"""Where pairs are, and how one is read."""
