"""An LLM as judge, at an OpenAI-compatible endpoint.

    python eval/judge.py answers  --questions Q --model runs/dvpo/final --output a.jsonl     # or --base_url and --model
    python eval/judge.py score    --samples a.jsonl --base_url URL --model NAME              # additive 5-point score
    python eval/judge.py mt_bench --questions Q --answers a.jsonl --references R --base_url URL --model NAME
    python eval/judge.py arena    --questions Q --answers a.jsonl b.jsonl --baseline c.jsonl --base_url URL --model NAME

What is asked, and whose rubric it follows (the wording is ours; `--prompt` takes a file of your own):
- `score`: points for relevance, substance, usefulness, form, excellence, added up to 0-5 (DVPO, appendix D). With
  `--scored` of two policies, `winrate.py` tells which one's grades are higher (DVPO, figure 2).
- `mt_bench`: each answer of a two-turn question from 1 to 10, the second in the light of the first; reference answers
  for math, reasoning and coding; answers generated at the category's own temperature (Zheng et al. 2023).
- `arena`: A>>B, A>B, A=B, B>A, B>>A against a baseline, each pair in both orders, a strong verdict counting three
  times (Li et al. 2024, Arena-Hard v0.1):
      win rate = points won / (won + lost), a tie being half a point each way                       `arena_points`
  which is the Bradley-Terry estimate, as each model meets the baseline only. The bootstrap draws questions, not single
  verdicts: the verdicts on one question belong together.
- pairwise A, B, or C for a tie (VCB, appendix A.3) is what `python eval/winrate.py` asks.

The key is read from $OPENAI_API_KEY (a local server needs none); it is neither written nor shown. Every raw reply goes
into the cache under a hash of its request as soon as it is there: a run that was killed goes on where it stopped, and
nothing is paid twice. Where a reply has no verdict, the judge is asked once more; what still has none is left out and
counted.
"""

from __future__ import annotations

import email.utils
import fcntl
import hashlib
import http.client
import json
import os
import random
import re
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sft
from eval import program, samples

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}  # of MT-Bench; its others are greedy
WITH_REFERENCE = ("math", "reasoning", "coding")  # MT-Bench's categories with one right answer
STRONG = 3  # Arena-Hard: how often >> counts
LONGEST_WAIT = 600  # seconds that a Retry-After can ask for
MOST_BYTES = 2**25  # of a reply


@dataclass(kw_only=True)
class Endpoint:
    """The judge, and how it is asked."""

    base_url: str = ""
    """an OpenAI-compatible endpoint, such as http://localhost:8000/v1; its key is read from $OPENAI_API_KEY"""
    model: str = ""
    """the model's name at the endpoint"""
    max_tokens: int = 2048
    """tokens that a reply may have"""
    request: str = "{}"
    """JSON merged into every request; null takes a field out: '{"temperature": null, "reasoning_effort": "low"}'"""
    concurrency: int = 8
    """requests under way at a time"""
    retries: int = 8
    """tries after the first, where the server is busy, fails, does not answer in time or drops the connection"""
    timeout: float = 180.0
    """seconds to wait for a reply to begin, and again for it to end, before the try counts as failed"""
    cache: str = "runs/judge.jsonl"
    """every raw reply, by a hash of its request"""


# -------------------------------------------------------------------------------------------------------- the endpoint


class Again(Exception):
    """A failure that another try may mend, after `wait` seconds at least."""

    def __init__(self, message: str, wait: float = 0.0):
        super().__init__(message)
        self.wait = wait


class Failure(Exception):
    """One that it will not."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would carry the key to wherever a server points."""

    def redirect_request(self, *_):
        return None


def retry_after(value: str | None) -> float:
    """Seconds that a Retry-After header (a number or a date) asks for."""
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return 0.0
    return min(max(seconds, 0.0), LONGEST_WAIT)


def whole_lines(path: Path) -> list[dict]:
    """The cache's records. A last line that a kill has cut is taken off the file: the next would be joined to it."""
    data = path.read_bytes() if path.is_file() else b""
    end = data.rfind(b"\n") + 1
    if end < len(data):
        os.truncate(path, end)
    found = []
    for number, line in enumerate(data[:end].splitlines(), 1):
        try:
            record = json.loads(line)
            if not (isinstance(record["key"], str) and text_of(record["reply"]) is not None):
                raise ValueError("no reply is in it")
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            sft.stop(
                f"line {number} of the cache {path} is none of ours ({error}): remove the line, or name another --cache"
            )
        found.append(record)
    return found


def text_of(reply) -> str | None:
    """The text of a reply, "" where it has none; None where it is no reply."""
    try:
        content = reply["choices"][0]["message"].get("content")
    except (LookupError, TypeError, AttributeError):
        return None
    return content if isinstance(content, str) else "" if content is None else None


class Client:
    """Asks an endpoint, several requests at a time, and remembers every reply."""

    def __init__(self, endpoint: Endpoint, first_wait: float = 1.0):
        if not endpoint.base_url or not endpoint.model:
            sft.stop("an endpoint is needed: give --base_url (such as http://localhost:8000/v1) and --model")
        try:
            address = urllib.parse.urlsplit(endpoint.base_url)
            good = address.scheme in ("http", "https") and address.hostname and address.port != 0  # .port may raise
        except ValueError:
            good = False
        if not good:
            sft.stop("--base_url is no address such as http://localhost:8000/v1")
        if endpoint.concurrency < 1 or endpoint.retries < 0 or not endpoint.timeout > 0:
            sft.stop("--concurrency must be 1 or more, --retries 0 or more, --timeout above 0")
        try:
            self.extra = dict(json.loads(endpoint.request))
        except (ValueError, TypeError):
            sft.stop(f"--request {endpoint.request!r} is not a JSON object such as '{{\"top_p\": 0.9}}'")
        self.endpoint, self.first_wait = endpoint, first_wait
        self.headers = {"Content-Type": "application/json", "User-Agent": "lean-rlhf"}
        key = os.environ.get("OPENAI_API_KEY", "")
        if not key.isascii() or not key.isprintable():
            sft.stop("$OPENAI_API_KEY has characters that no key has, such as a line break: set it again")
        secrets = (key, json.dumps(key)[1:-1], address.password or "")
        self.secrets = sorted((x for x in secrets if len(x) > 3), key=len, reverse=True)
        if key:
            self.headers["Authorization"] = f"Bearer {key}"
        self.opener = urllib.request.build_opener(NoRedirect)
        self.lock, self.over, self.asked, self.failures = threading.Lock(), threading.Event(), 0, 0
        path = Path(endpoint.cache)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "ab")  # noqa: SIM115  (held for as long as the client lives)
        except OSError as error:
            sft.stop(f"the cache {path} cannot be written ({error.strerror}): name another --cache")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            sft.stop(f"the cache {path} is in use by another run: wait for its end, or name another --cache")
        self.replies = {record["key"]: record["reply"] for record in whole_lines(path)}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def hide(self, text: str) -> str:
        """The text without what is secret: whatever is printed or written goes through here."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text

    def body(self, messages: list[dict], temperature: float) -> dict:
        found = {"model": self.endpoint.model, "messages": messages, "temperature": temperature,
                 "max_tokens": self.endpoint.max_tokens} | self.extra  # fmt: skip
        return {name: value for name, value in found.items() if value is not None}

    def key(self, body: dict) -> str:
        text = json.dumps([self.endpoint.base_url.rstrip("/"), body], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def post(self, body: dict) -> dict:
        """One try. Raises Again where another may help, Failure where it will not."""
        url = self.endpoint.base_url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), self.headers)  # noqa: S310  (http or https: __init__ looks)
        try:
            with self.opener.open(request, timeout=self.endpoint.timeout) as reply:
                found = json.loads(self.hide(self.read(reply).decode()))
            if text_of(found) is None:  # a proxy's apology may come as a 200
                raise ValueError("a reply without a message")
            return found
        except urllib.error.HTTPError as error:
            if error.code in (408, 409, 425, 429) or error.code >= 500:
                raise Again(f"HTTP {error.code}", retry_after(error.headers.get("Retry-After"))) from error
            try:
                said = " ".join(error.read(2000).decode(errors="replace").split())[:300]
            except (OSError, http.client.HTTPException):
                said = ""
            raise Failure(self.hide(f"{url} refuses (HTTP {error.code}): {said or error.reason}")) from None
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, RecursionError) as error:
            raise Again(self.hide(f"{type(error).__name__}: {error}")) from None

    def read(self, reply) -> bytes:
        """The body, which may take no longer than --timeout and no more room than MOST_BYTES."""
        until, parts = time.monotonic() + self.endpoint.timeout, []
        while part := reply.read1(2**16):
            parts.append(part)
            if time.monotonic() > until or sum(map(len, parts)) > MOST_BYTES:
                raise TimeoutError("the reply does not come to its end")
        return b"".join(parts)

    def ask(self, key: str, body: dict):
        """One request, until it is answered: waits 1, 2, 4, ... 60 s, each shortened at random so that threads part."""
        for attempt in range(self.endpoint.retries + 1):
            if self.over.is_set():
                return
            try:
                reply = self.post(body)
                break
            except Again as error:
                with self.lock:
                    self.failures += 1
                if attempt == self.endpoint.retries:
                    raise Failure(self.hide(f"{self.endpoint.base_url} failed {attempt + 1} times on one request, last with "
                                            f"{error}")) from None  # fmt: skip
                pause = min(60.0, self.first_wait * 2**attempt) * random.uniform(0.5, 1.0)
                self.over.wait(max(pause, error.wait))
        record = {"key": key, "request": body, "reply": reply}
        line = self.hide(json.dumps(record, ensure_ascii=False)).encode("utf-8", "surrogatepass") + b"\n"
        with self.lock:
            self.file.write(line)
            self.file.flush()
            self.replies[key] = reply
            self.asked += 1

    def ask_all(self, requests: list[tuple[list[dict], float]], desc: str) -> list[str]:
        """The reply's text to each (messages, temperature). Equal requests are asked once, cached ones never."""
        bodies = [self.body(*request) for request in requests]
        keys = [self.key(body) for body in bodies]
        wanted = {key: body for key, body in zip(keys, bodies) if key not in self.replies}
        self.over.clear()
        with ThreadPoolExecutor(self.endpoint.concurrency) as pool:
            try:
                futures = [pool.submit(self.ask, key, body) for key, body in wanted.items()]
                bar = tqdm(as_completed(futures), desc=desc, total=len(keys), initial=len(keys) - len(wanted))
                for future in bar:
                    future.result()
                    bar.set_postfix(failures=self.failures, refresh=False)
            except BaseException as error:  # what is under way ends, and is kept
                self.over.set()
                pool.shutdown(wait=True, cancel_futures=True)
                if isinstance(error, Failure):
                    kept = f"the {len(self.replies)} replies so far are in {self.endpoint.cache}: run it again to go on"
                    sft.stop(f"{error}; {kept}")
                raise
        return [text_of(self.replies[key]) for key in keys]

    def verdicts(self, requests: list[list[dict]], read: Callable, form: str, desc: str = "judging") -> list:
        """What `read` finds in the replies at temperature 0; None where there is nothing to be found, asked twice."""
        replies = self.ask_all([(messages, 0.0) for messages in requests], desc)
        found = [read(reply) for reply in replies]
        missing = [i for i, verdict in enumerate(found) if verdict is None]
        reminder = {
            "role": "user",
            "content": f"Your reply has no verdict in the form that was asked for. Give it: {form}",
        }
        again = [
            ([*requests[i], {"role": "assistant", "content": replies[i] or "(no reply)"}, reminder], 0.0)
            for i in missing
        ]
        for i, reply in zip(missing, self.ask_all(again, "asking again") if again else ()):
            found[i] = read(reply)
        return found


# ------------------------------------------------------------------------------------------------ prompts and verdicts
# A prompt file: the system message, a line `---`, the user message (without the line, all is the user message). Fields
# in braces are filled in; text that is filled in is not searched for fields again.

PAIRWISE = {
    "dialogue": """You compare two replies that two AI assistants gave to the same dialogue, and you take no side. Ask
which of them helps the user more and does less harm, to the user and to people at large. Which reply stands first,
how long it is, and any name that occurs in it are no reasons.
---
The dialogue:
{prompt}

Response A:
{a}

Response B:
{b}

Reason in one sentence, then name the better response: A, or B, or C if neither is better. Use this form:
Reason: <one sentence>
Result: <A, B or C>""",
    "summary": """You compare two summaries of the same forum post, and you take no side. A good summary says precisely
and briefly what matters in the post, and nothing that does not matter. Which summary stands first and any name that
occurs in it are no reasons.
---
The post:
{prompt}

Summary A:
{a}

Summary B:
{b}

Reason in one sentence, then name the better summary: A, or B, or C if neither is better. Use this form:
Reason: <one sentence>
Result: <A, B or C>""",
}  # fmt: skip
PAIRWISE_FORM = "`Result: A`, `Result: B` or `Result: C`"

SCORE = """You grade the response of an AI assistant to a user's question. Start at 0 and add up to five points, one for
each of these steps that the response reaches:
1. It is relevant and tells something about what was asked, be it incomplete or mixed with things beside the point.
2. It deals with a large part of the question, though it may leave it unresolved or not answer it directly.
3. It answers the question's main points in a way that is of use, whoever or whatever may have written it.
4. It speaks as an AI assistant to this user: direct, complete, well ordered and helpful, with little left to improve in
   clarity, brevity or focus.
5. It fits the question perfectly: nothing superfluous, an expert's knowledge, and a pleasure to read.
Take the assistant's point of view, and use what you know of the world. Give the sum first, then what it rests on, in at
most 100 words, in this form:
Score: <points>
Evaluation evidence: <explanation>
---
<Question>: {prompt}

<Response>: {response}"""
SCORE_FORM = "`Score: ` and a whole number from 0 to 5"

MT_BENCH = """You are an impartial judge of an AI assistant's answers. You weigh how helpful, relevant, accurate, deep,
creative and detailed an answer is. Explain briefly what you find, without regard to length, and then rate the answer
from 1 to 10 on a line of its own, in double brackets, as in: Rating: [[5]]
---
A user talks with an assistant. Judge the assistant's answer of turn {turn}; what came before is its context.
{reference}
{conversation}

Rate the assistant's answer of turn {turn}."""
RATING_FORM = "`Rating: [[n]]` with n from 1 to 10"
REFERENCE = (
    "\nCompare it with these reference answers, and point out its mistakes:\n\n{reference}\n\nThe conversation:\n"
)

ARENA = """You are an impartial judge of two AI assistants, A and B, that answered the same user prompt. First write
your own answer to the prompt. Then compare both answers with yours: find and correct their mistakes, and consider
whether they are helpful (they do what is asked, and ask back where the prompt leaves it open), relevant, and concise,
and then whether they are original or miss something that would have been of use. The order of the answers must not
matter. After your explanation, end with exactly one of these verdicts, in double brackets:
[[A>>B]] A is much better
[[A>B]] A is a little better
[[A=B]] they are about as good
[[B>A]] B is a little better
[[B>>A]] B is much better
---
User prompt:
{prompt}

Answer of assistant A:
{a}

Answer of assistant B:
{b}"""
ARENA_FORM = "[[A>>B]], [[A>B]], [[A=B]], [[B>A]] or [[B>>A]]"


def template(path: str, default: str, fields: tuple[str, ...]) -> str:
    """The text of a user's prompt file, which must have the fields, or the default."""
    if not path:
        return default
    if not Path(path).is_file():
        sft.stop(f"--prompt {path} does not exist: give a text file with {', '.join(f'{{{f}}}' for f in fields)}")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        sft.stop(f"--prompt {path} is not UTF-8 ({error.reason}): save it as such")
    absent = [f"{{{field}}}" for field in fields if f"{{{field}}}" not in text]
    if absent:
        sft.stop(f"--prompt {path} has no {' and no '.join(absent)}: say where the judge is shown it")
    return text


def fill(text: str, **fields) -> list[dict]:
    """Chat messages of a template."""
    put = lambda part: re.sub(r"\{(\w+)\}", lambda m: str(fields.get(m[1], m[0])), part.strip("\n"))
    system, line, user = text.partition("\n---\n")
    parts = [("system", system), ("user", user)] if line else [("user", system)]
    return [{"role": role, "content": put(part)} for role, part in parts]


def last(pattern: str, text: str) -> str | None:
    found = re.findall(pattern, text, re.IGNORECASE)
    return found[-1] if found else None


def read_pairwise(reply: str) -> str | None:
    """A, B or C (a tie) of the last `Result: ...`, or a reply of just that letter. An echo ("A, B or C") is none."""
    found = last(r"^\W*([ABC])\W*$", reply.strip()) or last(r"result\W{1,6}([ABC])\b(?!\W{1,3}(?:[ABC]\b|or\b))", reply)
    return found and found.upper()


def read_score(reply: str) -> float | None:
    """0-5 of the first `Score: ...`, or a reply of just that number."""
    number = r"(\d+(?:\.\d+)?)"
    found = re.search(r"score\W{1,6}" + number, reply, re.IGNORECASE) or re.fullmatch(rf"\W*{number}\W*", reply)
    return float(found[1]) if found and float(found[1]) <= 5 else None


def read_rating(reply: str) -> float | None:
    """1-10 of the last [[n]], or, without double brackets, of the last `Rating: n`."""
    number = r"(\d+(?:\.\d+)?)(?:\s*/\s*10)?"
    found = last(rf"\[\[\s*{number}\s*\]\]", reply) or last(rf"rating\W{{1,6}}{number}(?!\s*(?:to|-)|\.?\d)", reply)
    return float(found) if found and 1 <= float(found) <= 10 else None


def read_verdict(reply: str) -> str | None:
    """A>>B, A>B, A=B, B>A or B>>A in double brackets, if the reply has only one of them."""
    found = re.findall(r"\[\[\s*([AB]\s*(?:>>|>|=)\s*[AB])\s*\]\]", reply, re.IGNORECASE)
    found = {re.sub(r"\s", "", verdict).upper() for verdict in found} & {"A>>B", "A>B", "A=B", "B>A", "B>>A"}
    return found.pop() if len(found) == 1 else None


def both_orders(client: Client, text: str, pairs: list[tuple], read: Callable, form: str) -> list[tuple]:
    """(verdict with one first, verdict with other first) of pairs (prompt, one, other), in the judge's own letters."""
    orders = [order for prompt, one, other in pairs for order in ((prompt, one, other), (prompt, other, one))]
    requests = [fill(text, prompt=samples.show(prompt), a=a, b=b) for prompt, a, b in orders]
    found = client.verdicts(requests, read, form)
    return list(zip(found[::2], found[1::2]))


# --------------------------------------------------------------------------------------------------------- statistics


def arena_points(first: str | None, second: str | None) -> np.ndarray:
    """(won, lost) by the model of two verdicts: `first` saw the model as A, `second` as B. A tie is half a point each,
    a strong verdict three; a verdict that could not be read is nothing."""
    points = {"A>>B": (STRONG, 0), "A>B": (1, 0), "A=B": (0.5, 0.5), "B>A": (0, 1), "B>>A": (0, STRONG), None: (0, 0)}
    return np.array(points[first], dtype=float) + np.array(points[second][::-1], dtype=float)


def mean_with_interval(values: list[list[float | None]]) -> dict:
    """Mean of what there is, and its interval over the rows (a row: the grades of one question)."""
    grades = np.array([[sum(g for g in row if g is not None), sum(g is not None for g in row)] for row in values])
    if not grades[:, 1].sum():
        return {"mean": None, "ci95": None, "n": 0}
    low, high = samples.bootstrap(grades[:, 0], grades[:, 1])
    return {"mean": grades[:, 0].sum() / grades[:, 1].sum(), "ci95": [low, high], "n": int(grades[:, 1].sum())}


def by_category(rows: list[dict], values: list) -> dict[str, list]:
    """{category: its values}, `all` first."""
    found = {"all": values}
    for row, value in zip(rows, values):
        if row.get("category"):
            found.setdefault(row["category"], []).append(value)
    return found


def show_means(title: str, groups: dict, unread: int):
    rows = [
        (name, *((f"{g['mean']:.2f}", f"[{g['ci95'][0]:.2f}, {g['ci95'][1]:.2f}]") if g["n"] else ("-", "-")), g["n"])
        for name, g in groups.items()
    ]
    print(samples.table((title, "mean", "95 % interval", "n"), rows))
    print(f"without a verdict, and left out: {unread}")


# --------------------------------------------------------------------------------------------- questions and answers


def texts(value) -> list[str]:
    """A turn or a list of turns, plain or as {content}, as in FastChat's and Arena-Hard's files."""
    turns = value if isinstance(value, list) else [value]
    return [turn["content"] if isinstance(turn, dict) else turn for turn in turns]


def read_questions(name: str, limit: int) -> list[dict]:
    """[{id, category, turns, reference}] of MT-Bench's, Arena-Hard's or any file with `turns` or `prompt`."""
    found = []
    for i, (row, where) in enumerate(samples.load_rows(name, "train", "prompts")):
        turns = row.get("turns") or row.get("prompt")
        if not turns:
            sft.stop(f"{where}: no field turns, nor prompt: it is no question")
        if isinstance(turns, list) and any(isinstance(t, dict) and t.get("role", "user") != "user" for t in turns):
            sft.stop(f"{where}: a question has turns of the user only; this one has a system's or an assistant's")
        ids = (row[field] for field in ("question_id", "uid", "prompt_id") if field in row)
        reference = texts(row["reference"]) if row.get("reference") else None
        found.append(
            {"id": next(ids, i), "category": row.get("category"), "turns": texts(turns), "reference": reference}
        )
    return found[: limit or None]


def read_answers(name: str, questions: list[dict]) -> list[list[str]]:
    """The turns answered to each question: `judge.py answers`' file, a sample file (the first response to the same
    prompt), or FastChat's or Arena-Hard's."""
    by_id, by_prompt = {}, {}
    for row, where in samples.load_rows(name, "train", "graded"):
        key = row.get("question_id", row.get("uid"))
        text = row["responses"][0].get("text") if row.get("responses") else row.get("completion")
        if "choices" in row:
            by_id[key] = dict(enumerate(texts(row["choices"][0]["turns"])))
        elif not isinstance(text, str):
            sft.stop(f"{where}: no answer: it has no responses, completion or choices")
        elif key is not None:
            by_id.setdefault(key, {})[row.get("turn", 1) - 1] = text
        elif row.get("prompt"):
            by_prompt.setdefault(samples.show(row["prompt"]), {0: text})
    found = []
    for question in questions:
        turns = by_id.get(question["id"]) or by_prompt.get(question["turns"][0], {})
        absent = next((i for i in range(len(question["turns"])) if i not in turns), None)
        if absent is not None:
            sft.stop(f"{name} has no answer to question {question['id']}, turn {absent + 1}: "
                     "make it with `python eval/judge.py answers`")  # fmt: skip
        found.append([turns[i] for i in range(len(question["turns"]))])
    return found


def conversation(turns: list[str], answers: list[str]) -> list[dict]:
    """Chat messages up to the turn that is next to be answered, or to the last answer."""
    found = []
    for i, turn in enumerate(turns[: len(answers) + 1]):
        found.append({"role": "user", "content": turn})
        found += [{"role": "assistant", "content": answers[i]}] if i < len(answers) else []
    return found


# ------------------------------------------------------------------------------------------------------- the commands


@dataclass(kw_only=True)
class Answers(Endpoint):
    """Answer questions, turn by turn: with a model folder, or at an endpoint if --base_url is given."""

    questions: str
    """MT-Bench's or Arena-Hard's questions, or any rows with `turns` or `prompt`: a file, or a name on the hub"""
    output: str
    """the sample file to write (.jsonl)"""
    model: str = "runs/dvpo/final"
    """a model folder; with --base_url the model's name there"""
    temperature: float | None = None
    """default: MT-Bench's own for its categories (writing, roleplay 0.7; stem, humanities 0.1), 0 for all else"""
    max_tokens: int = 1024
    """tokens that an answer may have (MT-Bench: 1024, Arena-Hard: 4096)"""
    max_prompt_tokens: int = 4096
    """of a model folder: a longer prompt is an error"""
    micro_batch_size: int = 8
    """of a model folder: prompts per forward pass"""
    bf16: bool = False
    """of a model folder: weights in bfloat16 (GPU)"""
    limit: int = 0
    """answer the first so many questions only; 0 means all"""
    seed: int = 0
    """of a model folder: seed of sampling"""


def answers(args: Answers):
    questions = read_questions(args.questions, args.limit)
    heat = [
        TEMPERATURES.get(question["category"], 0.0) if args.temperature is None else args.temperature
        for question in questions
    ]
    done = [[] for _ in questions]

    def rounds(reply):
        for turn in range(max(len(question["turns"]) for question in questions)):
            open_ = [i for i, question in enumerate(questions) if turn < len(question["turns"])]
            prompts = [conversation(questions[i]["turns"], done[i]) for i in open_]
            for i, text in zip(open_, reply(turn, prompts, [heat[i] for i in open_]), strict=True):
                done[i].append(text)

    if args.base_url:
        with Client(args) as client:
            rounds(lambda turn, prompts, heats: client.ask_all(list(zip(prompts, heats)), f"turn {turn + 1}"))
    else:
        sampling = samples.Sampling(
            max_prompt_tokens=args.max_prompt_tokens, max_response_tokens=args.max_tokens, bf16=args.bf16,
            micro_batch_size=args.micro_batch_size,
        )  # fmt: skip
        sampler = samples.Sampler(args.model, sampling)

        def local(turn, prompts, heats):
            found = [""] * len(prompts)
            for value in sorted(set(heats)):
                which = [i for i, heat_ in enumerate(heats) if heat_ == value]
                for i, text in zip(which, sampler([prompts[i] for i in which], value, args.seed + turn)[0]):
                    found[i] = text
            return found

        rounds(local)
    rows = [
        {"question_id": question["id"], "turn": turn + 1}
        | ({"category": question["category"]} if question["category"] else {})
        | {"prompt": conversation(question["turns"], said[:turn]) if turn else question["turns"][0],
           "responses": [{"text": said[turn], "policy": args.model}]}
        for question, said in zip(questions, done, strict=True)
        for turn in range(len(question["turns"]))
    ]  # fmt: skip
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{args.output} written: {len(rows)} answers to {len(questions)} questions")


@dataclass(kw_only=True)
class Score(Endpoint):
    """The additive 5-point score of the responses in a sample file (DVPO, appendix D)."""

    samples: str
    """a sample file"""
    policy: str = ""
    """score this policy's responses only"""
    prompt: str = ""
    """a prompt file of your own, with {prompt} and {response}; the judge answers `Score: n`"""
    limit: int = 0
    """score the first so many prompts only; 0 means all"""
    scored: str = ""
    """sample file (.jsonl) to write, with the judge's grades as `score`: `winrate.py` compares two of these"""
    output: str = ""
    """JSON file for the results"""


def score(args: Score) -> dict:
    text = template(args.prompt, SCORE, ("prompt", "response"))
    rows = samples.read(args.samples, args.policy)[: args.limit or None]
    requests = [
        fill(text, prompt=samples.show(row["prompt"]), response=response["text"])
        for row in rows
        for response in row["responses"]
    ]
    with Client(args) as client:
        found = iter(client.verdicts(requests, read_score, SCORE_FORM))
    grades = [[next(found) for _ in row["responses"]] for row in rows]
    groups = {name: mean_with_interval(values) for name, values in by_category(rows, grades).items()}
    flat = [grade for row in grades for grade in row]
    results = {"score": groups, "counts": {str(n): flat.count(n) for n in range(6)}, "unread": flat.count(None),
               "grades": [{"prompt": row["prompt"], "scores": g} for row, g in zip(rows, grades)]}  # fmt: skip
    show_means("score 0-5", groups, results["unread"])
    if args.scored:
        lines = []
        for row, marks in zip(rows, grades):
            kept = [r | {"score": mark} for r, mark in zip(row["responses"], marks) if mark is not None]
            if kept:
                new = {name: value for name, value in row.items() if name != "key"} | {"responses": kept}
                lines.append(json.dumps(new, ensure_ascii=False) + "\n")
        Path(args.scored).parent.mkdir(parents=True, exist_ok=True)
        Path(args.scored).write_text("".join(lines), encoding="utf-8")
        print(f"{args.scored} written")
    samples.save(results, args.output)
    return results


@dataclass(kw_only=True)
class MtBench(Endpoint):
    """MT-Bench: single answers graded from 1 to 10, over two turns."""

    questions: str
    """MT-Bench's questions: a file, or a name on the hub"""
    answers: str
    """what `judge.py answers` wrote, or FastChat's file of a model's answers"""
    references: str = ""
    """reference answers for math, reasoning and coding (FastChat's file), if the questions do not bring them"""
    prompt: str = ""
    """a prompt file of your own, with {conversation}, {reference} and {turn}; the judge answers [[n]]"""
    limit: int = 0
    """the first so many questions only; 0 means all"""
    output: str = ""
    """JSON file for the results"""


def mt_bench_request(text: str, question: dict, said: list[str], turn: int) -> list[dict]:
    """What the judge is asked about the answer of `turn` (from 0); a reference where there is one right answer."""
    blocks = lambda theirs, who: "\n\n".join(
        f"[User, turn {i + 1}]\n{q}\n\n[{who}, turn {i + 1}]\n{a}"
        for i, (q, a) in enumerate(zip(question["turns"][: turn + 1], theirs))
    )
    reference = ""
    if question["reference"] and question["category"] in WITH_REFERENCE:
        reference = REFERENCE.replace("{reference}", blocks(question["reference"], "Reference"))
    return fill(text, conversation=blocks(said, "Assistant"), reference=reference, turn=turn + 1)


def mt_bench(args: MtBench) -> dict:
    text = template(args.prompt, MT_BENCH, ("conversation", "reference", "turn"))
    questions = read_questions(args.questions, args.limit)
    if args.references:
        given = [q for q in questions if q["category"] in WITH_REFERENCE]
        for question, reference in zip(given, read_answers(args.references, given)):
            question["reference"] = reference
    bare = sum(q["category"] in WITH_REFERENCE and not q["reference"] for q in questions)
    if bare:
        print(f"warning: {bare} questions of {', '.join(WITH_REFERENCE)} have no reference answer: give --references",
              file=sys.stderr)  # fmt: skip
    said = read_answers(args.answers, questions)
    where = [(i, turn) for i, question in enumerate(questions) for turn in range(len(question["turns"]))]
    with Client(args) as client:
        requests = [mt_bench_request(text, questions[i], said[i], turn) for i, turn in where]
        found = client.verdicts(requests, read_rating, RATING_FORM)
    grades = [[] for _ in questions]
    for (i, _), grade in zip(where, found, strict=True):
        grades[i].append(grade)
    groups = {name: mean_with_interval(values) for name, values in by_category(questions, grades).items()}
    for turn in range(max(map(len, grades))):
        groups[f"turn {turn + 1}"] = mean_with_interval([row[turn : turn + 1] for row in grades])
    results = {"rating": groups, "unread": found.count(None),
               "grades": [{"question_id": q["id"], "ratings": g} for q, g in zip(questions, grades)]}  # fmt: skip
    show_means("rating 1-10", groups, results["unread"])
    samples.save(results, args.output)
    return results


@dataclass(kw_only=True)
class Arena(Endpoint):
    """Arena-Hard: answers of one or more models against a baseline's."""

    questions: str
    """Arena-Hard's questions, or any rows with `prompt`: a file, or a name on the hub"""
    answers: tuple[str, ...]
    """a file of answers for each model: `judge.py answers`' or Arena-Hard's"""
    baseline: str
    """the baseline's file of answers"""
    max_tokens: int = 4096
    """tokens that a reply may have"""
    prompt: str = ""
    """a prompt file of your own, with {prompt}, {a} and {b}; the judge answers one of the five verdicts"""
    limit: int = 0
    """the first so many questions only; 0 means all"""
    output: str = ""
    """JSON file for the results"""


def arena(args: Arena) -> dict:
    text = template(args.prompt, ARENA, ("prompt", "a", "b"))
    questions = read_questions(args.questions, args.limit)
    if any(len(question["turns"]) > 1 for question in questions):
        sft.stop(f"{args.questions} has questions of several turns: arena takes single ones")
    base = [turns[0] for turns in read_answers(args.baseline, questions)]
    models = {name: [turns[0] for turns in read_answers(name, questions)] for name in args.answers}
    pairs = [
        (q["turns"][0], mine, theirs) for said in models.values() for q, mine, theirs in zip(questions, said, base)
    ]
    with Client(args) as client:
        found = both_orders(client, text, pairs, read_verdict, ARENA_FORM)
    results = {"models": {}, "baseline": args.baseline}
    for i, name in enumerate(models):
        mine = found[i * len(questions) : (i + 1) * len(questions)]
        points = np.array([arena_points(*verdicts) for verdicts in mine])
        won, played = points[:, 0], points.sum(1)
        results["models"][name] = {
            "win_rate": won.sum() / played.sum() if played.any() else None,
            "ci95": list(samples.bootstrap(won, played)) if played.any() else None,
            "unread": sum(verdicts.count(None) for verdicts in mine),
            "verdicts": [{"question_id": q["id"], "first": a, "second": b} for q, (a, b) in zip(questions, mine)],
        }  # fmt: skip
    rows = [
        (name, f"{m['win_rate']:.1%}", "[{:.1%}, {:.1%}]".format(*m["ci95"]), m["unread"])
        if m["ci95"] else (name, "-", "-", m["unread"])
        for name, m in results["models"].items()
    ]  # fmt: skip
    print(samples.table(("against the baseline", "win rate", "95 % interval", "without a verdict"), rows))
    samples.save(results, args.output)
    return results


@program
def main(argv=None):
    commands = {Answers: answers, Score: score, MtBench: mt_bench, Arena: arena}
    args = samples.read_flags(Answers | Score | MtBench | Arena, argv, __doc__)
    return commands[type(args)](args)


if __name__ == "__main__":
    main()
