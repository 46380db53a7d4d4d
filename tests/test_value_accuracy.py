"""Table 4 and its companions against brute force; calibration; the page of token values."""

import gzip
import html.parser
import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gvm
import sft
import toy
from eval import demo, token_values, value_accuracy, winrate

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("LEAN_RLHF_DATA", ROOT / "data")) / "alpaca_eval_multi_policy.jsonl.gz"
EVIL = "<script>alert(1)</script>"
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}


def model(kind, folder, tokenizer=None, seed=0, **changes):
    torch.manual_seed(seed)
    tokenizer = tokenizer or toy.tokenizer()
    config = toy.config(num_hidden_layers=1, **SIZES, vocab_size=len(tokenizer), **changes)
    getattr(transformers, f"LlamaFor{kind}")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def value_model(folder, tokenizer=None):
    grades = {"reward_mean": -0.2, "reward_std": 0.9, "tau_pairs": 1, "tau_tokens": 96}
    return model("TokenClassification", folder, tokenizer, num_labels=1, **grades)


def stopped(capsys, call, word):
    with pytest.raises(SystemExit) as error:
        call()
    said = capsys.readouterr().err.strip()
    assert error.value.code == 2 and word in said and "\n" not in said


def brute(rows, key):
    """(share of pairs in the right order, a tie being half; number of pairs)."""
    found = []
    for (p, s, one), (q, t, other) in itertools.combinations(rows, 2):
        if p == q and s != t:
            better, worse = (one[key], other[key]) if s > t else (other[key], one[key])
            found.append(1.0 if better > worse else 0.5 if better == worse else 0.0)
    return np.mean(found), len(found)


def test_accuracies(capsys):
    rng = np.random.default_rng(0)
    rows = [(f"q{i % 25}", float(rng.integers(0, 4)), {"x": float(rng.integers(0, 5)), "y": float(rng.normal())})
            for i in range(120)]  # fmt: skip
    found = value_accuracy.accuracies(rows)
    for key in "xy":
        share, pairs = brute(rows, key)
        assert found[key]["mean"] == pytest.approx(share) and found["pairs"] == pairs
        low, high = found[key]["ci95"]
        assert low < share < high
        drawn = []
        groups = [[row for row in rows if row[0] == f"q{i}"] for i in range(25)]
        counts = np.array([np.multiply(*brute(group, key)) if brute(group, key)[1] else 0 for group in groups])
        pairs_of = np.array([brute(group, key)[1] for group in groups])
        for _ in range(2000):
            i = rng.integers(25, size=25)
            drawn.append(counts[i].sum() / pairs_of[i].sum())
        assert np.allclose([low, high], np.percentile(drawn, [2.5, 97.5]), atol=0.02)
    assert found["prompts"] == 25
    stopped(
        capsys, lambda: value_accuracy.accuracies([("a", 1.0, {"x": 0.0}), ("b", 2.0, {"x": 0.0})]), "different scores"
    )


def test_calibration():
    rng = np.random.default_rng(0)
    exact = [rng.normal(size=n) for n in (3, 5, 2, 5)]
    values = [x + rng.normal(size=len(x)) for x in exact]
    rows = value_accuracy.calibration(values, exact)
    assert [row["n"] for row in rows] == [4, 4, 3, 2, 2] and [row["token"] for row in rows] == [1, 2, 3, 4, 5]
    q, true = np.array([values[i][2] for i in (0, 1, 3)]), np.array([exact[i][2] for i in (0, 1, 3)])
    assert rows[2]["mean"] == pytest.approx(q.mean()) and rows[2]["exact"] == pytest.approx(true.mean())
    assert rows[2]["rmse"] == pytest.approx(np.sqrt(((q - true) ** 2).mean()))
    assert rows[2]["correlation"] == pytest.approx(np.corrcoef(q, true)[0, 1])
    assert value_accuracy.calibration([np.zeros(1)] * 2, [np.ones(1)] * 2)[0]["correlation"] is None


def test_the_toy_world(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "TEXTS", 12)
    folder = value_model(tmp_path / "gvm")
    reward = model("SequenceClassification", tmp_path / "rm", num_labels=1)
    policy, reference = (
        model("CausalLM", tmp_path / name, seed=i) for i, name in enumerate(("policy", "reference"), 1)
    )
    flags = ["--gvm", folder, "--reward_model", reward, "--policy", policy, "--reference", reference]
    found = value_accuracy.main([*flags, "--output", str(tmp_path / "o.json")])
    texts = value_accuracy.toy_texts(0)
    key = lambda prompt: json.dumps([{"role": "user", "content": prompt}])
    rows = [(key(p), score, {"length": len(text.split()) + 1}) for _, p, text, score in texts]
    assert (
        found["length"]["mean"] == pytest.approx(brute(rows, "length")[0])
        and found["pairs"] == brute(rows, "length")[1]
    )

    scores = winrate.reward_scores(reward, [(p, {"text": text}) for _, p, text, _ in texts], value_accuracy.Args())
    rows = [(p, score, {"rm": x}) for (_, p, _, score), x in zip(texts, scores)]
    assert found["reward_model"]["mean"] == pytest.approx(brute(rows, "rm")[0])

    tokenizer, sums = toy.tokenizer(), []
    for name in (policy, reference):  # log-probs of the response tokens, one text at a time
        causal = transformers.AutoModelForCausalLM.from_pretrained(name)
        sums.append([])
        for _, prompt, text, _ in texts:
            before = tokenizer.apply_chat_template(
                json.loads(key(prompt)), add_generation_prompt=True, return_dict=False
            )
            ids = tokenizer(text + " " + toy.EOS)["input_ids"]
            with torch.no_grad():
                logp = causal(torch.tensor([before + ids])).logits[0].log_softmax(-1)
            sums[-1].append(sum(float(logp[len(before) - 1 + t, token]) for t, token in enumerate(ids)))
    gaps = np.subtract(*sums)
    answers = value_accuracy.load_answers(tokenizer, value_accuracy.Args())
    assert np.allclose(
        value_accuracy.implicit_rewards(policy, reference, answers, value_accuracy.Args()), gaps, atol=1e-3
    )
    rows = [(p, score, {"gap": x}) for (_, p, _, score), x in zip(texts, gaps)]
    assert found["implicit_reward"]["mean"] == pytest.approx(brute(rows, "gap")[0], abs=0.01)

    exact = [toy.exact_values(policy_, p, text.split() + [toy.EOS])[1:] for policy_, p, text, _ in texts]
    assert [row["n"] for row in found["calibration"]] == [
        sum(len(x) > t for x in exact) for t in range(max(map(len, exact)))
    ]
    assert found["calibration"][0]["exact"] == pytest.approx(np.mean([x[0] for x in exact]))
    assert json.loads((tmp_path / "o.json").read_text())["gvm"] == json.loads(json.dumps(found["gvm"]))
    said = capsys.readouterr().out
    for word in ("GVM, P99", "reward model", "implicit reward", "length of the response", "mean exact"):
        assert word in said
    found = value_accuracy.main(["--gvm", folder, "--max_response_tokens", "6"])  # which cuts most texts
    assert len(found["calibration"]) == 6 and found["fit"]["all"]["mse"] > 0
    stopped(capsys, lambda: value_accuracy.main(["--gvm", reward]), "no global value model")
    stopped(capsys, lambda: value_accuracy.main(["--gvm", folder, "--policy", policy]), "--reference")
    stopped(capsys, lambda: value_accuracy.main(["--gvm", str(tmp_path / "none")]), "python gvm.py")


def test_the_reward_model_is_measured_on_the_pairs_of_the_value_model(tmp_path, capsys):
    """Rows that are left out are left out for both, and a question is one prompt, as text and as a message."""
    one, two, three, four = toy.prompts("heldout")[:4]
    pair = {"chosen": "it is great .", "rejected": "it is bad ."}
    rows = [
        {"prompt": one, "responses": [{"text": "it is good .", "score": 1.0}]},
        {"prompt": [{"role": "user", "content": one}], "responses": [{"text": "it is bad .", "score": -1.0}]},
        {"prompt": two, **pair},
        {"prompt": three, "completion": "it is good ."},  # no pair
        {"prompt": f"{four} " * 20, **pair},  # too long
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = value_accuracy.main([
        "--gvm", value_model(tmp_path / "gvm"), "--data", str(tmp_path / "d.jsonl"), "--skip_bad_rows",
        "--max_prompt_tokens", "40", "--reward_model", "gold",
    ])  # fmt: skip
    line = next(line for line in capsys.readouterr().out.split("\n") if line.startswith("reward model"))
    assert found["pairs"] == 2 and line.split()[-1] == "2"


def byte_tokenizer():
    """Every byte is a token: reads any text without a download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *letters])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", chat_template=sft.PLAIN_TEMPLATE
    )


@pytest.mark.skipif(not DATA.is_file(), reason="no real data here")
def test_the_24_policies(tmp_path, monkeypatch):
    """Values that follow a known rule give the accuracy that brute force gives; the length of the text as well."""
    folder, seen = value_model(tmp_path / "gvm", byte_tokenizer()), []
    real = gvm.predict

    def predict(engine, tokenizer, groups, args, device):
        for group in groups:  # tau: one answer by the same policy to another prompt
            tau, answer = group
            assert tau.policy == answer.policy and tau.key != answer.key
        found = real(engine, tokenizer, groups[:24], args, device)
        seen.extend((group[-1], v) for group, v in zip(groups, found))
        rng = np.random.default_rng(0)
        rest = [np.append(0, group[-1].score + rng.normal(0, 5, len(group[-1].response))) for group in groups[24:]]
        seen.extend((group[-1], v) for group, v in zip(groups[24:], rest))
        return [*found, *rest]

    monkeypatch.setattr(gvm, "predict", predict)
    found = value_accuracy.main([
        "--gvm", folder, "--data", str(DATA), "--split", "train[:12]", "--max_response_tokens", "48",
        "--max_prompt_tokens", "400", "--skip_bad_rows", "--output", str(tmp_path / "o.json"),
    ])  # fmt: skip
    assert len(seen) == 24 * found["prompts"] and found["prompts"] > 4 and "calibration" not in found
    percentiles = {"mean": np.mean} | {f"P{p}": lambda x, p=p: np.percentile(x, p) for p in (1, 5, 10, 90, 95, 99)}
    for name, statistic in percentiles.items():
        rows = [(answer.key, answer.score, {"x": statistic(np.float64(v[1:] * 0.9 - 0.2))}) for answer, v in seen]
        share, pairs = brute(rows, "x")
        assert found["gvm"][name]["mean"] == pytest.approx(share, abs=1e-3) and found["pairs"] == pairs
    assert found["gvm"]["mean"]["mean"] > 0.75

    with gzip.open(DATA, "rt") as file:
        rows = [json.loads(line) for line in itertools.islice(file, 150)]
    triples = [(row["id"], r["score"], {"length": len(r["text"])}) for row in rows for r in row["responses"]]
    share, pairs = 0.0, 0
    for row in rows:
        score = np.array([x["score"] for x in row["responses"]])
        length = np.array([len(x["text"]) for x in row["responses"]])
        order = np.sign(score[:, None] - score[None, :])
        agree = order * np.sign(length[:, None] - length[None, :])
        pairs += (order > 0).sum()
        share += ((1 + agree[order > 0]) / 2).sum()
    found = value_accuracy.accuracies(triples)
    assert found["pairs"] == pairs and found["length"]["mean"] == pytest.approx(share / pairs)


# --------------------------------------------------------------------------------------------------- the page of values


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.css = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.css = dict(attrs).get("class")

    def handle_data(self, data):
        if self.css in ("w", "w start"):
            self.words.append(data)
        self.css = None


def test_token_values(tmp_path, capsys):
    folder = value_model(tmp_path / "gvm", byte_tokenizer())
    rows = [{"prompt": f"question {i} {EVIL}", "responses": [
        {"text": f"{EVIL} no {i}\n\nend", "score": -1.0, "policy": f"<i>{EVIL}"},
        {"text": "yes é 日", "score": 2.0, "policy": "good"}, {"text": "perhaps", "score": 0.5, "policy": "good"},
    ]} for i in range(3)]  # fmt: skip
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--gvm", folder, "--data", str(tmp_path / "d.jsonl"), "--output_dir", str(tmp_path / "out")]
    token_values.main([*flags, "--prompts", "2"])
    text = (tmp_path / "out" / "token_values.html").read_text()
    page = Page(text)
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags and "i" in tags and tags.count("i") == 1  # the legend's own
    assert text.count("&lt;script&gt;") == 2 * 2 and tags.count("section") == 2
    assert not [a for _, a in page.tags if "src" in a or "href" in a]
    assert (tmp_path / "out" / "token_values.png").read_bytes()[:4] == b"\x89PNG"

    settings = token_values.Args(gvm=folder, data=str(tmp_path / "d.jsonl"), prompts=2, responses=3)
    shown = token_values.cases(settings)
    assert [[line["score"] for line in case["lines"]] for case in shown] == [[2, 0.5, -1]] * 2
    tokenizer = byte_tokenizer()
    value = gvm.ValueModel(transformers.AutoModelForTokenClassification.from_pretrained(folder))
    line = shown[0]["lines"][1]  # of "good", which has answered another prompt: with tau
    found = []
    for i in (1, 2):
        for t in ("yes é 日", "perhaps"):
            ids = lambda x: [*tokenizer(x)["input_ids"], tokenizer.eos_token_id]
            group = [gvm.Answer([{"role": "user", "content": f"question {i} {EVIL}"}], ids(t)),
                     gvm.Answer([{"role": "user", "content": rows[0]["prompt"]}], ids("perhaps"))]  # fmt: skip
            found += gvm.predict(value, tokenizer, [group], gvm.Args(tau_tokens=96), torch.device("cpu"))
    assert len(line["q"]) == len("perhaps") + 2 == len(line["words"])
    assert any(np.allclose(line["q"], q, atol=1e-5) for q in found)

    token_values.main([*flags[:2], "--prompt", "p", "--response", "a b", "c", "--output_dir", str(tmp_path / "two")])
    assert "".join(Page((tmp_path / "two" / "token_values.html").read_text()).words) == "prompta␣b<eos>promptc<eos>"
    stopped(capsys, lambda: token_values.main(["--gvm", folder]), "nothing to show")
    stopped(capsys, lambda: token_values.main(["--gvm", folder, "--prompt", "p"]), "--response")


def test_pieces():
    tokenizer = byte_tokenizer()
    for text in ("plain words", "é 日本 🎉 end", "line\n\nnext"):
        ids = tokenizer(text)["input_ids"]
        pieces = token_values.pieces(tokenizer, ids)
        assert len(pieces) == len(ids) and "".join(p for p in pieces if p != "…") == text
    assert token_values.pieces(tokenizer, tokenizer("日")["input_ids"]) == ["…", "…", "日"]
    assert [token_values.visible(x) for x in (" a", "\n\n", " ", "")] == ["a", "⏎⏎", "␣", "␣"]
    assert token_values.evenly(list("abcdefg"), 3) == ["a", "d", "g"] and token_values.evenly([1], 3) == [1]
    assert token_values.evenly([1, 2, 3], 1) == [1]
