"""The command `bench-dfusion`: one module for each of its verbs, or for verbs that belong together."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import warnings
from types import FrameType
from typing import TYPE_CHECKING

import typer

from bench_dfusion import errors
from bench_dfusion.cli import doctor, evaluation, new, pairs, plugins, publish, records, run, sweep, tables, watch
from bench_dfusion.errors import PluginError, UsageError
from bench_dfusion.util import files

if TYPE_CHECKING:
    from bench_dfusion.runs.loaded import Loaded

app = typer.Typer(
    help="Which method aligns a text-to-image diffusion model best, at what cost, and the proof.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
pairs_app = typer.Typer(help="The consistent samples of a run as a preference dataset.", no_args_is_help=True)
app.command()(run.run)
app.command()(sweep.sweep)
app.command()(watch.watch)
app.command()(doctor.doctor)
app.command("eval")(evaluation.evaluate)
app.command()(evaluation.base)
app.command("list")(plugins.list_plugins)
app.command()(new.new)
app.command()(tables.leaderboard)
app.command()(tables.report)
app.command()(records.merge)
app.command()(records.verify)
app.command()(publish.publish)
pairs_app.command("export")(pairs.export)
app.add_typer(pairs_app, name="pairs")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


# What is wrong with a disk or a path, not with the program.
MENDED = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}


def _errno(error: Exception) -> int | None:
    """The system's number of an error; safetensors only has it in its text."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else getattr(error, "errno", None)


def main(loaded: Loaded | None = None) -> None:
    """Entry point: a user's mistake is one line on stderr and exit status 2; SIGTERM ends it as Ctrl-C does.

    `loaded`: what earlier runs in this process have loaded.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        sys.exit(app(standalone_mode=False, obj=loaded) or 0)  # typer.Exit comes back as its status
    except UsageError as error:
        print(f"bench-dfusion: {errors.plain(error)}", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL if isinstance(error, files.Busy) else 2)
    except PluginError as error:
        import traceback

        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        print(f"bench-dfusion: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        if _errno(error) in MENDED:
            print(
                f"bench-dfusion: {errors.plain(error)}; the same command goes on when that is mended", file=sys.stderr
            )
            sys.exit(2)
        # typer brings its own copy of click, whose exceptions it does not export: known by their method.
        if not hasattr(error, "format_message"):
            raise
        print(f"bench-dfusion: {error.format_message()}", file=sys.stderr)
        sys.exit(2)
