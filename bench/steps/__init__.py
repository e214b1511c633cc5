"""What ``python -m bench step`` is made of: shapes and records, the sides that train on them, FLOP by formula."""
