"""Code that extends mls from outside: importing it registers losses, methods, backbones, data sets or export targets.
It is named by `--import FILE|MODULE`, by `run.plugins` of a configuration, or by an installed package's entry point in
the group `mls.plugins`. The registries themselves stand beside what they hold: this file has their class."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, TypeVar

from mls.errors import ConfigError, UserError, one_line, unknown_name

GROUP = "mls.plugins"
REGISTERED = re.compile(r'^@?register\(\s*"([^"]+)"', re.MULTILINE)

Entry = TypeVar("Entry")
Registered = TypeVar("Registered")


class Registry(dict[str, Entry]):
    """What can be chosen by name, that of plug-ins included. `registry[name]` of an unknown name is the error that
    names the nearest known one.

    >>> shapes = Registry[type]("shape")
    >>> @shapes.register("circle", aliases=["disc"])
    ... class Circle: ...
    >>> shapes["disc"] is Circle, shapes.names()
    (True, ['circle'])
    """

    def __init__(self, kind: str, error: type[UserError] = ConfigError) -> None:
        super().__init__()
        self.kind = kind
        self.error = error
        self.aliases: dict[str, str] = {}  # and the name that each stands for

    def register(self, name: str, aliases: Sequence[str] = ()) -> Callable[[Registered], Registered]:
        """Decorator: the class or function is known by `name`, and by its aliases."""

        def enter(entry: Registered) -> Registered:
            for word in (name, *aliases):
                self.add(word, entry)
            self.aliases.update(dict.fromkeys(aliases, name))
            return entry

        return enter

    def add(self, name: str, entry: Any) -> None:
        if name in self and not _is_newer_version(entry, self[name]):
            raise ConfigError(f"there is a {self.kind} called '{name}' already: give the new one another name")
        self[name] = entry

    def names(self) -> list[str]:
        """Every entry once, without its aliases."""
        load_installed()
        return sorted(set(self) - set(self.aliases))

    def __missing__(self, name: str) -> Entry:
        load_installed()
        if name in self:
            return self[name]
        raise unknown_name(self.kind, name, self, self.error)


def _is_newer_version(entry: Any, existing: Any) -> bool:
    """The same definition, executed once more, as in a notebook's cell."""
    where = lambda thing: (getattr(thing, "__module__", None), getattr(thing, "__qualname__", None))
    return None not in where(entry) and where(entry) == where(existing)


def registered_in(package: str) -> list[str]:
    """The names that the files of a package of mls register with `register("name", ...)`, and plug-ins with them. They
    are read from the sources where there is no plug-in: importing the package would load torch.

    >>> registered_in("mls.core.losses")[:3]
    ['an', 'an_ls', 'asl']
    """
    if loaded() or entry_points(group=GROUP):
        return importlib.import_module(package).names()
    folder = Path(str(files("mls")), *package.split(".")[1:])
    return sorted(name for file in folder.glob("*.py") for name in REGISTERED.findall(file.read_text()))


_loaded: dict[str, ModuleType] = {}


def load(names: Iterable[str], copies: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    """Import plug-ins (files or modules), each once. Gives back what `run.plugins` keeps of them. `copies` names other
    files that are to be executed in their place."""
    found = []
    for name in names:
        name = _moved(absolute(name))
        if name not in _loaded:
            _loaded[name] = _import(copies.get(name, name))
        found.append(name)
    return found


def _moved(name: str) -> str:
    """A file that is gone, as a run remembers it, is the one of that name that was imported from another folder."""
    if is_file_name(name) and name not in _loaded and not Path(name).exists():
        return next((other for other in _loaded if Path(other).name == Path(name).name), name)
    return name


def loaded() -> list[str]:
    """All that `load` has imported in this process, in that order."""
    return list(_loaded)


def absolute(name: str, base: Path = Path()) -> str:
    """A file's absolute path, a module's name."""
    return os.path.abspath(base / Path(name).expanduser()) if is_file_name(name) else name


def is_file_name(name: str) -> bool:
    return name.endswith(".py") or "/" in name or os.sep in name


def _import(name: str) -> ModuleType:
    try:
        if is_file_name(name):
            return _import_file(Path(name))
        _announce(name)
        return importlib.import_module(name)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        if f"{name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"there is no plug-in module {name}: install it, or name its file with --import FILE.py"
            ) from None
        raise ConfigError(f"the plug-in {name} needs {error.name}: install it") from None
    except Exception as error:
        raise ConfigError(f"the plug-in {name} cannot be imported ({_reason(error, name)}): correct it") from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"there is no plug-in file {path}: put it back, or say where it is now with --import")
    if path.suffix != ".py" or "." in path.stem:
        raise ConfigError(f"the plug-in {path} has no name that can be imported: call it NAME.py, with one dot")
    # A worker process that does not inherit our memory finds the module by its name in the last folder of sys.path, so
    # the name must be the file's own and nobody else's.
    other = sys.modules.get(path.stem) or importlib.util.find_spec(path.stem)
    if other is not None and _file_of(other) != path:
        raise ConfigError(f"the plug-in {path} is called like the module {path.stem} of {_file_of(other)}: rename it")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # of a file NAME.py there always is one
    _announce(str(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    return module


def _announce(name: str) -> None:
    """Code from outside is never run silently."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"importing the plug-in {one_line(name, 200)}", file=sys.stderr, flush=True)


def _file_of(module: Any) -> Path | None:
    """Of a module or of its spec."""
    file = getattr(module, "__file__", None) or getattr(module, "origin", None)
    return Path(file) if file else None


def _reason(error: Exception, name: str) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    said = str(error).splitlines()[0] if str(error) else ""
    where = f", line {line}" if line and "line" not in said else ""
    return f"{type(error).__name__}: {said}{where}"


_installed_are_loaded = False


def load_installed() -> None:
    """Import what installed packages offer in the entry point group `mls.plugins`: when a name is looked up that mls
    does not know, and when names are listed. A package that is broken is left out with a warning."""
    global _installed_are_loaded
    if _installed_are_loaded:
        return
    _installed_are_loaded = True  # before the imports, which may look names up themselves
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:
            warnings.warn(f"the plug-in {entry.value} of an installed package cannot be imported: {error}")
