"""The command line: parses text, calls the public functions, draws. Nothing else of the package prints or logs to a
handler.

Importing it loads typer and nothing heavy; what a command needs is imported when it runs.
"""

from .app import app, main

__all__ = ["app", "main"]
