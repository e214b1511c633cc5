"""``tempo-fast scan``: which videos can be read, what each costs, and repaired copies of those that want one."""
