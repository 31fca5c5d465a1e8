"""Options as dataclass fields: flags of a command, choices and bounds."""

import argparse
from dataclasses import dataclass, field

import pytest

from captioning.base.options import add_arguments, check_options, from_args, names_with, option


@dataclass(kw_only=True)
class Options:
    source: str = option(help="required", fixed=True)
    count: int = option(3, "an integer", at_least=1, fixed=True)
    size: int | None = option(None, "an integer or none", at_least=1)
    rate: float = option(0.5, "a number", above=0, below=1)
    name: str | None = option("x", "a text or none")
    order: str = option("first", "one of two", choices=("first", "last"))
    fast: bool = option(False, "a switch")
    plain: int = field(default=7)

    def __post_init__(self):
        check_options(self)


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser, Options)
    return from_args(Options, parser.parse_args(["--source", "a", *arguments]))


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("", {}),
        ("--count 9", {"count": 9}),
        ("--size 9", {"size": 9}),
        ("--size none", {"size": None}),
        ("--rate 0.25", {"rate": 0.25}),
        ("--name none", {"name": None}),
        ("--name None", {"name": None}),
        ("--order last", {"order": "last"}),
        ("--fast", {"fast": True}),
        ("--plain 8", {"plain": 8}),
    ],
)
def test_flags(arguments, expected):
    """A flag sets its option, with the type of the field; "none" is None where None is allowed, and
    without flags, the options have the defaults of the dataclass."""
    assert parse(*arguments.split()) == Options(source="a", **expected)


@pytest.mark.parametrize("arguments", ["--count x", "--count none", "--size 1.5", "--order other"])
def test_values_of_another_type(arguments, capsys):
    """A value of another type or outside the choices ends the command with a usage message."""
    with pytest.raises(SystemExit) as caught:
        parse(*arguments.split())
    flag, value = arguments.split()
    message = capsys.readouterr().err
    assert caught.value.code == 2 and flag in message and f"'{value}'" in message


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"count": 0}, "count is 0, but must be at least 1"),
        ({"size": -2}, "size is -2, but must be at least 1"),
        ({"rate": 0}, "rate is 0, but must be greater than 0"),
        ({"rate": 1}, "rate is 1, but must be less than 1"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"order": "other"}, "unknown order 'other'; choose from first, last"),
    ],
    ids=str,
)
def test_invalid_values(changes, message):
    """In Python, a value outside the choices or bounds raises ValueError, which shows it."""
    with pytest.raises(ValueError, match=message):
        Options(source="a", **changes)


def test_none_in_python():
    """The text "none" is None in a field that allows it, and a text in another."""
    options = Options(source="none", size="none")
    assert options.size is None and options.source == "none"


def test_names_with():
    """Fields are found by a mark in their metadata."""
    assert names_with(Options, "fixed") == names_with(parse(), "fixed") == ["source", "count"]
