"""``tempo-fast scan``: which videos can be read, what each costs, and repaired copies of those that want one."""

from tempo_fast.scan.command import scan_command

__all__ = ["scan_command"]
