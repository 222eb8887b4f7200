"""Contract suites that any implementation of this package's protocols can be held against.

Each module is a suite of its own and needs pytest; nothing else of the package imports them.
"""
