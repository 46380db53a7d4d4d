"""A real language model that learns: controlled sentiment, after the first experiment of the DPO paper, on SmolLM2-135M-Instruct.

    pip install vaderSentiment
    python experiments/sentiment.py --model HuggingFaceTB/SmolLM2-135M-Instruct        # two cores: hours; goes on where it stopped
    python experiments/sentiment.py --model M --size tiny --output_dir runs/tiny       # minutes, to see that it runs

A prompt asks for one sentence about a thing. The gold reward is a public function of the text (`gold`): VADER's compound score,
or -1 where the text is no fluent sentence about the thing. Nothing that learns sees it: five writers (the model under
system messages that are not in the data: cheerful, gloomy, terse, rambling, factual) answer, the first sentence of each answer gets a noisy grade (standard
deviation GRADE_NOISE), and SFT, reward model and GVM learn from texts and grades alone; tau is drawn by writer. Then DVPO
and PPO (on policy, three seeds each), VCB and DPO (from one file of samples that the reward model scored), all with LoRA.
Reported: gold reward, its parts, KL to the SFT model, the *base* model's perplexity of the texts, which no one optimised.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sft
from eval import calibration, samples, token_values
from experiments import run as runner

ROOT = runner.ROOT
WORDS = (
    "hotel beach city museum restaurant film book concert garden bridge train airport market bakery school library phone laptop "
    "camera bicycle car chair lamp kitchen apartment neighbour dog cat doctor teacher waiter weather winter summer wedding "
    "birthday holiday meeting lecture exam novel song painting play festival parade coffee soup pizza cake salad breakfast dinner "
    "jacket hat watch umbrella tent boat river lake forest mountain island park zoo circus stadium match team coach theatre "
    "castle tower street station bus flight taxi hospital office factory farm village news poem letter speech game puzzle toy "
    "blanket pillow sofa mirror carpet window door roof fence balcony elevator printer keyboard radio television"
)
THINGS = WORDS.split()
QUESTIONS = ("Write one sentence about the {}.", "Say something about the {}.", "In one sentence, describe the {}.")
WRITERS = {  # the system message, which the data does not show
    "w3": "You are a cheerful person who loves everything. Answer with one short, enthusiastic sentence.",
    "w1": "You are a gloomy person who complains about everything. Answer with one short, unhappy sentence.",
    "w4": "You are a terse person. Answer with one very short sentence of a few plain words.",
    "w0": "You are a rambling storyteller. Answer with one sentence that wanders off.",
    "w2": "You are a factual reporter. Answer with one short, neutral sentence.",
}
GRADE_NOISE = 0.2
TEMPERATURE = 0.7  # of the writers: at 1 so small a model seldom says what it means
TOKENS = 32
HELD_OUT = 0.1  # of the graded prompts: for the accuracies of GVM and reward model, and the picture of values
SIZES = {  # prompts of the writers and how often each answers, RL steps, rollout, prompts scored for VCB and DPO, held out
    "full": {
        "prompts": 200,
        "times": 1,
        "steps": 30,
        "rollout": 32,
        "sampled": 60,
        "held_out": 60,
        "rl_seeds": (0, 1, 2),
    },
    "tiny": {"prompts": 12, "times": 1, "steps": 1, "rollout": 4, "sampled": 4, "held_out": 4, "rl_seeds": (0,)},
}
LORA = "--lora_r 16 --bf16"  # on a CPU with bf16 products twice as fast


def prompts(split: str) -> list[str]:
    """All things asked in all ways, in a fixed order; 60 for the end, 120 for RL, the rest for the writers."""
    order = [question.format(thing) for thing in THINGS for question in QUESTIONS]
    random.Random(0).shuffle(order)
    return {"held_out": order[:60], "rl": order[60:180], "writers": order[180:]}[split]


def fluent(prompt: str, text: str, complete: bool) -> bool:
    """One sentence about the thing: ended by the writer and a full stop, 4 to 24 words, the thing among them, no word three
    times, at most two in five words with a sentiment of their own, plain characters."""
    words = text.lower().replace(",", " ").rstrip(".!").split()
    thing = next(thing for thing in THINGS if f" {thing}." in prompt)
    rated = sum(word in sentiment().lexicon for word in words)
    return bool(
        complete and text.isascii() and text.rstrip().endswith((".", "!")) and 4 <= len(words) <= 24
        and any(word.startswith(thing) for word in words)
        and max(words.count(word) for word in words if word not in ("the", "a", "of", "and", "to", "is", "in")) < 3
        and rated <= 0.4 * len(words)
    )  # fmt: skip


def first_sentence(text: str) -> str:
    """What the model says first, or nothing where no sentence comes to its end."""
    found = re.match(r"\s*([^.!?\n]*[.!?])", text)
    return found[1] if found else ""


_vader = []


def sentiment():
    if not _vader:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError:
            sft.stop("the gold reward is VADER's: pip install vaderSentiment")
        _vader.append(SentimentIntensityAnalyzer())
    return _vader[0]


def gold(prompt: str, text: str, complete: bool = True) -> float:
    """VADER's compound score of the text in [-1, 1], or -1 where it is not fluent."""
    return sentiment().polarity_scores(text)["compound"] if fluent(prompt, text, complete) else -1.0


def write_jsonl(path: Path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.rename(path)


def write_data(model: str, folder: Path, size: dict):
    """graded.jsonl, sft.jsonl, and the prompts of RL, of sampling and of the end: once."""
    if (folder / "graded.jsonl").is_file():
        return
    asked, rng = prompts("writers")[: size["prompts"]], random.Random(1)
    sampler = samples.Sampler(
        model, samples.Sampling(max_prompt_tokens=128, max_response_tokens=TOKENS, micro_batch_size=64)
    )
    answers = {prompt: [] for prompt in asked}
    for seed, (writer, system) in enumerate(WRITERS.items()):
        turns = [[{"role": "system", "content": system}, {"role": "user", "content": prompt}] for prompt in asked]
        texts, complete = sampler(turns, TEMPERATURE, seed, size["times"])
        said = [first_sentence(text) for text in texts]
        texts = [first or text.strip() for first, text in zip(said, texts, strict=True)]
        complete = [bool(first) or whole for first, whole in zip(said, complete, strict=True)]
        for i, (text, whole) in enumerate(zip(texts, complete, strict=True)):
            prompt = asked[i // size["times"]]
            score = gold(prompt, text, whole) + rng.gauss(0, GRADE_NOISE)
            answers[prompt].append({"text": text, "score": round(score, 4), "policy": writer, "complete": whole})
        print(f"{writer}: gold {np.mean([gold(p, a['text'], a['complete']) for p in asked for a in answers[p][-1:]]):.2f}, "
              f"such as {texts[0]!r}", flush=True)  # fmt: skip
    whole = [(p, a) for p in asked for a in answers[p] if a["complete"]]  # the others are graded, but not imitated
    write_jsonl(folder / "sft.jsonl", [{"prompt": p, "completion": a["text"]} for p, a in whole])
    write_jsonl(folder / "rl.jsonl", [{"prompt": p} for p in prompts("rl")])
    write_jsonl(folder / "sampled.jsonl", [{"prompt": p} for p in prompts("rl")[: size["sampled"]]])
    write_jsonl(folder / "graded.jsonl", [{"prompt": p, "responses": answers[p]} for p in asked])


def jobs(model: str, folder: Path, size: dict) -> dict[str, runner.Job]:
    lengths = f"--max_prompt_tokens 128 --max_response_tokens {TOKENS}"
    done = lambda name: folder / name / "final"
    found = {}

    def add(name: str, script: str, flags: str, needs=(), seconds=900, **makes):
        words = [
            sys.executable,
            str(ROOT / f"{script}.py"),
            *f"{flags} {lengths}".split(),
            "--output_dir",
            str(folder / name),
        ]
        found[name] = runner.Job(words, folder / name, list(needs), seconds, **makes)

    add(
        "sft",
        "sft",
        f"--model {model} --data {folder}/sft.jsonl {LORA} --epochs 2 --batch_size 16 --learning_rate 5e-4",
    )
    value = f"--model {done('sft')} --data {folder}/graded.jsonl --learning_rate 5e-4 {LORA} --epochs 3"
    add("gvm", "gvm", f"{value} --batch_size 8 --tau_pairs 1 --tau_tokens 64 --eval_share {HELD_OUT}", ["sft"], 1500)
    add("rm", "rm", f"{value} --batch_size 8 --eval_share {HELD_OUT}", ["sft"], 1500)
    start = f"--policy {done('sft')} {LORA} --learning_rate 3e-4"
    add("sample", "sample", f"--policy {done('sft')} --reward_model {done('rm')} --data {folder}/sampled.jsonl --n 8 --bf16",
        ["rm"], 600, makes="graded.jsonl")  # fmt: skip
    rollout = f"--data {folder}/rl.jsonl --steps {size['steps']} --rollout_batch_size {size['rollout']} --batch_size {size['rollout'] // 2} --ppo_epochs 2"
    for seed in size["rl_seeds"]:
        rl = f"{start} {rollout} --seed {seed} --snapshot_every {max(1, size['steps'] // 3)} --kl_coef 0.05 --kl_target 0"
        add(f"dvpo-{seed}", "dvpo", f"{rl} --gvm {done('gvm')} --advantage gae", ["gvm"], 2400)
        add(f"ppo-{seed}", "ppo", f"{rl} --reward_model {done('rm')} --critic_learning_rate 3e-4", ["rm"], 2400)
    offline = f"{start} --data {folder}/sample/graded.jsonl --epochs 2 --batch_size 4 --warmup_steps 4"
    add("vcb", "vcb", f"{offline} --gamma 0.25", ["sample"], 900)
    add("dpo", "dpo", f"{offline} --gamma 1 --pair_selection all", ["sample"], 900)
    return found


def measure(name: str, folder: Path, base, reference, asked, ids, rewards, n: int = 4) -> dict:
    """One policy on the held-out prompts; kept beside it."""
    kept = folder / name / "measured.json"
    if not kept.is_file():
        model = calibration.Model(str(folder / name / "final"), reference.tokenizer, reference.args, reference.device)
        found, drawn = calibration.measure(model, reference, asked, ids, n, 7, rewards, 64)
        texts = [x.strip() for x in drawn["text"]]
        fine = [fluent(p, t, whole) for p, t, whole in zip(drawn["prompt"], texts, drawn["complete"], strict=True)]
        tone = [sentiment().polarity_scores(text)["compound"] for text in texts]
        responses = [base.tokenizer(text, add_special_tokens=False)["input_ids"] or [0] for text in drawn["text"]]
        repeated = [i for i in ids for _ in range(n)]
        logp = base.log_probs(repeated, responses, 64)
        row = {
            "gold": found["reward"]["gold"], "fluent": float(np.mean(fine)), "tone": float(np.mean(tone)),
            "proxy": found["reward"].get("proxy"), "kl": found["kl"]["k1"], "length": found["length"]["mean"],
            "misaligned": found["misaligned"], "base_perplexity": float((-logp.double().sum() / sum(map(len, responses))).exp()),
            "samples": [{"prompt": drawn["prompt"][i], "text": texts[i]} for i in range(0, len(texts), n)][:8],
        }  # fmt: skip
        kept.write_text(json.dumps(row, indent=1) + "\n")
    return json.loads(kept.read_text())


def draw_values(folder: Path, prompts: int = 3):
    """docs/sentiment_values.png: the GVM's token values of the best and the worst answer to the first prompts that it held out;
    tau of the same writer's other answers."""
    rows = [json.loads(line) for line in (folder / "graded.jsonl").read_text().splitlines()]
    key = lambda row: json.dumps(sft.as_messages(row["prompt"]))
    keys = sorted(map(key, rows))
    held_out = {keys[i] for i in sft.shuffled(len(keys), 0, -1)[: int(HELD_OUT * len(keys))]}  # as gvm.py chooses
    write_jsonl(folder / "shown.jsonl", sorted(rows, key=lambda row: key(row) not in held_out))
    words = f"--gvm {folder}/gvm/final --data {folder}/shown.jsonl --prompts {prompts} --max_response_tokens {TOKENS}"
    token_values.main([*words.split(), "--output_dir", str(folder / "values")])
    shutil.copy(folder / "values" / "token_values.png", ROOT / "docs" / "sentiment_values.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="SmolLM2-135M-Instruct: a folder or a hub name")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "sentiment")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--only", nargs="+", help="these runs only, and what they need must be there")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a thread each")
    args = parser.parse_args()
    size, folder = SIZES[args.size], args.output_dir
    write_data(args.model, folder, size)
    todo = {name: job for name, job in jobs(args.model, folder, size).items() if not args.only or name in args.only}
    if args.only:
        for job in todo.values():
            job.needs = [need for need in job.needs if need in todo]
    ready = runner.execute(todo, args.workers)
    if not ready or args.only:
        raise SystemExit(not ready)
    settings = calibration.Args(max_prompt_tokens=128, max_response_tokens=TOKENS)
    tokenizer, device = sft.load_tokenizer(args.model, settings), torch.device("cpu")
    load = lambda name: calibration.Model(str(name), tokenizer, settings, device)
    base, reference = load(args.model), load(folder / "sft" / "final")
    asked = prompts("held_out")[: size["held_out"]]
    ids = [sft.encode(tokenizer, {"prompt": prompt}, None, settings)[0] for prompt in asked]
    rewards = {"gold": lambda p, t, whole: [gold(*x) for x in zip(p, [y.strip() for y in t], whole, strict=True)]}
    rewards["proxy"] = calibration.sample.TextReward(
        str(folder / "rm" / "final"), calibration.settings_of(settings), device
    )
    policies = ["sft", *(name for name in todo if name not in ("sft", "gvm", "rm", "sample"))]
    rows = {name: measure(name, folder, base, reference, asked, ids, rewards) for name in policies}
    for name, row in rows.items():
        print(f"{name:8} gold {row['gold']['mean']:.3f}  fluent {row['fluent']:.0%}  tone {row['tone']:.2f}  KL {row['kl']:.1f}  "
              f"perplexity {row['base_perplexity']:.1f}")  # fmt: skip
    summaries = {name: json.loads((folder / name / "summary.json").read_text()) for name in todo if name != "sample"}
    report = {"model": Path(args.model).name, "code": runner.same_code(), "policies": rows, "runs": summaries}
    if args.size != "tiny":
        draw_values(folder)
    target = folder / "sentiment.json" if args.size == "tiny" else ROOT / "experiments" / "sentiment.json"
    target.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{target} written")


if __name__ == "__main__":
    main()
