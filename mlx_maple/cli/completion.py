"""`maple completion`: the completion script of a shell, made from the command's own parser."""

import argparse
import shlex
from collections.abc import Iterable
from dataclasses import dataclass

from mlx_maple.cli import DONE, VERBS, build_parser

SHELLS = ("bash", "zsh", "fish")
FILES = {
    "FILE",
    "IMAGE",
    "MASK",
    "MODEL",
    "IN",
    "OUT",
    "PATH",
}  # metavars that a file can stand for


@dataclass(frozen=True)
class Option:
    """One option or positional of a verb: its spellings (none for a positional) and its values."""

    names: tuple[str, ...]
    help: str
    values: tuple[str, ...]
    takes_value: bool
    takes_file: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("shell", choices=SHELLS, help="the shell that the script is for")


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    print({"bash": _bash, "zsh": _zsh, "fish": _fish}[args.shell](_tree()), end="")
    return DONE


def _tree() -> dict[str, list[Option]]:
    """Every verb's options; the second level ("models clear") is a verb of its own here."""
    parser = build_parser(VERBS)
    tree: dict[str, list[Option]] = {}
    for name, verb in _subparsers(parser).items():
        tree[name] = _options(verb)
        for inner, below in _subparsers(verb).items():
            tree[f"{name} {inner}"] = _options(below)
    return tree


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _options(parser: argparse.ArgumentParser) -> list[Option]:
    found = []
    for action in parser._actions:
        metavar = action.metavar if isinstance(action.metavar, str) else ""
        values = tuple(str(choice) for choice in action.choices or ()) or _names(metavar)
        text = (action.help or "").replace("%%", "%")
        takes_value = action.nargs != 0
        found.append(
            Option(tuple(action.option_strings), text, values, takes_value, metavar in FILES)
        )
    return found


def _names(metavar: str) -> tuple[str, ...]:
    """The values of the options whose lists live in the library."""
    if metavar not in ("SAMPLER", "SCHEDULE", "NOISE"):
        return ()
    from mlx_maple.sampling import noise, samplers, schedule

    return {
        "SAMPLER": tuple(samplers.SAMPLERS),
        "SCHEDULE": tuple(schedule.SCHEDULES),
        "NOISE": tuple(noise.NOISE_SOURCES),
    }[metavar]


def _bash(tree: dict[str, list[Option]]) -> str:
    cases, words = [], []
    for verb, options in tree.items():
        for option in options:
            if not option.names or not option.takes_value:
                continue
            labels = "|".join(f"'{verb}:{name}'" for name in option.names)
            reply = "()"
            if option.values:
                reply = f'($(compgen -W {_words(option.values)} -- "$word"))'
            elif option.takes_file:
                reply = '($(compgen -f -- "$word"))'
            cases.append(f"        {labels}) COMPREPLY={reply}; return ;;")
        names = [name for option in options for name in option.names]
        values = [value for option in options if not option.names for value in option.values]
        words.append(f"        '{verb}') names={_words(names)}; values={_words(values)} ;;")
    nested = "|".join(sorted({verb.split()[0] for verb in tree if " " in verb}))
    first = _words([*VERBS, "--help", "--version"])
    new_line = "\n"
    return f"""# bash completion for maple: eval "$(maple completion bash)"
_maple() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}"
    local verb="${{COMP_WORDS[1]}}" names="" values=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W {first} -- "$word"))
        return
    fi
    case "$verb" in
        {nested}) if [ "$COMP_CWORD" -gt 2 ]; then verb="$verb ${{COMP_WORDS[2]}}"; fi ;;
    esac
    case "$verb:$before" in
{new_line.join(cases)}
    esac
    case "$verb" in
{new_line.join(words)}
    esac
    case "$word" in
        -*) COMPREPLY=($(compgen -W "$names" -- "$word")) ;;
        *) COMPREPLY=($(compgen -W "$values" -- "$word") $(compgen -f -- "$word")) ;;
    esac
}}
complete -o filenames -F _maple maple
"""


def _words(words: Iterable[str]) -> str:
    """Words as one argument of a shell's command."""
    return shlex.quote(" ".join(words))


def _zsh(tree: dict[str, list[Option]]) -> str:
    verbs = "\n".join(f"        {shlex.quote(f'{name}:{text}')}" for name, text in VERBS.items())
    cases = []
    for verb, options in tree.items():
        if " " in verb:
            continue
        specs, rest = [], ":value: "
        for option in options:
            value = _zsh_value(option)
            if not option.names:  # zsh takes one form for all words that are no options
                rest = value if value != ":value: " else rest
            text = "".join(c for c in option.help if c not in "[]:")
            for name in option.names:
                specs.append(f"{name}[{text}]{value if option.takes_value else ''}")
        specs = [shlex.quote(spec) for spec in (*specs, f"*{rest}")]
        cases.append(f"        {verb}) _arguments -S {' '.join(specs)} ;;")
    new_line = "\n"
    return f"""#compdef maple
# zsh completion for maple: source <(maple completion zsh)
_maple() {{
    local -a verbs=(
{verbs}
    )
    if (( CURRENT == 2 )); then
        _describe 'verb' verbs
        return
    fi
    local verb="${{words[2]}}"
    shift words
    (( CURRENT-- ))
    case "$verb" in
{new_line.join(cases)}
    esac
}}
compdef _maple maple
"""


def _zsh_value(option: Option) -> str:
    if option.values:
        return f":value:({' '.join(option.values)})"
    return ":value:_files" if option.takes_file else ":value: "


def _fish(tree: dict[str, list[Option]]) -> str:
    lines = ["# fish completion for maple: maple completion fish | source", "complete -c maple -f"]
    for name, text in VERBS.items():
        condition = "-n __fish_use_subcommand"
        lines.append(f"complete -c maple {condition} -a {name} -d {_fish_quote(text)}")
    for verb, options in tree.items():
        seen = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in verb.split())
        for option in options:
            parts = [f"complete -c maple -n '{seen}'"]
            for name in option.names:
                parts.append(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}")
            if option.takes_file:
                parts.append("-rF" if option.names else "-F")
            elif option.takes_value and option.names:
                parts.append("-x")
            if option.values:
                parts.append(f"-a {_fish_quote(' '.join(option.values))}")
            if option.names:
                parts.append(f"-d {_fish_quote(option.help)}")
            lines.append(" ".join(parts))
    return "\n".join(lines) + "\n"


def _fish_quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
