"""The benchmark of the HTTP front: the engines that it sets up."""

import argparse

import pytest

from stepgraph.bench import front


@pytest.mark.parametrize("flags", [[], ["--max-model-len", "1000"], ["--block-size", "64"]], ids=lambda f: " ".join(f))
def test_the_cache_that_it_chooses_holds_a_request_of_max_model_len(flags):
    parser = argparse.ArgumentParser()
    front.add_parser(parser.add_subparsers())
    arguments = parser.parse_args(["front", "--streams", "1", "--prompt-len", "16", "--output-len", "16", *flags])
    settings = front._settings(arguments, 1)
    num_tokens = (settings["num_kv_blocks"] - 1) * settings.get("block_size", 16)  # block 0 takes what padding writes
    assert num_tokens >= settings["max_model_len"]
