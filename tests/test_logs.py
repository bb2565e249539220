"""Structured logs: their form by environment, and no secret in any part of them."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys

import pytest
from sedac import logs
from sedac.errors import ConfigError
from sedac.settings import read_settings

_TOKEN = "sedac_" + "aB3-_" * 8 + "xyz"
_KEY = "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEEIIr\nSECRETSECRET\n-----END EC PRIVATE KEY-----"


@pytest.fixture
def make_logger():
    """Return a logger that writes through the real handler parts, and what it wrote."""
    made = []

    def make(formatter: logging.Formatter) -> tuple[logging.Logger, io.StringIO]:
        stream, logger = io.StringIO(), logging.Logger("test.logs")
        handler = logging.StreamHandler(stream)
        handler.addFilter(logs.SecretFilter())
        handler.setFormatter(formatter)
        logger.addHandler(handler)
        made.append(handler)
        return logger, stream

    yield make
    for handler in made:
        handler.close()


def test_a_json_line_has_its_fields_in_order_and_what_came_as_extra(make_logger):
    logger, stream = make_logger(logs.JsonFormatter())
    logger.info("revision %d by %s", 7, "ops\nline", extra={"revision": 7, "engines": ["e1"], "message_id": None, "time": "mine"})
    (text,) = stream.getvalue().splitlines()
    line = json.loads(text)
    assert list(line) == ["time", "level", "logger", "message", "revision", "engines", "message_id"], "an extra field hides none of the line's own"
    assert line["message"] == "revision 7 by ops\nline"
    assert (line["level"], line["logger"], line["revision"], line["engines"]) == ("INFO", "test.logs", 7, ["e1"])
    assert line["time"].endswith("Z")


def test_a_json_line_holds_the_whole_traceback(make_logger):
    logger, stream = make_logger(logs.JsonFormatter())
    try:
        raise ValueError("it broke")
    except ValueError:
        logger.exception("failed")
    line = json.loads(stream.getvalue())
    assert line["message"] == "failed"
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("ValueError: it broke")


@pytest.mark.parametrize("formatter", [logs.JsonFormatter(), logging.Formatter("%(message)s")], ids=["json", "text"])
def test_no_secret_gets_through_wherever_it_stands(make_logger, formatter):
    logger, stream = make_logger(formatter)
    logger.info("metadata %s", (("authorization", "Bearer abc.def-ghi"), ("sedac-author", "ops")))
    logger.info("header authorization: bearer ABCDEF==", extra={"call": {"metadata": ["Bearer zyx987"], "key": _KEY.encode()}})
    logger.info("made %s for ops, and read %r", _TOKEN, _KEY)
    logger.info("cut off: %s", _KEY[:60])
    try:
        raise RuntimeError(f"refused: Bearer abc.def-ghi, {_KEY}")
    except RuntimeError:
        logger.exception("it broke", stack_info=True)
    written = stream.getvalue()
    for secret in ("abc.def-ghi", "ABCDEF", "zyx987", _TOKEN, "MHcCAQEEIIr", "SECRETSECRET"):
        assert secret not in written
    for kept in ("ops", "refused: Bearer ***", "-----BEGIN EC PRIVATE KEY----- *** -----END EC PRIVATE KEY-----", "made *** for"):
        assert kept in written


def test_words_that_look_a_little_like_secrets_stay(make_logger):
    logger, stream = make_logger(logging.Formatter("%(message)s"))
    logger.info("sedac_draft_token_ratio and the bearers of bad news; a wrong %d call", "x")
    assert "sedac_draft_token_ratio and the bearers of bad news" in stream.getvalue()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SEDAC_LOG_FORMAT", "xml", "SEDAC_LOG_FORMAT='xml' is unknown; use text or json"),
        ("SEDAC_LOG_LEVEL", "loud", "SEDAC_LOG_LEVEL='loud' is unknown; use debug, info, warning or error"),
    ],
)
def test_an_unknown_format_or_level_is_refused(name, value, message):
    with pytest.raises(ConfigError, match=message):
        logs.configure({name: value})


def test_the_engine_s_settings_accept_the_variables_of_logs_and_no_others_like_them():
    read_settings({"SEDAC_LOG_FORMAT": "json", "SEDAC_LOG_LEVEL": "debug"})
    with pytest.raises(ConfigError, match="SEDAC_LOG_FORM is unknown"):
        read_settings({"SEDAC_LOG_FORM": "json"})


def test_the_control_service_logs_json_lines(tmp_path):
    code = "import sys; from sedac.app.cli import main; sys.argv = ['sedac', 'control']; main()"
    env = {
        "SEDAC_LOG_FORMAT": "json",
        "SEDAC_CONTROL_PORT": "0",
        "SEDAC_CONTROL_METRICS_PORT": "0",
        "SEDAC_CONTROL_DATABASE": str(tmp_path / "control.sqlite3"),
    }
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        while not lines or not lines[-1]["message"].startswith("control service on"):
            lines.append(json.loads(process.stderr.readline()))
        process.terminate()
        rest, code = process.communicate(timeout=30)[1], process.returncode
    finally:
        process.kill()
        process.wait()
    lines += [json.loads(line) for line in rest.splitlines()]
    assert lines[0]["logger"] == "sedac.control.server.server"
    assert lines[-1]["message"] == "control service stops"
    assert code == 0
