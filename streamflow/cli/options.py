"""From the table of settings to flags, and from a command's function to what typer reads."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from streamflow.cli.errors import run_reporting
from streamflow.cli.load import EXAMPLE, LoadedApp, load
from streamflow.config import TABLE, Setting, Settings
from streamflow.hosting import settings_of
from streamflow.processing.declarations import Declarations

CONNECTION = ("broker", "data_dir")
"""Settings that every command takes; the worker takes all."""
_SWITCHES = "Settings: on or off"
"""Apart from the others, since `--no-...` takes a column, which at a width of 80 cut the names of the others short."""


@dataclass(frozen=True)
class Session:
    """What a command works with.

    Attributes:
        app: The app's declarations.
        origin: Its file.
        settings: Resolved.
        name: APP as it was written.
        warnings: About unknown environment variables; to be told once logging is set up.
    """

    app: Declarations
    origin: Path
    settings: Settings
    name: str
    warnings: Sequence[str]


def open_session(loaded: LoadedApp, flags: Mapping[str, object], environ: Mapping[str, str]) -> Session:
    """Resolve an app's settings.

    Args:
        loaded: The app.
        flags: Settings given on the command line.
        environ: The environment.

    Raises:
        ConfigurationError: A setting does not fit.
    """
    warnings: list[str] = []
    settings = settings_of(loaded.app.options, origin=loaded.origin, flags=flags, environ=environ, warn=warnings.append)
    return Session(loaded.app, loaded.origin, settings, loaded.name, warnings)


def as_command(
    function: Callable[..., None],
    *,
    names: Sequence[str],
    environ: Mapping[str, str],
    script: LoadedApp | None,
) -> Callable[..., None]:
    """Make a function a command that typer understands.

    Args:
        function: Takes a `Session` first; its other parameters are typer's.
        names: Settings it takes as flags.
        environ: The environment.
        script: The app whose script is the command line; the command then has no APP argument.

    Returns:
        The same with APP, unless `script` is given, and flags in place of the session.
    """

    def command(**arguments: Any) -> None:
        def run() -> None:
            loaded = script if script is not None else load(arguments.pop("app"))
            flags = {name: arguments.pop(name) for name in names}
            function(open_session(loaded, flags, environ), **arguments)

        raise typer.Exit(run_reporting(run))

    own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
    leading = [] if script is not None else [_app_argument()]
    parameters = [
        *leading,
        *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own),
        *(_flag(TABLE[name]) for name in names),
    ]
    command.__name__ = function.__name__
    command.__doc__ = function.__doc__
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def _app_argument() -> inspect.Parameter:
    text = f"The application: a file or a dotted module, with :name where it holds several; {EXAMPLE}."
    return inspect.Parameter(
        "app",
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[str, typer.Argument(metavar="APP", help=text, show_default=False)],
    )


def _flag(setting: Setting) -> inspect.Parameter:
    default = setting.about.shown_default.replace("`", "") or str(setting.default)
    text = f"{setting.about.help.replace('`', '')} (default: {default})"
    if setting.choices:
        text = text.replace(" (default", f" One of {', '.join(setting.choices)} (default")
    if setting.kind is bool:
        positive = setting.flag
        declared = f"{positive}/--no-{positive.removeprefix('--')}"
        option = typer.Option(declared, help=text, show_default=False, rich_help_panel=_SWITCHES)
        return _keyword(setting.name, bool, option)
    option = typer.Option(
        setting.flag,
        metavar={int: "INT", float: "FLOAT"}.get(setting.kind, "TEXT"),
        help=text,
        show_default=False,
        rich_help_panel="Settings",
        autocompletion=_completing(setting.choices) if setting.choices else None,
    )
    # Text, whatever the kind: `config` checks all sources alike, and its messages say what is allowed.
    return _keyword(setting.name, str, option)


def _keyword(name: str, kind: type, option: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _completing(choices: Sequence[str]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.lower().startswith(incomplete.lower())]

    return complete
