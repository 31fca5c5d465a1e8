"""Options as dataclass fields: each carries its help text, choices and bounds.

@dataclass(kw_only=True)
class Options:
    epochs: int = option(10, "passes over all training captions", at_least=1)
    schedule: str = option("one-cycle", "of the learning rate", choices=("one-cycle", "constant"))

    def __post_init__(self):
        check_options(self)

add_arguments(parser, Options)      # --epochs, --schedule
"""

from dataclasses import MISSING, field, fields
from types import NoneType
from typing import get_args

BOUNDS = {
    "at_least": (lambda value, bound: value >= bound, "at least"),
    "above": (lambda value, bound: value > bound, "greater than"),
    "below": (lambda value, bound: value < bound, "less than"),
}


def option(default=MISSING, help="", **metadata):
    """A dataclass field. Without a default it is required.

    metadata: `choices`, the allowed values; `at_least`, `above` and `below`, the bounds of a
    number; and marks of one's own, which `names_with` finds.
    """
    return field(default=default, metadata={"help": help, **metadata})


def names_with(options, mark) -> list[str]:
    """The names of the fields of a dataclass whose metadata contain `mark`."""
    return [f.name for f in fields(options) if f.metadata.get(mark)]


def from_args(options, args):
    """An instance of the dataclass `options` with the values of an argparse namespace."""
    return options(**{f.name: getattr(args, f.name) for f in fields(options)})


def kinds_of(f) -> tuple:
    """The types of a field's values: (int,), or for `int | None` (int, NoneType)."""
    return get_args(f.type) or (f.type,)


def check_options(options):
    """Raise ValueError for a value that is not among the choices or outside the bounds.

    "none", as typed on a command line, becomes None in a field that allows it.
    """
    for f in fields(options):
        value, choices = getattr(options, f.name), f.metadata.get("choices")
        if NoneType in kinds_of(f) and str(value).lower() == "none":
            setattr(options, f.name, None)
            continue
        if choices and value not in choices:
            raise ValueError(f"unknown {f.name} {value!r}; choose from {', '.join(choices)}")
        for name, (is_valid, text) in BOUNDS.items():
            if name in f.metadata and not is_valid(value, f.metadata[name]):
                raise ValueError(f"{f.name} is {value}, but must be {text} {f.metadata[name]}")


def add_arguments(parser, options):
    """Add a flag for each field of the dataclass `options` to an argparse parser."""
    for f in fields(options):
        flag, text = "--" + f.name.replace("_", "-"), f.metadata.get("help")
        kind, *others = kinds_of(f)
        if kind is bool:
            parser.add_argument(flag, action="store_true", default=f.default, help=text)
            continue
        parser.add_argument(
            flag,
            type=none_or(kind) if NoneType in others else kind,
            required=f.default is MISSING or f.metadata.get("required", False),
            default=None if f.default is MISSING else f.default,
            choices=f.metadata.get("choices"),
            help=text,
        )


def none_or(kind):
    """A conversion for argparse, which turns "none" into None."""

    def convert(text):
        return None if text.lower() == "none" else kind(text)

    convert.__name__ = kind.__name__  # argparse's error message contains it
    return convert
