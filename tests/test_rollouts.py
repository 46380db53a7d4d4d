"""Rollout engines draw from the policy as it is, say at which log-probs, and leave it as it was."""

import contextlib
import dataclasses
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dvpo
import ppo
import reinforce
import sample
import sft
import toy

CPU = torch.device("cpu")
ENGINES = ["generate", "graph", "generate_batch", "vllm"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """policy, gvm, rm: tiny random models, far from uniform; prompts.jsonl."""
    import transformers

    home, tokenizer = tmp_path_factory.mktemp("home"), toy.tokenizer()
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "initializer_range": 0.3}
    for name, kind in (("policy", "CausalLM"), ("gvm", "TokenClassification"), ("rm", "SequenceClassification")):
        torch.manual_seed(7)
        labels = {} if name == "policy" else {"num_labels": 1, "tau_pairs": 1, "tau_tokens": 64}
        model = getattr(transformers, f"AutoModelFor{kind}").from_config(toy.config(**small, **labels))
        model.config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    rows = [json.dumps({"prompt": prompt}) for prompt in toy.prompts("rl")[:16]]
    (home / "prompts.jsonl").write_text("\n".join(rows))
    return home


# ------------------------------------------------------------------------------------- vLLM's documented interface, alone
@dataclasses.dataclass(kw_only=True)
class SamplingParams:
    """Those of vLLM's settings that are used here; any other is an error."""

    temperature: float
    top_p: float
    seed: int
    max_tokens: int
    stop_token_ids: list
    logprobs: int

    def __post_init__(self):
        assert self.seed >= 0 and self.logprobs == 0  # 0: the log-prob of the drawn token, no alternatives


MADE = []


class LLM:
    """A stand-in that holds a model of its own, draws from it, and is awake or asleep as vLLM is."""

    def __init__(
        self, model, *, dtype, trust_remote_code, max_model_len, kv_cache_memory_bytes, distributed_executor_backend, seed,
        logprobs_mode, enable_sleep_mode,
    ):  # fmt: skip
        from transformers import AutoModelForCausalLM

        assert dtype in ("bfloat16", "float32") and logprobs_mode == "processed_logprobs" and kv_cache_memory_bytes > 0
        assert distributed_executor_backend in (None, "external_launcher") and isinstance(trust_remote_code, bool)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self.limit, self.sleeps, self.awake, self.calls = max_model_len, enable_sleep_mode, {"weights", "kv_cache"}, []
        MADE.append(self)

    def sleep(self, level=1):
        assert self.sleeps and level == 2
        self.calls.append("sleep")
        self.awake = set()
        for parameter in self.model.parameters():
            parameter.data.fill_(torch.nan)

    def wake_up(self, tags=None):
        self.calls.append(f"wake {tags}")
        self.awake |= set(tags or ("weights", "kv_cache"))

    def apply_model(self, function):
        assert "weights" in self.awake
        self.calls.append("load")
        return [function(SimpleNamespace(load_weights=self.load))]

    def load(self, weights):
        own = dict(self.model.named_parameters())
        given = dict(weights)
        assert given.keys() == own.keys(), given.keys() ^ own.keys()
        for name, tensor in given.items():
            assert own[name].shape == tensor.shape and not tensor.requires_grad
            own[name].data.copy_(tensor)

    @torch.no_grad()
    def generate(self, prompts, sampling_params, *, use_tqdm):
        assert self.awake == {"weights", "kv_cache"} and not use_tqdm
        self.calls.append(sampling_params)
        found = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            assert prompt.keys() == {"prompt_token_ids"}
            ids, logprobs, generator = list(prompt["prompt_token_ids"]), [], torch.Generator().manual_seed(params.seed)
            for _ in range(params.max_tokens):
                logits = self.model(torch.tensor([ids])).logits[0, -1].float()
                logp = (logits / (params.temperature or 1.0)).log_softmax(-1)
                token = int(
                    torch.multinomial(logp.exp(), 1, generator=generator) if params.temperature else logp.argmax()
                )
                ids.append(token)
                logprobs.append({token: SimpleNamespace(logprob=float(logp[token]))})
                if token in params.stop_token_ids:
                    break
            assert len(ids) <= self.limit
            output = SimpleNamespace(token_ids=ids[len(prompt["prompt_token_ids"]) :], logprobs=logprobs)
            found.append(SimpleNamespace(outputs=[output]))
        return found


@pytest.fixture
def vllm(monkeypatch):
    MADE.clear()
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=SamplingParams))
    return LLM


# ------------------------------------------------------------------------------------------------------------ one engine
def rollouts(home, rollout, lora_r=0, **flags):
    args = dvpo.Args(policy=str(home / "policy"), rollout=rollout, max_response_tokens=12, lora_r=lora_r, **flags)
    tokenizer = sft.load_tokenizer(args.policy, args)
    model = sft.load_model("causal", args.policy, tokenizer, args)
    model = sft.add_lora(model, args) if lora_r else model
    policy = sft.Policy(model)
    engine = SimpleNamespace(
        module=policy, args=args, deepspeed=None, optimizer="there", autocast=contextlib.nullcontext
    )
    return dvpo.Rollouts(engine, policy.ends, tokenizer, args, CPU), policy


def asked():
    rng = random.Random(0)
    return [[rng.randint(5, 90) for _ in range(n)] for n in (5, 1, 9, 14, 3, 3)]


def logps_of(policy, prompts, found, temperature):
    with torch.no_grad():
        batch = sft.collate([(p, r) for p, (r, _) in zip(prompts, found, strict=True)], 0)
        return [row[: len(r)].tolist() for row, (r, _) in zip(policy(batch, temperature), found, strict=True)]


@pytest.mark.parametrize("lora_r", [0, 4])
@pytest.mark.parametrize("rollout", ENGINES)
def test_an_engine_draws_from_the_policy_as_it_is_now_at_the_log_probs_that_it_tells(home, vllm, rollout, lora_r):
    draw, policy = rollouts(home, rollout, lora_r, temperature=0.7)
    torch.manual_seed(3)
    trained = [p for p in policy.parameters() if p.requires_grad]
    with torch.no_grad():  # a policy that training has moved from what the engine may have read from disk
        for parameter in trained:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    before = {name: p.clone() for name, p in policy.state_dict().items()}
    prompts = asked()
    for keys in (list(range(6)), [None] * 6, [1, None, 3, None, 5, 6]):
        found = draw(prompts, keys)
        for key, (response, logp), expected in zip(keys, found, logps_of(policy, prompts, found, 0.7), strict=True):
            assert 0 < len(response) <= 12 and len(logp) == len(response)
            assert all(token not in draw.ends for token in response[:-1])
            assert key is None or logp == pytest.approx(expected, abs=2e-4)
        for prompt, key, (response, _) in zip(prompts, keys, found, strict=True):
            if key is None:  # the likeliest token at each place
                with torch.no_grad():
                    logits = policy.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
                assert logits.argmax(-1).tolist() == response
    after = policy.state_dict()
    assert all(
        torch.equal(after[name], p) for name, p in before.items()
    )  # to the bit: nothing was merged and taken out
    assert draw(prompts, list(range(6))) != draw(prompts, list(range(6, 12)))


def test_graph_draws_what_generate_draws(home):
    one, two = (rollouts(home, rollout)[0](asked(), list(range(6))) for rollout in ("generate", "graph"))
    assert [response for response, _ in one] == [response for response, _ in two]
    assert [x for _, logp in one for x in logp] == pytest.approx([x for _, logp in two for x in logp], abs=1e-5)


@pytest.mark.parametrize("rollout", ["generate", "graph"])
def test_a_response_depends_on_its_key_alone(home, rollout):
    draw, _ = rollouts(home, rollout)
    together = draw(asked(), list(range(6)))
    for i, prompt in enumerate(asked()):
        [(response, _)] = draw([prompt], [i])
        assert response == together[i][0]


def test_vllm_sleeps_between_rollouts_and_is_given_the_weights_before_each(home, vllm):
    draw, _ = rollouts(home, "vllm")
    [llm] = MADE
    draw(asked(), list(range(6)))
    draw(asked(), [dvpo.key_of("second", i) for i in range(6)])
    round_ = ["wake ['weights']", "load", "wake ['kv_cache']", "generate", "sleep"]
    assert [x if isinstance(x, str) else "generate" for x in llm.calls] == ["sleep", *round_, *round_]
    seeds = [p.seed for call in llm.calls if isinstance(call, list) for p in call]
    assert len(set(seeds)) == 12 and max(seeds) < 2**31


def test_merged_weights_are_those_of_the_model_that_is_saved(home, tmp_path):
    """Of a policy on a shared backbone too, which carries another adapter and a head of values."""
    from transformers import AutoModelForCausalLM

    _, policy = rollouts(home, "generate", lora_r=4)
    model = policy.model
    model.add_adapter("gvm", model.peft_config["default"])
    model.get_base_model().score = torch.nn.Linear(32, 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    found = {name: tensor.clone() for name, tensor in dvpo.merged_weights(model)}
    model.delete_adapter("gvm")
    del model.get_base_model().score
    model.merge_and_unload().save_pretrained(tmp_path)
    saved = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    assert found.keys() == saved.keys()
    assert all(torch.allclose(found[name], saved[name], atol=1e-6) for name in saved)


def test_generate_batch_keeps_within_its_bytes(home, monkeypatch):
    import transformers

    seen, config = [], transformers.ContinuousBatchingConfig
    monkeypatch.setattr(
        transformers, "ContinuousBatchingConfig", lambda **x: seen.append(x["num_blocks"]) or config(**x)
    )
    page = 256 * 2 * 2 * 32 * 4  # tokens, layers, keys and values, heads x their size, bytes
    for gb, blocks in ((8.0, 7), (4 * page / 1e9, 5), (0.0, 2)):  # six responses of one page, and one to spare
        found = rollouts(home, "generate_batch", cache_gb=gb)[0](asked(), [None] * 6)
        assert seen[-1] == blocks and all(found)


# ------------------------------------------------------------------------------------------------------- whole scripts
def settings(home, module, out, **flags):
    models = {dvpo: {"gvm": str(home / "gvm")}}.get(module, {"reward_model": str(home / "rm")})
    given = {"policy": str(home / "policy"), "data": str(home / "prompts.jsonl"), "output_dir": str(out), "steps": 3,
             "rollout_batch_size": 8, "batch_size": 4, "max_response_tokens": 10, "learning_rate": 1e-2}  # fmt: skip
    return module.Args(**given | models | flags)


@pytest.mark.parametrize("rollout", ENGINES)
@pytest.mark.parametrize("module", [dvpo, ppo, reinforce])
def test_scripts_train_on_what_an_engine_draws(home, tmp_path, vllm, module, rollout):
    flags = {"baseline": "remax", "n": 1} if module is reinforce else {}
    module.train(settings(home, module, tmp_path / "out", rollout=rollout, lora_r=4, **flags))
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(
        row["logp_gap_max"] < 1e-3 for row in rows
    )  # the policy of this step, not of the first
    assert all(0 < row["useful_tokens"] <= 1 for row in rows)


@pytest.mark.parametrize("module", [dvpo, ppo, reinforce])
def test_tis_weighs_tokens_by_how_far_the_engine_is_from_training(home, tmp_path, monkeypatch, module):
    """With an engine that says that it drew each token at e times its probability, all weights are 1/e: a gradient
    of that size; with exact log-probs, or the cap at 0, nothing changes."""
    norms, own = {}, module.KeyedNoise.sampled
    for name, shift, cap in (("off", 1.0, 0.0), ("exact", 0.0, 2.0), ("on", 1.0, 2.0), ("capped", -3.0, 2.0)):
        told = lambda self, responses, shift=shift: [[x + shift for x in row] for row in own(self, responses)]
        with monkeypatch.context() as patch:
            patch.setattr(module.KeyedNoise, "sampled", told)
            flags = {"kl_coef": 0.0, "tis_cap": cap, "steps": 1, "ppo_epochs": 1, "batch_size": 8, "max_grad_norm": 0.0}
            module.train(settings(home, module, tmp_path / name, **flags))
        row = json.loads((tmp_path / name / "metrics.jsonl").read_text())
        norms[name] = row["grad_norm"]
        assert row["logp_gap_mean"] == pytest.approx(abs(shift), abs=1e-4)
    assert norms["exact"] == pytest.approx(norms["off"], rel=1e-3) and norms["off"] > 1e-3
    assert norms["on"] == pytest.approx(norms["off"] / 2.718281828, rel=1e-3)
    assert norms["capped"] == pytest.approx(2 * norms["off"], rel=1e-3)


def test_one_aligned_update_of_grpo_needs_no_pass_for_the_old_log_probs(home, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    calls, forward, found = [], reinforce.Policy.forward, []
    monkeypatch.setattr(reinforce.Policy, "forward", lambda *x, **y: calls.append(1) or forward(*x, **y))
    for name in ("spared", "passed"):
        flags = {"baseline": "grpo", "n": 4, "ppo_epochs": 1, "batch_size": 8, "tis_cap": 2.0}
        with monkeypatch.context() as patch:
            if name == "passed":
                patch.setattr(reinforce, "updates_once", lambda args: False)
            calls.clear()
            reinforce.train(settings(home, reinforce, tmp_path / name, **flags))
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        found.append((len(calls), load_file(tmp_path / name / "final" / "model.safetensors"), rows))
    (fewer, one, spared), (more, two, passed) = found
    assert (fewer, more) == (6, 9)  # three steps of reference and update, and the policy's own pass
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    for a, b in zip(spared, passed, strict=True):
        kept = [key for key in a if not key.endswith("seconds")]
        assert [a[key] for key in kept] == pytest.approx([b[key] for key in kept], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("rollout", ENGINES)
def test_sample_draws_by_every_engine(home, tmp_path, vllm, rollout):
    path = sample.train(
        sample.Args(
            policy=str(home / "policy"), reward_model=str(home / "rm"), data=str(home / "prompts.jsonl"), n=2,
            output_dir=str(tmp_path / "out"), max_response_tokens=10, temperature=0.7, rollout=rollout,
        )
    )  # fmt: skip
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 16 and sum(len({r["text"] for r in row["responses"]}) > 1 for row in rows) > 8
    if rollout == "vllm":  # a frozen policy: read from its folder, never asleep
        assert [type(call) for call in MADE[0].calls] == [list]
