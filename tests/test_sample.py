"""sample.py: exact and keyed noise, scores by text, a file that no kill, batch size or number of ranks changes."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sample
import toy
from eval.samples import load_rows

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny policy that ends its responses often, and reward models with one label and with two."""
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    policy = LlamaForCausalLM(toy.config(**small))
    with torch.no_grad():
        policy.lm_head.weight.mul_(8)
    for name, model in (
        ("policy", policy),
        ("rm", LlamaForSequenceClassification(toy.config(num_labels=1, **small))),
        ("two", LlamaForSequenceClassification(toy.config(num_labels=2, **small))),
    ):
        model.save_pretrained(folder / name)
        toy.tokenizer().save_pretrained(folder / name)
    prompts = [{"prompt": p} for p in toy.prompts("rl")[:7]]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return folder


def settings(home, out, **options):
    given = {"policy": str(home / "policy"), "reward_model": str(home / "rm"), "data": str(home / "prompts.jsonl"),
             "output_dir": str(out), "n": 3, "batch_size": 6, "max_response_tokens": 10}  # fmt: skip
    return sample.Args(**given | options)


def run(home, out, **options):
    return sample.train(settings(home, out, **options))


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ----------------------------------------------------------------------------------------------------------------- noise
def splitmix64(x):
    """The finaliser in plain integers."""
    x &= 2**64 - 1
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_keyed_gumbel_equals_plain_integers():
    keys = torch.tensor([0, -5, 2**62 + 12345], dtype=torch.int64)
    golden = 0x9E3779B97F4A7C15
    for position in (1, 2, 10**6):
        found = sample.keyed_gumbel(keys, position, 50)
        for b, key in enumerate(keys.tolist()):
            row = splitmix64(splitmix64(key) + position * golden)
            for j in (0, 1, 49):
                u = (splitmix64(row + (j + 1) * golden) % 2**53 + 0.5) / 2**53
                assert found[b, j].item() == pytest.approx(-math.log(-math.log1p(-u)), rel=1e-5, abs=1e-6)


def test_noise_is_gumbel_and_its_argmax_an_exact_sample():
    noise = sample.keyed_gumbel(torch.arange(20_000), 1, 8).double()
    euler = 0.5772156649
    assert noise.mean().item() == pytest.approx(euler, abs=0.01) and noise.var().item() == pytest.approx(
        math.pi**2 / 6, rel=0.02
    )
    p = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.03, 0.01, 0.008, 0.002], dtype=torch.float64)
    share = torch.bincount((noise + p.log()).argmax(1), minlength=8) / 20_000
    assert ((share - p).abs() < 4.5 * (p * (1 - p) / 20_000).sqrt()).all()
    # neighbouring keys, positions and indices know nothing of each other
    later = sample.keyed_gumbel(torch.arange(20_000), 2, 8).double()
    for a, b in ((noise[:-1, 0], noise[1:, 0]), (noise[:, 0], noise[:, 1]), (noise[:, 0], later[:, 0])):
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.03


def test_top_p_and_temperature():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(4000, 4)
    noise = sample.KeyedNoise(list(range(4000)), 0.5, "cpu", top_p=0.75)
    share = torch.bincount(noise(None, logits).argmax(1), minlength=4) / 4000
    p = torch.tensor([0.16, 0.09, 0.04, 0.01]) / 0.30  # at temperature 1/2: squares; the first two hold 0.83
    want = torch.tensor([p[0], p[1], 0, 0]) / (p[0] + p[1])
    assert share[2:].sum() == 0 and (share - want).abs().max() < 0.03


# ------------------------------------------------------------------------------------------------------------------ file
def test_rows(home, tmp_path):
    path = run(home, tmp_path / "a")
    found = rows(path)
    assert [row["prompt"] for row in found] == toy.prompts("rl")[:7]
    for row in found:
        assert set(row) == {"prompt", "responses"} and len(row["responses"]) == 3
        assert all(
            set(r) == {"text", "score", "policy", "complete"} and math.isfinite(r["score"]) for r in row["responses"]
        )
        assert len({r["text"] for r in row["responses"]}) > 1
    assert run(home, tmp_path / "b").read_bytes() == path.read_bytes()
    assert run(home, tmp_path / "c", seed=1).read_bytes() != path.read_bytes()
    texts = lambda path: [[r["text"] for r in row["responses"]] for row in rows(path)]
    assert texts(run(home, tmp_path / "d", batch_size=100)) == texts(path)  # of another batch size: the same texts


def test_a_prompt_that_comes_again_is_answered_anew(home, tmp_path):
    data = str(home / "prompts.jsonl")
    once, twice = rows(run(home, tmp_path / "a")), rows(run(home, tmp_path / "b", data=f"{data},{data}"))
    assert twice[:7] == once and [r["prompt"] for r in twice[7:]] == [r["prompt"] for r in once]
    assert all(a["responses"] != b["responses"] for a, b in zip(once, twice[7:], strict=True))


def test_scores_are_those_of_the_stock_reward_model(home, tmp_path):
    from transformers import AutoModelForSequenceClassification

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(home / "rm"), toy.tokenizer()
    args = settings(home, tmp_path / "a")
    rewards = sample.TextReward(str(home / "rm"), args, torch.device("cpu"))
    prompts, texts = toy.prompts("rl")[:3], ["it is good .", "no", "the soup is very nice and it is fine ."]
    found = rewards(prompts, texts, [True, True, False])
    for prompt, text, end, score in zip(prompts, texts, (True, True, False), found, strict=True):
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        ids = chat + tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * end
        assert model(torch.tensor([ids])).logits.item() == pytest.approx(score, abs=1e-5)


def test_greedy_is_generates_own(home, tmp_path):
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(home / "policy"), toy.tokenizer()
    found = rows(run(home, tmp_path / "a", greedy=True, n=1))
    for row in found:
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=False,
        )
        out = model.generate(
            chat, attention_mask=torch.ones_like(chat), do_sample=False, max_new_tokens=10, pad_token_id=0
        )[0, chat.shape[1] :]
        assert row["responses"][0]["text"] == tokenizer.decode([t for t in out.tolist() if t != tokenizer.eos_token_id])


def test_best_of(home, tmp_path):
    """Of each k draws the best: the same draws as those of a plain run of n k."""
    all_six = rows(run(home, tmp_path / "a", n=6))
    best = rows(run(home, tmp_path / "b", n=2, best_of=3))
    for six, two in zip(all_six, best, strict=True):
        scores = [r["score"] for r in six["responses"]]
        assert [r["score"] for r in two["responses"]] == [max(scores[:3]), max(scores[3:])]


def test_gold(home, tmp_path):
    found = rows(run(home, tmp_path / "a", data="toy", split="heldout[:2]", reward_model="gold"))
    assert [row["prompt"] for row in found] == toy.prompts("heldout")[:2]
    rewards = sample.TextReward("gold", settings(home, tmp_path), torch.device("cpu"))
    prompt, good = toy.prompts("heldout")[0], "it is very great and it is good and it is great ."
    chat = [{"role": "user", "content": prompt}]
    found = rewards([prompt, chat, prompt, prompt], [good, good, "it good", good], [True, True, True, False])
    assert found == [toy.gold(prompt, good)] * 2 + [toy.MALFORMED] * 2 and found[0] > 0  # a cut response is malformed


# ---------------------------------------------------------------------------------------------------------------- resume
def test_resume_after_a_cut_file_is_the_same_file(home, tmp_path):
    """Rows of a whole batch stay; of a batch in part, or a line in part, all is drawn again."""
    whole = run(home, tmp_path / "a")
    lines = (tmp_path / "a/parts/rank_0.jsonl").read_text().splitlines(keepends=True)
    for keep, tail in ((0, ""), (1, ""), (2, lines[2][:30]), (5, ""), (7, "")):
        folder = tmp_path / f"b{keep}"
        (folder / "parts").mkdir(parents=True)
        (folder / "args.json").write_text((tmp_path / "a/args.json").read_text().replace("/a", f"/b{keep}"))
        (folder / "parts/rank_0.jsonl").write_text("".join(lines[:keep]) + tail)
        assert run(home, folder, resume=True).read_bytes() == whole.read_bytes()


def test_any_character_survives_a_resume(tmp_path):
    """Unicode's own ends of line inside a text, and a line cut within a character."""
    rows = [{"index": i, "prompt": f"a\u2028b\u0085 {i} é", "responses": []} for i in range(3)]
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
    (tmp_path / "rank_0.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][: lines[2].index("é".encode()) + 1])
    assert list(sample.read_parts(tmp_path, [[0], [1], [2]]).values()) == rows[:2]


def test_resume_with_other_prompts_is_refused(home, tmp_path, capsys):
    data = tmp_path / "p.jsonl"
    data.write_text((home / "prompts.jsonl").read_text())
    run(home, tmp_path / "a", data=str(data))
    (tmp_path / "a" / "summary.json").unlink()  # as if it had been killed before its end
    data.write_text("".join(reversed(data.read_text().splitlines(keepends=True))))
    with pytest.raises(SystemExit):
        run(home, tmp_path / "a", data=str(data), resume=True)
    assert "holds other prompts" in capsys.readouterr().err


def test_killed_and_resumed(home, tmp_path):
    """SIGKILL at some moment, from the command line."""
    flags = {"policy": home / "policy", "reward_model": home / "rm", "n": 4, "batch_size": 4, "max_response_tokens": 40,
             "split": "train[:48]"}  # fmt: skip
    command = [sys.executable, str(ROOT / "sample.py"), *(str(x) for k, v in flags.items() for x in (f"--{k}", v))]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    whole = subprocess.run([*command, "--output_dir", "whole"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr[-1000:]
    process = subprocess.Popen(
        [*command, "--output_dir", "part"], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    part = tmp_path / "part/parts/rank_0.jsonl"
    for _ in range(12000):
        if part.exists() and part.read_text().count("\n") > 8:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "part/graded.jsonl").exists() and 8 < part.read_text().count("\n") < 48
    again = subprocess.run(
        [*command, "--output_dir", "part", "--resume"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr[-1000:]
    assert (tmp_path / "part/graded.jsonl").read_bytes() == (tmp_path / "whole/graded.jsonl").read_bytes()
    flags = [*command, "--output_dir", "part", "--resume", "--seed", "3"]
    other = subprocess.run(flags, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert other.returncode == 2 and "--seed was 0" in other.stderr


# --------------------------------------------------------------------------------------------------------------- engines
def test_generate_batch_greedy_is_generate(home, tmp_path):
    texts = lambda path: [[r["text"] for r in row["responses"]] for row in rows(path)]
    options = {"greedy": True, "n": 1, "batch_size": 4}
    assert texts(run(home, tmp_path / "a", **options)) == texts(
        run(home, tmp_path / "b", rollout="generate_batch", **options)
    )


def test_generate_batch_samples(home, tmp_path):
    found = rows(run(home, tmp_path / "a", rollout="generate_batch", n=4))
    assert len(found) == 7 and all(len({r["text"] for r in row["responses"]}) > 1 for row in found)


# -------------------------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize("options, message", [
    ({"greedy": True}, "--n 1"),
    ({"reward_model": "two"}, "not a reward model with one score"),
    ({"reward_model": "policy"}, "not a reward model with one score"),
    ({"reward_model": "runs/rm/final"}, "python rm.py"),
    ({"policy": "runs/sft/final"}, "python sft.py"),
    ({"rollout": "vllm"}, "pip install vllm"),
])  # fmt: skip
def test_mistakes(home, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "vllm", None)
    if options.get("reward_model") in ("two", "policy"):
        options = {"reward_model": str(home / options["reward_model"])}
    with pytest.raises(SystemExit) as ended:
        run(home, tmp_path / "o", **options)
    shown = capsys.readouterr().err
    assert ended.value.code == 2 and message in shown and shown.count("error:") == 1


def test_a_long_prompt_for_the_reward_model_is_told(home, tmp_path, capsys):
    rewards = sample.TextReward(str(home / "rm"), settings(home, tmp_path), torch.device("cpu"))
    with pytest.raises(SystemExit):
        rewards(["soup " * 600], ["it is ."], [True])
    assert "tokens for the reward model" in capsys.readouterr().err


def test_gold_of_another_prompt_is_told(home, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "who is it ?"}\n')
    with pytest.raises(SystemExit):
        run(home, tmp_path / "o", data=str(tmp_path / "p.jsonl"), reward_model="gold")
    assert "toy world only, and this is not a prompt of the toy world: 'who is it ?'" in capsys.readouterr().err


def test_parts_of_more_ranks_than_now_are_gone(home, tmp_path):
    """A run of eleven ranks goes on with one: no row of theirs can come back later."""
    whole, folder = run(home, tmp_path / "a"), tmp_path / "b"
    (folder / "parts").mkdir(parents=True)
    lines = (tmp_path / "a/parts/rank_0.jsonl").read_text().splitlines(keepends=True)
    (folder / "parts/rank_10.jsonl").write_text("".join(lines[:2]))
    (folder / "args.json").write_text((tmp_path / "a/args.json").read_text().replace("/a", "/b"))
    assert run(home, folder, resume=True).read_bytes() == whole.read_bytes()
    assert [path.name for path in (folder / "parts").iterdir()] == ["rank_0.jsonl"]


def test_sft_reads_what_it_writes(home, tmp_path):
    path = run(home, tmp_path / "a")
    assert len(load_rows(str(path), "train", "graded")) == 7


# ---------------------------------------------------------------------------------------------- rewards that are computed
def test_rewards_that_are_functions_are_added_with_their_factors(home, tmp_path, capfd):
    file = tmp_path / "check.py"
    file.write_text(
        "import json\n"
        "def words(prompts, responses):\n    assert all(m[-1]['role'] == 'user' for m in prompts)\n    return [len(r.split()) for r in responses]\n"
        "def asked(prompts, responses):\n    return [len(m[-1]['content']) for m in prompts]\n"
        "def short(prompts, responses):\n    return [0.0]\n"
        "def broken(prompts, responses):\n    return [float('nan')] * len(responses)\n"
    )
    run = lambda *names: sample.train(settings(home, tmp_path / "out", reward=names, reward_model="nowhere"))
    rows = [json.loads(x) for x in run(f"{file}:words", f"0.5*{file}:asked").read_text().splitlines()]
    assert rows and len({r["score"] for row in rows for r in row["responses"]}) > 2
    for row in rows:
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        for r in row["responses"]:
            assert r["score"] == len(r["text"].split()) + 0.5 * len(prompt)
    for name, says in (
        ("short", "1 numbers for"),
        ("broken", "not finite"),
        ("absent", "no attribute"),
        ("", "no attribute"),
    ):
        with pytest.raises(SystemExit) as ended:
            run(f"{file}:{name}")
        assert ended.value.code == 2 and says in capfd.readouterr().err
    for wrong in ("check", "x*check.py:words", f"{tmp_path}/none.py:words"):
        with pytest.raises(SystemExit) as ended:
            run(wrong)
        assert ended.value.code == 2 and "--reward" in capfd.readouterr().err
