"""What a field of settings says of itself, once: default, help and range.

The settings check themselves by it, and `commands/options.py` makes the options of the command line of it.
"""

from dataclasses import field, fields
from typing import Any, NamedTuple

from .errors import ScheduleError


class Option(NamedTuple):
    """Help and range of one field.

    `minimum`, `maximum`: ends of the range that belong to it. `above`, `below`: ends that do not. `choices`: the
    values of a text. `title`: what messages call it, where that is not the name of the field. `unit`: what 1 on
    the command line stands for in the field, such as 1 << 20 of one in bytes that is given in MiB.
    """

    help: str
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    title: str | None = None
    unit: int = 1

    def allows(self, value: Any) -> bool:
        """Return True if a value lies in the range. NaN lies in none."""
        if self.choices:
            return value in self.choices
        return (
            (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def describe_range(self) -> str:
        """Return the range in words, such as "1 or more"."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        ends = (
            ("{} or more", self.minimum), ("above {}", self.above), ("at most {}", self.maximum),
            ("below {}", self.below),
        )  # fmt: skip
        return " and ".join(words.format(end) for words, end in ends if end is not None)


def option(default: Any, help: str, **limits: Any) -> Any:
    """Return a field of a dataclass with a default, and what `Option` says of it.

    Args:
        default: of the field. None stays allowed where it is the default.
        help: one line for the command line.
        limits: range or choices; see `Option`.
    """
    return field(default=default, metadata={"option": Option(help, **limits)})


def find_options(settings: Any) -> dict[str, Option]:
    """Return what the fields of a dataclass, or of an instance, say of themselves, by name."""
    return {each.name: each.metadata["option"] for each in fields(settings) if "option" in each.metadata}


def check_options(settings: Any, error: type[Exception] = ScheduleError) -> None:
    """Raise `error` unless every field of an instance lies in its range; None does where it is the default."""
    for each in fields(settings):
        limits: Option | None = each.metadata.get("option")
        value = getattr(settings, each.name)
        if limits is None or (value is None and each.default is None):
            continue
        if not limits.allows(value):
            raise error(f"{limits.title or each.name} is {limits.describe_range()}; got {value!r}")
