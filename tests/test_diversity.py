"""EAD and Self-BLEU against brute force; the file for alpaca-eval."""

import collections
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import toy
from eval import alpaca, diversity


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_ead():
    assert diversity.ead([[1, 2], [1, 3, 3]], 10) == pytest.approx(3 / (10 * (1 - 0.9**5)))
    rng = np.random.default_rng(0)
    random_tokens = [diversity.ead(rng.integers(0, 50, (8, 12)).tolist(), 50) for _ in range(300)]
    assert np.mean(random_tokens) == pytest.approx(1, abs=0.01)  # what the expectation is there for
    assert diversity.ead([[7] * 20] * 8, 50) < 0.03 and diversity.ead([[], []], 50) == diversity.ead([[], []], 0) == 0


def bleu(text, references, n):
    """BLEU by its definition, for texts whose n-grams all have some match."""
    grams = lambda words, k: collections.Counter(tuple(words[i : i + k]) for i in range(len(words) - k + 1))
    words, others = text.split(), [reference.split() for reference in references]
    total = 0.0
    for k in range(1, n + 1):
        mine, most = grams(words, k), collections.Counter()
        for other in others:
            most |= grams(other, k)
        total += math.log(sum((mine & most).values()) / sum(mine.values())) / n
    closest = min((abs(len(other) - len(words)), len(other)) for other in others)[1]
    return math.exp(total + min(0.0, 1 - closest / len(words)))


def test_self_bleu():
    texts = [
        "the soup is good and it is hot",
        "the soup is very good and it is fine today",
        "a cat and the soup is good",
    ]
    for n in (2, 3):
        brute = np.mean([bleu(t, texts[:i] + texts[i + 1 :], n) for i, t in enumerate(texts)])
        assert diversity.self_bleu(texts, n) == pytest.approx(brute, abs=1e-6)
    assert diversity.self_bleu(["one two three four"] * 8, 3) == pytest.approx(1)
    apart = [" ".join(f"w{i}x{j}" for j in range(9)) for i in range(8)]
    assert diversity.self_bleu(apart, 2) < 0.1
    assert diversity.self_bleu(["yes", "yes"], 3) == pytest.approx(1)  # too short for 2-grams
    assert diversity.self_bleu(["", "yes"], 2) == 0


def test_the_seed_is_that_of_the_bootstrap():
    rows = [{"responses": [{"text": " ".join("abcd"[: i % 3 + 2])}, {"text": "a b"}]} for i in range(9)]
    found = [diversity.measure(rows, str.split, 4, 2, seed)["ead"] for seed in (0, 1)]
    assert found[0]["mean"] == found[1]["mean"] and found[0]["ci95"] != found[1]["ci95"]
    assert diversity.measure(rows, str.split, 4, 2)["ead"] == found[0]


def test_files_share_one_vocabulary(tmp_path, capsys):
    texts = [["a b c d", "a b c e"], ["a a a a", "f f f g"]]
    other = {"prompt": "q", "completion": "h"}
    files = [write(tmp_path / f"{i}.jsonl", [{"prompt": "p", "completion": t} for t in two] + [other])
             for i, two in enumerate(texts)]  # fmt: skip
    found = diversity.main(["--samples", *files, "--n", "2"])
    assert found["vocabulary"] == 7  # a to g: the prompt with one response is left out
    for name, two in zip(files, texts):
        row = found["files"][name]
        assert row["prompts"] == 1 and row["ead"]["mean"] == pytest.approx(diversity.ead([t.split() for t in two], 7))
    assert capsys.readouterr().out.count("1 prompts left out") == 2
    toy.tokenizer().save_pretrained(tmp_path / "tokenizer")
    found = diversity.main(["--samples", files[0], "--n", "2", "--tokenizer", str(tmp_path / "tokenizer")])
    assert found["vocabulary"] == len(toy.tokenizer())
    for flags, word in ((["--n", "3"], "lower --n"), (["--n", "1"], "2 or more")):
        with pytest.raises(SystemExit) as error:
            diversity.main(["--samples", files[0], *flags])
        assert error.value.code == 2 and word in capsys.readouterr().err


def test_alpaca(tmp_path, capsys, monkeypatch):
    rows = [{"prompt": "p <é>", "completion": "one", "category": "koala"},
            {"prompt": [{"role": "user", "content": "q"}], "completion": "two"}]  # fmt: skip
    flags = ["--samples", write(tmp_path / "s.jsonl", rows), "--name", "mine", "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(alpaca.shutil, "which", lambda *_, **__: None)
    alpaca.main(flags)
    expected = [{"instruction": "p <é>", "output": "one", "generator": "mine", "dataset": "koala"},
                {"instruction": "q", "output": "two", "generator": "mine"}]  # fmt: skip
    assert json.loads((tmp_path / "out" / "outputs.json").read_text()) == expected
    said = capsys.readouterr().out
    assert "pip install alpaca-eval" in said and f"alpaca_eval --model_outputs {tmp_path}/out/outputs.json" in said

    program = tmp_path / "alpaca_eval"  # in the package's place: writes its leaderboard where the package does
    program.write_text(f"""#!{sys.executable}
import pathlib, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = pathlib.Path(flags["--output_path"], flags["--annotators_config"])
folder.mkdir()
(folder / "leaderboard.csv").write_text(
    ",win_rate,standard_error,length_controlled_winrate\\nother,1,1,1\\n" + flags["--name"] + ",12.5,0.5,14.25\\n")
""")
    program.chmod(0o755)
    monkeypatch.setattr(alpaca.shutil, "which", lambda *_, **__: str(program))
    alpaca.main(flags)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found == {"length_controlled_winrate": 14.25, "win_rate": 12.5, "standard_error": 0.5}
    write(tmp_path / "s.jsonl", [{"prompt": [{"role": "user", "content": "q"}] * 3, "completion": "two"}])
    with pytest.raises(SystemExit):
        alpaca.main(flags)
    assert "single questions" in capsys.readouterr().err
