"""Entry point of a search process: ``deepspeed --module salient_ds.search run.yaml --proxy grad_norm ...``."""

from __future__ import annotations

import typer

from salient_ds.run.search import main

if __name__ == "__main__":
    typer.run(main)
