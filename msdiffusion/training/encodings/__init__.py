"""What the frozen networks say of pairs, computed ahead."""
