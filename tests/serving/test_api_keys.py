"""API keys: where they come from, and that only their hashes are held."""

import hashlib

import pytest

from vstar_engine.serving.http.api_keys import ApiKeys, hashed
from vstar_engine.serving.settings import Settings

KEY, OTHER = "a-key-0123456789abcdef", "another-key-0123456789"


def test_keys_from_file_and_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# ours\nalice {KEY}\n\nbob sha256:{hashlib.sha256(OTHER.encode()).hexdigest()}\n")
    file.chmod(0o600)
    keys = ApiKeys.read(file, {"VSTAR_API_KEYS": "third-key-0123456789,fourth-key-012345678"})
    assert len(keys) == 4
    assert keys.owner(f"Bearer {KEY}") == "alice"
    assert keys.owner(f"bearer {OTHER}") == "bob"
    assert keys.owner("Bearer third-key-0123456789") == f"key-{hashed('third-key-0123456789')[:12]}"
    assert not any(KEY in str(value) for value in vars(keys).values())


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", KEY, f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {hashed(KEY)}", "é"]
)
def test_other_headers_are_nobodys(header):
    assert ApiKeys.read(None, {"VSTAR_API_KEYS": KEY}).owner(header) is None


def test_an_owner_may_have_two_keys():
    keys = ApiKeys.read(None, {"VSTAR_API_KEYS": f"alice {KEY}\nalice {OTHER}"})
    assert keys.owner(f"Bearer {KEY}") == keys.owner(f"Bearer {OTHER}") == "alice"


@pytest.mark.parametrize("line", ["short", "a/b a-key-0123456789abcdef", "local a-key-0123456789abcdef", "sha256:abc"])
def test_bad_keys_are_refused(line):
    with pytest.raises(ValueError, match=r"key"):
        ApiKeys.read(None, {"VSTAR_API_KEYS": line})


def test_a_file_open_to_all_is_refused(tmp_path):
    file = tmp_path / "keys"
    file.write_text(KEY)
    file.chmod(0o644)
    with pytest.raises(ValueError, match="chmod"):
        ApiKeys.read(file, {})
    with pytest.raises(ValueError, match="cannot read"):
        ApiKeys.read(tmp_path / "none", {})
    file.chmod(0o600)
    file.write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no keys"):
        ApiKeys.read(file, {})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_a_public_address_needs_keys(host):
    with pytest.raises(ValueError, match="--keys"):
        Settings(host=host).check_bind(0)
    Settings(host=host).check_bind(1)
    Settings(host=host, insecure=True).check_bind(0)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.2"])
def test_a_loopback_address_needs_none(host):
    Settings(host=host).check_bind(0)


@pytest.mark.parametrize(
    "bad", [{"max_queue": 0}, {"port": 70000}, {"keep_for": 0}, {"grace": -1}, {"max_queue_per_key": 0}, {"instance": ""}]
)
def test_settings_that_make_no_sense(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Settings(**bad)
