"""``tempo-fast scan``: which videos can be read, what each costs, and repaired copies of those that want one."""

from tempo_fast.scan.command import Options, scan_command

__all__ = ["Options", "scan_command"]
