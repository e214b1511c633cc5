"""Response trees: one prompt with its videos, k answers, one row. Layout, packing, vision, forward."""
