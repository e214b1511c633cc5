"""Clips and sides of ``python -m bench video``."""
