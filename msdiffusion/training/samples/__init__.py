"""From a pair to a batch."""
