"""The --config flag: an experiment file, its variants, and single values changed by flags."""

import importlib.util
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from tfusion import config
from tfusion.errors import UserError, parsing

flags.disclaim_key_flags()  # `--help` of a verb lists the flag among its own


def define():
    with parsing():  # here, in a line: the flag's own parser has three for a file that is not there
        if (name := given()) != "config":
            _check_file(name.partition(":")[0])
    return config_flags.DEFINE_config_file("config", None, "experiments/FILE.py[:variant]")


def read(holder) -> config.RunConfig:
    """The config that the flags give. Raises UserError where it is not valid, or a flag changes a kind."""
    flag = flags.FLAGS["config"] if isinstance(holder, flags.FlagHolder) else None
    for key in () if flag is None else config_flags.get_override_values(flag):
        if key == "objective" or key.rsplit(".", 1)[-1] == "kind":
            raise UserError(f"--config.{key}: a kind brings keys of its own, a variant of the experiment file "
                            f"chooses it; {_variants(config_flags.get_config_filename(flag))}")
    return config.from_dict(holder.value)


def _check_file(path: str) -> None:
    if not Path(path).is_file():
        raise UserError(f"{path} not found: experiments/FILE.py[:variant] is wanted")


def load(path: str):
    """The module of an experiment file. Raises UserError where there is none."""
    _check_file(path)
    spec = importlib.util.spec_from_file_location("experiment", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def get(name: str):
    """The ConfigDict of experiments/FILE.py[:variant]."""
    return call(name, "get_config")


def call(name: str, function: str):
    """What a function of an experiment file returns for the words of `FILE.py[:words]`. Raises UserError where
    there is no such function, or it refuses the words."""
    path, _, words = name.partition(":")
    module = load(path)
    if not hasattr(module, function):
        raise UserError(f"{path} has no {function}")
    try:
        return getattr(module, function)(words) if words else getattr(module, function)()
    except ValueError as e:
        raise UserError(f"{name}: {e}") from e


def _variants(path: str) -> str:
    """What an experiment file says of its variants when it is asked for one that it does not have."""
    path = path.partition(":")[0]
    try:
        load(path).get_config("?")
    except TypeError:  # it takes no argument
        return f"{path} has no variants"
    except ValueError as e:
        return str(e).replace("unknown variant '?'; ", f"of {path}, ")
    return f"{path} has no variants"


def given() -> str:
    """What was given as --config, overrides aside."""
    found = [arg.split("=", 1)[1] for arg in sys.argv if arg.startswith(("--config=", "-config="))]
    return found[-1] if found else "config"
