"""The reference in training: cached, content-addressed statistics instead of a second model."""
