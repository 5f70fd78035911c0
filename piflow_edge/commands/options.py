"""What several commands share: options, and how results are told."""

import os
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from piflow_edge.system.progress import PROGRESS_MODES, set_progress_mode

if TYPE_CHECKING:
    from piflow_edge.option import Option


class LateOptions:
    """In the place of options that a command makes when somebody needs them: to list the commands takes none.

    `make` returns decorators of click.
    """

    def __init__(self, make: Callable[[], Sequence[Callable]]):
        self._make = make

    def make(self) -> list[click.Parameter]:
        collected: Any = _with(self._make(), lambda: None)
        return collected.__click_params__[::-1]


class Command(click.Command):
    """A command whose parameters may be `LateOptions`, which are made when somebody reads the parameters."""

    @property
    def params(self) -> list[click.Parameter]:
        parts = [each.make() if isinstance(each, LateOptions) else [each] for each in self._params]
        self._params = [parameter for part in parts for parameter in part]
        return self._params

    @params.setter
    def params(self, params: list[Any]) -> None:
        self._params: list[Any] = params

    def add_option(self, option: click.Parameter) -> None:
        """Add an option as the last one, and make none."""
        self._params.append(option)


def command(name: str | None = None) -> Callable[[Callable], Command]:
    """Return the decorator that makes a command, of the function's name unless another is given."""
    return click.command(name, cls=Command)


def late_options(make: Callable[[], Sequence[Callable]]) -> Callable:
    """Return a decorator that gives a `command` the options of `make`, made when they are needed."""

    def decorate(function: Any) -> Any:
        # Where the decorators of click leave theirs.
        function.__click_params__ = [*getattr(function, "__click_params__", ()), LateOptions(make)]
        return function

    return decorate


class Names(click.ParamType):
    """Names separated by commas."""

    name = "name,..."

    def convert(self, value, parameter, context):
        return tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else value


class Counts(click.ParamType):
    """Whole numbers, 1 or more, separated by commas."""

    name = "n,..."

    def convert(self, value, parameter, context):
        return tuple(calls(context, parameter, value)) or None if isinstance(value, str) else value


class Parsed(click.ParamType):
    """What a class makes of a text by its `parse`."""

    def __init__(self, kind: Any):
        self.kind, self.name = kind, kind.__name__.lower()

    def convert(self, value, parameter, context):
        return self.kind.parse(value) if isinstance(value, str) else value


class Multiples(click.IntRange):
    """Whole numbers of a unit, as a field has them that counts in ones."""

    def __init__(self, unit: int, **ends: Any):
        super().__init__(**{name: end and end // unit for name, end in ends.items()})
        self.unit = unit

    def convert(self, value, parameter, context):
        return super().convert(value, parameter, context) * self.unit


# Several values in one option, by the kind of one.
LISTS = {str: Names, int: Counts}


def click_type(annotation: Any, limits: "Option") -> Any:
    """Return what click reads a field of a dataclass as, with the range that the field says."""
    if limits.choices:
        return click.Choice(limits.choices)
    kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
    kind = kinds[0] if type(None) in typing.get_args(annotation) else annotation
    if typing.get_origin(kind) is Sequence or kind == tuple[str, ...]:
        return LISTS[typing.get_args(kind)[0]]()
    if typing.get_origin(kind) is tuple:
        return typing.get_args(kind)
    if hasattr(kind, "parse"):
        return Parsed(kind)
    ends = {
        "min": limits.minimum if limits.above is None else limits.above,
        "max": limits.maximum if limits.below is None else limits.below,
        "min_open": limits.above is not None,
        "max_open": limits.below is not None,
    }
    if ends["min"] is None and ends["max"] is None:
        return kind
    if limits.unit != 1:
        return Multiples(limits.unit, **ends)
    return {int: click.IntRange, float: click.FloatRange}[kind](**ends)


def find_settings(settings: Any) -> Any:
    """Return a dataclass or an instance, or what stands in the place "module:NAME"."""
    if not isinstance(settings, str):
        return settings
    module, _, name = settings.partition(":")
    return getattr(import_module(module), name)


def _make_option(settings: Any, field: str, flag: str, changes: Mapping[str, Any]) -> Callable:
    from piflow_edge.option import find_options

    limits = find_options(settings)[field]
    values: dict[str, Any] = {"help": limits.help}
    name = flag.replace("_", "-")
    annotation = typing.get_type_hints(settings if isinstance(settings, type) else type(settings))[field]
    if annotation is bool:
        values["is_flag"] = True
        if getattr(settings, field):  # the option turns it off
            return click.option(f"--no-{name}", flag, callback=lambda _, __, off: not off, **values)
    else:
        values |= {"default": getattr(settings, field)}
        if "type" not in changes:
            values["type"] = click_type(annotation, limits)
    return click.option(f"--{name}", flag, **{**values, **changes})


def field_option(settings: Any, field: str, flag: str | None = None, **changes: Any) -> Callable:
    """Return the option of the command line for one field of a dataclass.

    Args:
        settings: the dataclass or an instance, whose value is the default; or where it stands, "module:NAME", which is
            imported when the option is needed.
        field: its name; `piflow_edge.option.option` says its help and range.
        flag: name of the option and of the command's argument, where it is not the field's.
        changes: arguments of `click.option` that go before what the field says.
    """
    return late_options(lambda: [_make_option(find_settings(settings), field, flag or field, changes)])


def settings_options(
    argument: str,
    settings: Any,
    flags: Mapping[str, str] | None = None,
    *,
    without: Sequence[str] = (),
    **changes: Mapping[str, Any],
) -> Callable:
    """Give a command the options of a dataclass; it is called with an instance.

    Args:
        argument: of the command, which gets the instance.
        settings: the defaults, as in `field_option`. Fields that say nothing of themselves keep their value.
        flags: field -> name of its option, where they differ.
        without: fields that get no option and keep their value.
        changes: field -> arguments of `click.option` that go before what the field says.
    """

    def find_flags() -> tuple[Any, dict[str, str]]:
        from piflow_edge.option import find_options

        found = find_settings(settings)
        fields = [field for field in find_options(found) if field not in without]
        return found, {field: (flags or {}).get(field, field) for field in fields}

    def make_options() -> list[Callable]:
        found, names = find_flags()
        return [_make_option(found, field, flag, changes.get(field, {})) for field, flag in names.items()]

    def decorate(command):
        @wraps(command)
        def call(*arguments, **given):
            from dataclasses import replace

            found, names = find_flags()
            values = {field: given.pop(flag) for field, flag in names.items()}
            defaults = found() if isinstance(found, type) else found
            return command(*arguments, **given, **{argument: replace(defaults, **values)})

        return late_options(make_options)(call)

    return decorate


class PolicyName(click.Choice):
    """One of the registered policies, imported when the choices are needed, so that other commands stay quick."""

    def __init__(self):
        self.case_sensitive = True

    @property
    def choices(self):
        from piflow_edge.policies import POLICY_NAMES

        return tuple(POLICY_NAMES)


def size(context, parameter, text: str | None) -> int | tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text)
    if not match:
        raise click.BadParameter(f"give a side, such as 64, or height x width, such as 48x64; got {text!r}")
    height, width = match.groups()
    return (int(height), int(width)) if width else int(height)


def bundle_path(given: str | tuple[str, ...] | None) -> Any:
    """Where a bundle is: a folder, or one that comes with the package by its name."""
    if given is None or isinstance(given, tuple):
        return given and tuple(map(bundle_path, given))
    from piflow_edge.bundle.folder import find_bundle  # late: it brings NumPy

    return find_bundle(given)


def temperature(context, parameter, text: str | None) -> float | str | None:
    if text in (None, "auto"):
        return text
    try:
        return float(text)  # whose range the generator checks
    except ValueError:
        raise click.BadParameter(f"give a number, 0 or more, or auto; got {text!r}") from None


# Where npm install onnxruntime-web puts what a browser draws with.
RUNTIME_OF_BROWSERS = Path("node_modules/onnxruntime-web/dist")
FOLDER = click.Path(file_okay=False, path_type=Path)
# The path as it was typed: Path would make "digits" of "./digits".
BUNDLE_PATH = {"type": click.Path(), "callback": lambda context, parameter, given: bundle_path(given)}
BUNDLE = click.argument("bundle", **BUNDLE_PATH)
TRUSTED_KEYS = click.option(
    "--trusted-key",
    "trusted_keys",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    callback=lambda context, parameter, keys: list(keys) or None,
    help="Public key in PEM; can be given again. Use only a bundle that one of them signed.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
SEED = field_option("piflow_edge.distill.configs:TrainingConfig", "seed")
DATA = click.option(
    "--data",
    default="digits",
    help="'digits', an .npz of images or latents, or a folder with one folder of images per class.",
)
IMAGE_SIZE = click.option(
    "--size",
    callback=size,
    metavar="N|HxW",
    help="Bring the images of a folder to this height and width: scaled until they cover it, and cut to the middle.",
)
AUTOENCODER = click.option(
    "--autoencoder",
    type=FOLDER,
    help="Folder of an AutoencoderKL or AutoencoderTiny of diffusers: train on its latents of the images.",
)
TEACHER = click.option(
    "--teacher",
    "source",
    metavar="SOURCE",
    help="Checkpoint of train-teacher, package.module:function, SiT file, diffusers folder or hub id; else for digits "
    "the shipped teacher.",
)
TEACHER_STYLE = click.option(
    "--teacher-style", type=click.Choice(["sit", "repa", "piflow"]), default="sit", help="Of a SiT file."
)
RESUME = click.option("--resume", is_flag=True, help="Go on from the checkpoint in --out.")
COUNT = click.IntRange(min=1)
_PLACE = "piflow_edge.engines:EngineOptions"
# Where and how networks run.
_PLACEMENT = (
    click.option("--device", help="What the engine runs on, such as cpu, cuda or cuda:1; else its best."),
    field_option(_PLACE, "num_threads", "threads"),
    field_option(
        _PLACE, "cpu_affinity", "cores", type=str, callback=lambda *given: cores(*given), metavar="N,N,..."
    ),
)
KEEP = field_option(_PLACE, "keep")


def _make_engine_option() -> list[Callable]:
    from piflow_edge.engines import ENGINE_NAMES

    help = "Backend to run on; auto takes the fastest here that need not be built first."
    return [click.option("--engine", type=click.Choice(ENGINE_NAMES), default="auto", help=help)]


def engine_options(command):
    """The engine and `placement_options`, which the command gets as `**engine` and hands to `engine_settings`."""
    return _with((late_options(_make_engine_option), *_PLACEMENT), command)


def placement_options(command):
    """Those of `engine_options` but for the engine, for a command that takes several."""
    return _with(_PLACEMENT, command)


def engine_settings(engine, device, threads, cores, keep: str = "all") -> dict:
    """What `load` and `open_engine` take, from the options of `engine_options`."""
    from piflow_edge.engines import EngineOptions

    return {
        "engine": engine,
        "device": device,
        "options": EngineOptions(num_threads=threads, cpu_affinity=cores, keep=keep),
    }


def _with(options, command):
    for option in reversed(options):
        command = option(command)
    return command


def cores(context, parameter, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", text, re.ASCII):
        raise click.BadParameter(f"give numbers of cores, separated by commas, such as 0,1; got {text!r}")
    return tuple(int(core) for core in text.split(","))


def calls(context, parameter, text: str | None) -> list[int]:
    if text is None:
        return []
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise click.BadParameter(
            f"give whole numbers, 1 or more, separated by commas, such as 1,2,4; got {text!r}"
        )
    return [int(nfe) for nfe in text.split(",")]


def axis_lengths(context, parameter, texts: tuple[str, ...]) -> dict[str, tuple[int, int, int]]:
    """Return NAME=MIN:OPT:MAX by name."""
    found = {}
    for text in texts:
        match = re.fullmatch(r"(\w+)=(\d{1,6}):(\d{1,6}):(\d{1,6})", text, re.ASCII)
        if match is None:
            raise click.BadParameter(f"give NAME=MIN:OPT:MAX, such as tokens=1:77:512; got {text!r}")
        found[match[1]] = (int(match[2]), int(match[3]), int(match[4]))
    return found


def axis_ranges(context, parameter, texts: tuple[str, ...]) -> dict:
    """Return NAME=MIN:MAX or NAME=MIN:MAX:MULTIPLE by name, as `AxisSpec`."""
    from piflow_edge.bundle.sections import AxisSpec  # late: it brings in NumPy

    found = {}
    for text in texts:
        match = re.fullmatch(r"(\w+)=(\d{1,6}):(\d{1,6})(?::(\d{1,6}))?", text, re.ASCII)
        if match is None:
            raise click.BadParameter(
                f"give NAME=MIN:MAX or NAME=MIN:MAX:MULTIPLE, such as tokens=1:512; got {text!r}"
            )
        found[match[1]] = AxisSpec(int(match[2]), int(match[3]), int(match[4] or 1))
    return found


def user_loras(context, parameter, texts: tuple[str, ...]) -> list[tuple[str, float]]:
    """Return SOURCE or SOURCE=STRENGTH as source and strength, 1 where it is not said."""
    found = []
    for text in texts:
        source, equals, strength = text.rpartition("=")
        try:
            found.append((source, float(strength)) if equals else (text, 1.0))
        except ValueError:
            raise click.BadParameter(
                f"give SOURCE or SOURCE=STRENGTH, such as style=0.8; got {text!r}"
            ) from None
    return found


def precisions(context, parameter, text: str) -> list[str]:
    from piflow_edge.bundle.precisions import PRECISIONS  # late: it brings in NumPy

    names = text.split(",")
    if not set(names) <= set(PRECISIONS):
        raise click.BadParameter(
            f"give precisions of {', '.join(PRECISIONS)}, separated by commas; got {text!r}"
        )
    return names


def add_progress_options(command: Command) -> None:
    """Give a command that takes long the options that say how it tells how far it is."""

    def choose(context, parameter, mode: str | None) -> None:
        if mode:
            set_progress_mode(mode)

    told = {"expose_value": False, "callback": choose}
    help = "How to tell how far the job is, on stderr: auto is a bar on a terminal and a line every 15 s elsewhere."
    # Eager: it is read first, so that its default does not undo --quiet.
    command.add_option(
        click.Option(
            ["--progress"],
            type=click.Choice(PROGRESS_MODES),
            default="auto",
            help=help,
            is_eager=True,
            **told,
        )
    )
    command.add_option(
        click.Option(["--quiet"], is_flag=True, flag_value="quiet", help="Tell nothing of it.", **told)
    )


def network_precisions(context, parameter, texts: tuple[str, ...]) -> dict[str, str]:
    """Return NETWORK=NAME by network."""
    found = {network: name for network, _, name in (text.partition("=") for text in texts)}
    if not all(found) or not all(found.values()) or len(found) < len(texts):
        raise click.BadParameter(
            f"give NETWORK=NAME, each network once, such as encoder=int8; got {' '.join(texts)}"
        )
    for names in found.values():
        precisions(context, parameter, names)
    return found


def emit(value) -> None:
    import json

    click.echo(json.dumps(value, indent=2))


def say(line: str) -> None:
    click.echo(line, err=True)


def is_main_process() -> bool:
    """Whether nobody else reports: of the processes that a launcher starts, the first does."""
    return os.environ.get("RANK", "0") == "0"


def show(table) -> None:
    from rich.console import Console

    # Not a terminal: wide enough for every column, so that a file or a pipe gets whole lines.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table)


def report_rows(rows, as_json: bool, context: dict) -> None:
    if as_json:
        layers = [{**vars(row), "passed": row.passed} for row in rows]
        emit({**context, "passed": all(row.passed for row in rows), "layers": layers})
        return
    from rich.table import Table

    table = Table("precision", "layer", "worst error", "allowed", "in", "")
    for row in rows:
        cells = (row.precision, row.layer, f"{row.error:.2e}", f"{row.tolerance:.0e}", row.where)
        table.add_row(*cells, "ok" if row.passed else "FAILED")
    show(table)
