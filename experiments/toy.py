"""The toy world's experiments: every run that EXPERIMENTS.md speaks of, for each seed, gathered in experiments/toy.json.

    python experiments/toy.py --plan              # what is to be run and about how long that takes
    python experiments/toy.py                     # seeds 10 to 14; finished runs are kept, so it goes on where it stopped
    python experiments/toy.py --tune              # the grid that the settings below were chosen by, seeds 0 and 1: tuning.json

Settings were chosen on seeds 0 and 1, with as many trials for each method, by what the method itself can see (Q_T, the
reward model's score) on the prompts it trains on, among settings whose KL stayed below KL_BUDGET; the gold reward of the
held-out prompts decided nothing. A seed draws data, initial weights, samples and graded texts anew, everything but the prompts.
Two runs at a time, one thread each. All numbers of one results file come from one state of the code: see `same_code`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
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
    extra: list = field(default_factory=list)  # further runs that it needs

    def needs(self) -> list[str]:
        import re

        return [*self.extra, *dict.fromkeys(re.findall(r"\{([\w.+-]+)\}", self.flags))]


def teachers() -> dict[str, Run]:
    value = lambda flags, seconds=400: Run("gvm", f"--model {{sft}} {flags}", seconds)
    return {
        "sft": Run("sft", "", 120),
        "gvm": value(""),
        "rm": Run("rm", "--model {sft}", 160),
        "sample": Run(
            "sample", "--policy {sft} --reward_model {rm} --data toy,toy,toy --n 16", 40
        ),
        "gvm_no_tau": value("--tau_pairs 0", 200),
        "gvm_all_tokens": value("--outcome_share 0"),
        "gvm_td_0": value("--outcome_share 0 --td_lambda 0"),
        "gvm_td_95": value("--outcome_share 0 --td_lambda 0.95"),
        "gvm_eq_2": value("--outcome_share 0 --value_norm batch --micro_tokens 16384"),
    }


ON_POLICY = {  # method -> (script, its own flags, how many settings are tried: KL coefficients x learning rates)
    "dvpo": ("dvpo", "--gvm {gvm}"),
    "dvpo_q": ("dvpo", "--gvm {gvm} --advantage q"),
    "ppo": ("ppo", "--reward_model {rm}"),
    "remax": ("reinforce", "--baseline remax --reward_model {rm}"),
    "rloo": ("reinforce", "--baseline rloo --reward_model {rm}"),
    "grpo": ("reinforce", "--baseline grpo --reward_model {rm}"),
    "reinforce++": ("reinforce", "--baseline reinforce++ --reward_model {rm}"),
}
GRID = [(beta, rate) for rate in ("2e-4", "4e-4") for beta in ("0.05", "0.1", "0.2")]
CHOSEN = {name: ("0.1", "2e-4") for name in ON_POLICY}  # from tuning.json


def policy(name: str, *, beta: str = "", snapshots: int = 20) -> Run:
    script, flags = ON_POLICY[name]
    chosen, rate = CHOSEN[name]
    flags = f"--policy {{sft}} {flags} --kl_coef {beta or chosen} --learning_rate {rate} --snapshot_every {snapshots}"
    return Run(script, flags, 100)


def same_code() -> str:
    """A mark of all that makes the numbers: the scripts, the world, the kernels and what measures."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py"), ROOT / "experiments" / "measure.py"]
    files += [ROOT / "eval" / f"{name}.py" for name in ("demo", "calibration", "diversity")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:12]


def runs_to_tune() -> dict[str, Run]:
    found = {name: run for name, run in teachers().items() if name in ("sft", "gvm", "rm")}
    for name, (script, flags) in ON_POLICY.items():
        for beta, rate in GRID:
            settings = f"--policy {{sft}} {flags} --kl_coef {beta} --learning_rate {rate}"
            found[f"{name}-{beta}-{rate}"] = Run(script, settings, 100)
    return found


def command(name: str, run: Run, seed: int) -> list[str]:
    folder = FOLDER / f"seed{seed}"
    paths = {need: folder / need / "final" for need in run.needs()}
    if "sample" in paths:
        paths["sample"] = folder / "sample" / "graded.jsonl"
    flags = run.flags
    for need, path in paths.items():
        flags = flags.replace(f"{{{need}}}", str(path))
    program = ROOT / f"{run.script}.py" if (ROOT / f"{run.script}.py").is_file() else ROOT / "experiments" / "variants.py"
    words = [sys.executable, str(program), *([run.script] if program.parent.name == "experiments" else [])]
    return [*words, *flags.split(), "--seed", str(seed), "--output_dir", str(folder / name)]


def finished(name: str, seed: int) -> bool:
    return (FOLDER / f"seed{seed}" / name / "summary.json").is_file()


def execute(jobs: list[tuple[int, str, Run]], workers: int = 2):
    """All jobs, the first that is ready first. A failed one is told at the end, what needs it is left out."""
    code = same_code()
    waiting, running, failed, lock = list(jobs), set(), {}, threading.Condition()
    done = {(seed, name) for seed, name, _ in jobs if finished(name, seed)}
    waiting = [job for job in waiting if (job[0], job[1]) not in done]
    left = [sum(run.seconds for *_, run in waiting)]
    print(f"{len(done)} runs are done, {len(waiting)} to go: about {left[0] / 60 / workers:.0f} minutes")

    def work():
        while True:
            with lock:
                while True:
                    ready = next((j for j in waiting if all((j[0], n) in done for n in j[2].needs())), None)
                    if ready or not running:
                        break
                    lock.wait()
                if ready is None:
                    return
                waiting.remove(ready)
                running.add(ready[:2])
            seed, name, run = ready
            folder, started = FOLDER / f"seed{seed}", time.time()
            (folder / "logs").mkdir(parents=True, exist_ok=True)
            with open(folder / "logs" / f"{name}.log", "w") as log:
                environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
                status = subprocess.run(command(name, run, seed), cwd=ROOT, env=environment, stdout=log, stderr=log).returncode
            with lock:
                running.discard(ready[:2])
                left[0] -= run.seconds
                if status or same_code() != code:
                    failed[ready[:2]] = status
                else:
                    done.add(ready[:2])
                lock.notify_all()
            print(f"seed {seed} {name}: {'failed' if status else 'done'} in {time.time() - started:.0f} s, "
                  f"about {left[0] / 60 / workers:.0f} minutes to go", flush=True)  # fmt: skip

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (seed, name), status in failed.items():
        print(f"seed {seed} {name} failed ({status}): see {FOLDER / f'seed{seed}' / 'logs' / f'{name}.log'}")
    return not failed
