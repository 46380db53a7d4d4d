"""reinforce.py: each baseline's advantages against loops and by hand, the k3 term; the objectives, ratios and means of
later papers against loops in float64, as functions and through train(), and on any number of micro-batches."""

import contextlib
import functools
import io
import itertools
import json
import math
import random
import re
import shutil
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from test_dvpo import ragged

import reinforce
import toy

BASELINES = ("remax", "rloo", "grpo", "reinforce++")
PPO = {"objective": "ppo", "ratio": "token", "clip": 0.2, "clip_high": 0.0}
VARIANTS = {  # what differs from PPO
    "ppo": {},
    "clip_higher": {"clip_high": 0.5},
    "clip_lower": {"clip": 0.4, "clip_high": 0.1},
    "sequence": {"ratio": "sequence"},
    "gspo": {"ratio": "gspo", "clip": 0.05, "clip_high": 0.1},
    "cispo": {"objective": "cispo"},
    "cispo_one_sided": {"objective": "cispo", "clip": 1.0, "clip_high": 0.5},
}
ragged = functools.partial(ragged, rows=8, width=7)


def naive(reward, kl, lengths, baseline, n, greedy, beta):
    """Straight from the docstring, one response after the other."""
    to_go = [[beta * sum(k[t:T]) for t in range(T)] for k, T in zip(kl, lengths, strict=True)]
    rows = []
    for i, T in enumerate(lengths):
        group = range(i - i % n, i - i % n + n)
        if baseline == "remax":
            rows.append([reward[i] - greedy[i] - to_go[i][t] for t in range(T)])
        elif baseline == "reinforce++":
            rows.append([reward[i] - to_go[i][t] for t in range(T)])
        elif baseline == "rloo":
            whole = [reward[j] - to_go[j][0] for j in group]
            own = whole[i % n]
            rows.append([own - (sum(whole) - own) / (n - 1)] * T)
        else:
            rewards = [reward[j] for j in group]
            rows.append([(reward[i] - statistics.mean(rewards)) / (statistics.stdev(rewards) + 1e-4)] * T)
    if baseline == "reinforce++":
        cells = [x for row in rows for x in row]
        mean, sigma = statistics.mean(cells), statistics.pstdev(cells)
        rows = [[(x - mean) / (sigma + 1e-5) for x in row] for row in rows]
    return rows


@pytest.mark.parametrize(("baseline", "n", "beta"), itertools.product(BASELINES, (2, 4), (0.0, 0.3)))
def test_advantages_equal_a_loop_and_are_0_where_masked(baseline, n, beta):
    lengths, mask, noise = ragged(0)
    reward, greedy, kl = noise(1)[:, 0], noise(1)[:, 0], noise()
    found = reinforce.reward_advantages(reward, kl, mask, baseline=baseline, n=n, other=greedy, kl_coef=beta)
    expected = naive(reward.tolist(), kl.tolist(), lengths, baseline, n, greedy.tolist(), beta)
    for row, other, length in zip(found.tolist(), expected, lengths, strict=True):
        assert row[:length] == pytest.approx(other, rel=1e-8, abs=1e-9) and not any(row[length:])
    other_kl = torch.where(mask, kl, 1e6)
    again = reinforce.reward_advantages(reward, other_kl, mask, baseline=baseline, n=n, other=greedy, kl_coef=beta)
    assert torch.equal(found, again)


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        # rewards 1, 3, greedy 2, 2; KL 0.2, 0.4 and -0.6; beta 0.5: to go 0.3, 0.2 and -0.3
        ("remax", [-1.3, -1.2, 1.3]),
        # R = 1 - 0.3, 3 + 0.3: 0.7 - 3.3 and back
        ("rloo", [-2.6, -2.6, 2.6]),
        # mean 2, standard deviation (ddof 1) sqrt(2)
        ("grpo", [-0.70706, -0.70706, 0.70706]),
        # 0.7, 0.8, 3.3: mean 1.6, sigma sqrt((0.81 + 0.64 + 2.89) / 3) = 1.202775
        ("reinforce++", [-0.748263, -0.665123, 1.413386]),
    ],
)
def test_advantages_by_hand(baseline, expected):
    mask = torch.tensor([[True, True], [True, False]])
    reward, greedy = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])
    kl = torch.tensor([[0.2, 0.4], [-0.6, 55.0]])
    found = reinforce.reward_advantages(reward, kl, mask, baseline=baseline, n=2, other=greedy, kl_coef=0.5)
    assert found[mask].tolist() == pytest.approx(expected, abs=1e-4) and found[1, 1] == 0


@pytest.mark.parametrize("baseline", ["rloo", "grpo"])
def test_responses_of_equal_reward_teach_nothing_and_a_constant_reward_changes_nothing(baseline):
    _, mask, noise = ragged(1)
    reward, kl = noise(1)[:, 0], torch.zeros(8, 7, dtype=torch.float64)
    advantage = lambda r: reinforce.reward_advantages(r, kl, mask, baseline=baseline, n=4)
    assert torch.allclose(advantage(reward), advantage(reward + 100), atol=1e-9)
    assert not advantage(torch.full_like(reward, 0.7)).abs().gt(1e-12).any()


def test_leave_one_out_is_the_reward_minus_the_mean_of_the_group_but_for_a_factor():
    reward = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = reward.view(3, 4).mean(1).repeat_interleave(4)
    assert torch.allclose(reinforce.leave_one_out(reward, 4), (reward - mean) * 4 / 3)


def test_dr_grpo_takes_the_groups_mean_alone():
    reward, mask = torch.tensor([1.0, 3.0, 7.0, 7.0]), torch.ones(4, 1, dtype=torch.bool)
    found = reinforce.reward_advantages(reward, mask * 9.0, mask, baseline="grpo", n=2, kl_coef=1.0, group_std=False)
    assert found[:, 0].tolist() == [-1, 1, 0, 0]


# ---------------------------------------------------------------------------------------- objectives, ratios and means
def naive_loss(responses, *, objective, ratio, clip, clip_high, loss_mean, longest):
    """(loss, its derivative by each log-prob, clipped tokens), after the papers: responses (logps, old logps, A), A being
    one number for a response or one for each of its tokens. Of a response that is one action there is one term."""
    low, high, terms, slopes, clipped = 1 - clip, 1 + (clip_high or clip), [], [], 0
    for logps, olds, advantage in responses:
        T = len(logps)
        diffs = [a - b for a, b in zip(logps, olds, strict=True)]
        if ratio != "token":
            power = 1 / T if ratio == "gspo" else 1
            rho = math.prod(math.exp(d) for d in diffs) ** power
            kept = min(max(rho, low), high)
            terms.append([-min(rho * advantage, kept * advantage)])
            off = kept * advantage < rho * advantage
            slopes.append([0 if off else -rho * power * advantage] * T)
            clipped += T * off
            continue
        terms.append([]), slopes.append([])
        for t, d in enumerate(diffs):
            a = advantage[t] if isinstance(advantage, list) else advantage
            rho = math.exp(d)
            kept = min(max(rho, low), high)
            if objective == "cispo":
                terms[-1].append(-kept * a * logps[t])
                slopes[-1].append(-kept * a)
                clipped += kept != rho
            else:
                off = kept * a < rho * a
                terms[-1].append(-min(rho * a, kept * a))
                slopes[-1].append(0 if off else -rho * a)
                clipped += off
    if loss_mean == "sequence":
        scale = [1 / len(row) / len(responses) for row in terms]
    else:
        every = sum(map(len, terms)) if loss_mean == "token" else longest * len(responses)
        scale = [1 / every] * len(terms)
    loss = sum(s * x for s, row in zip(scale, terms, strict=True) for x in row)
    return loss, [[s * x for x in row] for s, row in zip(scale, slopes, strict=True)], clipped


def weighted(mask, loss_mean, longest):
    """A token's weight and what the loss is divided by, as train() has them."""
    sizes = mask.sum(1, keepdim=True)
    weight = mask / sizes.double() if loss_mean == "sequence" else mask.double()
    return weight, {"token": int(sizes.sum()), "sequence": len(mask), "sum": len(mask) * longest}[loss_mean]


@pytest.mark.parametrize(
    ("name", "loss_mean"),
    [
        x
        for x in itertools.product(VARIANTS, ("token", "sequence", "sum"))
        if x[1] == "sequence" or "ratio" not in VARIANTS[x[0]]
    ],
)
def test_losses_and_gradients_equal_loops(name, loss_mean):
    settings = PPO | VARIANTS[name]
    whole = settings["ratio"] != "token"  # a response is one term
    lengths, mask, noise = ragged(2)
    logp, old, advantage = noise() - 2, noise() * 0.5 - 2, noise()
    if whole:
        logp, advantage = old + 0.3 * noise(), advantage[:, :1].expand(8, 7)
    logp, weight_of = logp.requires_grad_(), weighted(mask, loss_mean, 20)
    loss, clipped = reinforce.policy_loss(logp, old, advantage * weight_of[0], mask, weight_of[1], **settings)
    loss.backward()
    responses = [
        (logp[i, :T].tolist(), old[i, :T].tolist(), float(advantage[i, 0]) if whole else advantage[i, :T].tolist())
        for i, T in enumerate(lengths)
    ]
    expected, slopes, off = naive_loss(responses, **settings, loss_mean=loss_mean, longest=20)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-12) and int(clipped) == off > 1
    for row, other, T in zip(logp.grad.tolist(), slopes, lengths, strict=True):
        assert row[:T] == pytest.approx(other, rel=1e-12, abs=1e-15) and not any(row[T:])
    if settings["objective"] == "ppo":  # the slopes above are those of the loss above
        i, t, step = 1, 2, 1e-6
        near = []
        for sign in (1, -1):
            moved = [x + sign * step * (k == t) for k, x in enumerate(responses[i][0])]
            rows = [*responses[:i], (moved, *responses[i][1:]), *responses[i + 1 :]]
            near.append(naive_loss(rows, **settings, loss_mean=loss_mean, longest=20)[0])
        assert (near[0] - near[1]) / (2 * step) == pytest.approx(slopes[i][t], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("clip_high", [0.0, 0.2])
def test_by_default_the_loss_is_dvpos_to_the_bit(clip_high):
    lengths, mask, noise = ragged(3, rows=64, width=40)
    logp, old, advantage = ((noise() * x).float() for x in (0.3, 0.3, 1.0))
    found = []
    for name in ("policy", "dvpo"):
        x = logp.clone().requires_grad_()
        own = {"clip_high": clip_high} if name == "policy" else {}
        loss, clipped = getattr(reinforce, f"{name}_loss")(x, old, advantage, mask, sum(lengths), clip=0.2, **own)
        loss.backward()
        found.append((loss.detach(), x.grad, clipped))
    assert all(map(torch.equal, *found)) and 0 < found[0][2] < mask.sum()


def test_ratios_by_hand():
    """Log-ratios log 2 and log 3 of a response of two tokens; log 5 of one; what is masked counts for nothing."""
    mask = torch.tensor([[True, True, False], [True, False, False], [False] * 3])
    logp = torch.tensor([[2.0, 3.0, 77.0], [5.0, 77.0, 77.0], [7.0, 7.0, 7.0]], dtype=torch.float64).log()
    for ratio, first, second in (("token", [2, 3], 5), ("sequence", [6, 6], 5), ("gspo", [6**0.5] * 2, 5)):
        found = reinforce.log_ratio(logp, torch.zeros_like(logp), mask, ratio).exp()
        assert found[0].tolist() == pytest.approx([*first, 1]) and found[1].tolist() == pytest.approx([second, 1, 1])
        assert found[2].tolist() == [1, 1, 1]


def test_a_long_response_whose_ratio_no_float_holds_is_clipped_as_any():
    logp, mask = torch.full((1, 1000), 0.1, requires_grad=True), torch.ones(1, 1000, dtype=torch.bool)
    settings = {"ratio": "sequence", "clip_high": 0.5}
    loss, clipped = reinforce.policy_loss(logp, torch.zeros(1, 1000), mask / 1000, mask, 1, **settings)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-1.5, rel=1e-5) and int(clipped) == 1000 and not logp.grad.any()


def test_on_policy_a_response_as_one_action_has_the_gradient_of_its_log_prob():
    """RLOO: mean of A grad log pi(y), whose part per token PPO divides by all tokens, and GSPO by the response's own."""
    lengths, mask, noise = ragged(4)
    old, advantage = noise(), noise(1)
    grads = {}
    for ratio, loss_mean in (("token", "token"), ("sequence", "sequence"), ("gspo", "sequence"), ("token", "sequence")):
        logp = old.clone().requires_grad_()
        weight, of = weighted(mask, loss_mean, 0)
        reinforce.policy_loss(logp, old, advantage * weight, mask, of, ratio=ratio)[0].backward()
        grads[ratio, loss_mean] = logp.grad
    assert torch.allclose(grads["sequence", "sequence"], -advantage * mask / 8)
    assert torch.allclose(grads["token", "token"], grads["sequence", "sequence"] * 8 / sum(lengths))
    assert torch.allclose(grads["gspo", "sequence"], -advantage * mask / 8 / torch.tensor(lengths)[:, None])
    assert torch.allclose(grads["gspo", "sequence"], grads["token", "sequence"])


def test_cispo_keeps_the_gradient_where_ppo_has_none():
    """Ratios 3 and 1/3: PPO stops the first where A > 0 and the second where A < 0, CISPO weighs by 1.2 and 0.8."""
    old = torch.zeros(4, 1, dtype=torch.float64)
    logp, mask = torch.tensor([[3.0], [1 / 3], [3.0], [1 / 3]], dtype=torch.float64).log(), old == 0
    advantage, found = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], dtype=torch.float64), {}
    for objective in ("ppo", "cispo"):
        x = logp.clone().requires_grad_()
        reinforce.policy_loss(x, old, advantage, mask, 1, objective=objective)[0].backward()
        found[objective] = x.grad[:, 0].tolist()
    assert found["ppo"] == pytest.approx([0, -1 / 3, 3, 0]) and found["cispo"] == pytest.approx([-1.2, -0.8, 1.2, 0.8])


@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
def test_the_k3_term_has_the_same_means(loss_mean):
    lengths, mask, noise = ragged(2)
    logp, ref = noise() * 0.5, noise() * 0.5
    found = reinforce.k3_loss(logp, ref, *weighted(mask, loss_mean, 0))
    rows = [[float(logp[i, t] - ref[i, t]) for t in range(T)] for i, T in enumerate(lengths)]
    rows = [[math.exp(-x) - 1 + x for x in row] for row in rows]
    rows = [[statistics.mean(row)] for row in rows] if loss_mean == "sequence" else rows
    assert float(found) == pytest.approx(statistics.mean(x for row in rows for x in row))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("world", "micro_tokens"), [(1, 12), (1, 40), (3, 1), (3, 40)])
def test_micro_batches_of_all_ranks_sum_to_the_whole_step(name, world, micro_tokens):
    """Rows that only fill up a rank, with an empty response, add nothing."""
    settings = PPO | VARIANTS[name]
    lengths, mask, noise = ragged(5, rows=7)
    loss_mean = "token" if settings["ratio"] == "token" else "sequence"
    weight, of = weighted(mask, loss_mean, 0)
    logp, old, adv = noise() * 0.5 - 2, noise() * 0.1 - 2, noise(1) * weight
    rows = [([1] * 3, [2] * T, i) for i, T in enumerate(lengths)]
    args, found, filled = SimpleNamespace(micro_tokens=micro_tokens, padding=False), [], 0
    for ranks, split in ((1, SimpleNamespace(micro_tokens=10**6, padding=False)), (world, args)):
        x, total, clipped, count = logp.clone().requires_grad_(), 0.0, 0, 0
        for rank in range(ranks):
            for micro in reinforce.micro_batches(rows, rank, ranks, split)[0]:
                inputs, index = reinforce.collate(micro, 0, None, split), torch.tensor([i for *_, i in micro])
                cut, count = inputs.response_mask.shape[1], count + 1
                a, b, c = (of[index, :cut] for of in (x, old, adv * mask))
                own = inputs.response_mask
                filled += int((~own).all(1).sum())
                loss, off = reinforce.policy_loss(a * own, b * own, c * own, own, of, **settings)
                loss.backward()
                total, clipped = total + loss.detach(), clipped + int(off)
        found.append((total, x.grad, clipped, count))
    (one, grad, off, single), (many, grads, offs, count) = found
    assert single == 1 < count and torch.allclose(one, many, rtol=1e-12) and off == offs > 0
    assert torch.allclose(grad, grads, rtol=1e-12, atol=1e-15)
    assert filled == (2 if (world, micro_tokens) == (3, 1) else 0)


# ------------------------------------------------------------------------------------------------------- through train()
def recipes() -> dict[str, list[str]]:
    """Method -> the flags that the docstring's table gives for it; a row may go on in the next line."""
    lines = reinforce.__doc__.split("    paper ")[1].split("\n\n")[0].splitlines()[1:]
    found = {}
    for line in lines:
        if line[4] != " ":
            name = line.strip().split(",")[0]
        found[name] = found.get(name, []) + re.search(r"--.*?(?=  |$)", line)[0].split()
    return found


KL = ["--kl_coef", "0", "--kl_target", "0"]
RECIPES = {name: flags + KL * (name not in ("RLOO", "GRPO")) for name, flags in recipes().items()}
MEANING = {  # the settings of each, from the papers
    "RLOO": {"ratio": "sequence", "loss_mean": "sequence"},
    "GRPO": {"baseline": "grpo", "loss_mean": "sequence"},
    "Dr. GRPO": {"baseline": "grpo", "loss_mean": "sum", "group_std": False, "kl_coef": 0},
    "DAPO": {"baseline": "grpo", "clip_high": 0.28, "kl_coef": 0},
    "GSPO": {
        "baseline": "grpo", "ratio": "gspo", "loss_mean": "sequence", "clip": 3e-4, "clip_high": 4e-4, "kl_coef": 0,
    },
    "CISPO": {"baseline": "grpo", "objective": "cispo", "clip": 1.0, "clip_high": 4.0, "kl_coef": 0},
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """policy, rm: tiny random models, far from uniform, whose responses end early; prompts.jsonl."""
    import transformers

    home, tokenizer = tmp_path_factory.mktemp("home"), toy.tokenizer()
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "initializer_range": 0.3}
    for name, kind, labels in (("policy", "CausalLM", {}), ("rm", "SequenceClassification", {"num_labels": 1})):
        torch.manual_seed(7)
        model = getattr(transformers, f"AutoModelFor{kind}").from_config(toy.config(**small, **labels))
        model.config.pad_token_id = tokenizer.pad_token_id
        if name == "policy":
            model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(30, 50)]
        model.save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    (home / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in toy.prompts("rl")[:8]))
    return home


def run(home, out, *flags):
    """Rows of metrics and final weights of a run of two steps, each of four updates."""
    from safetensors.torch import load_file

    given = {"policy": home / "policy", "reward_model": home / "rm", "data": home / "prompts.jsonl", "output_dir": out,
             "steps": 2, "rollout_batch_size": 8, "batch_size": 4, "max_response_tokens": 12}  # fmt: skip
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    smooth = functools.partial(reinforce.AdamW, eps=1e-4)  # an order of sums moves no weight by a whole learning rate
    with mock.patch.object(reinforce, "AdamW", smooth), mock.patch("torch.cuda.is_available", return_value=False):
        reinforce.main([*words, "--learning_rate", "1e-2", "--ppo_epochs", "2", "--kl_target", "0", *flags])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = lambda key: not key.endswith("seconds") and key != "useful_tokens"
    return [{k: v for k, v in row.items() if kept(k)} for row in rows], load_file(out / "final" / "model.safetensors")


def test_the_table_has_the_papers_settings():
    assert RECIPES.keys() == MEANING.keys()
    for name, flags in RECIPES.items():
        args = reinforce.parse_args(reinforce.Args, {}, {}, flags)
        defaults = reinforce.Args()
        changed = {key: value for key, value in vars(args).items() if value != getattr(defaults, key, value)}
        assert changed == MEANING[name], name


@pytest.mark.parametrize("name", RECIPES)
def test_the_loss_of_training_is_the_papers(home, tmp_path, monkeypatch, name):
    """All that a step learns from is taken from train(), and the loss worked out anew, response by response."""
    settings = vars(reinforce.Args()) | MEANING[name]
    taken, state = [], {}
    own = {part: getattr(reinforce, part) for part in ("collate", "policy_loss", "reward_advantages")}

    def spying(part, *args, **kwargs):
        if part == "collate":
            state["micro"] = args[0]
        elif part == "reward_advantages":
            state["reward"], taken[:] = args[0].double().tolist(), []
        else:
            logp, old = (x.detach().double().tolist() for x in args[:2])
            taken.append([(i, logp[k][: len(r)], old[k][: len(r)]) for k, (_, r, i) in enumerate(state["micro"])])
        return own[part](*args, **kwargs)

    for part in own:
        monkeypatch.setattr(reinforce, part, functools.partial(spying, part))
    rows, _ = run(home, tmp_path / "out", "--micro_tokens", "24", "--n", "4", "--kl_coef", "0", *RECIPES[name])
    credit = []
    for group in (state["reward"][:4], state["reward"][4:]):
        mean, sigma = statistics.mean(group), statistics.stdev(group)
        for r in group:
            if settings["baseline"] == "rloo":
                credit.append(r - (sum(group) - r) / 3)
            else:
                credit.append((r - mean) / (sigma + 1e-4) if settings["group_std"] else r - mean)
    seen, losses, off = [x for micro in taken for x in micro], [], 0
    for at in range(0, 16, 4):  # four updates of four responses, however many micro-batches each took
        responses = [(logp, old, credit[i]) for i, logp, old in seen[at : at + 4]]
        loss, _, clipped = naive_loss(
            responses, **{key: settings[key] for key in (*PPO, "loss_mean")}, longest=12
        )  # fmt: skip
        losses, off = [*losses, loss], off + clipped
    lengths = {i: len(logp) for i, logp, _ in seen}
    assert len(taken) > 4 and len(seen) == 16 and len(lengths) == 8 and len(set(lengths.values())) > 2
    assert rows[-1]["loss"] == pytest.approx(statistics.mean(losses), rel=1e-4, abs=1e-6)
    assert rows[-1]["clipped_share"] == pytest.approx(off / sum(lengths.values()) / 2) and off > 0


@pytest.mark.parametrize("name", RECIPES)
def test_micro_batches_change_no_run(home, tmp_path, name):
    whole, split = (run(home, tmp_path / x, "--micro_tokens", x, *RECIPES[name]) for x in ("4096", "16"))
    for a, b in zip(whole[0], split[0], strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=2e-5)
    assert all(torch.allclose(x, split[1][key], atol=1e-5) for key, x in whole[1].items())


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--ratio gspo --baseline grpo", "--loss_mean sequence"),
        ("--ratio sequence --loss_mean sum", "--ratio sequence makes one term of each response"),
        ("--ratio gspo --loss_mean sequence --baseline reinforce++", "--baseline rloo or grpo"),
        ("--ratio gspo --loss_mean sequence --objective cispo", "--objective ppo"),
        ("--no_group_std", "--no_group_std is for --baseline grpo"),
        ("--baseline astar", "no field responses with a score each: --baseline astar needs `python sample.py`'s file"),
        ("--baseline astar --kl_coef 0", "--kl_coef above 0"),
        ("--baseline astar --loss_mean sequence", "--loss_mean and --tis_cap have no part in it"),
        ("--clip_high -0.1", "--clip_high -0.1: give 0"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(home, tmp_path, flags, told):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as ended:
        run(home, tmp_path / "out", *flags.split())
    assert ended.value.code == 2 and told in said.getvalue() and said.getvalue().count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("n", [2, 3])
def test_online_dpos_advantages_are_its_gradient_on_best_and_worst(n):
    _, mask, noise = ragged(11, rows=6 * n)
    logp, ref, reward, beta = noise().requires_grad_(), noise(), noise(1)[:, 0], 0.4
    reward[:n] = 0.7  # a prompt whose responses are all alike
    total = ((logp - ref) * mask).sum(1)
    loss = 0.0
    for at in range(n, 6 * n, n):
        some = reward[at : at + n].tolist()
        best, worst = at + some.index(max(some)), at + some.index(min(some))
        loss = loss - torch.log(torch.sigmoid(beta * (total[best] - total[worst])))
    (expected,) = torch.autograd.grad(loss, logp)
    kl = (logp - ref).detach()
    credit = reinforce.reward_advantages(reward, kl, mask, baseline="dpo", n=n, kl_coef=beta)
    surrogate = reinforce.dvpo_loss(logp, logp.detach(), credit, mask, 1)[0]
    (grad,) = torch.autograd.grad(surrogate, logp)
    assert torch.allclose(beta * grad, expected, rtol=1e-10, atol=1e-14) and expected.abs().max() > 0.01
    assert not credit[:n].any()


def test_the_optimal_value_is_a_log_mean_exp_between_mean_and_best():
    scores = [0.3, -1.2, 2.0, 0.3]
    naive = 0.7 * math.log(sum(math.exp(r / 0.7) for r in scores) / 4)
    assert reinforce.optimal_value(scores, 0.7) == pytest.approx(naive, rel=1e-12)
    assert reinforce.optimal_value(scores, 1e6) == pytest.approx(statistics.mean(scores), abs=1e-5)
    assert reinforce.optimal_value(scores, 1e-4) == pytest.approx(2.0, abs=1e-3)  # without overflow
    assert reinforce.optimal_value([1.5], 0.1) == 1.5


def test_the_regression_equals_a_loop_and_on_policy_is_reinforce_with_the_optimal_advantage():
    lengths, mask, noise = ragged(5)
    logp, ref, gap, beta = noise().requires_grad_(), noise(), noise(1), 0.3
    mask = mask.clone()
    mask[3] = False  # a row that only fills up
    loss = reinforce.regression_loss(logp, ref, gap.expand_as(logp) * mask, mask, 5, beta)
    (grad,) = torch.autograd.grad(loss, logp)
    expected, slope = 0.0, torch.zeros_like(logp)
    for i, T in enumerate(lengths):
        if i != 3:
            residual = beta * sum((logp - ref)[i, :T].tolist()) - float(gap[i])
            expected, slope[i, :T] = expected + residual**2 / 5, 2 * beta * residual / 5
    assert loss.item() == pytest.approx(expected, rel=1e-12) and torch.allclose(grad, slope, rtol=1e-10)
    credit = (gap[:, 0] - beta * ((logp - ref) * mask).sum(1)).detach()[:, None] * mask
    surrogate = reinforce.dvpo_loss(logp, logp.detach(), credit, mask, 5)[0]
    assert torch.allclose(2 * beta * torch.autograd.grad(surrogate, logp)[0], grad, rtol=1e-10)


def scored(home) -> Path:
    """What sample.py would write: responses of the reference with their scores."""
    rng = random.Random(3)
    rows = [
        {"prompt": p, "responses": [{"text": "x", "score": rng.gauss(0, 1), "complete": k > 0} for k in range(3)]}
        for p in toy.prompts("rl")[:8]
    ]
    (home / "scored.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return home / "scored.jsonl"


@pytest.mark.parametrize("batch_size", [4, 8])  # with 8 one update a rollout, whose old log-probs are its own
def test_astar_regresses_on_the_reward_less_the_value_of_the_datas_responses(home, tmp_path, monkeypatch, batch_size):
    config = json.loads((home / "rm" / "config.json").read_text()) | {"reward_mean": 0.4, "reward_std": 2.0}
    mean, std, penalty, beta = 0.4, 2.0, 0.25, 0.5
    shutil.copytree(home / "rm", tmp_path / "rm")
    (tmp_path / "rm" / "config.json").write_text(json.dumps(config))
    taken, order = {}, []
    own = {part: getattr(reinforce, part) for part in ("reward_advantages", "regression_loss", "collate")}

    def spying(part, *args, **kwargs):
        if part == "reward_advantages":
            order[:] = []
            taken["reward"] = args[0].tolist()
        elif part == "collate":
            taken["micro"] = args[0]
        elif part == "regression_loss":
            logp, ref = (x.detach().double() for x in args[:2])
            order.extend((i, float((logp - ref)[k, : len(r)].sum())) for k, (_, r, i) in enumerate(taken["micro"]) if r)
        return own[part](*args, **kwargs)

    for part in own:
        monkeypatch.setattr(reinforce, part, functools.partial(spying, part))
    path = scored(home)
    flags = ["--baseline", "astar", "--value_beta", "0.7", "--kl_coef", str(beta), "--eos_penalty", str(penalty),
             "--ppo_epochs", "1", "--batch_size", str(batch_size)]  # fmt: skip
    flags += ["--data", str(path), "--reward_model", str(tmp_path / "rm")]
    rows, _ = run(home, tmp_path / "out", *flags)
    asked = reinforce.shuffled(8, 0, 1)  # the second step has the prompts of a second epoch
    value = []
    for line in path.read_text().splitlines():
        scores = [(r["score"] - mean) / std - penalty * (not r["complete"]) for r in json.loads(line)["responses"]]
        value.append(0.7 * math.log(sum(math.exp(r / 0.7) for r in scores) / 3))
    residuals = [beta * total - (taken["reward"][i] - value[asked[i]]) for i, total in order]
    assert len(residuals) == 8 and rows[-1]["clipped_share"] == 0
    assert rows[-1]["loss"] == pytest.approx(statistics.mean(r * r for r in residuals), rel=1e-4)
    assert any(abs(total) > 1e-2 for _, total in order)


@pytest.mark.parametrize(
    "changed",
    [{"policy": "another"}, {"reward_model": "gold"}, {"temperature": 0.7}, {"best_of": 4}, {"reward": ["a.py:f"]}],
)
def test_astar_refuses_responses_that_were_drawn_or_scored_otherwise(home, tmp_path, changed):
    path = tmp_path / "graded.jsonl"
    shutil.copy(scored(home), path)
    own = {
        "policy": str(home / "policy"),
        "reward_model": str(home / "rm"),
        "reward": [],
        "temperature": 1.0,
        "best_of": 1,
    }
    (tmp_path / "args.json").write_text(json.dumps(own | {"top_p": 1.0, "greedy": False} | changed))
    flags, said = ["--baseline", "astar", "--data", str(path), "--steps", "1"], io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit):
        run(home, tmp_path / "no", *flags)
    (name,) = changed
    assert f"was drawn with --{name}" in said.getvalue() and said.getvalue().count("\n") == 1
    (tmp_path / "args.json").write_text(json.dumps(own))
    run(home, tmp_path / "out", *flags)


def test_tis_weighs_a_response_as_its_ratio_is(home, tmp_path, monkeypatch):
    """An engine that says that it drew each token at e^0.01 times its probability: the loss is weighed by e^-0.01 to the
    power 1 (gspo, the mean), or the length (sequence)."""
    own, found = reinforce.KeyedNoise.sampled, {}
    told = lambda self, responses: [[x + 0.01 for x in row] for row in own(self, responses)]
    weights, policy_loss = {}, reinforce.policy_loss
    monkeypatch.setattr(reinforce.KeyedNoise, "sampled", told)
    for ratio, cap in itertools.product(("gspo", "sequence"), (0, 2)):

        def spying(logp, old, advantage, mask, of, key=(ratio, cap), **settings):
            weights.setdefault(key, []).append((advantage.sum(1), mask.sum(1)))
            return policy_loss(logp, old, advantage, mask, of, **settings)

        monkeypatch.setattr(reinforce, "policy_loss", spying)
        flags = f"--ratio {ratio} --loss_mean sequence --tis_cap {cap} --learning_rate 1e-12"
        found[ratio, cap] = run(home, tmp_path / f"{ratio}{cap}", *flags.split())
    for ratio in ("gspo", "sequence"):
        for (plain, length), (weighed, _) in zip(weights[ratio, 0], weights[ratio, 2], strict=True):
            power = length if ratio == "sequence" else torch.ones_like(length)
            assert plain.abs().max() > 0.01 and torch.allclose(weighed, plain * torch.exp(-0.01 * power), rtol=1e-3)


def test_k3_is_never_negative_and_on_policy_the_kl_with_the_gradient_of_the_reverse_one():
    generator = torch.Generator().manual_seed(0)
    logits, ref = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    logp, ref = logits.log_softmax(0), ref.log_softmax(0)
    p, one = logp.detach().exp(), torch.ones(1, 1, dtype=torch.float64)
    k3 = [reinforce.k3_loss(logp[a].view(1, 1), ref[a].view(1, 1), one, 1) for a in range(6)]
    assert min(k3) >= 0
    mean = sum(p[a] * k3[a] for a in range(6))
    assert torch.allclose(mean, (p * (logp - ref)).sum())
    (expected,) = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), logits, retain_graph=True)
    assert torch.allclose(torch.autograd.grad(mean, logits)[0], expected)
