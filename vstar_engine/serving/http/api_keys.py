"""API keys: read from a file or the environment, held only as hashes, compared in constant time."""

import hashlib
import hmac
import os
import re
from collections.abc import Mapping
from pathlib import Path

ENVIRONMENT = "VSTAR_API_KEYS"
# whose jobs are without keys
LOCAL = "local"
# whose keys open /metrics alone
METRICS = "metrics"
SHORTEST = 16
HASHED = "sha256:"
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


def hashed(key: str) -> str:
    """Hashes a key; keys are random and long, so that a plain hash cannot be guessed back."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


class ApiKeys:
    """Who may use the server. An owner with two keys keeps their videos while keys change."""

    def __init__(self, owners: Mapping[str, str]):
        self._owners = dict(owners)  # hash of a key -> its owner

    def __len__(self) -> int:
        return len(self._owners)

    @staticmethod
    def read(file: Path | None = None, environ: Mapping[str, str] = os.environ) -> "ApiKeys":
        """Reads a key a line, `[OWNER ]KEY` or `[OWNER ]sha256:HEX`; in the environment also parted by commas.

        ValueError for a file that cannot be read or is open to others, and for a key that is too short.
        """
        lines = environ.get(ENVIRONMENT, "").replace(",", "\n").splitlines()
        if file is not None:
            try:
                lines += file.read_text().splitlines()
                mode = file.stat().st_mode
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"cannot read the keys in {file}: {error}") from error
            if mode & 0o007:
                raise ValueError(f"the keys in {file} are open to every user of this machine: chmod o-rwx {file}")
        owners: dict[str, str] = {}
        for line in (line.strip() for line in lines):
            if line and not line.startswith("#"):
                digest, owner = _parse(line)
                owners[digest] = owner
        if file is not None and not owners:
            raise ValueError(f"{file} holds no keys; give one a line")
        return ApiKeys(owners)

    def owner(self, header: str | None) -> str | None:
        """Returns whose key an Authorization header carries; None for nobody's."""
        scheme, _, key = (header or "").partition(" ")
        digest = hashed(key.strip()) if scheme.lower() == "bearer" else ""
        found = None
        for known, owner in self._owners.items():  # all are compared, so that time tells nothing
            if hmac.compare_digest(known, digest):
                found = owner
        return found


def _parse(line: str) -> tuple[str, str]:
    owner, _, key = line.rpartition(" ")
    owner = owner.strip()
    if key.startswith(HASHED):
        digest = key.removeprefix(HASHED).lower()
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ValueError(f"a hashed key is {HASHED} and 64 hexadecimal digits")
    else:
        if len(key) < SHORTEST:
            raise ValueError(f"a key has at least {SHORTEST} characters; make one with `openssl rand -hex 24`")
        digest = hashed(key)
    if owner and (not NAME.fullmatch(owner) or owner == LOCAL):
        raise ValueError(f"a key's owner is named in letters, digits, '.', '_' and '-' and not {LOCAL!r}, got {owner[:80]!r}")
    return digest, owner or f"key-{digest[:12]}"
