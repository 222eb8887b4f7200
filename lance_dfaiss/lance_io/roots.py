"""Where a dataset lies: its main root, and the folder of it on this machine."""

from __future__ import annotations

from pathlib import Path

from lance import LanceDataset

__all__ = ["branch_of", "local_path", "main_root"]


def main_root(dataset: LanceDataset) -> str:
    """Return the root of the main branch: a branch's handle lies in ``<root>/tree/<branch>``."""
    uri = dataset.uri.rstrip("/")
    branch = branch_of(dataset)
    return _absolute(uri if branch is None else uri.removesuffix(f"/tree/{branch}"))


def branch_of(dataset: LanceDataset) -> str | None:
    """Return the branch that a handle is on, None for the main one."""
    uri = dataset.uri.rstrip("/")
    if "/tree/" in uri:
        for branch in dataset.branches.list():
            if uri.endswith(f"/tree/{branch}"):
                return str(branch)
    return None


def _absolute(uri: str) -> str:
    local = local_path(uri)
    return uri if local is None else str(local)


def local_path(uri: str) -> Path | None:
    """Return the folder that a URI names on this machine, None for one elsewhere."""
    for scheme in ("file://", "file-object-store://"):
        if uri.startswith(scheme):
            return Path(uri.removeprefix(scheme)).absolute()
    return None if "://" in uri else Path(uri).absolute()
