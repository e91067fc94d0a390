"""Cached prefixes of a LoRA adapter are found by its content, in any engine, and by no text that a user can give."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_folders import matrices, save_adapter
from tiny import drain

from stepgraph import SamplingParams
from stepgraph.engine import prefix_cache
from stepgraph.engine.blocks import block_key, root_key

BLOCK_BYTES = 4 * 16
DIGESTS = st.binary(min_size=32, max_size=32)
TEXTS = st.text(max_size=80)
PROMPT = [i % 250 for i in range(64)]
GREEDY = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)


@st.composite
def imitations(draw) -> tuple[str, bytes]:
    """A salt, and an adapter that it may be made for."""
    digest = draw(DIGESTS)
    parts = [digest.hex(), digest.decode("latin-1"), "adapter", "salt", " ", "\0", draw(TEXTS)]
    return "".join(draw(st.lists(st.sampled_from(parts), max_size=4))), digest


def imitates(root: Callable[[str | None, bytes | None], bytes], salt: str, digest: bytes) -> bool:
    """Whether requests with a salt find the blocks of those that have an adapter, with another salt, the same, or none."""
    with_adapter = {root(None, digest), *(root(other, digest) for other in (salt, "", digest.hex()))}
    return root(salt, None) in with_adapter or root(None, None) in with_adapter


@settings(max_examples=30)
@given(imitations())
def test_no_salt_imitates_an_adapter(both) -> None:
    assert not imitates(root_key, *both)


def by_text(salt: str | None, adapter: bytes | None) -> bytes:
    """An adapter is a part of the salt."""
    return root_key(salt if adapter is None else f"{adapter.hex()} {salt or ''}")


def test_mutant_an_adapter_in_the_salt_is_caught() -> None:
    digest = bytes(32)
    assert imitates(by_text, f"{digest.hex()} ", digest)


@given(TEXTS, DIGESTS, DIGESTS, st.binary(min_size=BLOCK_BYTES, max_size=BLOCK_BYTES))
def test_what_two_chains_hash_is_never_of_one_length(salt, digest, other, tokens) -> None:
    """So that tokens cannot make up for what a root lacks."""
    first = block_key(b"", tokens)
    roots = [root_key(None), first, root_key(salt), root_key(None, digest), root_key(salt, digest)]
    assert len({len(root) for root in roots}) == len(roots)
    assert (root_key(salt, digest) == root_key(salt, other)) == (digest == other)
    assert (root_key(salt, digest) == root_key(salt + "x", digest)) is False


@pytest.fixture(scope="module")
def create(create_engine) -> Callable:
    return lambda **settings: create_engine(enable_lora=True, max_loras=2, max_lora_rank=4, **settings)


def keys(engine, adapter: Path | str | None, salt: str | None = None) -> tuple[bytes, ...]:
    """Of the blocks of a prompt."""
    adapter = None if adapter is None else str(adapter)
    request = engine.add_request("r", PROMPT, GREEDY, adapter=adapter, cache_salt=salt)
    drain(engine)
    assert len(request.block_keys) >= 3
    return tuple(request.block_keys[:3])


def changed(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder


def test_engines_that_have_the_same_files_have_the_same_keys(create, tmp_path) -> None:
    (tmp_path / "one").mkdir()
    one = Path(save_adapter(tmp_path / "one", matrices(0)))
    copy = Path(shutil.copytree(one, tmp_path / "copy"))
    (tmp_path / "two").mkdir()
    two = save_adapter(tmp_path / "two", matrices(1))
    here, there = create(), create()
    keys(there, two)  # so that numbers differ
    for salt in (None, "a"):
        assert keys(here, one, salt) == keys(there, copy, salt)
    found = [keys(here, adapter, salt) for adapter in (None, one, two) for salt in (None, "a", "b")]
    assert len(set(found)) == len(found)


def test_whatever_changes_an_adapter_changes_its_keys(create, tmp_path) -> None:
    folder = Path(save_adapter(tmp_path, matrices(0)))
    engine = create()

    def anew() -> tuple[bytes, ...]:
        engine.forget_adapter(str(folder))
        return keys(engine, folder)

    config, weights = ((folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors"))
    before = anew()
    assert anew() == before
    more = json.dumps(json.loads(config) | {"lora_alpha": 9}).encode()
    changed(folder, "adapter_config.json", more)
    assert anew() != before
    changed(folder, "adapter_config.json", config)
    assert anew() == before
    changed(folder, "adapter_model.safetensors", weights[:-1] + bytes([weights[-1] ^ 1]))
    assert anew() != before


def test_mutant_keys_without_the_adapter_are_caught(create, tmp_path, monkeypatch) -> None:
    folder = save_adapter(tmp_path, matrices(0))
    monkeypatch.setattr(prefix_cache, "root_key", lambda salt, adapter: root_key(salt))
    engine = create()
    assert keys(engine, folder) == keys(engine, None)


def test_answers_that_are_remembered_stay_those_of_one_loading(create, tmp_path) -> None:
    """Whose key a user might know otherwise."""
    folder = save_adapter(tmp_path, matrices(0))
    found = set()
    for _ in range(2):
        engine = create(speculative_config={"method": "suffix", "adaptive": False, "memory_tokens": 4096})
        request = engine.add_request("r", PROMPT, GREEDY, adapter=folder)
        found.add(request.sampling.memory_key)
        drain(engine)
    assert len(found) == 2
