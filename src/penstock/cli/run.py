"""`penstock run`: what penstock needs is imported while the program runs already."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from penstock.cli.launch import CACHE_MODES, OBSERVERS, Launched, fail, launch
from penstock.cli.paths import fingerprint_directory, template_directory
from penstock.errors import PenstockError
from penstock.pagecache.policies import BUILT_IN, create_policy
from penstock.units import parse_size

if TYPE_CHECKING:
    from penstock.pagecache.runtime import Outcome
    from penstock.pagecache.session import Session


class _Size(click.ParamType[int | None]):
    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value == "auto" or value is None or isinstance(value, int):
            return value if isinstance(value, int) else None
        try:
            return parse_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command(
    context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False},
    epilog="""\b
Examples:
  penstock run -- python serve.py --model /models/llama-3b
  penstock run --service llama --report run.json -- vllm serve /models/llama-3b
  penstock run --policy my_policy:Mine --cache burn -- ./main -m model.gguf""",
)
@click.option("--service", metavar="NAME", help="Name of the template; derived from the command by default.")
@click.option(
    "--policy",
    "policy_name",
    default="maio",
    show_default=True,
    help="native (only observe), eager, sequential, maio, or a class of yours as package.module:Class.",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="Model file or directory; only these are observed. Found in the command by default.",
)
@click.option("--memory", type=_Size(), default="auto", help="Page cache the model may take, such as 8GiB.")
@click.option(
    "--cache",
    type=click.Choice(CACHE_MODES),
    default="auto",
    show_default=True,
    help="auto keeps what was read if the model fits into memory, and evicts it behind the reader if not.",
)
@click.option(
    "--observer",
    type=click.Choice(OBSERVERS),
    default="auto",
    show_default=True,
    help="auto is tracefs for root where there is one, else /proc.",
)
@click.option("--templates", metavar="DIR", help="Where templates lie; a directory shared by nodes works.")
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), help="Write a JSON report here.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the run into this PNG.")
@click.option("--quiet", "-q", is_flag=True, help="Say nothing on stderr unless something is wrong.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_obj
def run(
    launched: Launched | None,
    service: str | None,
    policy_name: str,
    models: tuple[Path, ...],
    memory: int | None,
    cache: str,
    observer: Literal["auto", "tracefs", "process"],
    templates: str | None,
    report: Path | None,
    plot: Path | None,
    quiet: bool,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND with its model files prefetched.

    The first run records which parts of which files the command reads, in which order. From then on they are
    prefetched from the moment the command starts, within the memory there is. Exit status, signals, terminal
    and output are the command's own; penstock speaks on stderr only.
    """
    own_policy = None
    if launched is None:
        try:
            own_policy = None if policy_name in BUILT_IN else create_policy(policy_name)
        except PenstockError as error:
            fail(str(error))
        launched = launch(command, observer)
    launched.release()

    session: Session | None = None
    try:
        from penstock.pagecache.files import models_in_command
        from penstock.pagecache.runtime import CacheMode
        from penstock.pagecache.session import Session, SessionOptions

        policy = own_policy or create_policy(policy_name)
        launched.give_way.end()
        options = SessionOptions(
            command=command,
            service=service,
            models=models or tuple(models_in_command(command)),
            models_are_all=bool(models),
            memory_bytes=memory,
            cache=CacheMode(cache),
            templates=template_directory(templates),
            fingerprints=fingerprint_directory(),
            sampling=report is not None or plot is not None,
        )
        session = Session(
            options, policy, launched.program.pid, launched.instance, launched.environment, launched.started_s
        )
        if launched.reason and observer == "auto":
            session.warnings.append(f"observing through /proc, because tracefs is not usable: {launched.reason}")
        session.begin()
        import penstock.report.report  # noqa: F401 — now, not when the program has ended and someone waits for us
    except Exception as error:  # noqa: BLE001 — whatever it is, the program goes on without us
        session = None
        click.echo(f"penstock: not prefetching: {type(error).__name__}: {error}", err=True)

    exit_code = launched.wait()
    wall_s = time.monotonic() - launched.started_s
    if session is not None:
        try:
            outcome = session.finish()
            _tell(session, policy_name, outcome, command, exit_code, wall_s, report, plot, quiet)
        except Exception as error:  # noqa: BLE001 — the exit status is the program's
            click.echo(f"penstock: no report: {type(error).__name__}: {error}", err=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # a policy that never returns may still hold a thread


def _tell(
    session: Session,
    policy_name: str,
    outcome: Outcome,
    command: tuple[str, ...],
    exit_code: int,
    wall_s: float,
    report_path: Path | None,
    plot_path: Path | None,
    quiet: bool,
) -> None:
    from penstock.report.report import Report, summary_lines

    report = Report(
        service=session.service,
        mode=session.mode,
        policy=policy_name,
        observer=session.observer,
        exit_code=exit_code,
        wall_s=wall_s,
        first_access_s=outcome.first_access_s,
        last_access_s=outcome.last_access_s,
        bytes_accessed=outcome.accessed_bytes,
        bytes_prefetched=outcome.prefetched_bytes,
        bytes_prefetched_unused=outcome.prefetched_unused_bytes,
        bytes_evicted=outcome.evicted_bytes,
        bytes_device_read=outcome.device_read_bytes,
        peak_resident_bytes=outcome.peak_resident_bytes,
        warnings=tuple(session.warnings),
        timeline=outcome.timeline,
        command=command,
        model_bytes=session.final_model_bytes,
        loader_method=outcome.loader_method,
        memory_source=outcome.budget.source,
        budget_bytes=outcome.budget.bytes,
    )
    if not quiet or session.warnings:
        for line in summary_lines(report):
            click.echo(line, err=True)
    if report_path is not None:
        report.save(report_path)
    if plot_path is not None:
        from penstock.report.plot import label, plot

        plot([(label(report), report)], plot_path, _device_limit(session))


def _device_limit(session: Session) -> float | None:
    """Bytes a second that the device gives without the page cache, measured on the largest model file."""
    from penstock.storage.probe import measure_read_bandwidth

    largest = max(session.files, key=lambda file: file.size_bytes, default=None)
    return measure_read_bandwidth(largest.path) if largest else None
