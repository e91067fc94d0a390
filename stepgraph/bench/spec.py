"""``bench spec``: what speculative decoding gives, on real text and with decreed acceptance."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stepgraph.abi.slot_line import MAX_DRAFTS
from stepgraph.bench import spec_forced, spec_text
from stepgraph.bench.offline import settings_line
from stepgraph.bench.report import check_one_device, machine, write_json
from stepgraph.bench.spec_forced import ForcedOptions, ForcedResult
from stepgraph.bench.spec_report import cost_table, forced_tables, plot_forced, plot_text, text_table
from stepgraph.bench.spec_text import BASELINE, MethodResult, TextOptions
from stepgraph.bench.spec_workloads import WORKLOADS, load_workload
from stepgraph.config import EngineConfig, add_flags, settings_from_flags
from stepgraph.config.speculative import SpeculativeConfig
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import ConfigError
from stepgraph.models.source import resolve_configured

_METHODS: tuple[str, ...] = SpeculativeConfig.__dataclass_fields__["speculative_method"].metadata["choices"]
_TEXT_SIZES, _FORCED_SIZES = (1, 8), (1, 8, 64)
_FORCED_DRAFTS = (1, 3, 5)


def add_parser(commands: Any) -> None:
    """Register ``bench spec``."""
    parser = commands.add_parser(
        "spec",
        help="speculative decoding by method: speed, acceptance, what a round costs",
        description="Answer the same prompts under each method, in turn, and compare. Or, with --acceptance, time rounds in "
        "which each proposal stands with a given probability, on random weights of any shape.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--batch-sizes",
        type=_numbers,
        metavar="N,N",
        help="requests under way at a time (default: 1,8; with --acceptance 1,8,64)",
    )
    parser.add_argument(
        "--rounds",
        type=_number,
        default=5,
        metavar="N",
        help="times that everything is measured, after one that captures graphs and does not count (default: 5)",
    )
    parser.add_argument(
        "--repeats", type=_number, default=10, metavar="N", help="timed runs of each graph alone (default: 10)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a chart as PNG (needs matplotlib)")

    text = parser.add_argument_group("real text")
    text.add_argument(
        "--methods",
        type=_names(_METHODS),
        metavar="NAME,NAME",
        help=f"of {', '.join(_METHODS)}; none is always measured (default: all)",
    )
    text.add_argument(
        "--workloads",
        type=_names(tuple(WORKLOADS)),
        metavar="NAME,NAME",
        help=f"of {', '.join(WORKLOADS)} (default: all)",
    )
    text.add_argument("--num-prompts", type=_number, metavar="N", help="of each workload (default: 8)")
    text.add_argument("--output-len", type=_number, metavar="N", help="most tokens of an answer (default: 128)")
    text.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default: 0)")

    forced = parser.add_argument_group("decreed acceptance", "With random weights and method mtp.")
    forced.add_argument("--acceptance", type=float, metavar="P", help="probability that a proposal stands")
    forced.add_argument(
        "--drafts", type=_numbers, metavar="N,N", help="numbers of proposals, one after the other (default: 1,3,5)"
    )
    forced.add_argument("--context-len", type=_number, metavar="N", help="tokens that each row knows (default: 128)")
    forced.add_argument(
        "--count-launches",
        action="store_const",
        const=True,
        help="count what the host launches per step, with the profiler (CUDA)",
    )
    add_flags(parser)
    parser.set_defaults(run=run)


_TEXT_ONLY = ("methods", "workloads", "num_prompts", "output_len", "temperature")
_FORCED_ONLY = ("drafts", "context_len", "count_launches")


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark; returns the exit code."""
    settings = settings_from_flags(arguments)
    forced = arguments.acceptance is not None
    for name in _TEXT_ONLY if forced else _FORCED_ONLY:
        if getattr(arguments, name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} says nothing {'with' if forced else 'without'} --acceptance; leave it out"
            )
    for name, instead in (("speculative_method", "--methods"), ("speculative_acceptance", "--acceptance")):
        if name in settings:
            raise ConfigError(f"{name}={settings[name]!r}: the benchmark sets it itself; use {instead}")
    settings["speculative_method"] = BASELINE  # until an engine gets its own
    check_one_device(EngineConfig.from_settings(**settings))
    return _run_forced(arguments, settings) if forced else _run_text(arguments, settings)


def _run_text(arguments: argparse.Namespace, settings: dict[str, Any]) -> int:
    SamplingParams(
        temperature=arguments.temperature or 0.0, max_tokens=arguments.output_len
    )  # refused before models are read
    names = arguments.workloads or tuple(WORKLOADS)
    options = TextOptions(
        methods=(BASELINE, *(m for m in arguments.methods or _METHODS if m != BASELINE)),
        workloads=[load_workload(name, arguments.num_prompts or 8) for name in names],
        batch_sizes=arguments.batch_sizes or _TEXT_SIZES,
        output_len=arguments.output_len or 128,
        temperature=arguments.temperature or 0.0,
        rounds=arguments.rounds,
        repeats=arguments.repeats,
    )
    config = EngineConfig.from_settings(**settings)
    source = resolve_configured(config.model)
    max_len = config.model.max_model_len or source.config.max_position_embeddings
    prompts = spec_text.load_prompts(source, options.workloads, options.output_len, max_len)
    engines = spec_text.create_engines(settings, source, prompts, options, progress=sys.stderr.isatty())
    results = spec_text.measure(engines, prompts, options)
    engine = engines[BASELINE]
    where = machine(engine.executor.specs.device)
    print(
        f"{settings_line(engine, where)}; medians of {options.rounds} rounds, methods in turn, after one round that "
        f"captured graphs; temperature {options.temperature:g}, answers of up to {options.output_len} tokens"
    )
    for each in prompts:
        left_out = f" ({each.num_too_long} left out, too long)" if each.num_too_long else ""
        print(f"{each.workload.name}: {len(each.token_ids)} prompts{left_out}, {each.workload.source}")
    print(f"\n{text_table(results)}\n\n{cost_table(results)}")
    if captures := sum(result.num_captures for result in results):
        print(f"\n{captures} graphs were captured in rounds that count; the time it took is left out")
    if arguments.json:
        write_json(
            arguments.json,
            {
                "benchmark": "spec",
                "machine": where,
                "settings": asdict(engine.config) | {"speculative": _without_method(settings)},
                "options": {
                    "output_len": options.output_len,
                    "temperature": options.temperature,
                    "rounds": options.rounds,
                    "repeats": options.repeats,
                },
                "workloads": {
                    each.workload.name: {"source": each.workload.source, "prompt_lens": list(map(len, each.token_ids))}
                    for each in prompts
                },
                "results": [_text_json(result) for result in results],
            },
        )
    if arguments.plot:
        plot_text(arguments.plot, results, f"{engine.source.name} on {where['device']}")
    return 0


def _run_forced(arguments: argparse.Namespace, settings: dict[str, Any]) -> int:
    options = ForcedOptions(
        acceptance=arguments.acceptance,
        num_drafts=arguments.drafts or _FORCED_DRAFTS,
        batch_sizes=arguments.batch_sizes or _FORCED_SIZES,
        context=arguments.context_len or 128,
        rounds=arguments.rounds,
        repeats=arguments.repeats,
        count_launches=bool(arguments.count_launches),
    )
    if not 0 <= options.acceptance <= 1:
        raise ConfigError(f"--acceptance {options.acceptance} is a probability; give 0 to 1")
    if settings.get("load_format", "dummy") != "dummy":
        raise ConfigError("with --acceptance, weights are random; leave --load-format out")
    if "num_speculative_tokens" in settings:
        raise ConfigError(
            "with --acceptance, --drafts gives the numbers of proposals; leave --num-speculative-tokens out"
        )
    if max(options.num_drafts) > MAX_DRAFTS:
        raise ConfigError(f"--drafts {max(options.num_drafts)} is above {MAX_DRAFTS}, the most a step verifies")
    engine, limits, results = spec_forced.measure(settings, options, progress=sys.stderr.isatty())
    where = machine(engine.executor.specs.device)
    print(
        f"{settings_line(engine, where)}; random weights, each proposal stands with probability {options.acceptance:g}, "
        f"{options.context} tokens of context; medians over {options.rounds} windows, with and without speculation in turn\n"
        f"limits measured here: copy {limits.copy_bytes_per_s / 1e9:.0f} GB/s, matrix product {limits.flops_per_s / 1e12:.2f} "
        f"TFLOP/s\n\n{forced_tables(results)}"
    )
    if arguments.json:
        write_json(
            arguments.json,
            {
                "benchmark": "spec",
                "machine": where,
                "settings": asdict(engine.config) | {"speculative": _without_method(settings)},
                "options": asdict(options),
                "limits": asdict(limits),
                "results": [_forced_json(result) for result in results],
            },
        )
    if arguments.plot:
        title = f"{engine.source.name} on {where['device']}, acceptance {options.acceptance:g}"
        plot_forced(arguments.plot, results, title)
    return 0


def _without_method(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of speculation that were given; the engines differ in the others."""
    names = SpeculativeConfig.__dataclass_fields__.keys() - {"speculative_method"}
    return {name: value for name, value in settings.items() if name in names}


def _text_json(result: MethodResult) -> dict[str, Any]:
    times = result.round_times
    return asdict(result) | {
        "of_ideal": result.of_ideal,
        "round_times": None if times is None else asdict(times) | {"draft_ms": times.draft_ms},
    }


def _forced_json(result: ForcedResult) -> dict[str, Any]:
    return asdict(result) | {
        "graphs": asdict(result.graphs) | {"draft_ms": result.graphs.draft_ms},
        "tokens_per_s": result.tokens_per_s,
        "speedup": result.speedup,
        "graph_speedup": result.graph_speedup,
        "of_ideal": result.of_ideal,
    }


def _number(text: str) -> int:
    """A whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be 1 or more")
    return number


def _numbers(text: str) -> tuple[int, ...]:
    """Several of them, with commas between."""
    return tuple(map(_number, text.split(",")))


def _names(known: tuple[str, ...]) -> Any:
    """A parser of names with commas between, which must be known."""

    def names(text: str) -> tuple[str, ...]:
        given = tuple(text.split(","))
        if unknown := [name for name in given if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} unknown; choose from {', '.join(known)}")
        return given

    return names
