"""Files and folders that are whole or absent: writing aside, private folders, hashing."""

import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vstar_engine.errors import OutputError

PRIVATE = 0o700
# bytes of a name that leave room, of the 255 of most disks, for the words around it while it is written
LONGEST_NAME, LONGEST_SUFFIX = 160, 16


def check_writable(path: Path, force: bool = False, made: Sequence[str] | None = None) -> None:
    """Raises OutputError when `path` cannot be written, exists and `force` is off, or is a folder of what we do not make.

    A file replaces no folder and no device; where it is a link, what the link leads to is written. A folder replaces one that
    holds nothing but names which match the patterns `made`.
    """
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    if made is None and path.exists() and not path.is_dir() and not path.is_file():
        raise OutputError(f"cannot write {path}: it is a device or a pipe; give the name of a file")
    if made is None and path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder; give the name of a file")
    if path.exists() and not force:
        raise OutputError(f"{path} exists; give --force to replace it, or another name")
    if made is not None and path.is_symlink():
        raise OutputError(f"{path} is a link to {path.resolve()}; give that folder as --out, or another name")
    if made is not None and path.is_dir():
        for entry in path.iterdir():
            if not any(entry.match(pattern) for pattern in made):
                raise OutputError(f"{path} holds {entry.name}, which is not ours; it is left as it is, so give another name")
    folder = _target(path).parent
    if not folder.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write {path}: the folder {folder} is not writable")


@contextmanager
def write_aside(path: Path, folder: bool = False, private: bool = False, owner: str | None = None) -> Iterator[Path]:
    """Yields a temporary file name (or a new folder) beside `path` that takes its place on success and vanishes otherwise.

    The name says whose it is: `owner`'s, else this process's, with a word of its own, since processes of two containers may
    have one number. Where `path` is a link to a file, the file takes the place of what the link leads to.
    """
    try:
        target = _target(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    who = owner or f"{os.getpid()}-{secrets.token_hex(4)}"
    aside = target.parent / f".{_short(target.name)}.{who}.partial{target.suffix[:LONGEST_SUFFIX]}"
    try:
        if folder:
            aside.mkdir(mode=PRIVATE if private else 0o777)
        yield aside
        _take_place(aside, target)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if aside.is_dir():
            shutil.rmtree(aside)
        else:
            aside.unlink(missing_ok=True)


def _target(path: Path) -> Path:
    """Returns the absolute path that is written: what a link leads to, links to folders aside."""
    return Path(os.path.realpath(path)) if path.is_symlink() and not path.is_dir() else path.absolute()


def _short(name: str) -> str:
    """Returns a name, or a hash of one so long that no words fit around it."""
    return name if len(os.fsencode(name)) <= LONGEST_NAME else hashlib.sha256(os.fsencode(name)).hexdigest()


def _take_place(aside: Path, path: Path) -> None:
    """Renames `aside` to `path`; a folder that is there already and the new one change places, so that one always is."""
    if not (path.is_dir() and aside.is_dir()):
        os.replace(aside, path)
        return
    if _exchanged(aside, path):
        return  # the old one is aside now, and goes as what failed would
    before = path.absolute().parent / f".{_short(path.name)}.{os.getpid()}-{secrets.token_hex(4)}.before"
    os.replace(path, before)
    try:
        os.replace(aside, path)
    except OSError:
        os.replace(before, path)
        raise
    shutil.rmtree(before)


def _exchanged(one: Path, other: Path) -> bool:
    """Lets two names change places at once; False where the system or the disk cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename is None or rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return rename is not None
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number))


def clear_killed(path: Path) -> None:
    """Removes what killed writers of `path` left beside it; one must be kept away meanwhile.

    A folder that was moved away, on a disk where names cannot change places, comes back where nothing took its place.
    """
    path = path.absolute()
    name, ending = re.escape(_short(path.name)), re.escape(path.suffix[:LONGEST_SUFFIX])
    ours = re.compile(rf"\.{name}\.\d+(-[0-9a-f]+)?\.(before|partial{ending})")
    for left in [entry for entry in path.parent.iterdir() if ours.fullmatch(entry.name)]:
        if left.suffix == ".before" and not path.exists():
            os.replace(left, path)
        else:
            shutil.rmtree(left)


def user_cache() -> Path | None:
    """Returns the user's folder for what can be made again; None for a user without a home."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return None


def make_private(folder: Path) -> None:
    """Makes a folder, and those above it that are missing, for this user alone."""
    if not folder.is_dir():
        make_private(folder.parent)
        folder.mkdir(mode=PRIVATE, exist_ok=True)


def sha256(path: Path) -> str:
    """Hashes a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(content: object) -> str:
    """Hashes plain data by its JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
