"""The `penstock` command and its subcommands, each imported when it is called."""

from __future__ import annotations

import importlib

import click

from penstock import __version__

COMMANDS = {
    "run": ("penstock.cli.run:run", "Run a command with its model files prefetched."),
    "template": ("penstock.cli.template:template", "List, show and delete recorded I/O templates."),
    "residency": ("penstock.cli.residency:residency", "Show what of a model is in the page cache."),
    "warm": ("penstock.cli.warm:warm", "Read models into the page cache."),
    "evict": ("penstock.cli.evict:evict", "Drop models from the page cache."),
    "load": ("penstock.cli.load:load", "Load a checkpoint as a library call does, and tell how fast."),
    "inspect": ("penstock.cli.inspect:inspect", "List the tensors of a checkpoint."),
    "verify": ("penstock.cli.verify:verify", "Check the structure of a checkpoint."),
    "kv": ("penstock.cli.kv:kv", "Inspect, verify and delete saved sessions of KV caches."),
    "doctor": ("penstock.cli.doctor:doctor", "Show what this machine allows, and what penstock does instead."),
    "plot": ("penstock.cli.plot:plot", "Draw one or more reports of `penstock run`."),
    "generate": ("penstock.cli.generate:generate", "Write a checkpoint with a real model's shapes."),
    "demo": ("penstock.cli.demo:demo", "See the difference on this machine, in a minute."),
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: penstock run -- python serve.py --model /models/llama-3b",
)
@click.version_option(__version__, prog_name="penstock")
def penstock() -> None:
    """A programmable page cache: unmodified programs load their models at the SSD's speed."""
