"""Benchmarks: ``python -m bench NAME --device cpu --json FILE``. Numbers worth keeping go to LOG.md, lost ideas too."""
