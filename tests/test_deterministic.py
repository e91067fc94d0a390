"""Deterministic mode: a request's tokens and log-probabilities have the same bits alone, in any batch, however its prompt is
cut into chunks, at any captured shape, in a graph or eagerly."""

import random

import pytest
import torch
from tiny import VOCAB_SIZE, drain

from stepgraph import SamplingParams, ops
from stepgraph.verify.graphs import verify_graphs

PROMPT_LENGTHS = (1, 3, 17, 40, 75, 130)


@pytest.fixture(scope="module")
def create_deterministic(create_engine):
    return lambda **settings: create_engine(**({"deterministic": True} | settings))


def prompts():
    rng = random.Random(7)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in PROMPT_LENGTHS]


def params(index):
    """Greedy, sampled, and sampled with everything that looks at the history."""
    settings = (
        {"temperature": 0.0, "prompt_logprobs": 2},
        {"temperature": 0.8, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "logit_bias": {7: 2.5}},
    )[index % 3]
    return SamplingParams(max_tokens=6, seed=index, ignore_eos=True, logprobs=5, **settings)


def answers(engine, batches):
    """Run the prompts whose indices each batch lists, one batch after the other. Tokens and all log-probabilities, by index."""
    found = {}
    for number, batch in enumerate(batches):
        requests = {i: engine.add_request(f"{number}-{i}", prompts()[i], params(i)) for i in batch}
        drain(engine)
        for i, request in requests.items():
            found[i] = (list(request.output_token_ids), list(request.output_logprobs), list(request.prompt_logprobs))
    return [found[i] for i in sorted(found)]


ALONE = [[i] for i in range(len(PROMPT_LENGTHS))]
TOGETHER = [list(range(len(PROMPT_LENGTHS)))]
SETTINGS = {
    "together": {},
    "together, eagerly": {"graph_backend": "eager"},
    "in chunks of 5": {"max_num_batched_tokens": 5, "max_num_seqs": 3, "capture_sizes": (5,), "capture_rows": (3,)},
    "in one chunk each": {"max_num_batched_tokens": 300, "capture_sizes": (300,)},
    "in other KV blocks": {"block_size": 8},
}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def answers_alone(create_deterministic, dtype):
    return answers(create_deterministic(dtype=dtype), ALONE)


@pytest.mark.parametrize("case", SETTINGS)
def test_a_request_gets_the_bits_it_gets_alone(case, dtype, create_deterministic, answers_alone):
    found = answers(create_deterministic(dtype=dtype, **SETTINGS[case]), TOGETHER)
    assert [len(tokens) for tokens, _, _ in found] == [6] * len(PROMPT_LENGTHS)
    assert found == answers_alone


def test_without_the_flag_some_bits_differ(create_engine):
    """Otherwise the test above would prove nothing. A device's kernels may happen to agree in one precision."""
    engines = [create_engine(dtype=dtype) for dtype in ("float32", "bfloat16")]
    assert any(answers(engine, ALONE) != answers(engine, TOGETHER) for engine in engines)


def test_rows_of_random_compositions_have_the_logits_they_have_alone_at_their_exact_shape(dtype, create_deterministic):
    engine = create_deterministic(dtype=dtype)
    for report in verify_graphs(engine.executor, rounds=6, seed=3, alone_rows=8):
        assert report.mismatches == []
        assert report.worst_graph_difference == 0
        assert report.worst_alone_difference == 0


def weight_for(x):
    return torch.linspace(0.5, 1.5, x.shape[1], device=x.device).to(x.dtype)


def rope_cache(x):
    """One query head, one key head and one value head of a sixth of the width, rounded up to an even number."""
    T, D = x.shape[0], -(-x.shape[1] // 6) * 2
    qkv = torch.nn.functional.pad(x, (0, 3 * D - x.shape[1]))
    cache = x.new_zeros(2, T, 1, 1, D)
    cos_sin = torch.linspace(-1, 1, D, device=x.device).unsqueeze(0)
    norm = weight_for(x)[:D].contiguous()
    position_T = torch.zeros(T, dtype=torch.int32, device=x.device)
    slot_T = torch.arange(T, dtype=torch.int32, device=x.device)
    q_THD = ops.rope_cache(qkv, position_T, slot_T, cos_sin, norm, norm, cache[0], cache[1], 1, 1e-5)
    return torch.cat([part.reshape(T, D) for part in (q_THD, *cache)], 1)


OPERATORS = {
    "rms_norm": lambda x: ops.rms_norm(x, weight_for(x), 1e-5),
    "rope_cache": rope_cache,
    "swiglu": ops.swiglu,
    "geglu": ops.geglu,
    "sigmoid_gate": lambda x: ops.sigmoid_gate(x[:, 1:].contiguous(), x[:, 1:]),
    "sigmoid_gate of tokens": lambda x: ops.sigmoid_gate(x, x[:, :1].contiguous()),
}


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operator_gives_each_row_the_bits_it_gives_it_alone(operator, dtype, num_threads, device):
    """Torch's CPU kernels leave the end of a vector, or of a thread's share, to scalar code that may round otherwise."""
    if device == "cuda" and num_threads > 1:
        pytest.skip("threads are the CPU's")
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for width in (18, 514, 576, 1002, 3074):
            x = torch.randn(150, width, generator=torch.Generator().manual_seed(width)).to(device, dtype)
            alone = torch.cat([OPERATORS[operator](row.clone()) for row in x.split(1)])
            for size in (2, 3, 17, 64, 149, 150):
                assert torch.equal(OPERATORS[operator](x[:size].clone()), alone[:size]), (width, size)
    finally:
        torch.set_num_threads(threads)
