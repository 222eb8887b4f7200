"""Serving: an index in the RAM of several processes, and the client that asks them.

`wire` is what travels between them, `batcher` decides what is searched together, `placement` what each server holds,
`routing` whom a client asks. Those do no I/O. `holdings` loads and swaps, `server` and `client` are the two ends.
"""

__all__: list[str] = []
