"""Settings of the control service: SEDAC_CONTROL_* environment variables."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class ControlSettings(BaseSettings):
    """Where the control service listens and what it keeps."""

    model_config = SettingsConfigDict(env_prefix="SEDAC_CONTROL_", frozen=True)

    host: str = "127.0.0.1"
    """address to listen on; there is no authentication yet, so anything but loopback wants a fence around it"""
    port: int = Field(default=50051, ge=0, le=65535)
    """gRPC port; 0: any free one"""
    metrics_host: str = "127.0.0.1"
    """address of the Prometheus endpoint"""
    metrics_port: int = Field(default=9464, ge=0, le=65535)
    """Prometheus port; 0: none"""
    database: Path = Path("var/control.sqlite3")
    """SQLite file of the revisions; made with its directory"""
    max_message_bytes: int = Field(default=1 << 20, ge=1 << 12)
    """largest gRPC message taken"""
    drain_seconds: float = Field(default=5.0, ge=0)
    """how long running calls may finish after SIGTERM"""
