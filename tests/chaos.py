"""Minutes of what a unit test has no time for: one line a test, with counts. `make chaos`.

    python tests/chaos.py [--kills 20] [--rows 10000] [--steps 2000]

Kills: each script is run with a checkpoint and a snapshot at every second step and killed (SIGKILL) at one of its file-system calls
(open for writing, rename, remove, make a folder: Python's audit events), then resumed. It must end with the weights, the rows
and the files of a run that was not killed. Rows: strangers' data through what reads rows in every script. Steps: a long run of
dvpo.py, whose memory and open files must not grow.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["TQDM_DISABLE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import test_invariants as tiny
import torch
from test_faults import odd_row

import gvm
import sample
import sft
import toy
import vcb
from eval import samples

torch.set_num_threads(1)
CALLS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.truncate")
SAVED = {"save_every": 2, "steps": 4}
BAD, LINES = 0, []


def said(name: str, good: int, of: int, *, more: str = ""):
    global BAD
    BAD += good != of
    LINES.append(f"{'ok  ' if good == of else 'FAIL'} {name}: {good} / {of}{more}")
    print(LINES[-1], flush=True)


def forked(work, told: str | Path = os.devnull) -> int:
    """Exit status of `work()` in a process of its own, which prints to `told`; minus the signal that killed it."""
    pid = os.fork()
    if not pid:
        output = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        try:
            work()
            os._exit(0)
        except SystemExit as ended:
            os._exit(ended.code or 0)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def counted(folder: Path, at: int, number: int = signal.SIGKILL) -> list:
    """An audit hook that sends this process a signal at its call number `at` on a path under the folder. -> the calls so far."""
    calls, counts = 0, []

    def hook(event, found):
        nonlocal calls
        if event not in CALLS or not str(found[0]).startswith(str(folder)):
            return
        if event == "open" and not (found[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        calls += 1
        if calls == at:
            os.kill(os.getpid(), number)
        counts.append(calls)

    sys.addaudithook(hook)
    return counts


def started(script: str, home: Path, out: Path, resume: bool):
    settings = SAVED | ({} if script in ("sft", "gvm", "rm") else {"snapshot_every": 2})
    if script == "sample":
        flags = {
            "data": home / "prompts.jsonl",
            "output_dir": out,
            "policy": home / "base",
            "reward_model": home / "rm" / "final",
        }
        words = [x for name, value in flags.items() for x in (f"--{name}", str(value))]
        return sample.main(
            [*words, "--n", "2", "--max_response_tokens", "8", "--batch_size", "4", *(["--resume"] if resume else [])]
        )
    if script == "rest":
        settings |= {"quantiles": (0.0,)}
    tiny.run(home, script, out, resume=resume, **settings)


def written(out: Path) -> dict:
    """What a run leaves: names of files, rows but for times, weights."""
    names = sorted(str(x.relative_to(out)) for x in out.rglob("*") if x.is_file() and x.name != "lock")
    rows = {path.name: tiny.jsonl(path) for path in out.glob("*.jsonl")}
    rows = {
        name: [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in some]
        for name, some in rows.items()
    }
    found = {path: path.read_bytes() for path in out.glob("**/model.safetensors")}
    return {"names": names, "rows": rows, "weights": {str(path.relative_to(out)): data for path, data in found.items()}}


def kills(home: Path, folder: Path, most: int):
    good, tried, number = 0, 0, folder / "calls"
    for script in (*tiny.SCRIPTS, "sample"):
        straight = folder / f"{script}-straight"

        def uncut(script=script, out=straight):
            counts = counted(out, 0)
            started(script, home, out, False)
            number.write_text(str(len(counts)))

        assert forked(uncut) == 0, script
        calls, expected = int(number.read_text()), written(straight)
        wanted, fine = sorted(random.Random(script).sample(range(1, calls + 1), min(calls, most))), 0
        for at in wanted:
            out = folder / f"{script}-{at}"
            status = forked(lambda s=script, o=out, at=at: (counted(o, at), started(s, home, o, False)))
            again = forked(lambda s=script, o=out: started(s, home, o, True))
            if status == -signal.SIGKILL and again == 0 and written(out) == expected:
                fine += 1
                shutil.rmtree(out)
            else:
                print(
                    f"     {script} killed at call {at} of {calls}: ended {status}, resumed {again}, see {out}",
                    flush=True,
                )
        good, tried = good + fine, tried + len(wanted)
        said(f"kills survived, {script}", fine, len(wanted), more=f" (of {calls} calls)")
    said("kills survived, all", good, tried)


def signals_and_full_disks(home: Path, folder: Path, most: int):
    """SIGTERM and SIGINT at a file-system call; files that may not grow beyond a size, as on a disk that is full. What is
    resumed afterwards is the run that nothing happened to; no traceback."""
    good, tried = {"signals": 0, "full disks": 0}, {"signals": 0, "full disks": 0}
    for script in (*tiny.SCRIPTS, "sample"):
        straight = folder / f"{script}-straight"
        expected, rng = written(straight), random.Random(script)
        largest = max(path.stat().st_size for path in straight.rglob("*") if path.is_file())
        trials = [("signals", (signal.SIGTERM, signal.SIGINT)[i % 2], rng.randint(1, 12)) for i in range(most)]
        trials += [("full disks", None, int(largest * rng.random())) for _ in range(most)]
        for i, (kind, number, at) in enumerate(trials):
            out, told = folder / f"{script}-{kind}-{i}", folder / "told"

            def work(s=script, o=out, number=number, at=at):
                if number:
                    counted(o, at, number)
                else:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (at, at))
                started(s, home, o, False)

            status = forked(work, told)
            said_then = told.read_text(errors="replace")
            begun = (out / "args.json").is_file()  # a signal may come before there is anything to go on with
            again = forked(lambda s=script, o=out, begun=begun: started(s, home, o, begun), told)
            fine = status in ((0, 130, 143) if number else (0, 2)) and "Traceback" not in said_then
            fine = fine and again == 0 and written(out) == expected
            good[kind] += fine
            tried[kind] += 1
            if fine:
                shutil.rmtree(out)
            else:
                print(f"     {script}, {kind}, {number or ''} at {at}: ended {status}, resumed {again}, see {out}: {said_then[-300:]}"
                      f"\n{told.read_text(errors='replace')[-300:]}", flush=True)  # fmt: skip
    for kind in good:
        said(f"{kind} outlived, all scripts", good[kind], tried[kind])


TOLD = {  # what the unit tests hold, counted here: name -> where
    "NaN in weights, gradients, losses": "tests/test_faults.py -k finite",
    "two runs in one folder, folders that are none": "tests/test_faults.py -k 'live_run or places or resume'",
    "ranks that fail, hosts that vanish, launchers killed": "tests/test_ranks.py -k 'watch or host or mistake or exception or signal or launcher'",
    "judge's endpoints, and keys that stay secret": "tests/test_judge.py -k 'secret or key or drips or cache or killed or mended'",
    "pages escaped": "tests/test_report.py -k escaped",
}


def told():
    for name, where in TOLD.items():
        words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *shlex.split(where)]
        lines = subprocess.run(
            words, cwd=Path(__file__).resolve().parent.parent, capture_output=True, text=True
        ).stdout.splitlines()
        counts = {
            word: int(number)
            for number, word in re.findall(r"(\d+) (passed|failed|errors?)", lines[-1] if lines else "")
        }
        said(name, counts.get("passed", 0), sum(counts.values()) or 1)


# ------------------------------------------------------------------------------------------------------- strangers' rows
def rows(folder: Path, count: int):
    """Every file of odd rows ends in one line, or is read."""
    tokenizer, rng, good, tried, read = toy.tokenizer(), random.Random(0), 0, 0, 0
    readers = {
        "sft": lambda args: sft.load_data(args, "sft", lambda row: [sft.encode(tokenizer, row, "completion", args)]),
        "gvm": lambda args: gvm.load_answers(tokenizer, args),
        "vcb": lambda args: vcb.load_groups(tokenizer, args, args.data, "train"),
        "eval": lambda args: samples.read(args.data),
    }
    kinds = {"sft": sft.Args, "gvm": gvm.Args, "vcb": vcb.Args, "eval": sft.Args}
    per_file = 25
    while tried < count:
        path = folder / "odd.jsonl"
        some = [odd_row(rng) for _ in range(per_file)]
        path.write_text("".join(json.dumps(row) + "\n" for row in some), errors="surrogatepass")
        for name, read_all in readers.items():
            args = kinds[name](data=str(path), skip_bad_rows=rng.random() < 0.8)
            tried += per_file
            try:
                with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                    read_all(args)
                read += 1
            except SystemExit as ended:
                if ended.code != 2:
                    continue
            except BaseException as error:
                print(f"     {name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
                continue
            good += per_file
    said("odd rows without a traceback", good, tried, more=f" ({read} files of them were read)")


def programs(home: Path, folder: Path, count: int):
    """Files of few odd rows among sound ones as what each eval program reads: one line and exit code 2, or a result."""
    gvm, out, odd = home / "gvm" / "final", str(folder / "out"), folder / "odd.jsonl"
    sound = folder / "sound.jsonl"
    lengths = ["--max_prompt_tokens", "64", "--max_response_tokens", "24"]
    called = {
        "winrate": [["--a", odd, "--b", sound, "--output", out]],
        "human": [["sheet", "--a", sound, "--b", odd, "--n", "4", "--output", f"{out}.html"],
                  ["tally", "--key", odd, "--answers", sound, odd]],
        "diversity": [["--samples", odd, sound, "--n", "2"], ["--samples", odd, "--n", "2", "--tokenizer", home / "base"]],
        "value_accuracy": [["--gvm", gvm, "--data", odd, *lengths], ["--gvm", gvm, "--data", odd, "--skip_bad_rows", *lengths]],
        "token_values": [["--gvm", gvm, "--data", odd, "--skip_bad_rows", "--output_dir", folder / "values", *lengths]],
        "calibration": [["--policy", home / "brief", "--reference", home / "brief", "--reward_model", home / "rm" / "final",
                         "--data", odd, "--split", "train", "--n", "2", *lengths]],
        "judge": [["answers", "--questions", odd, "--base_url", "http://127.0.0.1:9", "--output", f"{out}.jsonl", "--retries", "0"],
                  ["score", "--samples", odd, "--base_url", "http://127.0.0.1:9", "--cache", f"{out}.cache",
                   "--retries", "0"]],
        "alpaca": [["--samples", odd, "--name", "a", "--output_dir", folder / "alpaca"]],
    }  # fmt: skip
    rng, good, tried, ended_well = random.Random(1), 0, 0, 0
    modules = {name: importlib.import_module(f"eval.{name}") for name in called}
    asked = toy.prompts("rl")[:20]
    plain = lambda i: {
        "prompt": asked[i],
        "responses": [{"text": "the soup is good .", "score": rng.random(), "policy": "a"}] * 2,
    }
    sound.write_text("".join(json.dumps(plain(i)) + "\n" for i in range(20)))
    while tried < count:
        some = [plain(i) for i in range(6)] + [odd_row(rng) for _ in range(rng.randint(0, 3))]
        rng.shuffle(some)
        text = "".join(json.dumps(row) + "\n" for row in some)
        if rng.random() < 0.1:  # a file that is broken as a whole
            text = rng.choice(
                ["", "\n", "{", "[]", "null", "3", "[" * 5000, text[: len(text) // 2], text.replace("\n", "")]
            )
        odd.write_text(text, errors="surrogatepass")
        for name, calls in called.items():
            words = [str(x) for x in rng.choice(calls)]
            tried += len(some)
            try:
                with contextlib.redirect_stderr(io.StringIO()) as said_to, contextlib.redirect_stdout(io.StringIO()):
                    modules[name].main(words)
                ended_well += 1
            except SystemExit as ended:
                if ended.code != 2 or "Traceback" in said_to.getvalue():
                    print(f"     {name}: exit code {ended.code}: {said_to.getvalue()[-200:]}", flush=True)
                    continue
            except BaseException as error:
                print(f"     {name} {words[0]}: {type(error).__name__}: {str(error)[:200]}", flush=True)
                shutil.copy(odd, folder / f"{name}-{type(error).__name__}.jsonl")
                continue
            good += len(some)
    said("odd rows in eval programs without a traceback", good, tried, more=f" ({ended_well} calls came to a result)")


def long_run(home: Path, folder: Path, steps: int):
    """Memory and open files of dvpo.py after a tenth of its steps and at its end."""
    seen, module = [], tiny.SCRIPTS["dvpo"]
    log = module.Run.log

    def watched(self, metrics):
        log(self, metrics)
        if self.step in (steps // 10, steps):
            seen.append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, len(os.listdir("/proc/self/fd"))))

    module.Run.log = watched
    began = time.time()
    tiny.run(home, "dvpo", folder / "long", steps=steps, rollout_batch_size=6, batch_size=6)
    module.Run.log = log
    (memory, files), (memory_then, files_then) = seen
    flat = memory_then < memory * 1.05 + 20 and files_then <= files
    said(f"{steps} steps of DVPO in flat memory", int(flat), 1,
         more=f" ({memory:.0f} -> {memory_then:.0f} MB, {files} -> {files_then} files, {time.time() - began:.0f} s)")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kills", type=int, default=10**6, help="at most so many for a script; default: one at each of its calls"
    )
    parser.add_argument("--rows", type=int, default=10000)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    folder = Path(tempfile.mkdtemp())
    make = type("Factory", (), {"mktemp": staticmethod(lambda x: (folder / x).mkdir() or folder / x)})
    home = tiny.home.__wrapped__(make)
    kills(home, folder, args.kills)
    signals_and_full_disks(home, folder, min(args.kills, 6))
    told()
    rows(folder, args.rows)
    programs(home, folder, args.rows)
    long_run(home, folder, args.steps)
    if not BAD:  # what failed can be looked at
        shutil.rmtree(folder)
    if vars(args) == vars(parser.parse_args([])):  # the whole of it, which docs/faults.md shows
        (Path(__file__).resolve().parent.parent / "bench" / "results" / "chaos.txt").write_text("\n".join(LINES) + "\n")
    print("all is well" if not BAD else f"{BAD} tests failed: see {folder}")
    raise SystemExit(bool(BAD))


if __name__ == "__main__":
    main()
