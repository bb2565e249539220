"""No token and no key is told to anybody; denied calls are told of, and no flood of them."""

from __future__ import annotations

import json
import logging
import threading

import grpc
from prometheus_client import generate_latest
from sedac.contract.credentials import read_credentials
from sedac.control.access.auth import RULES
from sedac.control.access.principals import digest_token

from testing.control.access import GET, METHODS, ROLES, UPDATE, call, find_error, wait_until


def test_no_token_and_no_key_is_in_a_log_an_error_or_a_metric(start, mtls_settings, open_channel, authority, principals, pair, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    running = start(mtls_settings)
    client_pair = authority.issue("ops")
    credentials = read_credentials(ca=authority.cert, client_cert=client_pair.cert, client_key=client_pair.key)
    channel = open_channel(running, client_cert=client_pair.cert, client_key=client_pair.key)
    texts = [repr(mtls_settings), repr(credentials), repr(channel)]
    tried = ["stolen-token-of-somebody", "sedac_" + "x" * 40]
    for path in METHODS:
        for name in ROLES:
            texts += find_error(channel, path, principals.make_metadata(name), timeout=0.3 if name in RULES[path] else 20)[1:]
        for token in tried:
            texts += find_error(channel, path, (("authorization", f"Bearer {token}"),))[1:]
            texts += find_error(channel, path, (("authorization", token),))[1:]
    old = principals.make_metadata("operator")
    principals.add("operator", "operator")
    texts += find_error(channel, GET, old)[1:]
    principals.add_line("broken", json.dumps({"name": "broken", "role": "viewer", "token": tried[0]}))
    pair.key.write_text(pair.key.read_text().replace("BEGIN", "begin"))
    refused = running.server._metrics.file_refused
    wait_until(lambda: refused.labels("principals")._value.get() == refused.labels("certificate")._value.get() == 1, "both files are refused")
    texts.append(generate_latest(running.server._metrics.registry).decode())
    texts += [record.getMessage() + str(record.exc_info) + str(record.args) for record in caplog.records]
    texts += capfd.readouterr()
    secrets = [*tried, *principals.tokens.values(), old[0][1].removeprefix("Bearer "), *map(digest_token, principals.tokens.values())]
    for file in (pair.key, client_pair.key):
        secrets += file.read_text().splitlines()[1:-1]
    assert any("refused" in text for text in texts), "something was logged"
    assert len(secrets) > 10
    assert not [secret for secret in secrets for text in texts if secret in text]


def test_denied_calls_are_logged_with_who_and_what_and_counted(start, settings, principals, caplog):
    running = start(settings.model_copy(update={"principals": principals.path}))
    denied = running.server._metrics.denied
    with grpc.insecure_channel(running.address) as channel:
        call(channel, UPDATE, principals.make_metadata("viewer"))
        call(channel, UPDATE)
        lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert lines[0].startswith(f"refused {UPDATE} from ipv4:127.0.0.1:")
        assert "token:viewer has role viewer" in lines[0]
        assert len(lines) == 2
        threads = [threading.Thread(target=lambda: [call(channel, GET) for _ in range(50)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert denied.labels("permission_denied")._value.get() == 1
    assert denied.labels("unauthenticated")._value.get() == 201
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines) < 120, "a flood is not logged line by line"
