"""Download of a model from the Hugging Face hub into its cache, through the package huggingface_hub.

Only the option --download leads here. The package itself obeys HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from edgellama.errors import CheckpointError, EdgellamaError, MissingDependencyError, ResourceError
from edgellama.files import file_sha256
from edgellama.host.hub import DEFAULT_REVISION, HubName, cache_folder, snapshot
from edgellama.host.hub_files import describing_files, gguf_models, the_gguf, weight_files

Say = Callable[[str], None]

# Bytes from which a download that breaks off goes on where it stopped. The package itself starts a file again.
LARGE = 8 * 10**6
_COMMIT = re.compile(r"[0-9a-f]{40}")


def download_model(name: HubName, *, weights: bool, say: Say) -> Path:
    """Fetches the files of a model that edgellama reads, and returns their snapshot in the cache.

    Files that are there already are not fetched again. A large file that broke off goes on where it stopped. If the hub
    cannot be reached, a snapshot in the cache is taken.

    weights: False to leave out the weights, if the model can be described without.

    Raises MissingDependencyError without the package, CheckpointError for a model that is missing or gated, and
    ResourceError for a full disk.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise MissingDependencyError(
            f"{name}: a download needs the package huggingface_hub, which is not installed",
            remedy="pip install 'edgellama[hub]'",
        ) from error
    wanted = name.revision or DEFAULT_REVISION
    try:
        with _explained(name):
            info = HfApi().model_info(name.repository, revision=wanted, files_metadata=True)
    except _Unreachable as error:
        try:
            folder = snapshot(name.folder, name.revision)
        except CheckpointError:
            raise error from error.__cause__
        say(f"{error.message}; snapshot {folder.name} in the Hugging Face cache is taken")
        return folder
    commit = str(info.sha)
    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    say(f"{name}: commit {commit} at {name.address}")
    fetch = _Fetcher(name, commit, sizes, say)
    fetch.all(_chosen(name, sizes, fetch, weights=weights))
    if not _COMMIT.fullmatch(wanted):
        _write_reference(name.folder / "refs" / wanted, commit)
    return name.folder / "snapshots" / commit


def _chosen(name: HubName, sizes: Mapping[str, Any], fetch: _Fetcher, *, weights: bool) -> list[str]:
    """Names of the files to fetch. Raises CheckpointError for several GGUF models, and for none at all."""
    names = [file for file in sizes if "/" not in file]
    describing = describing_files(names)
    if name.file is not None:
        model = [parts for parts in gguf_models(sizes) if name.file in parts]
        if not model:
            listing = ", ".join(parts[0] for parts in gguf_models(sizes)) or "none"
            raise CheckpointError(
                f"{name}: no such file at {name.address} (GGUF files there: {listing})",
                remedy="Check the name of the file.",
            )
        return [*describing, *model[0]]
    if not weights and "config.json" in names:
        return describing
    found = weight_files(names, lambda index: fetch.one(index).read_bytes())
    found = found or the_gguf(names, f"{name.address}", f"Name one of them: {name}:FILE.")
    if not found and "adapter_config.json" in names:
        raise CheckpointError(
            f"{name}: an adapter (LoRA) and not a whole model at {name.address}",
            remedy="Export its base model, and give the adapter's directory with --adapter.",
        )
    if not found:
        raise CheckpointError(
            f"{name}: no weights that edgellama reads at {name.address} (files: {_some(names)})",
            remedy="Give a repository with safetensors, pytorch_model.bin, consolidated.*.pth or a .gguf file.",
        )
    return [*describing, *found]


class _Fetcher:
    """Fetches files of one commit into the cache."""

    def __init__(self, name: HubName, commit: str, sizes: Mapping[str, int | None], say: Say) -> None:
        self.name, self.commit, self.sizes, self.say = name, commit, sizes, say
        self.snapshot = name.folder / "snapshots" / commit

    def all(self, files: list[str]) -> None:
        missing = [file for file in files if not (self.snapshot / file).exists()]
        self._check_disk(missing)
        for number, file in enumerate(missing, start=1):
            size = self.sizes.get(file)
            amount = f" ({size / 1e6:.1f} MB)" if size and size > 50_000 else ""
            self.say(f"download {number} of {len(missing)}: {file}{amount}")
            self.one(file)

    def one(self, file: str) -> Path:
        """Fetches a file, if it is not there, and returns its place."""
        from huggingface_hub import hf_hub_download

        if not (self.snapshot / file).exists():
            with _explained(self.name, file):
                if (self.sizes.get(file) or 0) >= LARGE:
                    _fetch_blob(self.name, self.commit, file, self.say)
                hf_hub_download(
                    self.name.repository, file, revision=self.commit, cache_dir=str(cache_folder())
                )
        return self.snapshot / file

    def _check_disk(self, files: list[str]) -> None:
        needed, folder = sum(self.sizes.get(file) or 0 for file in files), cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise ResourceError(
                f"{self.name}: {needed / 1e9:.1f} GB are to be fetched, and {folder} has {free / 1e9:.1f} GB free",
                remedy="Free some space, or set HF_HUB_CACHE to a folder on a larger disk.",
            )


def _fetch_blob(name: HubName, commit: str, file: str, say: Say) -> None:
    """Fetches a large file as a blob of the cache. What an earlier run left of it is kept.

    The package then only links the blob into the snapshot.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    url = hf_hub_url(name.repository, file, revision=commit)
    metadata = get_hf_file_metadata(url)
    if metadata.etag is None or not re.fullmatch(r"[\w.-]+", metadata.etag) or metadata.size is None:
        return
    headers = build_hf_headers()
    if urlsplit(metadata.location).netloc != urlsplit(url).netloc:
        headers.pop("authorization", None)  # the token is for the hub, not for its storage
    blob = name.folder / "blobs" / metadata.etag
    partial = blob.with_name(f"{metadata.etag}.edgellama-partial")
    blob.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # another process may fetch the same file
        if blob.exists():
            partial.unlink(missing_ok=True)
            return
        start = stream.tell()
        if start > metadata.size:
            stream.truncate(0)
            start = 0
        if start:
            say(f"{file}: goes on at {start / 1e6:.1f} MB")
        http_get(
            metadata.location,
            stream,
            resume_size=start,
            headers=headers,
            expected_size=metadata.size,
            displayed_filename=file,
        )
        stream.flush()
        _check_hash(partial, metadata.etag, file)
        partial.replace(blob)


def _check_hash(partial: Path, etag: str, file: str) -> None:
    """Raises CheckpointError, and removes the file, unless it has the hash that the hub names it by."""
    if re.fullmatch(r"[0-9a-f]{64}", etag):
        actual = file_sha256(partial)
    elif re.fullmatch(r"[0-9a-f]{40}", etag):
        actual = _git_hash(partial)
    else:
        return
    if actual != etag:
        partial.unlink()
        raise CheckpointError(
            f"{file}: what was fetched has hash {actual[:16]}…, and the hub names it {etag[:16]}…",
            remedy="It was altered on its way, or changed on the hub; try again.",
        )


def _git_hash(file: Path) -> str:
    total = hashlib.sha1(f"blob {file.stat().st_size}\0".encode(), usedforsecurity=False)
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            total.update(piece)
    return total.hexdigest()


class _Unreachable(CheckpointError):
    """No answer from the hub, or HF_HUB_OFFLINE is set."""


@contextmanager
def _explained(name: HubName, file: str | None = None) -> Iterator[None]:
    """Turns the package's errors into sentences with the model's address.

    file: the file that is fetched; None for a question about the model.
    """
    try:
        yield
    except EdgellamaError:
        raise
    except Exception as error:  # the transport's own types depend on the package's version
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        raise _explanation(name, file, error) from error


def _explanation(name: HubName, file: str | None, error: BaseException) -> CheckpointError:
    from huggingface_hub import errors

    what, address = str(name) if file is None else f"{name}, {file}", name.address
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return _explanation(name, file, error.__cause__)  # the package looked into its cache after an error
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            f"{what}: gated: its terms have to be accepted at {address}, by the account that HF_TOKEN belongs to",
            remedy="Accept them there, set HF_TOKEN to a token that may read (or `hf auth login`), and try again.",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(
            f"{what}: no such model at {address}, or a private one that this token may not read",
            remedy="Check the name; for a private model set HF_TOKEN, or run `hf auth login`.",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(
            f"{what}: no revision {name.revision or DEFAULT_REVISION} at {address}",
            remedy=f"Give a branch, a tag or a commit that {address}/tree/main lists.",
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return _Unreachable(
            f"{what}: HF_HUB_OFFLINE forbids to ask {address}",
            remedy="Unset HF_HUB_OFFLINE, or fetch the model on another machine and copy its cache folder.",
        )
    if isinstance(error, errors.HfHubHTTPError):
        status = getattr(error.response, "status_code", 0)
        if status == 404:
            return CheckpointError(
                f"{what}: nothing of this name at {address}", remedy="Check the name and the revision."
            )
        if status in (401, 403):
            return CheckpointError(
                f"{what}: access refused at {address} (HTTP {status})",
                remedy="Check that HF_TOKEN is valid and may read this model.",
            )
        return _Unreachable(f"{what}: HTTP {status} from {address}", remedy="Try again later.")
    reason = "no answer from the hub" if file is None else "the download broke off"
    text = str(error).strip().splitlines() or [type(error).__name__]
    return _Unreachable(
        f"{what}: {reason} at {address} ({text[0]:.160})",
        remedy="Check the connection and try again; what has come already is kept.",
    )


def _write_reference(file: Path, commit: str) -> None:
    """Notes the commit of a branch or tag, last of all: until then the cache names the earlier one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(commit, encoding="ascii")
    partial.replace(file)


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:8]) or "none"
