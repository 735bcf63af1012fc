"""The options of `penstock run`, where they have to be parsed for good: see `launch.plain`."""

from __future__ import annotations

import click

from penstock.cli.launch import CACHE_MODES, OBSERVERS, RunOptions, launch
from penstock.cli.supervise import own_policy, supervise
from penstock.units import parse_size


class _Size(click.ParamType[str]):
    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            if value != "auto":
                parse_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return str(value)


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
    type=click.Path(exists=True),
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
@click.option(
    "--report", type=click.Path(dir_okay=False), help="Write a JSON report here, at the end and while COMMAND runs."
)
@click.option("--plot", type=click.Path(dir_okay=False), help="Draw the run into this PNG.")
@click.option("--quiet", "-q", is_flag=True, help="Say nothing on stderr unless something is wrong.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    service: str | None,
    policy_name: str,
    models: tuple[str, ...],
    memory: str,
    cache: str,
    observer: str,
    templates: str | None,
    report: str | None,
    plot: str | None,
    quiet: bool,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND with its model files prefetched.

    The first run records which parts of which files the command reads, in which order. From then on they are
    prefetched from the moment the command starts, within the memory there is. Exit status, signals, terminal
    and output are the command's own; penstock speaks on stderr only.
    """
    options = RunOptions(
        command,
        service=service,
        policy=policy_name,
        models=models,
        memory=memory,
        cache=cache,
        observer=observer,
        templates=templates,
        report=report,
        plot=plot,
        quiet=quiet,
    )
    policy = own_policy(options)
    supervise(launch(options), policy)
