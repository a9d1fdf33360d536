"""What `jfhpo notify` says when it cannot do its work; what it does is tested on a real server in test_search.py."""

from __future__ import annotations

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from typer.testing import CliRunner

from jfhpo.cli import INFRASTRUCTURE, REFUSED, app

NOBODY = "http://127.0.0.1:9/api"
"""The discard port: nothing listens there."""


@pytest.mark.parametrize(
    ("webhook", "server", "code", "message"),
    [
        ("chat.example.com/hooks/1", NOBODY, REFUSED, "the webhook is no web address"),
        ("https://chat.example.com/hooks/1", None, REFUSED, "PREFECT_API_URL is not set"),
        (
            "https://chat.example.com/hooks/1",
            NOBODY,
            INFRASTRUCTURE,
            f"the Prefect server at {NOBODY} made no automations",
        ),
    ],
)
def test_without_a_server_or_an_address_the_reason_is_told(
    webhook: str, server: str | None, code: int, message: str
) -> None:
    left_out = {PREFECT_API_URL} if server is None else set()
    with temporary_settings({} if server is None else {PREFECT_API_URL: server}, restore_defaults=left_out):
        result = CliRunner().invoke(app, ["notify", webhook])
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert "hooks/1" not in result.stderr, "the address of a webhook is a secret"
