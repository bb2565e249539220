"""What would let strangers in is refused at start, and the lines of a principals file are named and never quoted."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sedac.control.access.principals import read_principals
from sedac.errors import ConfigError

from testing.control.access import GET, OK, call
from testing.control.running import RunningServer


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"host": "0.0.0.0"}, "SEDAC_CONTROL_HOST=0.0.0.0 is not loopback and there is no TLS; .* or set SEDAC_CONTROL_INSECURE=1"),
        ({"host": "::"}, "SEDAC_CONTROL_HOST=:: is not loopback and there is no TLS"),
        ({"host": "control.internal"}, "is not loopback"),
        ({"host": "0.0.0.0", "principals": "file"}, "tokens would travel in the clear"),
        ({"host": "0.0.0.0", "principals": "file", "insecure": True}, "tokens would travel in the clear"),
        ({"host": "0.0.0.0", "tls_cert": "cert", "tls_key": "key"}, "anybody could change the policy; set SEDAC_CONTROL_PRINCIPALS"),
        ({"tls_cert": "cert"}, "SEDAC_CONTROL_TLS_KEY is missing"),
        ({"tls_key": "key"}, "SEDAC_CONTROL_TLS_CERT is missing"),
        ({"tls_client_ca": "cert"}, "SEDAC_CONTROL_TLS_CLIENT_CA needs SEDAC_CONTROL_TLS_CERT"),
        ({"tls_cert": "key", "tls_key": "cert"}, "are not a PEM certificate and its unencrypted key"),
        ({"tls_cert": "cert", "tls_key": "missing"}, "can't be read: No such file"),
        ({"tls_cert": "cert", "tls_key": "key", "tls_client_ca": "key"}, "holds no PEM certificate"),
        ({"principals": "missing"}, "SEDAC_CONTROL_PRINCIPALS .* can't be read"),
    ],
)
def test_what_would_let_strangers_in_is_refused_at_start(settings, tmp_path, pair, principals, changes, complaint):
    files = {"cert": pair.cert, "key": pair.key, "file": principals.path, "missing": tmp_path / "missing"}
    with pytest.raises(ConfigError, match=complaint):
        RunningServer(settings.model_copy(update={name: files.get(value, value) for name, value in changes.items()}))


def test_another_host_is_fine_with_tls_and_principals(start, tls_settings, open_channel, principals):
    running = start(tls_settings.model_copy(update={"host": "0.0.0.0"}))
    assert call(open_channel(running), GET, principals.make_metadata("viewer")) is OK


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"name": "a", "role": "viewer", "token": "SECRET"}', "line 2: token"),
        ('{"name": "a", "role": "viewer", "token_sha256": "SECRET"}', "line 2: token_sha256"),
        ('{"name": "a SECRET", "role": "viewer", "token_sha256": "' + "1" * 64 + '"}', "line 2: name"),
        ('{"name": "a", "role": "SECRET", "token_sha256": "' + "1" * 64 + '"}', "line 2: role"),
        ('{"name": "a", "role": "viewer", "token_sha256": "' + "0" * 64 + '"}', "line 2: the same token as 'first'"),
        ('{"name": "first", "role": "admin", "token_sha256": "' + "1" * 64 + '"}', "line 2: 'first' has another role"),
        ('{"name": "a", "role": "viewer", "token_sha256": "' + "1" * 64 + '", "engine_id": "e"}', "engine_id belongs to role engine"),
        ('{"name": "a", "role": "viewer", "token_sha256": "' + "1" * 64 + '", "expires": "2030-01-01"}', "line 2: expires"),
        ('{"name": "a", "role": "viewer", "certificate": "x"}', "needs SEDAC_CONTROL_TLS_CLIENT_CA"),
        ('["SECRET"]', "line 2: the line"),
        ("SECRET", "line 2 is not a JSON object"),
        ("[" * 100_000, "line 2"),
    ],
)
def test_a_bad_line_is_named_and_never_quoted(tmp_path, line, complaint):
    path = tmp_path / "principals.jsonl"
    path.write_text('{"name": "first", "role": "viewer", "token_sha256": "' + "0" * 64 + f'"}}\n{line}\n')
    with pytest.raises(ConfigError, match=complaint) as refused:
        read_principals(path, certificates=False)
    assert "SECRET" not in str(refused.value)


_JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
_FIELDS = st.sampled_from(["name", "role", "token_sha256", "certificate", "expires", "engine_id"])


@given(st.text() | st.dictionaries(_FIELDS, _JSON).map(json.dumps) | _JSON.map(json.dumps))
def test_any_file_is_read_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(ConfigError):
        assert read_principals(path, certificates=True).entries
