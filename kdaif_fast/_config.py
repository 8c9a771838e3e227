"""TOML files that describe a run: read, checked key by key, and what they name in Python imported."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn


class ConfigError(Exception):
    """Something in the file that cannot be used; the message names the key."""


REQUIRED: Any = object()
"""As the default of a key: there is none."""


def read_toml(path: Path) -> dict[str, Any]:
    """The file's tables; ConfigError if it cannot be read or is not TOML."""
    try:
        return parse_toml(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a text; ValueError if it is not TOML."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    return tomllib.loads(text)


def require_known(path: Path, table: Mapping[str, Any], known: Iterable[str], prefix: str = "") -> None:
    """Raise ConfigError for a key that is not known, with the known ones and the one that may be meant."""
    names = tuple(known)
    for key in table:
        if key not in names:
            raise ConfigError(
                f"{path}: the key {prefix + key!r} is unknown, expected one of {', '.join(names)}{meant(key, names)}"
            )


def meant(given: Any, known: Iterable[str]) -> str:
    """The end of an error: which of the known names comes closest, if one does."""
    close = difflib.get_close_matches(str(given), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


class Section:
    """A table of the file. What is read from it is checked, and an error names its key.

    Args:
        path: the file.
        name: of the table, "distill" or "student.optimizer"; "" for the file itself.
        table: what is in it.
        known: the keys that it may have; None for any.

    Raises:
        ConfigError: it is no table, or has a key that is not known.
    """

    def __init__(self, path: Path, name: str, table: Any, known: Iterable[str] | None = None) -> None:
        if not isinstance(table, Mapping):
            raise ConfigError(f"{path}: {name} is {table!r}, expected a table [{name}]")
        self.path, self.name, self.given = path, name, dict(table)
        self.resolved: dict[str, Any] = {}
        """What was read, with defaults: plain values, as they are in the file."""
        if known is not None:
            require_known(path, table, known, f"{name}." if name else "")

    def __contains__(self, key: str) -> bool:
        return key in self.given

    def label(self, key: str) -> str:
        """The key's full name."""
        return f"{self.name}.{key}" if self.name else key

    def wrong(self, key: str, expected: str) -> ConfigError:
        """The error about the value of a key."""
        value = self.given.get(key, self.resolved.get(key))
        return ConfigError(f"{self.path}: {self.label(key)} is {value!r}, {expected}")

    def value(self, key: str, default: Any = REQUIRED) -> Any:
        """Whatever the key has."""
        if key not in self.given and default is REQUIRED:
            raise ConfigError(f"{self.path}: the key {self.label(key)!r} is missing")
        self.resolved[key] = self.given.get(key, default)
        return self.resolved[key]

    def text(self, key: str, default: Any = REQUIRED) -> Any:
        """A text that is not empty; or the default."""
        value = self.value(key, default)
        if key in self and (not isinstance(value, str) or not value):
            raise self.wrong(key, "expected text")
        return value

    def choice(self, key: str, names: Iterable[Any], default: Any = REQUIRED) -> Any:
        """One of the names, or numbers; or the default."""
        value, known = self.value(key, default), list(names)
        if key in self and (value not in known or isinstance(value, bool)):
            shown = [str(name) for name in known]
            raise self.wrong(key, f"expected one of {', '.join(shown)}{meant(value, shown)}")
        return value

    def flag(self, key: str, default: Any = False) -> Any:
        """True or false."""
        value = self.value(key, default)
        if key in self and not isinstance(value, bool):
            raise self.wrong(key, "expected true or false")
        return value

    def integer(self, key: str, default: Any = REQUIRED, least: int = 0) -> Any:
        """A whole number of at least `least`; or the default."""
        value = self.value(key, default)
        if key in self and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise self.wrong(key, f"expected a whole number >= {least}")
        return value

    def number(self, key: str, expected: str, default: Any, least: float, most: float = math.inf) -> Any:
        """A finite number from `least` to `most`, each of them in it if `expected` has a bracket there; or the default.

        Args:
            key: whose value it is.
            expected: what the error says is expected: "a number in [0, 1)" leaves 1 out, "a number > 0" leaves 0 out.
            default: where the key is not there.
            least, most: the limits.
        """
        value = self.value(key, default)
        if key not in self:
            return value
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        opens = "(" in expected or ">" in expected.replace(">=", "")
        closes = ")" in expected
        if not is_number or not least <= value <= most or (opens and value == least) or (closes and value == most):
            raise self.wrong(key, f"expected {expected}")
        return value

    def texts(self, key: str, default: Any = REQUIRED) -> Any:
        """A list of texts, or one text, which is a list of one; or the default."""
        value = self.value(key, default)
        if key not in self:
            return value
        several = [value] if isinstance(value, str) else value
        if not isinstance(several, list) or not several or not all(isinstance(one, str) and one for one in several):
            raise self.wrong(key, "expected a text or a list of texts")
        return several

    def numbers(self, key: str, default: Any = REQUIRED) -> Any:
        """A list of numbers; or the default."""
        value = self.value(key, default)
        is_list = isinstance(value, list) and value
        if key in self and not (is_list and all(type(number) in (int, float) for number in value)):
            raise self.wrong(key, "expected a list of numbers")
        return value

    def path_to(self, key: str, default: Any = REQUIRED) -> Path | None:
        """A file or folder that is there, relative to the file's own folder; None where there is no key."""
        value = self.text(key, default)
        if value is None:
            return None
        found = self.path.parent / value
        if not found.exists():
            raise self.wrong(key, f"but there is no {found}")
        return found

    def table(self, key: str, known: Iterable[str] | None = None) -> Section:
        """The table of that name in this one, empty if it is not there."""
        inner = Section(self.path, self.label(key), self.given.get(key, {}), known)
        self.resolved[key] = inner.resolved
        return inner

    def settings(self, key: str) -> dict[str, Any]:
        """A table with keys of any names: arguments for something else."""
        inner = self.table(key)
        inner.resolved.update(inner.given)
        return dict(inner.given)


class Importer:
    """Imports what a file names: "package.module:name", or "file.py:name" with a Python file relative to its folder.

    A file's own folder can be imported from, as if it were run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._modules: dict[str, ModuleType] = {}

    def module(self, key: str, name: str) -> ModuleType:
        """The module of that name; ConfigError, which names the key, if it cannot be imported."""
        if name not in self._modules:
            try:
                self._modules[name] = self._import(key, name)
            except ConfigError:
                raise
            except ImportError as error:
                raise ConfigError(f"{self.path}: {key} is {name!r}, which cannot be imported: {error}") from error
            except Exception as error:  # whatever running it may raise
                raise ConfigError(f"{self.path}: {key} is {name!r}, which cannot be imported: {told(error)}") from error
        return self._modules[name]

    def object(self, key: str, value: str) -> Any:
        """What "module:name" names; ConfigError, which names the key, if there is no such thing."""
        module_name, _, name = value.rpartition(":")
        if not module_name or not name:
            raise ConfigError(f"{self.path}: {key} is {value!r}, expected 'module:name' or 'file.py:name'")
        module = self.module(key, module_name)
        if not hasattr(module, name):
            close = meant(name, [known for known in dir(module) if not known.startswith("_")])
            raise ConfigError(f"{self.path}: {key} is {value!r}, but {module_name} has no {name!r}{close}")
        return getattr(module, name)

    def function(self, key: str, value: str) -> Any:
        """As `object`, for what can be called."""
        found = self.object(key, value)
        if not callable(found):
            raise ConfigError(
                f"{self.path}: {key} is {value!r}, which is a {type(found).__name__}, expected a function"
            )
        return found

    def call(self, key: str, value: str, arguments: Mapping[str, Any], **offered: Any) -> Any:
        """What the function returns.

        Args:
            key: that names it.
            value: "module:name".
            arguments: of the file.
            offered: given to a function that has a parameter of that name which the file says nothing of.

        Raises:
            ConfigError: arguments that it does not have or lacks; whatever it raises.
        """
        function = self.function(key, value)
        try:
            parameters: Mapping[str, inspect.Parameter] = inspect.signature(function).parameters
        except (ValueError, TypeError):  # some built-in functions do not tell
            parameters = {}
        wanted = {name: given for name, given in offered.items() if name in parameters and given is not None}
        given = {**wanted, **arguments}
        takes_any = not parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if not takes_any:
            place = key.rpartition(".")[0]
            require_known(self.path, arguments, parameters, f"{place}.arguments." if place else "arguments.")
        for name, parameter in parameters.items():
            is_named = parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            if is_named and parameter.default is parameter.empty and name not in given:
                raise ConfigError(f"{self.path}: {key} is {value!r}, whose argument {name!r} is missing")
        try:
            return function(**given)
        except ConfigError:
            raise
        except Exception as error:  # whatever it may raise
            raise ConfigError(f"{self.path}: {key} is {value!r}, which failed: {told(error)}") from error

    def _import(self, key: str, name: str) -> ModuleType:
        folder = self.path.parent.resolve()
        if not name.endswith(".py"):
            _search(folder)
            return importlib.import_module(name)
        file = folder / name
        if not file.is_file():
            raise ConfigError(f"{self.path}: {key} is {name!r}, but there is no file {file}")
        if file.stem in sys.stdlib_module_names:
            raise ConfigError(
                f"{self.path}: {key} is {name!r}, but {file.stem!r} is a module of Python's own; expected another name"
            )
        _search(file.parent)
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[file.stem] = module  # where workers of a DataLoader look for its classes
        spec.loader.exec_module(module)
        return module


def _search(folder: Path) -> None:
    """Have Python look for modules there first."""
    if sys.path[:1] != [str(folder)]:
        sys.path.insert(0, str(folder))


def told(error: BaseException) -> str:
    """An error in a line, with the place that it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def load_weights(path: Path, key: str, model: nn.Module, checkpoint: Path) -> None:
    """Load a state dict, of torch.save or .safetensors, into the model; ConfigError, naming the key, if that fails."""
    try:
        if checkpoint.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(checkpoint)
        else:
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    except ImportError as error:
        raise ConfigError(f"{path}: {key} is {str(checkpoint)!r}: pip install safetensors") from error
    except Exception as error:  # whatever unpickling may raise
        raise ConfigError(f"{path}: {key} is {str(checkpoint)!r}, which cannot be loaded: {error}") from error


def to_device(path: Path, key: str, device: str, *models: nn.Module) -> None:
    """Move the models; ConfigError, naming the key, for a device that is not there."""
    try:
        for model in models:
            model.to(device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        raise ConfigError(f"{path}: {key} is {device!r}: {error}") from error
