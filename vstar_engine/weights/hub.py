"""Models on the Hub, by huggingface_hub alone: ids, what would be downloaded, and downloads; each failure is one sentence."""

import errno
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vstar_engine.artifacts.file_kind import WEIGHT_ENDINGS
from vstar_engine.errors import CheckpointError, DownloadError, MissingLibrary

from . import diffusers_files as files

ID = re.compile(r"(?P<id>[\w][\w.-]*/[\w.-]+)(?:@(?P<revision>[^:@\s]+))?(?::(?P<file>[^:\s]+))?")
EXTRA = 'pip install "vstar-engine[hub]"'


@dataclass(frozen=True)
class HubId:
    """A model on the Hub: owner/name[@revision][:file]."""

    id: str
    revision: str | None = None
    file: str | None = None

    @staticmethod
    def parse(text: str) -> "HubId | None":
        """Reads an id; None for what is none, such as the name of a weight file."""
        found = ID.fullmatch(text)
        if found is None or (found["file"] is None and text.lower().endswith(WEIGHT_ENDINGS)):
            return None
        return HubId(**found.groupdict())

    def __str__(self) -> str:
        return f"{self.id}{'@' + self.revision if self.revision else ''}{':' + self.file if self.file else ''}"


@dataclass(frozen=True)
class Snapshot:
    """What a model's id stands for: the commit, the sizes in bytes and known sha256 of its files, and its licence."""

    id: HubId
    commit: str
    sizes: dict[str, int]
    sums: dict[str, str] = field(default_factory=dict)
    licence: str | None = None
    folder: Path | None = None

    def wanted(self, half: bool = False) -> list[str]:
        """Returns the files that are read, without those that an index names; CheckpointError where it is not clear which."""
        if self.id.file is not None:
            if self.id.file not in self.sizes:
                raise CheckpointError(f"{self.id.id} holds no {self.id.file}; it holds {_listed(list(self.sizes))}")
            return [self.id.file]
        if files.INDEX in self.sizes:
            return self._pipeline(half)
        single = [name for name in self.sizes if name.endswith(WEIGHT_ENDINGS) and "/" not in name]
        if files.CONFIG in self.sizes and (found := self._part("", files.UNET, half)):
            return [files.CONFIG, *found]
        if len(single) != 1:
            said = (
                f"several checkpoints: {_listed(single)}" if single else f"no checkpoint; it holds {_listed(list(self.sizes))}"
            )
            raise CheckpointError(f"{self.id.id} holds {said}; name a file of it: {self.id.id}:FILE")
        return single

    def _pipeline(self, half: bool) -> list[str]:
        found = [files.INDEX, f"{files.SCHEDULE}/{files.SCHEDULER}"]
        for part in files.STEMS:
            weights = self._part(f"{part}/", part, half)
            if not weights:
                raise CheckpointError(f"{self.id.id} holds no weights in {part}/; it holds {_listed(list(self.sizes))}")
            found += [f"{part}/{files.CONFIG}", *weights]
        found += [name for name in self.sizes if name.startswith(f"{files.TOKENIZER}/")]
        missing = [name for name in found if name not in self.sizes]
        if missing:
            raise CheckpointError(f"{self.id.id} holds no {_listed(missing)}, which a diffusers folder has")
        return found

    def _part(self, folder: str, part: str, half: bool) -> list[str]:
        """Returns the preferred weights of a part: one file, or an index; half precision first where `half`."""
        order = files.candidates(part)
        for single, index in sorted(order, key=lambda names: files.HALF not in names[0]) if half else order:
            for name in (single, index):
                if folder + name in self.sizes:
                    return [folder + name]
        return []


def _listed(names: Sequence[str]) -> str:
    few = sorted(names)[:8]
    return ", ".join(few) + (f" and {len(names) - len(few)} more" if len(names) > len(few) else "") if names else "nothing"


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise MissingLibrary(f"models of the Hub need huggingface_hub, which is not installed; {EXTRA}") from error
    return huggingface_hub


def look_up(id: HubId) -> Snapshot:
    """Asks the Hub what an id stands for; without a network, what its cache holds. DownloadError says why neither is known."""
    library = _library()
    try:
        with explained(id):
            told = library.HfApi().model_info(id.id, revision=id.revision, files_metadata=True)
    except Unreachable as error:
        if (held := _cached(id)) is None:
            raise DownloadError(f"{error}; and its cache holds no snapshot of {id}") from error
        return held
    siblings = told.siblings or []
    sums = {one.rfilename: one.lfs.sha256 for one in siblings if one.lfs}
    card = told.card_data.to_dict() if told.card_data else {}
    return Snapshot(id, told.sha, {one.rfilename: one.size or 0 for one in siblings}, sums, card.get("license"))


def _cached(id: HubId) -> Snapshot | None:
    """Returns the snapshot in the Hub's cache that an id stands for; None where there is none."""
    library = _library()
    try:
        folder = Path(library.snapshot_download(id.id, revision=id.revision, local_files_only=True))
    except library.errors.IncompleteSnapshotError as error:  # of all files of the model, few are read
        folder = Path(error.snapshot_path)
    except (library.errors.LocalEntryNotFoundError, library.errors.HFValidationError):
        return None
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return Snapshot(id, folder.name, sizes, folder=folder)


def missing_bytes(snapshot: Snapshot, names: Sequence[str]) -> int:
    """Returns how many bytes of files are not in the Hub's cache yet."""
    if snapshot.folder is not None:
        return 0
    cached = _library().try_to_load_from_cache
    there = [name for name in names if isinstance(cached(snapshot.id.id, name, revision=snapshot.commit), str)]
    return sum(snapshot.sizes[name] for name in names if name not in there)


def cache_folder() -> Path:
    """Returns the folder of the Hub's cache."""
    return Path(_library().constants.HF_HUB_CACHE)


def download(snapshot: Snapshot, names: Sequence[str]) -> Path:
    """Downloads files of a snapshot, with those that indexes among them name, and returns the folder that they lie in.

    Raises DownloadError, one sentence; what was downloaded before stays in the Hub's cache and is resumed.
    """
    if snapshot.folder is not None:
        return snapshot.folder
    root = None
    waiting = list(names)
    while waiting:
        name = waiting.pop(0)
        path = fetched(snapshot, name)
        root = path.parents[name.count("/")]
        if ".index." in name:
            waiting += [str(shard.relative_to(root)) for shard in files.shards(path, there=False)]
    assert root is not None
    return root


def fetched(snapshot: Snapshot, name: str) -> Path:
    """Downloads one file into the Hub's cache and returns its path there.

    By the revision's own name, under which the cache then finds the commit without a network.
    """
    with explained(snapshot.id, name):
        path = Path(_library().hf_hub_download(snapshot.id.id, name, revision=snapshot.id.revision))
    if snapshot.commit not in path.parts:
        raise DownloadError(f"{snapshot.id} has changed since it was looked up; run it again")
    return path


class Unreachable(DownloadError):
    """The Hub does not answer, or must not be asked."""


@contextmanager
def explained(id: HubId, name: str | None = None) -> Iterator[None]:
    """Raises DownloadError, one sentence without a token, for whatever the library raises inside."""
    import httpx

    library = _library()
    errors, hub = library.errors, library.constants.ENDPOINT
    what = f"{name} of {id}" if name else str(id)
    try:
        yield
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"{id.id} is gated: accept its terms at {hub}/{id.id}, and set HF_TOKEN to a token of that account"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DownloadError(f"{id.id} has no revision {id.revision!r} on {hub}") from error
    except (errors.RemoteEntryNotFoundError, errors.DisabledRepoError) as error:
        raise DownloadError(f"{hub} does not give {what}: {_status(error)}") from error
    except errors.RepositoryNotFoundError as error:
        raise DownloadError(
            f"there is no file or folder {id} here, and no model {id.id} on {hub} that this token may read ({_status(error)}): "
            "look at the name; for a private model set HF_TOKEN"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise Unreachable(f"there is no file or folder {id} here, and HF_HUB_OFFLINE forbids to ask {hub}") from error
    except errors.HFValidationError as error:
        raise DownloadError(f"{id.id} is no id of a model: {str(error).splitlines()[0]}") from error
    except errors.HfHubHTTPError as error:
        raise _refused(what, hub, error) from error
    except errors.LocalEntryNotFoundError as error:
        raise Unreachable(f"{hub} cannot be reached for {what}, which its cache does not hold") from error
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        raise Unreachable(f"{hub} cannot be reached for {what} ({_first_line(error)})") from error
    except httpx.HTTPError as error:
        raise DownloadError(f"the download of {what} was cut ({_first_line(error)}); run it again, and it resumes") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(cache_folder().anchor).free
            raise DownloadError(
                f"the disk of {cache_folder()} is full ({free / 1e9:.1f} GB free): make room, or set HF_HOME to another disk"
            ) from error
        said = _first_line(error)
        if "consistency check" in said.lower():
            raise DownloadError(f"the download of {what} was cut, as it is too short; run it again, and it resumes") from error
        raise DownloadError(f"{what} cannot be downloaded: {said}") from error


def _refused(what: str, hub: str, error: Any) -> DownloadError:
    """Returns the sentence for an answer that is no success."""
    status = error.response.status_code
    if status == 401:
        return DownloadError(f"{hub} does not accept the token for {what} (401): set HF_TOKEN to a valid one, or unset it")
    if status == 403:
        return DownloadError(f"{hub} does not allow this token to read {what} (403): ask for access there")
    if status >= 500 or status == 429:
        return DownloadError(f"{hub} is too busy or broken for {what} ({status}); try again later")
    return DownloadError(f"{hub} does not give {what}: {_status(error)}")


def _status(error: Any) -> str:
    return f"{error.response.status_code} {error.response.reason_phrase}".strip()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0].strip() or type(error).__name__
