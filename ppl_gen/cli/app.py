"""The command ``ppl-gen``: its commands, its exit codes, and errors in one sentence."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ppl_gen.cli.parsing import Misuse
from ppl_gen.runtime.interrupts import allowed, listening

if TYPE_CHECKING:
    import typer

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``ppl-gen`` and give its exit code: 0 done, 1 a fit or the run failed, 2 the command was not understood.

    Ctrl-C and SIGTERM end the fits under way; what they learned is shown and saved, and the code is 130 or 143.

    >>> main(["fit", "no_such_program", "crabs"])
    2
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with listening() as heard, allowed():
        code = _run([a for a in arguments if a != "--debug"], "--debug" in arguments)
    return 128 + heard.signal if heard.signal else code


def _run(arguments: Sequence[str], debug: bool) -> int:
    try:
        return int(_app()(args=list(arguments), prog_name="ppl-gen", standalone_mode=False) or 0)
    except Misuse as error:
        return _said(error, 2, debug)
    except KeyboardInterrupt:
        return _said("interrupted", 130, False)
    except Exception as error:  # shown without a traceback unless it was asked for
        if type(error).__name__ == "Abort":  # what typer makes of KeyboardInterrupt
            return _said("interrupted", 130, False)
        if debug:
            raise
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # what typer raises for the command line itself
            error.show()
            return int(error.exit_code)
        kind = "" if isinstance(error, ValueError | TypeError | ArithmeticError | ImportError) else type(error).__name__
        return _said(f"{kind}: {error}" if kind else error, 1, False)


def _said(error: object, code: int, debug: bool) -> int:
    if debug and isinstance(error, BaseException):
        raise error
    print(f"ppl-gen: {error}", file=sys.stderr)
    return code


def _app() -> typer.Typer:
    try:
        import typer
    except ModuleNotFoundError as error:
        from ppl_gen.errors import MissingExtraError

        raise MissingExtraError('the command line needs typer: pip install "ppl_gen[cli]"') from error
    from ppl_gen.cli import commands

    app = typer.Typer(
        help="One generative program, every way to learn it, one honest yardstick.",
        epilog="Add --debug to any command for the traceback of an error.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.command("demo")(commands.demo)
    app.command("compare")(commands.compare)
    app.command("fit")(commands.fit)
    app.command("list")(commands.list_)
    return app
