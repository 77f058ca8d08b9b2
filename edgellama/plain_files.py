"""What may be read in a directory that came from a stranger: plain files, and links that stay inside.

A link could show a private file as part of a model, and a pipe or a device would never end.
"""

from __future__ import annotations

from pathlib import Path

# What a checkpoint's readers look at, by ending.
_READ = (".json", ".jinja", ".safetensors", ".pth", ".model", ".md")


def strange_file(path: Path, *, links: bool = True) -> str | None:
    """Why the file at `path` must not be read, in words; None for a plain file, a directory, and for nothing at all.

    links: a link may lead to another file of the same directory, or into the cache of the Hugging Face hub, which
    keeps the files of a model as links.
    """
    if path.is_symlink():
        try:
            target = path.resolve()
        except (OSError, RuntimeError):
            return "a symbolic link that leads nowhere"
        if not links:
            return "a symbolic link"
        if not target.is_relative_to(path.parent.resolve()) and not _is_hub_blob(target):
            return "a symbolic link out of its directory"
    if path.exists() and not path.is_file() and not path.is_dir():
        return "not a plain file"
    return None


def strange_files(directory: Path) -> dict[str, str]:
    """By name, what is wrong with the files of a checkpoint's directory that could be read."""
    found = {f.name: strange_file(f) for f in sorted(directory.iterdir()) if f.suffix.lower() in _READ}
    return {name: why for name, why in found.items() if why}


def _is_hub_blob(target: Path) -> bool:
    """Whether a path is `models--OWNER--NAME/blobs/HASH`, as in the cache of huggingface_hub."""
    folder = target.parent
    return folder.name == "blobs" and folder.parent.name.startswith("models--")
