"""Surroundings of outgoing HTTP: proxies, certificates and keys are followed, or named in one sentence without secrets."""

import pytest

from vstar_engine.errors import ServerError
from vstar_engine.machine.outgoing_http import _proxy_for, client_for, shown_address, usable_key

OUTER = "http://vstar.example.com:8000"


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "127.1.2.3"])
def test_this_machine_is_never_asked_by_a_proxy(host, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://10.0.0.1:3128")
    assert _proxy_for(f"http://{host}:8000")[1] is None
    assert _proxy_for(OUTER) == ("HTTP_PROXY", "http://10.0.0.1:3128")


@pytest.mark.parametrize(
    ("listed", "url"),
    [
        ("[::1],example.com", OUTER),
        (".example.com", OUTER),
        ("*", OUTER),
        ("vstar.example.com:8000", OUTER),
        ("10.0.0.0/8", "http://10.1.2.3"),
        ("[2001:db8::1]:80,[2001:db8::2]", "http://[2001:db8::2]:8000"),
    ],
)
def test_what_no_proxy_lists_is_asked_directly(listed, url, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://10.0.0.1:3128")
    monkeypatch.setenv("NO_PROXY", listed)
    assert _proxy_for(url)[1] is None
    client_for(url, {}, 1.0, ServerError).close()
    assert (_proxy_for("http://another.org")[1] is None) == (listed == "*")


@pytest.mark.parametrize(
    ("name", "value", "url", "said"),
    [
        ("all_proxy", "socks://user:secret@10.0.0.1:1", OUTER, "all_proxy holds no address of a proxy that can be used"),
        ("HTTP_PROXY", "http://[::1", OUTER, "HTTP_PROXY holds no address of a proxy"),
        (
            "SSL_CERT_FILE",
            "/nonexistent/ca.pem",
            "https://vstar.example.com",
            "SSL_CERT_FILE.* names certificates that cannot be read",
        ),
    ],
)
def test_a_variable_that_cannot_be_followed_is_named(name, value, url, said, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(ServerError, match=said) as refused:
        client_for(url, {}, 1.0, ServerError)
    assert "secret" not in str(refused.value)


def test_certificates_do_not_matter_without_tls(monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent/ca.pem")
    client_for(OUTER, {}, 1.0, ServerError).close()


def test_keys_and_addresses_show_no_secret():
    assert usable_key("\ufeffsk-a\r\n", "the key") == "sk-a"
    assert usable_key(" \n", "the key") is None
    with pytest.raises(ValueError, match="the key holds a space, a line break") as refused:
        usable_key("sk-a\nsk-b", "the key")
    assert "sk-" not in str(refused.value)
    assert shown_address("https://user:secret@host:1/v1?key=secret") == "https://host:1/v1"
