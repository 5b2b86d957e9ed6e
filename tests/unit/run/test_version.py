"""`salient-ds --version`."""

from __future__ import annotations

from typer.testing import CliRunner

from salient_ds import __version__
from salient_ds.cli import app


def test_version_and_completion() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"salient-ds {__version__}\n")
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).stdout
