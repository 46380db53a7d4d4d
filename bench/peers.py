"""This project's scripts beside TRL's trainers: the same losses, and the time and memory of a step.

    pip install trl                                 # not among the requirements; 1.16 was tried
    python bench/peers.py --losses                  # ten optimizer steps at the tiny shape
    python bench/peers.py --method sft,dpo          # time and memory, added to bench/results/peers.json
    python bench/peers.py --show bench/results/peers.json

Both sides run their own training code: a script's `train`, and a TRL trainer with a small dataset in memory. They get
the same weights (random, of bench/step.py's shapes), token ids in the same order, rewards, and AdamW with the same
settings: constant learning rate, no weight decay, no dropout, fp32, whole batches. Prompts and responses have lengths
from half to one and a half times those of the shape. Rollouts are replayed: generation and the reward model are left out
of both, and what scores them (log-probs of the policy before the update, and of the reference) is in.

Losses are those of the optimizer steps, as each side's backward pass gets them; a gap is |a - b| / max(|a|, |b|), which
--losses wants below 1e-4. Where definitions or defaults differ:

    dpo    TRL reads the reference in every step, or with `precompute_ref_log_probs` before the first, as ours always.
    ipo    TRL divides log-ratios by their lengths: ours with --length_normalize yes. The default, sums, is another loss.
    grpo   TRL weights its KL by the ratio unless `use_bias_correction_kl` is off, as here; its default `beta` is 0.
           With one update a rollout (`grpo_once`) it takes the log-probs before the update from the update itself.
    rloo   TRL has one ratio a response and means over responses, ours one a token and means over tokens. With one update
           a rollout (ratio 1) TRL's loss is the mean advantage, 0 for every policy, and its gradient is ours times the
           rollout's mean length. So gradients are clipped to a norm that both exceed, which makes updates the same, and
           what is compared is the mean log-prob of the rollout's tokens before each update.

Seconds are processor time (user + system, all threads) from one step to the next, which other work on the machine
stretches less than wall time; a ratio is the median over steps of ours / TRL's. Each side has a process of its own, and
they take turns step by step: one works, the others wait. The first step is warm-up; a rollout is a step. Memory is the
peak resident set from before the first step, less what the process had when everything was imported. On a CPU TRL
sends every position through the LM head; `trl_selected` is TRL made to select the response's, as it does on a GPU.
`ours_padded` is ours with --padding. TRL has no `dvpo`: it stands beside itself, packed and padded, one epoch over a rollout.
"""

import argparse
import contextlib
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

METHODS = {  # script, trainer, optimizer steps a step
    "sft": ("sft", "SFT", 1), "rm": ("rm", "Reward", 1), "dpo": ("dpo", "DPO", 1), "dpo_precomputed": ("dpo", "DPO", 1),
    "ipo": ("dpo", "DPO", 1), "rloo": ("reinforce", "RLOO", 1), "grpo": ("reinforce", "GRPO", 2),
    "grpo_once": ("reinforce", "GRPO", 1), "dvpo": ("dvpo", "", 1),
}  # fmt: skip
TIMED = [method for method in METHODS if method != "ipo"]  # its work is dpo's
COMPARED = [method for method in METHODS if method not in ("grpo_once", "dvpo")]
SEQUENCES, N, GAP = 8, 4, 1e-4  # of a step; responses to a prompt
COMMON = {"padding": False, "learning_rate": 1e-4, "max_grad_norm": 1.0, "kl_coef": 0.05, "gamma": 0.1, "clip": 0.2}
# Of the comparison: what makes an error show, and not rounding. ipo: 1 / (2 gamma) would be most of it; rloo: as above.
SHARP = {"ipo": {"gamma": 5.0, "learning_rate": 3e-4}, "rloo": {"max_grad_norm": 1e-2}}
LIMITS = {"max_prompt_tokens": 10**4, "max_response_tokens": 10**4}


def build(method: str, folder: Path, s: dict):
    """policy/, rm/, pairs.jsonl (prompt, chosen, rejected) and rollouts.json (N responses, rewards for each prompt)."""
    step.build(folder, s | {"share_backbone": False, "bf16": False, "rollout_batch_size": 0, "warmup": 0})
    rng, words = random.Random(0), range(5, s["model"]["vocab_size"])
    ids = lambda part: rng.choices(words, k=rng.randint(s[f"{part}_tokens"] // 2, s[f"{part}_tokens"] * 3 // 2))
    fields = {"prompt": "prompt", "chosen": "response", "rejected": "response"}
    text = lambda part: " ".join(map(step.word, ids(part)))
    rows = s["steps"] * SEQUENCES // {"sft": 1, "rm": 2, "dpo": 2, "reinforce": N, "dvpo": 1}[METHODS[method][0]]
    pairs = [{name: text(part) for name, part in fields.items()} for _ in range(rows)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    rollouts = [[([*ids("response"), 1], rng.gauss(0, 1)) for _ in range(N)] for _ in pairs]
    (folder / "rollouts.json").write_text(json.dumps(rollouts))


class Done(Exception):
    """The last step has been taken; what comes after it is not measured."""


class Log:
    """What a side writes down: losses of optimizer steps, processor time at their ends, peak memory."""

    told = None  # where the parent reads

    def __init__(self, method: str, s: dict):
        self.base, self.updates = step.resident("VmRSS:"), METHODS[method][2]
        self.total, self.losses, self.logps, self.reference, self.loss = s["steps"] * self.updates, [], [], 0.0, 0.0

    def hook(self, owner, name: str, act):
        """After each call of owner.name: act(what it gave, its processor time, *its arguments)."""
        function = getattr(owner, name)

        def hooked(*args, **options):
            start = time.process_time()
            found = function(*args, **options)
            act(found, time.process_time() - start, *args)
            return found

        setattr(owner, name, hooked)

    def begin(self, *_):
        step.forget_peak()
        self.turn()
        self.ends = [time.process_time()]

    def turn(self):
        """Lets the other sides take theirs."""
        print("waits", file=self.told, flush=True)
        sys.stdin.readline()

    def add(self, loss):
        self.loss += float(loss.detach())

    def add_reference(self, _, seconds, *args):
        self.reference += seconds

    def step(self, *_):
        self.ends.append(time.process_time())
        self.losses.append(self.loss)
        self.loss = 0.0
        self.turn()
        if len(self.losses) == self.total:
            raise Done

    def result(self) -> dict:
        seconds = [round(b - a, 4) for a, b in itertools.pairwise(self.ends[:: self.updates])]
        return {"losses": self.losses, "logps": self.logps, "seconds": seconds[1:],
                "reference_seconds": round(self.reference / len(seconds), 4),
                "peak_memory_mb": round((step.peak() - self.base) / 2**20, 1)}  # fmt: skip


# --- Ours -------------------------------------------------------------------------------------------------------------


def ours(method: str, folder: Path, s: dict) -> Log:
    script, _, updates = METHODS[method]
    module = importlib.import_module(script)
    importlib.import_module("transformers.models.llama.modeling_llama")
    log = Log(method, s)
    log.hook(module.Engine, "backward", lambda _, __, engine, loss: log.add(loss))
    log.hook(module.Engine, "step", log.step)
    log.hook(module.Run, "restore", log.begin)
    module.shuffled, module.schedule = (lambda n, seed, epoch: list(range(n))), (lambda *_: 1.0)
    size = SEQUENCES // 2 if script in ("rm", "dpo") else SEQUENCES  # pairs, or sequences
    model = {"model" if script in ("sft", "rm") else "policy": str(folder / ("rm" if method == "rm" else "policy"))}
    args = (
        {name: s[name] for name in ("steps", "learning_rate", "max_grad_norm")}
        | model
        | LIMITS
        | {"micro_tokens": 10**9, "padding": s["padding"]}
    )
    args |= {"data": str(folder / "pairs.jsonl"), "output_dir": str(folder / f"run_{s['padding']}"), "batch_size": size}
    args |= {"eval_share": 0.0} if method == "rm" else {}
    if script == "dpo":
        args |= {"gamma": s["gamma"]} | ({"loss": "ipo", "length_normalize": "yes"} if method == "ipo" else {})
        log.hook(module, "add_reference", log.add_reference)
    elif script in ("reinforce", "dvpo"):
        args |= {"rollout_batch_size": size, "ppo_epochs": updates, "kl_coef": s["kl_coef"], "clip": s["clip"]}
        replayed = {"reward_model": "replayed", "baseline": method.split("_")[0], "n": N}
        args |= {"gvm": str(folder / "gvm")} if script == "dvpo" else replayed
        replay(module, folder, log)
    with contextlib.suppress(Done):
        module.train(module.Args(**args))
    return log


def replay(module, folder: Path, log: Log):
    """Rollouts come from rollouts.json, in the order of its prompts."""

    rollouts, scores = iter(json.loads((folder / "rollouts.json").read_text())), []

    def draw(prompts, keys):
        drawn = [pair for _ in range(len(prompts) // N) for pair in next(rollouts)]
        scores[:] = [reward for _, reward in drawn]
        return [(ids, [0.0] * len(ids)) for ids, _ in drawn]  # log-probs of generation are for a metric only

    def scored(found, _, rows, *args):
        log.logps.append(float(found[0].sum()) / sum(len(row[1]) for row in rows))

    reward = {"mean": 0.0, "std": 1.0, "model": None, "__call__": lambda *_: list(scores)}
    module.Rollouts, module.TextReward = lambda *_, **__: draw, lambda *_: type("Replayed", (), reward)()
    log.hook(module, "over_ranks", scored)


# --- TRL --------------------------------------------------------------------------------------------------------------


def peer(method: str, folder: Path, s: dict, selected: bool) -> Log:
    import datasets
    import transformers
    import trl
    import trl.trainer.utils

    if selected:
        trl.trainer.utils._use_triton = lambda device: True  # the name that `add_fused_lm_head` asks; not its kernels'
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    _, kind, updates = METHODS[method]
    trainer, config = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    importlib.import_module("transformers.models.llama.modeling_llama")
    log = Log(method, s)
    log.hook(trainer, "compute_loss", lambda loss, *_: log.add(loss))
    log.hook(transformers.trainer_callback.CallbackHandler, "on_train_begin", log.begin)
    log.hook(transformers.trainer_callback.CallbackHandler, "on_step_end", log.step)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "policy")
    columns, prompts = encoded(kind, folder, tokenizer)
    args = {"output_dir": str(folder / "trl"), "use_cpu": True, "max_steps": s["steps"] * updates,
            "per_device_train_batch_size": SEQUENCES // (2 if kind in ("Reward", "DPO") else 1),
            "learning_rate": s["learning_rate"], "max_grad_norm": s["max_grad_norm"], "lr_scheduler_type": "constant",
            "weight_decay": 0.0, "optim": "adamw_torch_fused", "bf16": False, "gradient_checkpointing": False,
            "report_to": "none", "save_strategy": "no", "disable_tqdm": True}  # fmt: skip
    options = {}
    if kind in ("RLOO", "GRPO"):
        args |= {"num_generations": N, "num_iterations": updates, "beta": s["kl_coef"], "epsilon": s["clip"],
                 "shuffle_dataset": False, "steps_per_generation": 1}  # fmt: skip
        args |= {"use_bias_correction_kl": False} if kind == "GRPO" else {}
        rollouts = json.loads((folder / "rollouts.json").read_text())
        replayed = lambda numbers, part: [rollouts[int(x)][i % N][part] for i, x in enumerate(numbers)]
        options["reward_funcs"] = lambda prompts, **_: replayed(prompts, 1)
        asked = lambda self, numbers: ([prompts[int(x)] for x in numbers], None, {"drawn": replayed(numbers, 0)})
        drawn = lambda self, ids, _, fields, *__: (fields["drawn"], None) if kind == "GRPO" else fields["drawn"]
        trainer._tokenize_prompts, trainer._generate_single_turn = asked, drawn
        mean = lambda x: float(x["old_logps"].sum() / x["completion_mask"].sum())
        scored = lambda found, *_: log.logps.append(mean(found)) if kind == "RLOO" else None
        log.hook(trainer, "_generate_and_score_completions", scored)
    else:
        args |= {"max_length": None, "train_sampling_strategy": "sequential"}
        trainer._prepare_dataset = lambda self, dataset, *_: dataset  # has its ids
    if kind == "DPO":
        args |= {"beta": s["gamma"], "loss_type": ["ipo" if method == "ipo" else "sigmoid"]}
        args |= {"precompute_ref_log_probs": method == "dpo_precomputed"}
        log.hook(trainer, "_precompute_ref_logps", log.add_reference)
    auto = f"AutoModelFor{'SequenceClassification' if kind == 'Reward' else 'CausalLM'}"
    model = getattr(transformers, auto).from_pretrained(folder / ("rm" if kind == "Reward" else "policy"))
    options |= {"train_dataset": datasets.Dataset.from_dict(columns), "processing_class": tokenizer}
    with contextlib.suppress(Done):
        trainer(model=model, args=config(**args), **options).train()
    return log


def encoded(trainer: str, folder: Path, tokenizer) -> tuple[dict, list]:
    """The columns that a trainer wants of data with ids, and the prompts' ids: those that scripts make of the rows."""
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
    return columns.get(trainer, {"prompt": [str(i) for i in range(len(rows))]}), prompts


# --- Measuring --------------------------------------------------------------------------------------------------------


def together(method: str, folder: Path, sides: dict) -> dict:
    """What the sides' logs say; `sides` maps each to its settings."""
    env = {"OMP_NUM_THREADS": "1"} | os.environ | {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    workers, pipe = {}, {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": env}

    def hear(side):
        if line := workers[side].stdout.readline():
            return line
        raise SystemExit(f"{method}, {side} failed:\n{(folder / f'{side}.txt').read_text()[-4000:]}")

    def turn(side):
        print(file=workers[side].stdin, flush=True)
        return hear(side)

    try:
        for side, s in sides.items():
            call = [sys.executable, __file__, "--worker", json.dumps([method, side, str(folder), s])]
            with open(folder / f"{side}.txt", "w") as errors:
                workers[side] = subprocess.Popen(call, stderr=errors, **pipe)
            hear(side)
        for side in list(sides) * s["steps"] * METHODS[method][2]:
            turn(side)
        return {side: json.loads(turn(side)) for side in sides}
    finally:
        for worker in workers.values():
            worker.kill()
            worker.communicate()


def settings(shape: str) -> dict:
    model, sizes = step.SHAPES[shape]
    s = COMMON | {"shape": shape, "model": model, "sequences": SEQUENCES}
    return s | {name: sizes[name] for name in ("prompt_tokens", "response_tokens")}


def compare(method: str, **changes) -> dict:
    """Both sides' losses of ten optimizer steps at the tiny shape; `changes`: settings of TRL alone, to see a gap."""
    s = settings("tiny") | {"steps": 10 // METHODS[method][2], "learning_rate": 1e-3} | SHARP.get(method, {})
    s["padding"] = True  # as TRL: packed rows round otherwise, and ten steps of Adam make 1e-4 of that
    with tempfile.TemporaryDirectory() as folder:
        build(method, Path(folder), s)
        found = together(method, Path(folder), {"ours": s, "trl": s | changes})
    a, b = (found[side]["logps" if method == "rloo" else "losses"] for side in ("ours", "trl"))
    gap = max(abs(x - y) / max(abs(x), abs(y)) for x, y in zip(a, b, strict=True))
    return {"method": method, "what": "mean log-prob" if method == "rloo" else "loss", "ours": a, "trl": b, "gap": gap}


def measure(method: str, s: dict) -> dict:
    sides = ("ours", "ours_padded", "trl", "trl_selected")[: {"rm": 3, "dvpo": 2}.get(method, 4)]  # rm: no LM head
    with tempfile.TemporaryDirectory() as folder:
        build(method, Path(folder), s)
        found = together(method, Path(folder), {side: s | {"padding": side == "ours_padded"} for side in sides})
    columns = ("seconds", "reference_seconds", "peak_memory_mb")
    row = {name: {side: found[side][name] for side in sides} for name in columns}
    return {"method": method, **row, "load": [round(x, 2) for x in os.getloadavg()], "ratio": ratios(row)}


def ratios(row: dict) -> dict:
    """Ours / TRL's: a step's seconds, the same with the reference's share of one pass over the data, and memory."""
    t, once, memory = row["seconds"], row["reference_seconds"], row["peak_memory_mb"]

    def over(side, share):
        pairs = zip(t["ours"], t[side], strict=True)
        return statistics.median((a + share * once["ours"]) / (b + share * once[side]) for a, b in pairs)

    found = {side: (over(side, 0), over(side, 1), memory["ours"] / memory[side]) for side in t if side != "ours"}
    names = ("seconds", "with_reference", "memory")
    return {side: {name: round(x, 3) for name, x in zip(names, of, strict=True)} for side, of in found.items()}


def table(report: dict) -> str:
    """Markdown: a line for each method, with median seconds and MiB of each side and ours / TRL's; then the losses."""
    s, v, others = report["settings"], report["versions"], ("ours_padded", "trl", "trl_selected")
    line = lambda *cells: f"| {' | '.join(cells)} |"
    head = lambda first, *rest: [line(first, *rest), line("---", *["---:"] * len(rest))]
    found = [f"{report['device']}, {s['shape']}, {s['sequences']} sequences a step, one thread, {report['clock']}",
             f"commit {report['commit']}, {report['date']}, {', '.join(f'{name} {x}' for name, x in v.items())}", ""]  # fmt: skip
    found += head(
        "method",
        "ours, s",
        "padded, s",
        "TRL, s",
        "selecting, s",
        "with reference",
        "ours, MiB",
        "padded, MiB",
        "TRL, MiB",
        "selecting, MiB",
    )
    for row in report["rows"]:
        t = {side: statistics.median(x) for side, x in row["seconds"].items()}
        m, r = row["peak_memory_mb"], row["ratio"]
        seconds = [f"{t[side]:.2f} ({r[side]['seconds']:.2f})" if side in r else "" for side in others]
        memory = [f"{m[side]:.0f} ({r[side]['memory']:.2f})" if side in r else "" for side in others]
        whole = " / ".join(f"{x['with_reference']:.2f}" for x in r.values()) if row["reference_seconds"]["ours"] else ""
        found.append(line(row["method"], f"{t['ours']:.2f}", *seconds, whole, f"{m['ours']:.0f}", *memory))
    found += ["", *head("method", "compared", "largest relative gap")]
    found += [line(x["method"], f"{len(x['ours'])} x {x['what']}", f"{x['gap']:.1e}") for x in report["losses"]]
    return "\n".join(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", help=f"some of {','.join(METHODS)}")
    parser.add_argument("--losses", action="store_true", help="compare losses, measure nothing")
    parser.add_argument("--shape", choices=("tiny", "100m"), default="100m")
    parser.add_argument("--steps", type=int, default=4, help="measured steps, after one of warm-up")
    parser.add_argument("--output", type=Path, default=step.ROOT / "bench" / "results" / "peers.json")
    parser.add_argument("--show", type=Path, help="print the table of an earlier run, measure nothing")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        method, side, folder, s = json.loads(args.worker)
        Log.told = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what trainers print goes the way of errors
        log = ours(method, Path(folder), s) if "ours" in side else peer(method, Path(folder), s, side == "trl_selected")
        print(json.dumps(log.result()), file=Log.told, flush=True)
        return
    if args.show:
        print(table(json.loads(args.show.read_text())))
        return
    known = COMPARED if args.losses else TIMED
    methods = args.method.split(",") if args.method else known
    if unknown := [method for method in methods if method not in known]:
        parser.error(f"--method {unknown[0]}: choose from {', '.join(known)}")
    try:
        versions = {name: importlib.metadata.version(name) for name in ("trl", "torch", "transformers", "accelerate")}
    except importlib.metadata.PackageNotFoundError as missing:
        parser.error(f"{missing.name} is not installed: pip install trl")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed says that it had to look
    s = settings(args.shape)
    report = {"settings": s, "losses": []} | (json.loads(args.output.read_text()) if args.output.is_file() else {})
    if "rows" not in report or (not args.losses and report["settings"] != s):
        report |= {"settings": s, "rows": []}
    clock, date = "processor time on a machine that others use", time.strftime("%F %R UTC", time.gmtime())
    report |= {"device": step.cpu_name(), "clock": clock, "versions": versions, "commit": step.commit(), "date": date}
    part = "losses" if args.losses else "rows"
    for method in methods:
        found = compare(method) if args.losses else measure(method, s | {"steps": args.steps + 1})
        kept = {row["method"]: row for row in report[part]} | {method: found}
        report[part] = [kept[name] for name in METHODS if name in kept]
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    if wide := [row["method"] for row in report["losses"] if not row["gap"] < GAP]:
        raise SystemExit(f"losses differ by more than {GAP}: {', '.join(wide)}")


if __name__ == "__main__":
    main()
