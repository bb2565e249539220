"""Logs of `sedac serve` and `sedac control`: SEDAC_LOG_FORMAT (text or json) and SEDAC_LOG_LEVEL. Never a secret in them.

    SEDAC_LOG_FORMAT=json sedac control
    {"time": "2026-11-21T12:00:00.123Z", "level": "INFO", "logger": "sedac.control.server.server", "message": "control service on ..."}

What a call of the logger carries in `extra` becomes fields of their own, `exception` holds a traceback. What follows `Bearer`, tokens of
`sedac control token` and what is in a PEM block are masked wherever they stand: in messages, arguments, extra fields and tracebacks,
whoever logged them.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import re
from collections.abc import Mapping
from typing import Any

from sedac.errors import ConfigError

VARIABLES = ("SEDAC_LOG_FORMAT", "SEDAC_LOG_LEVEL")
"""The environment variables that are read here."""
_FORMATS = ("text", "json")
_LEVELS = ("debug", "info", "warning", "error")
_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_BEARER = re.compile(r"(?i)\b(bearer)([\s\"':=]+)[A-Za-z0-9._~+/=-]+")
_TOKEN = re.compile(r"\bsedac_[A-Za-z0-9_-]{43}(?![A-Za-z0-9_-])")
"""Pattern of what `sedac control token` makes."""
_PEM = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----.*?(?:-----END \1-----|\Z)", re.DOTALL)
_MASK = "***"
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "vllm_process_name"}
"""Attributes that every record has, in vLLM's processes too. The others came as `extra`."""


def configure(environ: Mapping[str, str] = os.environ) -> None:
    """Send the logs of this process to standard error as the environment says.

    Raises:
        ConfigError: SEDAC_LOG_FORMAT or SEDAC_LOG_LEVEL is none that is known.
    """
    form = _read(environ, "SEDAC_LOG_FORMAT", _FORMATS, "text")
    level = _read(environ, "SEDAC_LOG_LEVEL", _LEVELS, "info")
    handler = logging.StreamHandler()
    handler.addFilter(SecretFilter())
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def _read(environ: Mapping[str, str], name: str, known: tuple[str, ...], default: str) -> str:
    value = environ.get(name, "").lower() or default
    if value not in known:
        raise ConfigError(f"{name}={environ[name][:40]!r} is unknown; use {', '.join(known[:-1])} or {known[-1]}")
    return value


def mask(text: str) -> str:
    """Return the text without tokens and without what is in PEM blocks."""
    return _PEM.sub(rf"-----BEGIN \1----- {_MASK} -----END \1-----", _TOKEN.sub(_MASK, _BEARER.sub(rf"\1\2{_MASK}", text)))


class SecretFilter(logging.Filter):
    """Masks secrets in all parts of a record; belongs on handlers, for a logger's filter does not see its children's records."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Mask the record in place, and keep it."""
        record.msg, record.args = mask(_get_message(record)), None
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        for name in ("exc_text", "stack_info"):
            text = getattr(record, name)
            if text:
                setattr(record, name, mask(text))
        for name, value in vars(record).items():
            if name not in _OWN:
                setattr(record, name, _mask_value(value))
        return True


def _get_message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError) as error:  # a wrong call of the logger must not cost the message
        return f"{record.msg} {record.args} (can't be formatted: {error})"


def _mask_value(value: Any) -> Any:
    if isinstance(value, bool | int | float) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(key): _mask_value(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_mask_value(part) for part in value]
    return mask(str(value))


class JsonFormatter(logging.Formatter):
    """One JSON object per record and line."""

    def format(self, record: logging.LogRecord) -> str:
        """Write time (UTC), level, logger, message, `exception` where there is one, and the extra fields."""
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"time": time, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        line |= {name: text for name, text in (("exception", record.exc_text), ("stack", record.stack_info)) if text}
        extra = {name: _mask_value(value) for name, value in vars(record).items() if name not in _OWN}
        return json.dumps({**line, **{name: value for name, value in extra.items() if name not in line}}, ensure_ascii=False)
