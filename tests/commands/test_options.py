"""Options made of a dataclass: default, help and range are said once, and hold for Python callers too."""

import subprocess
import sys
from dataclasses import dataclass

import pytest
from click.testing import CliRunner

from piflow_edge.commands.options import command, find_settings, settings_options
from piflow_edge.errors import ScheduleError
from piflow_edge.option import check_options, find_options, option

# Of `bench`: field -> its option, where they differ.
FLAGS = {"engines": "engine", "precisions": "precision", "nfes": "nfe", "batches": "batch"}


@dataclass(frozen=True)
class Range:
    """Read from "LEAST-MOST"."""

    least: int
    most: int

    @classmethod
    def parse(cls, text):
        return cls(*map(int, text.split("-")))


@dataclass(frozen=True)
class Kettle:
    cups: int = option(2, "Of tea.", minimum=1, maximum=8)
    heat: float = option(0.5, "Of the plate.", above=0, below=1)
    leaf: str | None = option(None, "What is in it.", choices=("green", "black"))
    span: tuple[float, float] | None = option(None, "Minutes from and to.")
    tags: tuple[str, ...] = option(("warm",), "What it is called.")
    whistles: bool = option(False, "Make a noise.")
    keeps_warm: bool = option(True, "Let it go cold.")
    water: int | None = option(None, "In litres.", minimum=1000, unit=1000, title="water in ml")
    hours: Range = option(Range(9, 17), "When it may run.")  # noqa: RUF009 - frozen
    hidden: int = 7

    def __post_init__(self):
        check_options(self)


def brew(*arguments, settings=Kettle(), **changes):
    made = []

    @command()
    @settings_options("kettle", settings, {"cups": "number"}, **changes)
    def boil(kettle):
        made.append(kettle)

    done = CliRunner().invoke(boil, list(arguments))
    return done, made


def test_a_command_gets_the_defaults_of_the_instance_it_was_given():
    mine = Kettle(cups=4, tags=("a", "b"), hidden=9)
    assert brew(settings=mine)[1] == [mine]


def test_every_kind_of_field_is_read():
    words = [
        "--number",
        "3",
        "--heat",
        "0.9",
        "--leaf",
        "black",
        "--span",
        "1",
        "2.5",
        "--tags",
        "x,y",
        "--whistles",
        "--no-keeps-warm",
        "--water",
        "2",
        "--hours",
        "6-20",
    ]
    expected = Kettle(3, 0.9, "black", (1.0, 2.5), ("x", "y"), True, False, 2000, Range(6, 20))
    assert brew(*words)[1] == [expected]


@pytest.mark.parametrize(
    "words", ["--number 0", "--number 9", "--heat 0", "--heat 1", "--leaf blue", "--water 0"]
)
def test_what_is_out_of_range_is_wrong_usage(words):
    done, made = brew(*words.split())
    assert (done.exit_code, made) == (2, [])


@pytest.mark.parametrize(
    "given",
    [{"cups": 0}, {"cups": 9}, {"heat": 0.0}, {"heat": 1.0}, {"heat": float("nan")}, {"leaf": "blue"}],
)
def test_the_same_ranges_hold_in_python(given):
    ((name, value),) = given.items()
    with pytest.raises(ScheduleError, match=f"^{name} is .*; got {value!r}$"):
        Kettle(**given)


def test_help_shows_each_text_once():
    text = brew("--help")[0].output
    for name, said in find_options(Kettle).items():
        assert text.count(said.help) == 1, name
    assert "hidden" not in text


def test_a_command_may_say_what_click_cannot_know():
    assert brew("--number", "3", cups={"callback": lambda context, parameter, cups: cups * 2})[1] == [
        Kettle(6)
    ]


def test_settings_of_training_are_the_options_of_the_commands():
    from piflow_edge.cli import main
    from piflow_edge.distill.configs import TEACHER_TRAINING, RunConfig, TrainingConfig

    for name, training in (("distill", TrainingConfig()), ("train-teacher", TEACHER_TRAINING)):
        defaults = main.commands[name].make_context(name, ["--out", "x"]).params
        assert defaults.items() >= {each: getattr(training, each) for each in find_options(training)}.items()
        assert defaults.items() >= vars(RunConfig()).items()


@pytest.mark.parametrize(
    ("name", "line", "settings"),
    [
        ("sample", "digits --out x.png", "piflow_edge.sampling_settings:SamplingSettings"),
        ("bench", "digits", "piflow_edge.bench.config:BenchConfig"),
    ],
)
def test_a_command_without_options_gets_the_defaults_of_the_library(monkeypatch, name, line, settings):
    from piflow_edge.cli import main

    given, parsed = {}, main.commands[name]
    monkeypatch.setattr(parsed, "callback", lambda **values: given.update(values))
    parsed.main(line.split(), standalone_mode=False)
    options = find_options(find_settings(settings))
    for field, limits in options.items():
        (parameter,) = [each for each in parsed.params if each.name == FLAGS.get(field, field)]
        assert (parameter.help, given[parameter.name]) == (
            limits.help,
            getattr(find_settings(settings), field),
        )


def test_the_list_of_commands_makes_no_options_of_settings():
    code = "import sys, piflow_edge.cli as cli; cli.main(['--help'], standalone_mode=False); "
    code += "sys.exit(str([m for m in ('piflow_edge.option', 'piflow_edge.engines') if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "[]\n"


def test_settings_of_a_call_bring_no_numpy():
    code = "import sys, piflow_edge.sampling_settings; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
