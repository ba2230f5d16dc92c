"""API keys: read from a file or the environment, stored as hashes, compared in constant time."""

import hashlib
import hmac
import os
import re
from collections.abc import Mapping
from pathlib import Path

from vstar_engine.artifacts.text_file import read_text, unreadable

ENVIRONMENT = "VSTAR_API_KEYS"
# the owner of jobs on a server without keys
LOCAL = "local"
# the owner whose keys are valid for /metrics only
METRICS = "metrics"
SHORTEST = 16
HASHED = "sha256:"
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


def hashed(key: str) -> str:
    """Returns the SHA-256 of a key; keys are long and random, so no salt is needed."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


class ApiKeys:
    """The keys of a server, each with its owner. An owner may have several keys, so that keys can be rotated."""

    def __init__(self, owners: Mapping[str, str]):
        self._owners = dict(owners)  # hash of a key -> owner

    def __len__(self) -> int:
        return len(self._owners)

    @staticmethod
    def read(file: Path | None = None, environ: Mapping[str, str] = os.environ) -> "ApiKeys":
        """Reads one key a line, `[OWNER ]KEY` or `[OWNER ]sha256:HEX`; in the environment also separated by commas.

        ValueError for a file that is unreadable or readable by everyone, and for a key that is too short.
        """
        lines = environ.get(ENVIRONMENT, "").replace(",", "\n").split("\n")
        if file is not None:
            try:
                lines += read_text(file).split("\n")
                mode = file.stat().st_mode
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"cannot read the keys in {file}: {unreadable(error)}") from error
            if mode & 0o007:
                raise ValueError(f"every user of this machine can access the keys in {file}: chmod o-rwx {file}")
        owners: dict[str, str] = {}
        for line in (line.strip() for line in lines):
            if line and not line.startswith("#"):
                digest, owner = _parse(line)
                owners[digest] = owner
        if file is not None and not owners:
            raise ValueError(f"{file} holds no keys; write one a line")
        return ApiKeys(owners)

    def owner(self, header: str | None) -> str | None:
        """Returns the owner of the key in an Authorization header; None for an unknown key."""
        scheme, _, key = (header or "").partition(" ")
        digest = hashed(key.strip()) if scheme.lower() == "bearer" else ""
        found = None
        for known, owner in self._owners.items():  # all are compared, so that the time reveals nothing
            if hmac.compare_digest(known, digest):
                found = owner
        return found


def _parse(line: str) -> tuple[str, str]:
    owner, _, key = line.rpartition(" ")
    owner = owner.strip()
    if key.startswith(HASHED):
        digest = key.removeprefix(HASHED).lower()
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ValueError(f"a hashed key is {HASHED} followed by 64 hexadecimal digits")
    else:
        if len(key) < SHORTEST:
            raise ValueError(f"a key must have at least {SHORTEST} characters; create one with `openssl rand -hex 24`")
        digest = hashed(key)
    if owner and (not NAME.fullmatch(owner) or owner == LOCAL):
        raise ValueError(
            f"a key's owner consists of letters, digits, '.', '_' and '-' and is not {LOCAL!r}, got {owner[:80]!r}"
        )
    return digest, owner or f"key-{digest[:12]}"
