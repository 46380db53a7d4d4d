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
--losses wants below 1e-4. Where definitions or defaults differ:

    dpo    TRL reads the reference in every step, or with `precompute_ref_log_probs` before the first (`dpo_precomputed`),
           as ours does always.
    ipo    TRL divides each log-ratio by its length: ours with --length_normalize yes. The default, on sums, is another loss.
    grpo   TRL weights its KL term by the ratio unless `use_bias_correction_kl` is off, as it is here; its `beta` is 0 by
           default. With one update a rollout (`grpo_once`) it takes the log-probs before the update from the update itself.
    rloo   TRL has one ratio a response, of its whole probability, and takes the mean over responses; ours has one a token, and
           takes the mean over tokens. With one update a rollout, ratio 1, TRL's loss is the mean of advantages, which is 0 for
           every policy, and its gradient is ours times the mean length of the rollout's responses. So gradients are clipped to
           a norm that both exceed, which makes the updates the same, and what is compared is the mean log-prob of the rollout's
           tokens under the policy before each update.

Seconds are processor time (user + system, all threads) from one step to the next, which other work on the machine
stretches less than wall time; a ratio is the median over steps of ours / TRL's. Each side has a process of its own, and
they take turns step by step: one works, the others wait. The first step is warm-up. A step is a rollout for rloo and grpo.
Memory is the peak resident set from before the first step, less what the process had when everything was imported.

On a CPU TRL sends every position through the LM head, not just the response's. `trl_selected` is TRL made to select them,
as it does on a GPU.
"""

import argparse
import importlib
import importlib.metadata
import itertools
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
TRAINERS = {"sft": "SFT", "rm": "Reward", "dpo": "DPO", "dpo_precomputed": "DPO", "ipo": "DPO", "rloo": "RLOO",
            "grpo": "GRPO", "grpo_once": "GRPO"}  # fmt: skip
UPDATES = {"grpo": 2}  # optimizer steps a rollout; 1 for the others
TIMED = [method for method in SCRIPTS if method != "ipo"]  # its work is dpo's
COMPARED = [method for method in SCRIPTS if method != "grpo_once"]
N = 4  # responses to a prompt
GAP = 1e-4
COMMON = {"learning_rate": 1e-4, "max_grad_norm": 1.0, "kl_coef": 0.05, "gamma": 0.1, "clip": 0.2}
# Of the comparison: what makes an error show. ipo: 1 / (2 gamma) would be most of the loss; rloo: as above.
SHARP = {"ipo": {"gamma": 5.0}, "rloo": {"max_grad_norm": 1e-2}}
LIMITS = {"max_prompt_tokens": 10**4, "max_response_tokens": 10**4}


def build(folder: Path, s: dict):
    """policy/, rm/, pairs.jsonl (prompt, chosen, rejected) and rollouts.json (N responses and rewards for each prompt)."""
    step.build(folder, s | {"share_backbone": False, "bf16": False, "rollout_batch_size": 0, "warmup": 0})
    rng, words = random.Random(0), range(5, s["model"]["vocab_size"])
    ids = lambda part: rng.choices(words, k=rng.randint(s[f"{part}_tokens"] // 2, s[f"{part}_tokens"] * 3 // 2))
    fields = {"prompt": "prompt", "chosen": "response", "rejected": "response"}
    rows = s["batch_size"] * s["steps"]
    pairs = [{name: " ".join(map(step.word, ids(part))) for name, part in fields.items()} for _ in range(rows)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    rollouts = [[([*ids("response"), 1], rng.gauss(0, 1)) for _ in range(N)] for _ in pairs]
    (folder / "rollouts.json").write_text(json.dumps(rollouts))


class Log:
    """What a side writes down: losses of optimizer steps, processor time at their ends, peak memory."""

    told = None  # where the parent reads

    def __init__(self):
        self.base, self.losses, self.logps, self.reference, self.loss = step.resident("VmRSS:"), [], [], 0.0, 0.0

    def begin(self):
        step.forget_peak()
        self.turn()
        self.ends = [time.process_time()]

    def turn(self):
        """Lets the other sides take theirs."""
        print("waits", file=self.told, flush=True)
        sys.stdin.readline()

    def add(self, loss):
        self.loss += float(loss.detach())

    def step(self):
        self.ends.append(time.process_time())
        self.losses.append(self.loss)
        self.loss = 0.0
        self.turn()

    def timed(self, function):
        """`function`, whose processor time is the reference's."""

        def run(*args, **options):
            start = time.process_time()
            found = function(*args, **options)
            self.reference += time.process_time() - start
            return found

        return run

    def result(self, method: str) -> dict:
        seconds = [round(b - a, 4) for a, b in itertools.pairwise(self.ends[:: UPDATES.get(method, 1)])]
        return {"compared": self.logps if method == "rloo" else self.losses, "seconds": seconds[1:],
                "reference_seconds": round(self.reference / len(seconds), 4),
                "peak_memory_mb": round((step.peak() - self.base) / 2**20, 1)}  # fmt: skip


# --- Ours ---------------------------------------------------------------------------------------------------------------


class Done(Exception):
    """The last step has been taken; what a script does after it is not measured."""


def whole_batches(size: int) -> dict:
    """The flag under which a script takes an optimizer step's `size` rows in one forward pass."""
    return {"micro_batch_size": size}


def ours(method: str, folder: Path, s: dict) -> dict:
    module = importlib.import_module(SCRIPTS[method])
    importlib.import_module("transformers.models.llama.modeling_llama")
    log, updates, policy = Log(), UPDATES.get(method, 1), str(folder / "policy")
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
    size = s["batch_size"] if SCRIPTS[method] in ("sft", "reinforce") else s["batch_size"] // 2  # sequences; pairs
    args = {name: s[name] for name in ("steps", "learning_rate", "max_grad_norm")} | LIMITS | whole_batches(size)
    args |= {"data": str(folder / "pairs.jsonl"), "output_dir": str(folder / f"run_{os.getpid()}"), "batch_size": size}
    if method == "sft":
        args |= {"model": policy}
    elif method == "rm":
        args |= {"model": str(folder / "rm"), "eval_share": 0.0}
    elif SCRIPTS[method] == "dpo":
        args |= {"policy": policy, "gamma": s["gamma"]}
        args |= {"loss": "ipo", "length_normalize": "yes"} if method == "ipo" else {}
        module.add_reference = log.timed(module.add_reference)
    else:
        args |= {"policy": policy, "reward_model": "replayed", "baseline": method.split("_")[0], "n": N, "clip": s["clip"],
                 "rollout_batch_size": size, "ppo_epochs": updates, "kl_coef": s["kl_coef"]}  # fmt: skip
        replay(module, folder, log)
    try:
        module.train(module.Args(**args))
    except Done:
        return log.result(method)
    raise RuntimeError(f"{method} ended before its last step")


def replay(module, folder: Path, log: Log):
    """Rollouts come from rollouts.json, in the order of its prompts."""
    import torch

    rollouts, scores, score_tokens = iter(json.loads((folder / "rollouts.json").read_text())), [], module.score_tokens

    def sample_responses(engine, prompts, noise, *_):
        drawn = [pair for _ in range(len(prompts) // N) for pair in next(rollouts)]
        scores[:] = [reward for _, reward in drawn]
        noise.logp = [torch.zeros(len(drawn), 1)]  # of generation; for a metric only
        return [ids for ids, _ in drawn]

    def score_tokens_logged(scorers, rows, *args):
        found = score_tokens(scorers, rows, *args)
        log.logps.append(float(found[0].sum()) / sum(len(response) for _, response in rows))
        return found

    class Replayed:
        mean, std, model = 0.0, 1.0, None

        def __call__(self, *_):
            return list(scores)

    module.sample_responses, module.score_tokens = sample_responses, score_tokens_logged
    module.TextReward = lambda *_: Replayed()


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
    kind, updates = TRAINERS[method], UPDATES.get(method, 1)
    base, config = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    importlib.import_module("transformers.models.llama.modeling_llama")
    log = Log()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "policy")
    columns, prompts = encoded(method, folder, tokenizer)
    args = {"output_dir": str(folder / f"run_{os.getpid()}"), "use_cpu": True, "max_steps": s["steps"] * updates,
            "per_device_train_batch_size": s["batch_size"] // (2 if kind in ("Reward", "DPO") else 1),
            "learning_rate": s["learning_rate"], "max_grad_norm": s["max_grad_norm"], "lr_scheduler_type": "constant",
            "weight_decay": 0.0, "optim": "adamw_torch_fused", "bf16": False, "gradient_checkpointing": False,
            "report_to": "none", "save_strategy": "no", "disable_tqdm": True}  # fmt: skip
    options = {}
    if kind in ("RLOO", "GRPO"):
        args |= {"num_generations": N, "num_iterations": updates, "beta": s["kl_coef"], "epsilon": s["clip"],
                 "shuffle_dataset": False, "steps_per_generation": 1}  # fmt: skip
        args |= {"use_bias_correction_kl": False} if kind == "GRPO" else {}
        rollouts = json.loads((folder / "rollouts.json").read_text())
        replayed = lambda prompts, part: [rollouts[int(p)][i % N][part] for i, p in enumerate(prompts)]
        options["reward_funcs"] = lambda prompts, **_: replayed(prompts, 1)
    else:
        args |= {"max_length": None, "train_sampling_strategy": "sequential"}
    if kind == "DPO":
        args |= {"beta": s["gamma"], "loss_type": ["ipo" if method == "ipo" else "sigmoid"],
                 "precompute_ref_log_probs": method == "dpo_precomputed"}  # fmt: skip
        base._precompute_ref_logps = log.timed(base._precompute_ref_logps)

    class Logged(base):
        def compute_loss(self, *args, **options):
            loss = super().compute_loss(*args, **options)
            log.add(loss)
            return loss

        def _prepare_dataset(self, dataset, *_):
            return dataset  # has its ids

        def _tokenize_prompts(self, numbers):
            self.drawn = replayed(numbers, 0)
            return [prompts[int(number)] for number in numbers], None, {}

        def _generate_single_turn(self, *_):
            return (self.drawn, None) if kind == "GRPO" else self.drawn

        def _generate_and_score_completions(self, inputs):
            found = super()._generate_and_score_completions(inputs)
            if kind == "RLOO":
                log.logps.append(float(found["old_logps"].sum() / found["completion_mask"].sum()))
            return found

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            log.begin()

        def on_step_end(self, *_, **__):
            log.step()

    auto = f"AutoModelFor{'SequenceClassification' if kind == 'Reward' else 'CausalLM'}"
    model = getattr(transformers, auto).from_pretrained(folder / ("rm" if kind == "Reward" else "policy"))
    trainer = Logged(model=model, args=config(**args), train_dataset=datasets.Dataset.from_dict(columns),
                     processing_class=tokenizer, callbacks=[Clock()], **options)  # fmt: skip
    trainer.train()
    return log.result(method)


def encoded(method: str, folder: Path, tokenizer) -> tuple[dict, list]:
    """The columns that a trainer wants of data with token ids, and the prompts' ids: those that scripts make of the rows."""
    import sft

    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    encode = lambda row, side: sft.encode(tokenizer, row, side, SimpleNamespace(**LIMITS))
    chosen, rejected = ([encode(row, side) for row in rows] for side in ("chosen", "rejected"))
    prompts, better, worse = [p for p, _ in chosen], [r for _, r in chosen], [r for _, r in rejected]
    whole, other = ([p + r for p, r in side] for side in (chosen, rejected))
    columns = {
        "SFT": {"input_ids": whole, "labels": [[-100] * len(p) + r for p, r in chosen]},
        "Reward": {"chosen_ids": whole, "rejected_ids": other},
        "DPO": {"prompt_ids": prompts, "chosen_ids": better, "rejected_ids": worse},
    }
    return columns.get(TRAINERS[method], {"prompt": [str(i) for i in range(len(rows))]}), prompts


# --- Measuring ----------------------------------------------------------------------------------------------------------


def together(method: str, folder: Path, sides: dict) -> dict:
    """What the sides' logs say; `sides` maps each to its settings."""
    env = {"OMP_NUM_THREADS": "1"} | os.environ | {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    workers, pipe = {}, {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": env}

    def hear(side):
        line = workers[side].stdout.readline()
        if not line:
            raise SystemExit(f"{method}, {side} failed:\n{(folder / side).read_text()[-4000:]}")
        return line

    def turn(side):
        workers[side].stdin.write("\n")
        workers[side].stdin.flush()
        return hear(side)

    try:
        for side, s in sides.items():
            call = [sys.executable, __file__, "--worker", json.dumps([method, side, str(folder), s])]
            with open(folder / side, "w") as errors:
                workers[side] = subprocess.Popen(call, stderr=errors, **pipe)
            hear(side)
        for _ in range(s["steps"] * UPDATES.get(method, 1)):
            for side in sides:
                turn(side)
        return {side: json.loads(turn(side)) for side in sides}
    finally:
        for worker in workers.values():
            worker.kill()
            worker.communicate()


def settings(shape: str, steps: int, batch_size: int) -> dict:
    model, sizes = step.SHAPES[shape]
    s = COMMON | {"shape": shape, "model": model, "steps": steps, "batch_size": batch_size}
    return s | {name: sizes[name] for name in ("prompt_tokens", "response_tokens")}


def compare(method: str, **changes) -> dict:
    """Both sides' losses of ten optimizer steps at the tiny shape; `changes`: settings of TRL alone, to see a gap."""
    s = settings("tiny", 10 // UPDATES.get(method, 1), 8) | {"learning_rate": 1e-3} | SHARP.get(method, {})
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), s)
        found = together(method, Path(folder), {"ours": s, "trl": s | changes})
    a, b = (found[side]["compared"] for side in ("ours", "trl"))
    gap = max(abs(x - y) / max(abs(x), abs(y)) for x, y in zip(a, b, strict=True))
    return {"method": method, "what": "mean log-prob" if method == "rloo" else "loss", "ours": a, "trl": b, "gap": gap}


def measure(method: str, s: dict) -> dict:
    sides = ("ours", "trl", "trl_selected")[: 2 if method == "rm" else 3]  # rm has no LM head
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), s)
        found = together(method, Path(folder), dict.fromkeys(sides, s))
    row = {name: {side: found[side][name] for side in sides} for name in found["ours"] if name != "compared"}
    return {"method": method, **row, "load": [round(x, 2) for x in os.getloadavg()], "ratio": ratios(row)}


def ratios(row: dict) -> dict:
    """Ours / TRL's, of a step's seconds, of those with the reference's share of one pass over the data, and of memory."""
    t, reference, memory = row["seconds"], row["reference_seconds"], row["peak_memory_mb"]
    found = {}
    for side in [side for side in t if side != "ours"]:
        over = lambda more, side=side: statistics.median(
            (a + more["ours"]) / (b + more[side]) for a, b in zip(t["ours"], t[side], strict=True)
        )
        found[side] = {
            "seconds": over(dict.fromkeys(t, 0)),
            "with_reference": over(reference),
            "memory": memory["ours"] / memory[side],
        }
    return {side: {name: round(x, 3) for name, x in of.items()} for side, of in found.items()}


def table(report: dict) -> str:
    """Markdown: a line for each method, with seconds and MiB of each side and ours / TRL's; then the losses."""
    s, v, others = report["settings"], report["versions"], ("trl", "trl_selected")
    lines = [
        f"{report['device']}, {s['shape']}, {s['batch_size']} sequences a step, one thread, {report['clock']}; "
        f"TRL {v['trl']}, torch {v['torch']}, transformers {v['transformers']}; commit {report['commit']}, {report['date']}",
        "", "| method | ours, s | TRL, s | TRL selecting, s | with reference | ours, MiB | TRL, MiB | selecting, MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for row in report["rows"]:
        t, m, r = {side: statistics.mean(x) for side, x in row["seconds"].items()}, row["peak_memory_mb"], row["ratio"]
        cells = [f"{t[side]:.2f} ({r[side]['seconds']:.2f})" if side in r else "" for side in others]
        once = row["reference_seconds"]["ours"]
        cells.append(" / ".join(f"{x['with_reference']:.2f}" for x in r.values()) if once else "")
        memory = [f"{m[side]:.0f} ({r[side]['memory']:.2f})" if side in r else "" for side in others]
        lines.append("| " + " | ".join([row["method"], f"{t['ours']:.2f}", *cells, f"{m['ours']:.0f}", *memory]) + " |")
    lines += ["", "| method | compared | ours, first and last | TRL, first and last | largest relative gap |",
              "| --- | --- | ---: | ---: | ---: |"]  # fmt: skip
    for row in report["losses"]:
        ends = [f"{row[side][0]:.6f}, {row[side][-1]:.6f}" for side in ("ours", "trl")]
        compared = f"{len(row['ours'])} x {row['what']}"
        lines.append("| " + " | ".join([row["method"], compared, *ends, f"{row['gap']:.1e}"]) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", help=f"some of {','.join(SCRIPTS)}")
    parser.add_argument("--losses", action="store_true", help="compare losses, measure nothing")
    parser.add_argument("--shape", choices=("tiny", "100m"), default="100m")
    parser.add_argument("--batch_size", type=int, default=8, help=f"sequences a step: 2 a pair, {N} a rollout's prompt")
    parser.add_argument("--steps", type=int, default=4, help="measured steps, after one of warm-up")
    parser.add_argument("--output", type=Path, default=step.ROOT / "bench" / "results" / "peers.json")
    parser.add_argument("--show", type=Path, help="print the table of an earlier run, measure nothing")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        method, side, folder, s = json.loads(args.worker)
        Log.told = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what trainers print goes the way of errors
        run = ours(method, Path(folder), s) if side == "ours" else peer(method, Path(folder), s, side == "trl_selected")
        print(json.dumps(run), file=Log.told, flush=True)
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
    report = {"settings": s, "losses": []} | (json.loads(args.output.read_text()) if args.output.is_file() else {})
    if "rows" not in report or (not args.losses and report["settings"] != s):
        report |= {"settings": s, "rows": []}
    versions = {name: importlib.metadata.version(name) for name in ("trl", "torch", "transformers", "accelerate")}
    clock, date = (
        "processor time (user + system) on a machine that others use",
        time.strftime("%F %R UTC", time.gmtime()),
    )
    report |= {"device": step.cpu_name(), "clock": clock, "versions": versions, "commit": step.commit(), "date": date}
    part = "losses" if args.losses else "rows"
    for method in methods:
        found = compare(method) if args.losses else measure(method, s)
        kept = {row["method"]: row for row in report[part]} | {method: found}
        report[part] = [kept[name] for name in SCRIPTS if name in kept]
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    if wide := [row["method"] for row in report["losses"] if not row["gap"] < GAP]:
        raise SystemExit(f"losses differ by more than {GAP}: {', '.join(wide)}")


if __name__ == "__main__":
    main()
