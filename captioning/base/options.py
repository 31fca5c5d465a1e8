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


def check_options(options):
    """Raise ValueError for a value that is not among the choices or outside the bounds.

    "none", as typed on a command line, becomes None in a field that allows it.
    """
    for f in fields(options):
        value = getattr(options, f.name)
        if allows_none(f) and str(value).lower() == "none":
            setattr(options, f.name, None)
            continue
        choices = f.metadata.get("choices")
        if choices and value not in choices:
            raise ValueError(f"unknown {f.name} {value!r}; choose from {', '.join(choices)}")
        for name, (is_valid, text) in BOUNDS.items():
            bound = f.metadata.get(name)
            if bound is not None and value is not None and not is_valid(value, bound):
                raise ValueError(f"{f.name} is {value}, but must be {text} {bound}")


def add_arguments(parser, options):
    """Add a flag for each field of the dataclass `options` to an argparse parser."""
    for f in fields(options):
        flag, text = "--" + f.name.replace("_", "-"), f.metadata.get("help", "")
        if f.default is MISSING or f.metadata.get("required"):
            parser.add_argument(flag, required=True, help=text)
        elif isinstance(f.default, bool):
            parser.add_argument(flag, action="store_true", default=f.default, help=text)
        else:
            kind = type_of(f)
            parser.add_argument(
                flag,
                type=none_or(kind) if allows_none(f) else kind,
                default=f.default,
                choices=f.metadata.get("choices"),
                help=text,
            )


def none_or(kind):
    """A conversion for argparse, which turns "none" into None."""

    def convert(text):
        return None if text.lower() == "none" else kind(text)

    convert.__name__ = kind.__name__  # argparse's error message contains it
    return convert


def allows_none(f) -> bool:
    return "None" in str(f.type)


def type_of(f):
    """The type of a field's values: str, int or float."""
    names = str(f.type.__name__ if isinstance(f.type, type) else f.type)
    return next(kind for kind in (float, int, str) if kind.__name__ in names)
