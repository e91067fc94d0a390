"""Flags of `stepgraph bench serve`: what they mean, and which are refused before anything is sent."""

import sys

import pytest

from stepgraph import bench
from stepgraph.bench import report as bench_report
from stepgraph.bench import serve
from stepgraph.errors import ConfigError


def test_a_server_that_cannot_be_reached_is_refused_with_the_fix() -> None:
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:1/v1/models .*start the server, correct --base-url, or name"):
        bench.main(["serve", "--base-url", "http://127.0.0.1:1"])


def test_aiohttp_is_asked_for_before_anything_is_sent(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(ConfigError, match=r"aiohttp.*pip install 'stepgraph\[bench\]'"):
        bench.main(["serve"])


def test_secrets_after_an_equals_sign_are_not_written_either() -> None:
    words = ["serve", "--api-key=sk", "--model=m", "--header", "A=1", "--seed", "3"]
    assert bench_report._without_secrets(words) == [
        *("serve", "--api-key=***", "--model=m", "--header", "***", "--seed", "3")
    ]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--num-prompts 0", "--num-prompts=0 is too small; the smallest value is 1"),
        ("--max-concurrency 0", "--max-concurrency=0 is too small"),
        ("--client-processes 0", "--client-processes=0 is too small"),
        ("--client-processes 3 --num-prompts 2", "more than --num-prompts=2.*lower it to 2 or less"),
        ("--client-processes 3 --max-concurrency 2", "more than --max-concurrency=2.*lower it to 2"),
        ("--request-rate 0", "--request-rate=0.0 must be above 0"),
        ("--burstiness nan", "--burstiness=nan must be above 0"),
        ("--random-range-ratio 1", "--random-range-ratio=1.0 must be at least 0 and below 1"),
        ("--random-input-range 5 4", "--random-input-range.*no less than the first"),
        ("--random-output-range 0 4", "--random-output-range.*at least 1"),
        ("--random-input-range 4 5 --random-input-len 4", "contradict each other"),
        (
            "--dataset sharegpt --random-input-len 4",
            "--random-input-len has no effect on dataset 'sharegpt'; use random",
        ),
        ("--prefix-len 4", "--prefix-len has no effect on dataset 'random'; use prefix_repetition"),
        ("--dataset-path x", "--dataset-path has no effect on dataset 'random'; use sharegpt or file"),
        ("--dataset file", "no file; name one with --dataset-path"),
        ("--result-filename x", "--result-filename has no effect without --save-result"),
        ("--save-detailed", "--save-detailed has no effect without"),
        ("--endpoint embeddings", "--endpoint=embeddings is not known; choose one of: completions, chat"),
        ("--percentile-metrics ttft,speed", "'speed' is not known; choose from ttft,tpot,itl,e2el"),
        ("--metric-percentiles 50,101", "--metric-percentiles=50,101 must be numbers from 0 to 100"),
        ("--metric-percentiles fifty", "--metric-percentiles=fifty must be numbers"),
        ("--goodput itl:4", "--goodput itl:4 must be one of ttft, tpot, e2el"),
        ("--goodput ttft", "--goodput ttft must be one of"),
        ("--goodput ttft:-1", "--goodput ttft:-1 must be one of"),
        ("--header nothing", "--header nothing must be KEY=VALUE"),
        ("--extra-body [1]", "must be a JSON object"),
        ("--extra-body {", "is not JSON"),
    ],
)
def test_flags_that_cannot_be_used_are_refused_before_anything_is_sent(flags, complaint) -> None:
    with pytest.raises(ConfigError, match=complaint):
        bench.main(["serve", "--base-url", "http://127.0.0.1:1", *flags.split()])


@pytest.mark.parametrize(
    ("flags", "inputs", "outputs"),
    [
        ("", (1024, 1024), (128, 128)),
        ("--input-len 10 --output-len 5", (10, 10), (5, 5)),
        ("--random-input-len 10 --random-range-ratio 0.25", (7, 13), (96, 160)),
        ("--random-input-len 1 --random-output-len 1 --random-range-ratio 0.9", (1, 2), (1, 2)),
        ("--random-input-range 4 80 --random-output-range 1 9", (4, 80), (1, 9)),
        ("--dataset prefix_repetition --prefix-repetition-prefix-len 9", (1024, 1024), None),
        ("--dataset sharegpt --output-len 5", (1024, 1024), (5, 5)),
    ],
)
def test_lengths_come_from_the_flags_as_in_vllm(monkeypatch, flags, inputs, outputs) -> None:
    asked = []
    monkeypatch.setattr(serve, "make_prompts", lambda options, count: asked.append(options) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench.main(["serve", *flags.split()])
    assert (asked[0].input_range, asked[0].output_range) == (inputs, outputs)
    assert asked[0].prefix_len == (9 if "prefix" in flags else 256)
