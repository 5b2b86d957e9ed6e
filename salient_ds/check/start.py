"""Everything that is checked right before a run starts: the pre-flight checks, tokens, the run directory, the port."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from salient_ds.check.preflight import preflight
from salient_ds.check.report import Report
from salient_ds.check.token_sample import SAMPLE, check_tokens
from salient_ds.config.run import RunConfig
from salient_ds.host import is_taken

PORT = 29500
"""Where the processes of the deepspeed launcher meet, if nothing else is said."""


_STARTED_WITH = ("salient_ds", "deepspeed", "torch", "transformers")
"""Packages that training processes import first."""


@dataclass(frozen=True)
class StartOptions:
    """How the run will be started."""

    processes: int = 1
    resume: str = "never"
    overwrite: bool = False
    port: int | None = None
    all_rows: bool = False
    """Tokenise all rows, not only the first ones."""
    elsewhere: bool = False
    """The processes meet on another machine, whose ports are unknown here."""


def check_start(run: RunConfig, options: StartOptions, run_source: str = "run.yaml") -> Report:
    """All checks. A used output directory, of which :func:`preflight` makes a note, is a problem if nobody wants it."""
    report = preflight(run, world_size=max(options.processes, 1), run_source=run_source)
    if not report.problems:  # data, template and tokenizer are sound
        try:
            check_tokens(run, report, None if options.all_rows else SAMPLE)
        except ValueError as error:
            report.problems.append(str(error))
    report.problems += hidden_packages(Path.cwd())
    note = report.facts.pop("used_directory", None)
    if note is not None and options.resume == "never" and not options.overwrite:
        report.notes.remove(note)
        report.problems.append(note)
    if not options.elsewhere and is_taken(options.port or PORT):
        if options.port is not None:
            report.problems.append(f"port {options.port} of this machine is taken: choose another with --master-port")
        else:
            report.notes.append(
                f"port {PORT} of this machine is taken: salient-ds train chooses another, the deepspeed launcher needs "
                "--master_port"
            )
    return report


def hidden_packages(folder: Path) -> list[str]:
    """A sentence for each folder that Python would import instead of the installed package.

    ``python -m`` looks in the working directory first, and takes any folder of that name, such as a clone of a
    repository. Then only the processes that the launcher starts fail.
    """
    hiding = [folder / name for name in _STARTED_WITH if (folder / name).is_dir()]
    rest = "hides the installed package {name} from processes that start here: rename it, or start in another directory"
    return [
        f"the folder {path} {rest.format(name=path.name)}" for path in hiding if not (path / "__init__.py").exists()
    ]
