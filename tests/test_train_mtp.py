"""Training of MTP heads: what the script in examples/ computes, writes and measures."""

import gzip
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import save_tiny_model

from stepgraph.models.source import resolve

EXAMPLES = Path(__file__).parents[1] / "examples"
ASSET = "assets/smollm2_mtp/model.safetensors"
PROMPTS = {
    "sharegpt": [[60 + i, 70, 80 + i, 90] for i in range(6)],
    "human-eval": [[33, 34, 35, 36, 37]],
    "mt-bench": [[44, 45, 46]],
}


@pytest.fixture
def mtp_head(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import mtp_head

    return mtp_head


@pytest.fixture
def train_mtp(mtp_head):
    import train_mtp

    return train_mtp


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return resolve(save_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def target(mtp_head, source):
    return mtp_head.Target.load(source, torch.float32, torch.device("cpu"))


@pytest.fixture
def head(mtp_head, source):
    """A head whose every weight matters."""
    torch.manual_seed(1)
    head = mtp_head.MTPHead(source.config)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return head


class CachedDrafter:
    """The head with a KV cache, a position at a time, as an engine runs it. Written apart from what it checks."""

    def __init__(self, head, config):
        self.w, self.config, self.keys, self.values = dict(head.named_parameters()), config, [], []

    def _norm(self, x, name):
        return F.rms_norm(x, x.shape, self.w[f"{name}.weight"], self.config.rms_norm_eps)

    def _heads(self, x, name, rotated_to=None):
        heads = (self.w[f"self_attn.{name}.weight"] @ x).view(-1, self.config.head_dim)
        if rotated_to is None:
            return heads
        angle = rotated_to * torch.tensor(self.config.ropes[0].inv_freq)
        first, second = heads.chunk(2, dim=-1)
        pairs = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    def append(self, embed, hidden, position):
        """Run the layer at a position whose key and value join the cache; returns y."""
        x = self.w["eh_proj.weight"] @ torch.cat((self._norm(embed, "enorm"), self._norm(hidden, "hnorm")))
        normed = self._norm(x, "input_layernorm")
        self.keys.append(self._heads(normed, "k_proj", position))
        self.values.append(self._heads(normed, "v_proj"))
        group_size = self.config.num_heads // self.config.num_kv_heads
        attended = []
        for number, query in enumerate(self._heads(normed, "q_proj", position)):
            keys, values = (torch.stack(c)[:, number // group_size] for c in (self.keys, self.values))
            attended.append((keys @ query / self.config.head_dim**0.5).softmax(0) @ values)
        x = x + self.w["self_attn.o_proj.weight"] @ torch.cat(attended)
        normed = self._norm(x, "post_attention_layernorm")
        gate, up = (self.w[f"mlp.{name}_proj.weight"] @ normed for name in ("gate", "up"))
        return x + self.w["mlp.down_proj.weight"] @ (F.silu(gate) * up)

    def draft_result(self, y):
        return self._norm(y, "shared_head.norm")

    def drop(self, num_entries):
        del self.keys[-num_entries:], self.values[-num_entries:]


@torch.no_grad()
def test_chains_of_training_are_those_of_drafting_with_a_cache(mtp_head, target, head, source):
    num_steps, ids = 4, torch.randint(1, source.config.vocab_size, (1, 14), generator=torch.manual_seed(2))
    angles = mtp_head.angles(source.config, 13, ids.device)
    hidden = target(ids[:, :-1], angles)
    embeds = target.embed_tokens(ids[:, 1:])
    steps = head.forward_chains(embeds, hidden, angles, num_steps)
    drafter = CachedDrafter(head, source.config)
    for base in range(13 - num_steps + 1):
        y = drafter.append(embeds[0, base], hidden[0, base], base)  # stays: it comes from a true hidden state
        torch.testing.assert_close(steps[0][0, base], drafter.draft_result(y), rtol=1e-4, atol=1e-4)
        for step in range(1, num_steps):
            y = drafter.append(embeds[0, base + step], y, base + step)
            expected = drafter.draft_result(y)
            torch.testing.assert_close(steps[step][0, base + step], expected, rtol=1e-4, atol=1e-4)
        drafter.drop(num_steps - 1)


@torch.no_grad()
def test_target_has_the_hidden_states_of_transformers(mtp_head, target, source):
    from transformers import LlamaForCausalLM

    ids = torch.randint(1, source.config.vocab_size, (2, 20), generator=torch.manual_seed(3))
    reference = LlamaForCausalLM.from_pretrained(source.folder).model(ids).last_hidden_state
    hidden = target(ids, mtp_head.angles(source.config, 20, ids.device))
    torch.testing.assert_close(hidden, reference, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_the_cross_entropy(mtp_head, train_mtp, target, head, source):
    texts = [train_mtp.Text(list(range(5, 25)), 6), train_mtp.Text(list(range(40, 52)), 4)]
    draft_ids = torch.tensor([i for i in range(source.config.vocab_size) if i % 7])  # some tokens cannot be drafted
    angles = mtp_head.angles(source.config, 64, torch.device("cpu"))
    trainee = train_mtp.Trainee(target, head, draft_ids, angles, 3)
    batch = train_mtp.Batch.of(texts, torch.device("cpu"))
    rank_of = torch.full((source.config.vocab_size,), train_mtp.IGNORED)
    rank_of[draft_ids] = torch.arange(len(draft_ids))
    train_mtp._add_gradients(trainee, batch, rank_of, 0.5)
    found = {name: p.grad.clone() for name, p in head.named_parameters()}
    head.zero_grad()

    hidden, results = trainee.run(batch)
    total = 0
    for step, result in enumerate(results):
        losses = []
        for row, text in enumerate(texts):
            for place in range(text.prompt_len + 1 + step, len(text.token_ids)):  # of the token that is drafted
                if text.token_ids[place] % 7:
                    p = (hidden[row, place - 1] @ target.lm_head.weight[draft_ids].T).softmax(-1)
                    losses.append(F.cross_entropy(result[row, place - 2] @ target.lm_head.weight[draft_ids].T, p))
        total += 0.5**step * torch.stack(losses).mean()
    total.backward()
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_stored_head_comes_back_up_to_its_rounding(mtp_head, head, source, tmp_path):
    path, ids = tmp_path / "head.safetensors", torch.tensor([3, 5, 8])
    mtp_head.write_head(path, head, ids, 2, "tiny")
    stored, stored_ids = mtp_head.read_head(path, source.config)
    assert stored_ids.tolist() == ids.tolist()
    for name, parameter in head.state_dict().items():
        tolerance = parameter.abs().amax(-1, keepdim=True) / 254 * 1.001 if parameter.dim() == 2 else 0.0
        assert ((stored.state_dict()[name] - parameter).abs() <= tolerance).all(), name
    again = tmp_path / "again.safetensors"
    mtp_head.write_head(again, stored, stored_ids, 2, "tiny")
    first, second = load_file(path), load_file(again)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-6, atol=0)


def test_shipped_head_is_one_for_the_embedded_model(mtp_head):
    import stepgraph

    config = resolve("smollm2").config
    head, draft_token_ids = mtp_head.read_head(Path(stepgraph.__file__).parent / ASSET, config)
    assert all(parameter.isfinite().all() for parameter in head.parameters())
    assert (draft_token_ids.diff() > 0).all()
    assert draft_token_ids[0] >= 0
    assert draft_token_ids[-1] < config.vocab_size
    assert set(config.eos_token_ids) <= set(draft_token_ids.tolist())


def test_rounds_count_the_drafts_up_to_the_first_that_is_wrong(train_mtp, monkeypatch, target, head):
    text = train_mtp.Text([9] * 3 + [1, 2, 3, 4, 5, 6, 7, 8], 3)
    trainee = train_mtp.Trainee(target, head, torch.arange(257), torch.zeros(0), 2)
    # Step 1 is right but for the draft of 5, step 2 but for that of 8. Rounds of two drafts then draft 2, 3 (both accepted);
    # 5, 6 (none: 5 is wrong); 6, 7 (both); the next would reach beyond the answer.
    wrong = iter([5, 8])

    def drafts(trainee, result, output_head):
        ids = torch.tensor([*text.token_ids[2:], *[0] * 55])[None]
        return torch.where(ids == next(wrong), 0, ids)

    monkeypatch.setattr(train_mtp.Trainee, "run", lambda self, batch: (None, [torch.zeros(1, 64, 32)] * 2))
    monkeypatch.setattr(train_mtp, "_drafts", drafts)
    result = train_mtp.measure(trainee, [text], 4096)
    assert result.rounds == 3
    assert result.accepted_at_position == [round(2 / 3, 4)] * 2
    # With one draft: 2 accepted, 4 accepted, 6 accepted, 8 accepted.
    assert result.mean_accepted_length == [2.0, round(1 + 4 / 3, 4)]


def test_script_writes_a_head_and_its_numbers(train_mtp, source, tmp_path, capsys):
    work, output = tmp_path / "work", tmp_path / "out" / "head.safetensors"
    work.mkdir()
    with gzip.open(work / "prompts.json.gz", "wt") as file:
        json.dump(PROMPTS, file)
    sizes = ["--max-prompt-len", "16", "--max-answer-len", "24", "--held-out-answer-len", "24", "--answer-minutes", "0"]
    training = ["--steps", "60", "--num-steps", "3", "--tokens-per-batch", "256", "--draft-vocabulary", "64"]
    arguments = ["--model", str(source.folder), "--work", str(work), "--output", str(output), "--device", "cpu"]
    assert train_mtp.main([*arguments, *sizes, *training, "--seed", "1"]) == 0, capsys.readouterr().err
    numbers = json.loads(output.with_suffix(".json").read_text())
    assert numbers["training"]["updates"] == 60
    assert len(numbers["acceptance"]["all"]["accepted_at_position"]) == train_mtp.MEASURED_STEPS
    assert numbers["texts"]["sharegpt"]["answers"] == len(PROMPTS["sharegpt"])
