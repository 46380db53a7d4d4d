"""The toy world's experiments: every run that EXPERIMENTS.md speaks of, for each seed, gathered in experiments/toy.json.

    python experiments/run.py --plan              # what is to be run and about how long that takes
    python experiments/run.py                     # seeds 10 to 14; finished runs are kept, so it goes on where it stopped
    python experiments/run.py --seeds 12 --only dvpo ppo      # a part, on any machine: toy.json keeps what it has of the same code
    python experiments/run.py --tune              # the grid that the settings below were chosen by, seeds 0 and 1: tuning.json

Settings were chosen on seeds 0 and 1, with as many trials for each method, by what the method itself can see (Q_T, the
reward model's score) on the prompts it trains on, among settings whose KL over the last ten steps was at most KL_BUDGET;
the gold reward of the held-out prompts decided nothing. A seed draws data, initial weights, samples and graded texts anew, everything but the prompts.
Two runs at a time, one thread each. All numbers of one results file come from one state of the code (`same_code`): what was
run by another is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FOLDER = ROOT / "runs" / "experiments"
SEEDS, TUNING = (10, 11, 12, 13, 14), (0, 1)
KL_BUDGET = 5.5  # nats a response


@dataclass
class Run:
    """One call of a script. In flags, {name} is the folder `final` of that run, which must come first."""

    script: str
    flags: str = ""
    seconds: int = 90  # on one core, for --plan

    def needs(self) -> list[str]:
        return list(dict.fromkeys(re.findall(r"\{([\w.+-]+)\}", self.flags)))


def teachers() -> dict[str, Run]:
    value = lambda flags, seconds=700: Run("gvm", f"--model {{sft}} {flags}", seconds)
    return {
        "sft": Run("sft", "", 140),
        "gvm": value(""),
        "rm": Run("rm", "--model {sft}", 270),
        "sample": Run("sample", "--policy {sft} --reward_model {rm} --data toy,toy,toy --n 16", 40),
        "gvm_tau_4": value("--tau_pairs 4", 1100),
        "gvm_tau_all_tokens": value("--outcome_share 0"),
        "gvm_no_tau": value("--tau_pairs 0", 350),
        # what the targets do is asked without tau: half the time, and nothing of question 1 in it; the outcome's share, a default, with
        "gvm_all_tokens": value("--tau_pairs 0 --outcome_share 0", 350),
        "gvm_td_0": value("--tau_pairs 0 --outcome_share 0 --td_lambda 0", 350),
        "gvm_td_95": value("--tau_pairs 0 --outcome_share 0 --td_lambda 0.95", 350),
        # eq. 2 leaves scale and offset of Q open: for `q` only; with eq. 1 it is the paper's own
        "gvm_eq_2": value("--tau_pairs 0 --outcome_share 0 --value_norm batch --micro_tokens 16384", 350),
        "gvm_paper": value(
            "--tau_pairs 0 --outcome_share 0 --td_lambda 0 --value_norm batch --micro_tokens 16384", 350
        ),
    }


ON_POLICY = {  # method -> (script, its own flags)
    "dvpo": ("dvpo", "--gvm {gvm}"),
    "dvpo_q": ("dvpo", "--gvm {gvm} --advantage q"),
    "ppo": ("ppo", "--reward_model {rm}"),
    "remax": ("reinforce", "--baseline remax --reward_model {rm}"),
    "rloo": ("reinforce", "--baseline rloo --reward_model {rm}"),
    "grpo": ("reinforce", "--baseline grpo --reward_model {rm}"),
    "reinforce++": ("reinforce", "--baseline reinforce++ --reward_model {rm}"),
}
GRID = [(beta, rate) for rate in ("2e-4", "4e-4") for beta in ("0.05", "0.1", "0.2")]
CHOSEN = {  # KL coefficient, learning rate: tuning.json
    "dvpo": ("0.1", "4e-4"),
    "dvpo_q": ("0.2", "2e-4"),
    "ppo": ("0.05", "4e-4"),
    "remax": ("0.05", "2e-4"),
    "rloo": ("0.05", "4e-4"),
    "grpo": ("0.2", "2e-4"),
    "reinforce++": ("0.05", "2e-4"),
}


def settings(name: str, beta: str = "") -> str:
    chosen, rate = CHOSEN[name]
    return f"--kl_coef {beta or chosen} --learning_rate {rate}"


def policy(name: str, *, beta: str = "", snapshots: int = 20) -> Run:
    script, flags = ON_POLICY[name]
    return Run(script, f"--policy {{sft}} {flags} {settings(name, beta)} --snapshot_every {snapshots}", 130)


def same_code() -> str:
    """A mark of all that makes the numbers: the scripts, the world, the kernels and what measures."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py")]
    files += [ROOT / "experiments" / f"{name}.py" for name in ("measure", "variants")]
    files += [ROOT / "eval" / f"{name}.py" for name in ("demo", "calibration", "diversity")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:12]


def runs_to_tune() -> dict[str, Run]:
    found = {name: run for name, run in teachers().items() if name in ("sft", "gvm", "rm")}
    for name, (script, flags) in ON_POLICY.items():
        for beta, rate in GRID:
            flag = f"--policy {{sft}} {flags} --kl_coef {beta} --learning_rate {rate}"
            found[f"{name}-{beta}-{rate}"] = Run(script, flag, 130)
    return found


@dataclass
class Job:
    """One process: done when its folder holds a summary.json, or the file it is to make."""

    words: list[str]
    folder: Path
    needs: list[str]
    seconds: int
    makes: str = "summary.json"

    def done(self) -> bool:
        return (self.folder / self.makes).is_file()


def job(name: str, run: Run, seed: int) -> Job:
    base = FOLDER / f"seed{seed}"
    flags, needs = run.flags, run.needs()
    for need in needs:
        path = base / need / ("graded.jsonl" if need in ("sample", "noisy") else "final")
        flags = flags.replace(f"{{{need}}}", str(path))
    own = [folder / f"{run.script}.py" for folder in (ROOT, ROOT / "experiments")]
    program = next(([str(path)] for path in own if path.is_file()), None)
    program = program or [str(ROOT / "experiments" / "variants.py"), run.script]
    words = [sys.executable, *program, *flags.split(), "--seed", str(seed), "--output_dir", str(base / name)]
    return Job(words, base / name, [f"{seed}/{need}" for need in needs], run.seconds)


def execute(jobs: dict[str, Job], workers: int = 2) -> bool:
    """All jobs, the first that is ready first; False if one failed, which leaves out what needs it."""
    code, started = same_code(), time.time()
    done = {name for name, job in jobs.items() if job.done()}
    for folder in (jobs[name].folder for name in done):
        mark = folder / "code"
        if not mark.is_file() or mark.read_text() != code:
            told = f"error: {folder} is of another state of the code: move {folder.parent} aside, and begin again"
            print(told, file=sys.stderr)
            raise SystemExit(2)
    waiting, running, failed, lock = [name for name in jobs if name not in done], set(), [], threading.Condition()
    total = sum(jobs[name].seconds for name in waiting)
    print(f"{len(done)} runs are done, {len(waiting)} to go: about {total / 60 / workers:.0f} minutes", flush=True)

    def take():
        while True:
            name = next((name for name in waiting if done.issuperset(jobs[name].needs)), None)
            if name or not running:
                return name
            lock.wait()

    def work():
        while True:
            with lock:
                name = take()
                if name is None:
                    return
                waiting.remove(name)
                running.add(name)
            job, begun = jobs[name], time.time()
            log = job.folder.parent / "logs" / f"{job.folder.name}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "w") as file:
                environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
                ended = subprocess.run(job.words, cwd=ROOT, env=environment, stdout=file, stderr=file).returncode
            with lock:
                running.discard(name)
                if ended or not job.done():
                    failed.append(f"{name} failed: see {log}")
                elif same_code() != code:
                    failed.append(f"{name}: the code has changed meanwhile; remove {job.folder} and begin again")
                else:
                    (job.folder / "code").write_text(code)
                    done.add(name)
                lock.notify_all()
                left = sum(jobs[x].seconds for x in (*waiting, *running))
            print(f"{name}: {time.time() - begun:.0f} s; about {left / 60 / workers:.0f} minutes to go", flush=True)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("\n".join([*failed, f"{time.time() - started:.0f} s"]))
    return not failed and not waiting


def runs() -> dict[str, Run]:
    """Every run of a seed, the most asked for first."""
    found = teachers()
    for name in ON_POLICY:
        found[name] = policy(name)
    for name, flags in OFF_POLICY.items():
        found[name] = Run(
            flags.split()[0], f"--policy {{sft}} --data {{sample}} {flags.partition(' ')[2]} --snapshot_every 48", 60
        )
    dvpo = lambda flags, script="dvpo": Run(script, f"--policy {{sft}} {flags} {settings('dvpo')}", 130)
    found |= {
        # question 3: where the loss is. 4: advantages
        "dvpo_exact_q": dvpo("--gvm {gvm}", "exact_q"),
        "ppo_gold": Run("ppo", f"--policy {{sft}} --reward_model gold {settings('ppo')}", 130),
        "dvpo_eos_penalty": dvpo("--gvm {gvm} --eos_penalty 1"),
        "dvpo_lam_1": dvpo("--gvm {gvm} --lam 1"),
        "dvpo_q_minus_v": dvpo("--gvm {gvm} --lam 0"),
        "dvpo_q_position": dvpo("--gvm {gvm} --advantage q --baseline position"),
        "dvpo_q_start": dvpo("--gvm {gvm} --advantage q --baseline start"),
        "dvpo_released": dvpo("--gvm {gvm_no_tau}", "released"),
        # question 1: what tau does for the policy
        "dvpo_no_tau": dvpo("--gvm {gvm_no_tau}"),
        "dvpo_no_tau_shown": dvpo("--gvm {gvm} --tau_pairs 0"),
        "dvpo_other_tau": dvpo("--gvm {gvm}", "other_tau"),
        # question 2: what the targets do for the policy
        "dvpo_tau_all_tokens": dvpo("--gvm {gvm_tau_all_tokens}"),
        "dvpo_all_tokens": dvpo("--gvm {gvm_all_tokens}"),
        "dvpo_td_95": dvpo("--gvm {gvm_td_95}"),
        "dvpo_td_0": dvpo("--gvm {gvm_td_0}"),
    }
    for gvm in ("no_tau", "eq_2", "paper"):
        found[f"dvpo_q_{gvm}"] = Run(
            "dvpo", f"--policy {{sft}} --gvm {{gvm_{gvm}}} --advantage q {settings('dvpo_q')}", 130
        )
    # question 9: two more, each with six settings on seed 0, chosen as the others' (experiments/later.json)
    drawn = "--policy {sft} --reward_model {rm} --snapshot_every 20"
    astar = f"{drawn} --data {{sample}} --baseline astar --kl_coef 0.1 --learning_rate 2e-4"
    found |= {
        "astar": Run("reinforce", astar, 130),
        "astar_once": Run("reinforce", f"{astar} --ppo_epochs 1 --batch_size 64", 130),
        "online_dpo": Run("reinforce", f"{drawn} --baseline dpo --kl_coef 1 --learning_rate 4e-4", 130),
    }
    # question 6: reward against KL
    for name in ("dvpo", "ppo"):
        for beta in ("0.02", "0.05", "0.1", "0.2"):
            if beta != CHOSEN[name][0]:
                found[f"{name}_beta_{beta}"] = policy(name, beta=beta, snapshots=0)
    for name, (sign, flag, values) in COEFFICIENTS.items():
        script, _, own = OFF_POLICY[name].partition(" ")
        for value, given in values.items():
            flags = f"--policy {{sft}} --data {{sample}} {own} {flag} {given}"
            found[f"{name}_{sign}_{value}"] = Run(script, flags, 60)
    vcb = lambda flags: Run("vcb", f"--policy {{sft}} --data {{sample}} {flags}", 60)
    found |= {f"vcb_n_{n}": vcb(f"--n {n}") for n in (2, 4, 8)}
    found |= {f"vcb_{pairs}": vcb(f"--pairs {pairs}") for pairs in ("full", "mean")}
    found["noisy"] = Run("noisy", "--data {sample} --noise 1", 2)
    for name in ("vcb", "dpo", "rest"):
        script, _, flags = OFF_POLICY[name].partition(" ")
        found[f"{name}_noise_1"] = Run(script, f"--policy {{sft}} --data {{noisy}} {flags}", 60)
    found |= {"dpo_length_penalty": Run("dpo", "--policy {sft} --data {sample} --loss dpo --length_penalty 0.1", 60)}
    return found


PROBED = ("gvm", "rm", "dvpo", "ppo", "vcb", "dpo", "ipo")
OFF_POLICY = {
    "vcb": "vcb",
    "dpo": "dpo --loss dpo",
    "ipo": "dpo --loss ipo",
    "slic": "dpo --loss slic --nll_coef 3 --learning_rate 3e-4",
    "rrhf": "dpo --loss rrhf --nll_coef 10 --learning_rate 3e-4",
    "rest": "rest",
}
COEFFICIENTS = {  # a method's coefficient: its sign in a run's name, its flag (the last given counts), its values beside the own
    "vcb": ("gamma", "--gamma", {x: x for x in ("0.15", "0.2", "0.35", "0.5", "1")}),
    "dpo": ("gamma", "--gamma", {x: x for x in ("0.5", "0.7", "1.5", "2.5", "5")}),
    "ipo": ("gamma", "--gamma", {x: x for x in ("0.05", "0.07", "0.2", "0.4")}),
    "slic": ("c", "--nll_coef", {x: x for x in ("0.3", "1", "10", "30")}),
    "rrhf": ("c", "--nll_coef", {x: x for x in ("3", "30", "100", "1000", "10000")}),
    "rest": ("steps", "--quantiles", {"1": "0.5", "2": "0.5 0.75", "4": "0.5 0.75 0.9 0.97"}),
}


def tuned(seeds=TUNING) -> dict:
    """method -> every setting tried: what the run saw at its end (mean over seeds), its KL, and which was chosen."""
    found = {}
    for name in ON_POLICY:
        rows = []
        for beta, rate in GRID:
            ends = [last(FOLDER / f"seed{seed}" / f"{name}-{beta}-{rate}") for seed in seeds]
            row = {key: sum(end[key] for end in ends) / len(ends) for key in ends[0]}
            rows.append({"kl_coef": beta, "learning_rate": rate, **row})
        allowed = [row for row in rows if row["kl"] <= KL_BUDGET]
        best = max(allowed or rows, key=lambda row: row["seen"])
        found[name] = [row | {"chosen": row is best} for row in rows]
    return found


def last(folder: Path, steps: int = 10) -> dict:
    """Means of the last steps: the GVM's Q_T or the reward model's score on the training prompts, the KL, and the gold reward
    there, which is told but not chosen by."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-steps:]
    mean = lambda key: sum(row[key] for row in rows) / len(rows)
    return {"seen": mean("value" if "value" in rows[0] else "reward"), "kl": mean("kl"), "gold_there": mean("gold")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 10 to 14, or with --tune 0 and 1")
    parser.add_argument("--tune", action="store_true", help="run the grid and write experiments/tuning.json")
    parser.add_argument("--plan", action="store_true", help="say what is to be run, and run nothing")
    parser.add_argument("--only", nargs="+", help="these runs and what they need")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a thread each")
    args = parser.parse_args()
    seeds, wanted = args.seeds or (TUNING if args.tune else SEEDS), runs_to_tune() if args.tune else runs()
    if args.only:
        if unknown := [name for name in args.only if name not in wanted]:
            parser.error(f"no run is called {', '.join(unknown)}; --plan lists them")
        names, found = list(args.only), {}
        while names:
            name = names.pop()
            found[name] = wanted[name]
            names += wanted[name].needs()
        wanted = {name: run for name, run in wanted.items() if name in found}
    jobs = {f"{seed}/{name}": job(name, run, seed) for name, run in wanted.items() for seed in seeds}
    if args.plan:
        for name, one in jobs.items():
            print(f"{name}: {'done' if one.done() else f'about {one.seconds} s'}")
        return
    ready = execute(jobs, args.workers)
    report = {"code": same_code(), "commit": commit(), "seeds": list(seeds)}
    if args.tune:
        if ready:
            save("tuning", report | {"methods": tuned(seeds)})
        raise SystemExit(not ready)
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(measure, seeds))
    save("toy", merged(report | gathered(wanted, seeds)))
    raise SystemExit(not ready)


def measure(seed: int):
    """experiments/measure.py for every run of a seed; experiments/probes.py where all that it asks of is there."""
    folder, environment = FOLDER / f"seed{seed}", os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    programs = ["measure", *(["probes"] if all((folder / x / "final").is_dir() for x in PROBED) else [])]
    for name in programs:
        words = [sys.executable, str(ROOT / "experiments" / f"{name}.py"), str(folder)]
        subprocess.run(words, check=True, env=environment)


def gathered(names, seeds) -> dict:
    """runs: run -> seed -> what experiments/measure.py found; probes: seed -> what experiments/probes.py found; logged: run ->
    seed -> metric -> its first row and the mean of its last ten."""
    read = lambda paths: {seed: json.loads(path.read_text()) for seed, path in paths.items() if path.is_file()}
    at = lambda *parts: read({str(seed): Path(FOLDER / f"seed{seed}", *parts) for seed in seeds})
    return {
        "runs": {name: found for name in names if (found := at(name, "measured.json"))},
        "probes": at("probes.json"),
        "logged": {
            name: found for name in names
            if (found := {str(seed): ends for seed in seeds if (ends := logged(FOLDER / f"seed{seed}" / name))})
        },
    }  # fmt: skip


def logged(folder: Path, steps: int = 10) -> dict:
    """Metric -> [its first number, the mean of those of the last ten rows]; a row has none where it was not finite."""
    path, found = folder / "metrics.jsonl", {}
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    for key in [key for key in (rows or [{}])[0] if key != "step" and not key.endswith("seconds")]:
        numbers, last = ([x for row in some if (x := row[key]) is not None] for some in (rows, rows[-steps:]))
        if last:
            found[key] = [float(f"{x:.4g}") for x in (numbers[0], sum(last) / len(last))]
    return found


def merged(report: dict) -> dict:
    """The report and what experiments/toy.json has already of the same code: seeds and runs may come one after the other."""
    path = ROOT / "experiments" / "toy.json"
    old = json.loads(path.read_text()) if path.is_file() else {}
    if old.get("code") != report["code"]:
        return report
    both = lambda part: {
        name: dict(sorted((old.get(part, {}).get(name, {}) | report.get(part, {}).get(name, {})).items()))
        for name in [*old.get(part, {}), *report.get(part, {})]
    }
    seeds = sorted({*old["seeds"], *report["seeds"]})
    parts = {"runs": both("runs"), "logged": both("logged"), "probes": old["probes"] | report["probes"]}
    return report | {"seeds": seeds} | parts


def commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()


def lines(x, depth: int = 3) -> str:
    """JSON with a line for each run of a seed: a difference can be read, and the file is half as long as indented."""
    if not depth or not isinstance(x, dict):
        return json.dumps(x, separators=(",", ":"))
    return "{" + ",".join(f"\n{json.dumps(key)}: {lines(value, depth - 1)}" for key, value in x.items()) + "\n}"


def save(name: str, report: dict):
    path = ROOT / "experiments" / f"{name}.json"
    path.write_text(lines(report) + "\n")
    print(f"{path} written")


if __name__ == "__main__":
    main()
