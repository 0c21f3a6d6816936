"""The command line: flags made from the settings classes, and one line per error."""

import argparse
import difflib
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import Field
from typing import get_args

from crab_min.config import (
    INFER,
    PRESET_ONLY,
    RECIPES,
    RENAMED,
    flag_fields,
    groups_of,
    with_values,
)
from crab_min.errors import RunError
from crab_min.media.kinds import media_kind
from crab_min.recipes.presets import PRESETS

# flags of train.py that --help shows; --help-all shows the others too
BASIC = """
    data test tasks target frames test_rows things weights load_in_4bit adapter r alpha heads
    trainable steps epochs batch_size grad_accum lr connector_lr seed out
    stage side compare_lora modalities fusion modality_sequential exit_threshold
    see_steps hear_steps read_steps
""".split()

# removed flag -> what replaces it
REMOVED = {
    "about": "the built-in world asks about the channels of --side",
    "depth": "tutorials/41_modalities.py registers a depth encoder",
    "encoder-adapters": "the released ones never trained",
    "feature-cache": "--cache-features keeps features in memory",
    "masks": "crab-tiny --stage masks trains the mask decoder",
    "max-tokens": "lower --batch-size and raise --grad-accum",
    "separate": "a converted run says how its prompts are laid out",
}
for old in PRESET_ONLY:
    REMOVED[old.replace("_", "-")] = "presets have it (crab_min/recipes/presets.py)"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports an error in one line, with a command that helps."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        print(f"error: {message}; see python {self.prog} --help", file=sys.stderr)
        sys.exit(2)

    def check_flags(self, arguments: list[str], flags: list[str], renamed: dict[str, str]) -> None:
        """Stop at the first argument that is no known flag, and say what to give instead.

        Args:
            arguments: of the command line.
            flags: known flags, without dashes in front.
            renamed: old name of a flag -> new name, both without dashes in front.
        """
        for word in arguments[: arguments.index("--")] if "--" in arguments else arguments:
            is_file = media_kind(word) or os.path.exists(word)
            if is_file and re.match("-[^-]", word):
                self.error(f"{word} reads like a flag; write ./{word} for the file")
        for name in given_flags(arguments):
            if name in flags:
                continue
            if name in renamed:
                self.error(f"--{name} is now --{renamed[name]}")
            if name in REMOVED:
                self.error(f"--{name} is gone: {REMOVED[name]}")
            close = difflib.get_close_matches(name, flags, 1)
            hint = f", did you mean --{close[0]}?" if close else ""
            self.error(f"unknown flag --{name}{hint}")


def given_flags(arguments: list[str]) -> list[str]:
    """Return the names of the flags among command-line arguments.

    `--no-x` and `--x=1` give x.
    """
    if "--" in arguments:  # what follows are words, such as a clip named -1.mp4
        arguments = arguments[: arguments.index("--")]
    flags = [argument[2:].split("=")[0] for argument in arguments if argument.startswith("--")]
    return [flag.removeprefix("no-") for flag in flags]


def flag_name(field_name: str) -> str:
    """Return the flag of a field, without dashes in front."""
    return field_name.replace("_", "-")


def flags_of(groups: dict[str, type]) -> dict[str, Field]:
    """Return the fields of groups that are flags, by flag without dashes in front."""
    found = [f for group in groups.values() for f in flag_fields(group)]
    return {flag_name(f.name): f for f in found}


def add_flags(parser: Parser, groups: dict[str, type], values: dict, shown: list | None) -> None:
    """Add the flags of groups of settings, under one heading per group.

    Args:
        values: name of a setting -> default, for those with another default than their own.
        shown: names of the settings in the help; None for all.
    """
    for name, group in groups.items():
        flags = flag_fields(group)
        in_help = [f for f in flags if shown is None or f.name in shown]
        heading = parser.add_argument_group(name, group.__doc__) if in_help else parser
        for f in flags:
            add_flag(heading, f, values.get(f.name, f.default), f in in_help)


def add_flag(parser, f: Field, default, in_help: bool) -> None:
    """Add the flag of a settings field to a parser, or to an argument group of one."""
    text = f.metadata["help"]
    if "(default:" not in text:
        text += f" (default: {default_text(default)})"
    options = {"default": default, "help": text if in_help else argparse.SUPPRESS}
    if isinstance(f.default, bool):
        options["action"] = argparse.BooleanOptionalAction
    elif f.type is list:
        options |= {"action": "append", "default": [], "help": f"{text}; several times"}
    else:
        choices = get_args(f.type)  # of a Literal
        options |= {"choices": choices} if choices else {"type": f.type}
        if f.type in (int, float):
            options["type"] = number_reader(f.type, *f.metadata["range"])
    parser.add_argument("--" + flag_name(f.name), **options)


def number_reader(type_: type, least: float, most: float) -> Callable:
    """Return a function that reads an int or a float, and refuses what is out of a range."""

    def read_number(text: str) -> int | float:
        kind = "whole number" if type_ is int else "number"
        try:
            value = type_(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind}") from None
        if not least <= value <= most or math.isinf(value):  # also refuses nan
            limit = f"{least} or more" if math.isinf(most) else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"{text}, expected a {kind}, {limit}")
        return value

    return read_number


def default_text(default) -> str:
    """Return a default value as the help shows it."""
    if isinstance(default, bool):
        return "on" if default else "off"
    return "none" if default in ("", None) else str(default)


# --- train.py ------------------------------------------------------------------------------------

COMMANDS = {
    "help": "show the basic flags of this preset",
    "help-all": "show all flags of this preset",
    "list": "list the presets",
    "plan": "print parameters, memory and the GPUs that are large enough; downloads nothing",
    "debug": "show a traceback where something goes wrong",
}


def parse_train(arguments: list[str]) -> tuple[argparse.Namespace, object]:
    """Parse the arguments of train.py; the preset may stand anywhere among the flags.

    Returns:
        The parsed arguments, and the settings of the run, of its recipe's class.
    """
    # the first pass knows the flags of all presets, and finds the preset and Crab's stage
    first = command_parser()
    arguments = fit_without_value(arguments)
    preset_of: dict[str, str] = {}  # flag -> the first preset that has it
    for name, preset in PRESETS.items():
        for flag, f in flags_of(groups_of(RECIPES[preset.recipe])).items():
            if flag not in preset_of:
                preset_of[flag] = name
                add_flag(first, f, f.default, in_help=False)
    renamed = {flag_name(old): flag_name(new) for old, new in RENAMED.items()}
    first.check_flags(arguments, [*COMMANDS, "fit", *preset_of], renamed)
    known = first.parse_args(arguments)
    if known.preset not in PRESETS:
        first.error(f"unknown preset {known.preset!r}; choose from {', '.join(PRESETS)}")

    # the second pass knows the flags and the defaults of that preset alone
    preset = PRESETS[known.preset]
    groups = groups_of(RECIPES[preset.recipe])
    for name in given_flags(arguments):
        if name in preset_of and name not in flags_of(groups):
            first.error(f"{known.preset} has no --{name}; {preset_of[name]} has")
    parser = command_parser(f"{known.preset}: {preset.description}")
    values = preset.values | preset.stages.get(known.stage, {})
    add_flags(parser, groups, values, None if known.help_all else BASIC)

    # commands that only print
    if known.help or known.help_all:
        parser.print_help()
        sys.exit(0)
    if known.list:
        for name, preset in PRESETS.items():
            print(f"{name:<16} {preset.description}")
        sys.exit(0)

    # the run's settings
    given = parser.parse_args(arguments)
    values |= {f.name: getattr(given, f.name) for f in flags_of(groups).values()}
    flags = given_flags(arguments)
    if "epochs" in flags and given.epochs:
        if "steps" in flags:
            parser.error("--steps and --epochs both say how long the run is; give one of them")
        values["steps"] = 0  # those of the preset
    try:
        return given, with_values(RECIPES[preset.recipe](), **values)
    except RunError as error:
        parser.error(str(error))


def fit_without_value(arguments: list[str]) -> list[str]:
    """Return arguments in which a preset behind --fit is no number of gigabytes."""
    following = [*arguments[1:], ""]
    pairs = zip(arguments, following)
    return ["--fit=0" if word == "--fit" and next_ in PRESETS else word for word, next_ in pairs]


def command_parser(description: str = "") -> Parser:
    """Return a parser of train.py that knows the preset and COMMANDS.

    It knows no settings yet.
    """
    presets = "presets: " + ", ".join(PRESETS)
    parser = Parser(prog="train.py", description=description, epilog=presets, add_help=False)
    parser.add_argument("preset", nargs="?", default="crab_plus-tiny", help="what to train")
    parser.add_argument(
        "--fit",
        nargs="?",
        type=number_reader(float, 0, math.inf),
        const=0.0,
        metavar="GB",
        help="choose 4 bits, batch size and limits on media so that the run fits a GPU of so many "
        "gigabytes (without a number: this machine's); with --plan it only says so",
    )
    for flag, text in COMMANDS.items():
        names = ["-h", "--help"] if flag == "help" else ["--" + flag]
        parser.add_argument(*names, action="store_true", help=text)
    return parser


# --- infer.py ------------------------------------------------------------------------------------

RENAMED_INFER = {"limit": "max-new-tokens", "without": "ablate"}


def parse_infer(arguments: list[str]) -> argparse.Namespace:
    """Parse the arguments of infer.py."""
    parser = Parser(prog="infer.py", description="Ask about a clip, or score a split (--eval).")
    parser.add_argument(
        "clip",
        nargs="*",
        help="videos, sounds, images or folders of them, and the question as the last word; a "
        "video's own sound is used without --audio",
    )
    parser.add_argument("--debug", action="store_true", help=COMMANDS["debug"])
    add_flags(parser, INFER, {}, shown=None)
    known = [*flags_of(INFER), "help", "debug"]
    parser.check_flags(arguments, known, RENAMED_INFER)

    # clips and the question may stand among the flags; behind -- all are words
    words = []
    if "--" in arguments:
        end = arguments.index("--")
        arguments, words = arguments[:end], arguments[end + 1 :]
    given = parser.parse_intermixed_args(arguments)
    given.clip = [*given.clip, *words]
    return given


# --- both ----------------------------------------------------------------------------------------


def run_command(command: Callable[[], None], debug: bool) -> int:
    """Run a command and return its exit code.

    An error that a user can cause is printed in one line, with exit code 2.

    Args:
        debug: raise such an error instead, for its traceback.
    """
    try:
        command()
        return 0
    except (ValueError, OSError) as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        # torch is not imported here, and does not count this among its user's errors
        if debug or type(error).__name__ != "OutOfMemoryError":
            raise
        reason = str(error).split(".")[0]
        advice = (
            "a run of train.py with fewer --frames or --load-in-4bit needs less, and train.py "
            "--plan says how much"
        )
        print(f"error: out of memory ({reason}); {advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
