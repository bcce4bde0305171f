"""APP on the command line: a file or a dotted module, with `:name` where it holds several apps."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from streamflow.config import nearest
from streamflow.errors import ConfigurationError, StreamFlowError
from streamflow.processing.declarations import Declarations

EXAMPLE = "for example `orders.py`, `shop.orders` or `orders.py:app`"
loading: list[str] = []
"""APPs being imported just now: meanwhile `app.main()` at the end of a script does nothing."""


@dataclass(frozen=True)
class LoadedApp:
    """An app and where it came from.

    Attributes:
        app: Its declarations.
        origin: The file whose folder, or nearest pyproject.toml, relative paths start at.
        name: How to name it to people.
    """

    app: Declarations
    origin: Path
    name: str


def load(target: str) -> LoadedApp:
    """Import an app.

    Args:
        target: A file or a dotted module, with `:name` where it holds several apps.

    Raises:
        ConfigurationError: There is no such file, module or app, or importing it failed; the message says which.
    """
    place, name = _split(target)
    with _being_loaded(target):
        module = _import_file(Path(place)) if _is_file_name(place) else _import_module(place)
    app = _choose(module, place, name)
    origin = Path(module.__file__) if module.__file__ else Path.cwd()
    return LoadedApp(app, origin, target)


def _split(target: str) -> tuple[str, str]:
    place, separator, name = target.rpartition(":")
    if separator and name.isidentifier() and place:
        return place, name
    if separator and not name and place:
        raise ConfigurationError(f"APP {target!r} ends with a colon: write the app's name after it ({EXAMPLE})")
    return target, ""


def _is_file_name(place: str) -> bool:
    return place.endswith(".py") or "/" in place or "\\" in place or Path(place).is_file()


@contextmanager
def _being_loaded(target: str) -> Generator[None]:
    loading.append(target)
    try:
        yield
    finally:
        loading.pop()


# --- importing ----------------------------------------------------------------------------------------------------


def _import_file(path: Path) -> ModuleType:
    if path.is_dir():
        raise ConfigurationError(f"APP {str(path)!r} is a folder; name the file in it ({EXAMPLE})")
    if not path.is_file():
        folder = path.parent
        near = [str(folder / other.name) for other in sorted(folder.glob("*.py"))] if folder.is_dir() else []
        hint = nearest(str(path), near) if near else f"; there is no Python file in {folder.resolve()}"
        raise ConfigurationError(f"APP {str(path)!r}: there is no such file{hint}")
    path = path.resolve()
    if (path.parent / "__init__.py").is_file():
        return _import_from_package(path)
    _put_first_on_path(path.parent)
    known = sys.modules.get(path.stem)
    if known is not None and known.__file__ == str(path):
        return known
    # A file called like a module that others need must not take its place.
    taken = known is not None or path.stem in sys.stdlib_module_names or not path.stem.isidentifier()
    name = "streamflow_app_" + path.stem if taken else path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigurationError(f"APP {str(path)!r} is no Python file; its name is to end with .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as exc:
        del sys.modules[name]
        raise _import_failed(str(path), exc) from exc
    return module


def _import_from_package(path: Path) -> ModuleType:
    """By its dotted name, so that its relative imports work and nobody imports it a second time under another name."""
    parts = [] if path.name == "__init__.py" else [path.stem]
    folder = path.parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    _put_first_on_path(folder)
    return _import_dotted(".".join(parts), str(path))


def _import_module(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ConfigurationError(f"APP {name!r} is neither a file nor the dotted name of a module ({EXAMPLE})")
    _put_first_on_path(Path.cwd())
    return _import_dotted(name, name)


def _import_dotted(name: str, target: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name is not None and (name == exc.name or name.startswith(exc.name + ".")):
            as_file = Path(*name.split(".")).with_suffix(".py")
            hint = f"; did you mean {str(as_file)!r}?" if as_file.is_file() else f" ({EXAMPLE})"
            raise ConfigurationError(f"APP {target!r}: there is no module {exc.name!r} in {Path.cwd()}{hint}") from exc
        raise _import_failed(target, exc) from exc
    except BaseException as exc:
        raise _import_failed(target, exc) from exc


def _put_first_on_path(folder: Path) -> None:
    text = str(folder)
    if text in sys.path:
        sys.path.remove(text)
    sys.path.insert(0, text)


def _import_failed(target: str, exc: BaseException) -> BaseException:
    """What to raise instead: the app's own traceback, without the frames of the import machinery."""
    if isinstance(exc, KeyboardInterrupt):
        return exc
    frames = traceback.extract_tb(exc.__traceback__)
    own = [frame for frame in frames if "importlib" not in frame.filename and frame.filename != __file__]
    if isinstance(exc, StreamFlowError):
        package = str(Path(__file__).parent.parent)
        users = [frame for frame in own if not frame.filename.startswith(package)]
        place = f"{users[-1].filename}:{users[-1].lineno}: " if users else ""
        return ConfigurationError(f"{place}{exc}")
    lines = ["Traceback (most recent call last):\n", *traceback.format_list(own)] if own else []
    told = "".join([*lines, *traceback.format_exception_only(exc)]).rstrip()
    return ConfigurationError(f"APP {target!r} could not be imported:\n{told}")


# --- choosing -----------------------------------------------------------------------------------------------------


def _choose(module: ModuleType, place: str, name: str) -> Declarations:
    apps = {key: value for key, value in vars(module).items() if isinstance(value, Declarations)}
    if name:
        if name in apps:
            return apps[name]
        if hasattr(module, name):
            raise ConfigurationError(
                f"{name!r} in {place} is no sf.App but {type(getattr(module, name)).__name__}"
                + (f"; apps there: {', '.join(apps)}" if apps else "")
            )
        raise ConfigurationError(f"{place} has no {name!r}" + (nearest(name, list(apps)) if apps else ""))
    if not apps:
        raise ConfigurationError(f'{place} has no sf.App at its top level: write `app = sf.App("my-app")` there')
    if len({id(app) for app in apps.values()}) > 1:
        choices = " or ".join(f"{place}:{key}" for key in apps)
        raise ConfigurationError(f"{place} has several apps; say which one: {choices}")
    return next(iter(apps.values()))
