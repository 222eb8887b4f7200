"""The command line: parses text, calls the public functions, draws.

It is the only place that prints, and that decides where log records go. Importing it loads typer and
nothing heavy; what a command needs is imported when it runs.
"""

from .app import app, main

__all__ = ["app", "main"]
