"""The command's entry point: which commands there are, and how errors become exit codes.

====  ==================================================================================================
code  meaning
====  ==================================================================================================
0     done
1     something failed that the user did not type: one line, and how to get the traceback
2     wrong usage or input: one line that says what was expected and what came
130   Ctrl-C
141   whoever read the output, such as ``head``, has closed it
143   SIGTERM (while training: a checkpoint is saved first)
====  ==================================================================================================
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import select
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, TextIO

import typer

from gist_fast.cli import bench, demo, doctor, embed_guide, evaluate, inspect, kernels, mine, profile, train
from gist_fast.cli.output import INTERRUPTED, note, replace_what_cannot_be_encoded
from gist_fast.runtime.errors import WrongInput
from gist_fast.version import __version__

app = typer.Typer(name="gist-fast", add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

# To add a command: a file beside this one with a function, and a line here.
app.command("train", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(train.train)
app.command("profile", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(profile.profile)
app.command("embed-guide")(embed_guide.embed_guide)
app.command("mine")(mine.mine)
app.command("evaluate")(evaluate.evaluate)
app.command("inspect")(inspect.inspect)
app.command("doctor")(doctor.doctor)
app.command("kernels")(kernels.kernels)
app.add_typer(bench.app, name="bench")
app.command("demo")(demo.demo)

CLOSED = 141
# typer carries its own copy of click in newer versions; this is the base class of usage errors in whichever it
# uses.
UsageError: Any = typer.BadParameter.__mro__[2]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"gist-fast {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Fast, guided fine-tuning of text-embedding models (GISTEmbed)."""
    _log_to_stderr()
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


def main() -> None:
    """The entry point of the installed command."""
    code = run()
    # All is said and done: a late Ctrl-C must not end the shutdown in a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command on these arguments, by default the process's, and return its exit code."""
    replace_what_cannot_be_encoded()
    try:
        return _run(list(sys.argv[1:] if arguments is None else arguments))
    except BrokenPipeError:
        _drop(_closed())
        return CLOSED


def _run(arguments: list[str]) -> int:
    debug = "--debug" in itertools.takewhile(lambda argument: argument.startswith("-"), arguments)
    try:
        code = _invoke(arguments)
        sys.stdout.flush()  # what fails here would fail again in the interpreter's last moments
        return code
    except (KeyboardInterrupt, typer.Abort):
        note("gist-fast: interrupted.")
        return INTERRUPTED
    except UsageError as error:
        path = error.ctx.command_path if getattr(error, "ctx", None) else "gist-fast"
        message = " ".join(error.format_message().split())
        note(f"{path}: {message[:1].lower()}{message[1:]}{'' if message[-1:] in '.?' else '.'} See {path} --help.")
        return 2
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _closed():  # pipes between processes break too
            raise
        if debug:
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, WrongInput):
            note(f"gist-fast: {message}")
            return 2
        if not debug:
            message += f" (for the traceback: gist-fast --debug {' '.join(arguments[:1])} ...)"
        note(f"gist-fast: {type(error).__name__}: {message}")
        return 1


def _invoke(arguments: list[str]) -> int:
    # Not app(...): that turns Ctrl-C into an exit, or an Abort, by its version.
    command = typer.main.get_command(app)
    try:
        with command.make_context("gist-fast", arguments) as context:
            command.invoke(context)
        return 0
    except typer.Exit as done:
        return done.exit_code


def _closed() -> list[TextIO]:
    """Which of stdout and stderr nobody reads any more; none where the system cannot tell."""
    found: list[TextIO] = []
    for stream in (sys.stdout, sys.stderr) if hasattr(select, "poll") else ():
        poll = select.poll()
        with contextlib.suppress(OSError):  # a stream that is no file
            poll.register(stream.fileno(), 0)  # asks for errors alone
            found += [stream] * bool(poll.poll(0))
    return found


def _drop(streams: Sequence[TextIO]) -> None:
    """Drop what they still hold, which would fail once more at the interpreter's exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class _Stderr(logging.Handler):
    """Writes to whatever ``sys.stderr`` is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        note(f"{prefix}{self.format(record)}")


def _log_to_stderr() -> None:
    logger = logging.getLogger("gist_fast")
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        logger.addHandler(_Stderr())
    logger.setLevel(logging.INFO)


if __name__ == "__main__":
    main()
