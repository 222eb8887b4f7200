"""Starting servers: on this machine, and by hand."""

from __future__ import annotations

from .local import LocalCluster
from .options import ServeOptions
from .restarts import RestartPolicy

__all__ = ["LocalCluster", "RestartPolicy", "ServeOptions"]
