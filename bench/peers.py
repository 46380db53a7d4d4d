"""This project's scripts beside TRL's trainers: the same losses, and the time and memory of a step.

    pip install trl                                            # not among the requirements; 1.16 was tried
    python bench/peers.py --losses                             # ten optimizer steps at the tiny shape
    python bench/peers.py --shape 100m --method sft,dpo        # time and memory; adds to bench/results/peers.json
    python bench/peers.py --show bench/results/peers.json

Both sides run their own training code: a script's `train`, and a TRL trainer with a small dataset in memory. They get the
same weights (random, of bench/step.py's shapes), token ids in the same order, rewards, and AdamW with the same settings:
constant learning rate, no weight decay, no dropout, fp32, whole batches. Prompts and responses have lengths from half to
one and a half times those of the shape. Rollouts are replayed: generation and the reward model are left out of both, and
what scores them (log-probs of the policy before the update, and of the reference) is in.

Losses are those of the optimizer steps, as each side's backward pass gets them; a gap is |a - b| / max(|a|, |b|), which
--losses wants below 1e-4. Where definitions differ:

    dpo    none. Ours reads the reference once, before the first step; TRL in every step, or with
           `precompute_ref_log_probs` before the first (`dpo_precomputed`).
    ipo    TRL divides each log-ratio by its length: ours with --length_normalize yes. The default, on sums, is another loss.
    grpo   TRL's KL term is weighted by the ratio unless `use_bias_correction_kl` is off, as it is here; `beta` is 0 by default.
    rloo   TRL has one ratio a response, of its whole probability, and takes the mean over responses; ours has one a token, and
           takes the mean over tokens. With one update a rollout, ratio 1, TRL's loss is the mean of advantages, which is 0 for
           every policy, and its gradient is ours times the mean length of the rollout's responses. So gradients are clipped to
           a norm that both exceed, which makes the updates the same, and what is compared is the mean log-prob of the rollout's
           tokens under the policy before each update.

Seconds are the processor time (user + system, all threads) of the process from one step to the next, which other work on
the machine stretches less than wall time: of each step the least of the repeats, and the mean over steps, whose lengths
differ. The first step is warm-up. A step is a rollout for rloo and grpo. Each measurement has a process of its own, and the sides take turns. Memory is the peak resident set
from before the first step, less what the process had when everything was imported.

Without Triton's devices TRL sends every position through the LM head, not just the response's. `trl_selected` is TRL made to
select them, as it does on a GPU.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent))
import step

SCRIPTS = {"sft": "sft", "rm": "rm", "dpo": "dpo", "dpo_precomputed": "dpo", "ipo": "dpo", "rloo": "reinforce",
           "grpo": "reinforce", "grpo_once": "reinforce"}  # fmt: skip
EPOCHS = {"grpo": 2}  # updates of a rollout
TIMED = [method for method in SCRIPTS if method != "ipo"]  # whose work is dpo's
COMPARED = [method for method in SCRIPTS if method != "grpo_once"]
SIDES = ("ours", "trl", "trl_selected")
GAP = 1e-4
N = 4  # responses to a prompt
COMMON = {"learning_rate": 1e-4, "max_grad_norm": 1.0, "kl_coef": 0.05, "gamma": 0.1, "clip": 0.2}


def build(folder: Path, s: dict):
    """policy/, rm/, pairs.jsonl (prompt, chosen, rejected) and rollouts.json (N responses and rewards for each prompt)."""
    step.build(folder, s | {"share_backbone": False, "bf16": False, "rollout_batch_size": 0, "warmup": 0})
    rng, words = random.Random(0), range(5, s["model"]["vocab_size"])
    text = lambda mean: " ".join(step.word(rng.choice(words)) for _ in range(rng.randint(mean // 2, mean * 3 // 2)))
    pairs = [
        {
            "prompt": text(s["prompt_tokens"]),
            "chosen": text(s["response_tokens"]),
            "rejected": text(s["response_tokens"]),
        }
        for _ in range(s["batch_size"] * s["steps"])
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    ids = lambda: [
        rng.choice(words) for _ in range(rng.randint(s["response_tokens"] // 2, s["response_tokens"] * 3 // 2))
    ]
    rollouts = [[([*ids(), 1], rng.gauss(0, 1)) for _ in range(N)] for _ in pairs]
    (folder / "rollouts.json").write_text(json.dumps(rollouts))


class Log:
    """What a side writes down: losses of optimizer steps, processor time at their ends, peak memory."""

    def __init__(self):
        self.base, self.losses, self.traces, self.reference, self.loss = step.resident("VmRSS:"), [], [], 0.0, 0.0

    def begin(self):
        step.forget_peak()
        self.times = [time.process_time()]

    def add(self, loss):
        self.loss += float(loss.detach())

    def step(self):
        self.losses.append(self.loss)
        self.times.append(time.process_time())
        self.loss = 0.0

    def timed(self, function):
        """`function`, its processor time added up as that of the reference."""

        def run(*args, **options):
            start = time.process_time()
            found = function(*args, **options)
            self.reference += time.process_time() - start
            return found

        return run

    def result(self, updates: int) -> dict:
        """`updates`: optimizer steps in a step."""
        ends = self.times[::updates]
        seconds = [round(b - a, 4) for a, b in zip(ends, ends[1:])]
        return {
            "losses": self.traces or self.losses,
            "seconds": seconds[1:],
            "reference_seconds": round(self.reference / len(seconds), 4),
            "peak_memory_mb": round((step.peak() - self.base) / 2**20, 1),
        }


# --- Ours ---------------------------------------------------------------------------------------------------------------


class Done(Exception):
    """The last step has been taken; what a script does after it is not measured."""


def whole_batches(size: int) -> dict:
    """The flag under which a script takes an optimizer step's sequences in one forward pass."""
    return {"micro_batch_size": size}


def ours(method: str, folder: Path, s: dict) -> dict:
    module = importlib.import_module(SCRIPTS[method])
    importlib.import_module("transformers.models.llama.modeling_llama")
    log, updates = Log(), EPOCHS.get(method, 1)
    backward, update, restore = module.Engine.backward, module.Engine.step, module.Run.restore

    def backward_logged(engine, loss):
        log.add(loss)
        return backward(engine, loss)

    def update_logged(engine):
        norm = update(engine)
        log.step()
        if len(log.losses) == s["steps"] * updates:
            raise Done
        return norm

    def begin(run):
        restore(run)
        log.begin()

    module.Engine.backward, module.Engine.step, module.Run.restore = backward_logged, update_logged, begin
    module.shuffled, module.schedule = (lambda n, seed, epoch: list(range(n))), (lambda *_: 1.0)
    size = s["batch_size"] if SCRIPTS[method] in ("sft", "reinforce") else s["batch_size"] // 2  # rows; pairs
    args = {"data": str(folder / "pairs.jsonl"), "output_dir": str(folder / f"run_{os.getpid()}"), "batch_size": size,
            "steps": s["steps"], "learning_rate": s["learning_rate"], "max_grad_norm": s["max_grad_norm"],
            "max_prompt_tokens": 10**4, "max_response_tokens": 10**4, **whole_batches(size)}  # fmt: skip
    if method == "sft":
        args |= {"model": str(folder / "policy")}
    elif method == "rm":
        args |= {"model": str(folder / "rm"), "eval_share": 0.0}
    elif SCRIPTS[method] == "dpo":
        args |= {"policy": str(folder / "policy"), "gamma": s["gamma"]}
        args |= {"loss": "ipo", "length_normalize": "yes"} if method == "ipo" else {}
        module.add_reference = log.timed(module.add_reference)
    else:
        args |= {"policy": str(folder / "policy"), "reward_model": "replayed", "baseline": method.split("_")[0], "n": N,
                 "rollout_batch_size": size, "ppo_epochs": updates, "kl_coef": s["kl_coef"], "clip": s["clip"]}  # fmt: skip
        replay(module, folder, log, traced=method == "rloo")
    try:
        module.train(module.Args(**args))
    except Done:
        return log.result(updates)
    raise RuntimeError(f"{method} ended before its last step")


def replay(module, folder: Path, log: Log, traced: bool):
    """Rollouts come from rollouts.json, in the order of its prompts."""
    rollouts = iter(json.loads((folder / "rollouts.json").read_text()))
    scores, score_tokens = [], module.score_tokens

    def sample_responses(engine, prompts, noise, *_):
        drawn = [pair for _ in range(len(prompts) // N) for pair in next(rollouts)]
        scores[:] = [reward for _, reward in drawn]
        noise.logp = [log.zeros(len(drawn), 1)] * max(len(ids) for ids, _ in drawn)
        return [ids for ids, _ in drawn]

    def score_tokens_logged(scorers, rows, *args):
        found = score_tokens(scorers, rows, *args)
        log.traces.append(float(found[0].sum()) / sum(len(response) for _, response in rows))
        return found

    class Replayed(SimpleNamespace):
        def __call__(self, *_):
            return list(scores)

    import torch

    log.zeros = torch.zeros
    module.sample_responses = sample_responses
    module.TextReward = lambda *_: Replayed(mean=0.0, std=1.0, model=None)
    if traced:
        module.score_tokens = score_tokens_logged


# --- TRL ----------------------------------------------------------------------------------------------------------------


def peer(method: str, folder: Path, s: dict, selected: bool) -> dict:
    import datasets
    import transformers
    import trl
    import trl.trainer.utils

    if selected:
        trl.trainer.utils._use_triton = lambda device: True  # the name that `add_fused_lm_head` asks; not its kernels'
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    kind = {"sft": "SFT", "rm": "Reward", "dpo": "DPO", "dpo_precomputed": "DPO", "ipo": "DPO"}.get(method)
    kind, updates = kind or method.split("_")[0].upper(), EPOCHS.get(method, 1)
    base, config = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    importlib.import_module("transformers.models.llama.modeling_llama")
    log = Log()
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "policy")
    data = encoded(method, rows, tokenizer)
    size = s["batch_size"] // (2 if kind in ("Reward", "DPO") else 1)
    args = {"output_dir": str(folder / f"run_{os.getpid()}"), "per_device_train_batch_size": size, "use_cpu": True,
            "max_steps": s["steps"] * updates, "learning_rate": s["learning_rate"], "lr_scheduler_type": "constant",
            "weight_decay": 0.0, "max_grad_norm": s["max_grad_norm"], "optim": "adamw_torch_fused", "bf16": False,
            "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}  # fmt: skip
    if kind in ("SFT", "Reward", "DPO"):
        args |= {"max_length": None, "train_sampling_strategy": "sequential"}
    if kind == "DPO":
        args |= {"beta": s["gamma"], "loss_type": ["ipo" if method == "ipo" else "sigmoid"],
                 "precompute_ref_log_probs": method == "dpo_precomputed"}  # fmt: skip
        base._precompute_ref_logps = log.timed(base._precompute_ref_logps)
    options = {}
    if kind in ("RLOO", "GRPO"):
        args |= {"num_generations": N, "num_iterations": updates, "beta": s["kl_coef"], "epsilon": s["clip"],
                 "shuffle_dataset": False, "steps_per_generation": 1}  # fmt: skip
        args |= {"use_bias_correction_kl": False} if kind == "GRPO" else {}
        rollouts = json.loads((folder / "rollouts.json").read_text())
        of = lambda prompts, part: [rollouts[int(p)][i % N][part] for i, p in enumerate(prompts)]
        options["reward_funcs"] = lambda prompts, **_: of(prompts, 1)

    class Logged(base):
        def compute_loss(self, *args, **options):
            loss = super().compute_loss(*args, **options)
            log.add(loss)
            return loss

        def _prepare_dataset(self, dataset, *_):
            return dataset  # has its ids

        def _tokenize_prompts(self, prompts):
            self.drawn = of(prompts, 0)
            return [data["ids"][int(prompt)] for prompt in prompts], None, {}

        def _generate_single_turn(self, *_):
            return (self.drawn, None) if kind == "GRPO" else self.drawn

        def _generate_and_score_completions(self, inputs):
            found = super()._generate_and_score_completions(inputs)
            if kind == "RLOO":
                log.traces.append(float(found["old_logps"].sum() / found["completion_mask"].sum()))
            return found

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            log.begin()

        def on_step_end(self, *_, **__):
            log.step()

    auto = f"AutoModelFor{'SequenceClassification' if kind == 'Reward' else 'CausalLM'}"
    model = getattr(transformers, auto).from_pretrained(folder / ("rm" if kind == "Reward" else "policy"))
    dataset = datasets.Dataset.from_dict({k: v for k, v in data.items() if k != "ids"})
    trainer = Logged(model=model, args=config(**args), train_dataset=dataset, processing_class=tokenizer,
                     callbacks=[Clock()], **options)  # fmt: skip
    trainer.train()
    return log.result(updates)


def encoded(method: str, rows: list[dict], tokenizer) -> dict:
    """The columns that a trainer wants of data with token ids: the ids that the scripts make of the same rows."""
    import sft

    limits = SimpleNamespace(max_prompt_tokens=10**4, max_response_tokens=10**4)
    chosen, rejected = ([sft.encode(tokenizer, row, side, limits) for row in rows] for side in ("chosen", "rejected"))
    prompts = [prompt for prompt, _ in chosen]
    if method == "sft":
        labels = [[-100] * len(prompt) + response for prompt, response in chosen]
        return {"input_ids": [prompt + response for prompt, response in chosen], "labels": labels}
    if method == "rm":
        return {f"{side}_ids": [p + r for p, r in of] for side, of in (("chosen", chosen), ("rejected", rejected))}
    if SCRIPTS[method] == "dpo":
        return {"prompt_ids": prompts, "chosen_ids": [r for _, r in chosen], "rejected_ids": [r for _, r in rejected]}
    return {"prompt": [str(i) for i in range(len(rows))], "ids": prompts}


# --- Measuring ----------------------------------------------------------------------------------------------------------


def spawn(method: str, side: str, folder: Path, s: dict) -> dict:
    done = subprocess.run(
        [sys.executable, __file__, "--worker", json.dumps([method, side, str(folder), s])], capture_output=True, text=True,
        env={"OMP_NUM_THREADS": "1"} | os.environ | {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{method}, {side} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def settings(shape: str, steps: int, batch_size: int) -> dict:
    model, sizes = step.SHAPES[shape]
    s = COMMON | {"shape": shape, "model": model, "steps": steps, "batch_size": batch_size}
    return s | {name: sizes[name] for name in ("prompt_tokens", "response_tokens")}


def gap(a: list[float], b: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(x - y) / max(abs(x), abs(y)) for x, y in zip(a, b, strict=True))


def compare(methods: list[str], steps: int = 10) -> list[dict]:
    """Losses of both sides at the tiny shape; `steps` optimizer steps."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        s = settings("tiny", steps, 8)
        build(Path(folder), s)
        for method in methods:
            own = s | {"steps": steps // EPOCHS.get(method, 1), "learning_rate": 1e-3}
            own |= {"rloo": {"max_grad_norm": 1e-2}, "ipo": {"gamma": 5.0}}.get(
                method, {}
            )  # ipo: 1 / (2 gamma) hides nothing
            losses = {side: spawn(method, side, Path(folder), own)["losses"] for side in ("ours", "trl")}
            what = "mean log-prob" if method == "rloo" else "loss"
            found.append({"method": method, "what": what, **losses, "gap": gap(losses["ours"], losses["trl"])})
    return found


def measure(method: str, s: dict, repeats: int) -> dict:
    sides = [side for side in SIDES if (method, side) != ("rm", "trl_selected")]  # no LM head
    runs = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), s)
        for _ in range(repeats):
            for side in sides:
                print(f"measuring {method}, {side}", file=sys.stderr, flush=True)
                runs[side].append(spawn(method, side, Path(folder), s))
    row = {"method": method, "updates": EPOCHS.get(method, 1), "load": [round(x, 2) for x in os.getloadavg()]}
    row["rounds"] = {side: [run["seconds"] for run in of] for side, of in runs.items()}
    least = {side: [min(of_step) for of_step in zip(*of, strict=True)] for side, of in row["rounds"].items()}
    row["seconds"] = {side: round(statistics.mean(x), 3) for side, x in least.items()}
    for name in ("reference_seconds", "peak_memory_mb"):
        row[name] = {side: min(run[name] for run in of) for side, of in runs.items()}
    row["ratio"] = ratios(row)
    return row


def ratios(row: dict) -> dict:
    """Ours / TRL's, of a step's seconds, of those with the reference's share of one pass over the data, and of memory."""
    whole = {side: x + row["reference_seconds"][side] for side, x in row["seconds"].items()}
    parts = {"seconds": row["seconds"], "with_reference": whole, "memory": row["peak_memory_mb"]}
    return {
        side: {name: round(of["ours"] / of[side], 3) for name, of in parts.items()} for side in whole if side != "ours"
    }


def table(report: dict) -> str:
    """Markdown: a line for each method, seconds and MiB of each side, and ours / TRL's in brackets."""
    s, v = report["settings"], report["versions"]
    lines = [f"{report['device']}, {s['shape']}, {s['batch_size']} sequences a step, one thread; TRL {v['trl']}, "
             f"torch {v['torch']}, transformers {v['transformers']}; commit {report['commit']}, {report['date']}", "",
             "| method | ours, s | TRL, s | TRL selecting, s | with reference | ours, MiB | TRL, MiB |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for row in report["rows"]:
        t, m, r = row["seconds"], row["peak_memory_mb"], row["ratio"]
        cell = lambda side, t=t, r=r: f"{t[side]:.2f} ({r[side]['seconds']:.2f})" if side in t else ""
        whole = (
            " / ".join(f"{of['with_reference']:.2f}" for of in r.values()) if row["reference_seconds"]["ours"] else ""
        )
        lines.append(f"| {row['method']} | {t['ours']:.2f} | {cell('trl')} | {cell('trl_selected')} | {whole} | {m['ours']:.0f} "
                     f"| {m['trl']:.0f} ({r['trl']['memory']:.2f}) |")  # fmt: skip
    lines += ["", "| method | compared | ours, first and last | TRL, first and last | largest relative gap |",
              "| --- | --- | ---: | ---: | ---: |"]  # fmt: skip
    for row in report["losses"]:
        ends = lambda x: f"{x[0]:.6f}, {x[-1]:.6f}"
        lines.append(f"| {row['method']} | {len(row['ours'])} × {row['what']} | {ends(row['ours'])} | {ends(row['trl'])} | {row['gap']:.1e} |")  # fmt: skip
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", help=f"some of {','.join(SCRIPTS)}")
    parser.add_argument("--losses", action="store_true", help="compare losses, measure nothing")
    parser.add_argument("--shape", choices=("tiny", "100m"), default="100m")
    parser.add_argument(
        "--batch_size", type=int, default=8, help="sequences a step: two a pair, four a prompt of a rollout"
    )
    parser.add_argument("--steps", type=int, default=2, help="measured steps, after one of warm-up")
    parser.add_argument("--repeats", type=int, default=2, help="processes a side")
    parser.add_argument("--output", type=Path, default=step.ROOT / "bench" / "results" / "peers.json")
    parser.add_argument("--show", type=Path, help="print the table of an earlier run, measure nothing")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        method, side, folder, s = json.loads(args.worker)
        run = ours(method, Path(folder), s) if side == "ours" else peer(method, Path(folder), s, side == "trl_selected")
        print(json.dumps(run))
        return
    if args.show:
        print(table(json.loads(args.show.read_text())))
        return
    methods = args.method.split(",") if args.method else COMPARED if args.losses else TIMED
    if unknown := [method for method in methods if method not in SCRIPTS]:
        parser.error(f"--method {unknown[0]}: choose from {', '.join(SCRIPTS)}")
    if args.batch_size % N:
        parser.error(f"--batch_size {args.batch_size}: it must be a multiple of {N}")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed says that it had to look
    s = settings(args.shape, args.steps + 1, args.batch_size)
    report = {
        "clock": "processor time (user + system) of the process, on a machine that others use; not wall time",
        "device": step.cpu_name(), "settings": s, "rows": [], "losses": [],
    }  # fmt: skip
    earlier = json.loads(args.output.read_text()) if args.output.is_file() else {}
    if earlier and (args.losses or earlier["settings"] == s):
        report = earlier  # what is measured now takes the place of what was
    report["versions"] = {
        name: importlib.metadata.version(name) for name in ("trl", "torch", "transformers", "accelerate")
    }
    report |= {"commit": step.commit(), "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}
    part = "losses" if args.losses else "rows"
    for method in methods:
        row = compare([method])[0] if args.losses else measure(method, s, args.repeats)
        kept = {row["method"]: row for row in report[part]} | {method: row}
        report[part] = [kept[name] for name in SCRIPTS if name in kept]
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    wide = [row for row in report["losses"] if not row["gap"] < GAP]
    if wide:
        raise SystemExit(f"losses differ by more than {GAP}: {', '.join(row['method'] for row in wide)}")


if __name__ == "__main__":
    main()
