"""The LLM judge: reading verdicts, the benchmarks, and an endpoint that is slow, busy, broken and wrong."""

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from eval import judge, samples, winrate

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("LEAN_RLHF_DATA", ROOT / "data"))
KEY = "sk-not-to-be-seen"


# ------------------------------------------------------------------------------------------------------------- a server


class Stub:
    """An endpoint in a thread. `answer(body, attempt)` gives a text, or a fault; attempts count equal bodies."""

    def __init__(self, answer):
        stub = self
        self.answer, self.lock, self.asked, self.served, self.attempts = answer, threading.Lock(), [], [], {}

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                body = json.loads(raw)
                with stub.lock:
                    stub.asked.append((time.time(), raw, self.headers.get("Authorization")))
                    attempt = stub.attempts[raw] = stub.attempts.get(raw, 0) + 1
                said = stub.answer(body, attempt)
                if callable(said):
                    return said(self)
                reply = {"choices": [{"message": {"role": "assistant", "content": said}}]}
                try:
                    respond(self, 200, json.dumps(reply))
                except OSError:  # the client has gone
                    return
                with stub.lock:
                    stub.served.append(raw)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def respond(handler, code, text, promised=None, **headers):
    handler.send_response(code)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(promised or len(text.encode())))
    handler.end_headers()
    handler.wfile.write(text.encode())


def drop(handler):
    handler.close_connection = True
    handler.connection.close()


def slow(handler):
    time.sleep(0.8)
    drop(handler)


FAULTS = (
    lambda h: respond(h, 429, "busy", Retry_After="0.2"),
    lambda h: respond(h, 500, "oops"),
    lambda h: respond(h, 503, "<html>"),
    lambda h: respond(h, 200, "<html>we are sorry</html>"),
    lambda h: respond(h, 200, '{"error": "no choices"}'),
    lambda h: respond(h, 200, '{"choices": [{"message": null}]}'),
    lambda h: respond(h, 200, '{"choices": [', promised=400),
    drop,
    slow,
)


def client(stub, tmp_path, **changes):
    settings = {
        "base_url": stub.url,
        "model": "m",
        "cache": str(tmp_path / "cache.jsonl"),
        "timeout": 0.4,
        "retries": 4,
    }
    return judge.Client(judge.Endpoint(**(settings | changes)), first_wait=0.01)


def asked(text):
    return [{"role": "user", "content": text}]


def stopped(capsys, call, *words):
    with pytest.raises(SystemExit) as error:
        call()
    said = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.value.code == 2 and said.startswith("error: ")
    for word in words:
        assert word in said, said
    return said


def test_no_reply_is_lost_and_none_is_paid_twice(tmp_path):
    """Each request fails in its own way, twice, before it is answered."""

    def answer(body, attempt):
        number = int(body["messages"][0]["content"])
        return FAULTS[(number + attempt) % len(FAULTS)] if attempt < 3 else f"reply {number}"

    requests = [(asked(str(i % 27)), 0.0) for i in range(30)]  # three of them twice
    with Stub(answer) as stub:
        with client(stub, tmp_path) as one:
            assert one.ask_all(requests, "") == [f"reply {i % 27}" for i in range(30)]
        assert len(stub.served) == len(set(stub.served)) == 27 and len(stub.asked) == 3 * 27
        lines = [json.loads(line) for line in (tmp_path / "cache.jsonl").read_text().splitlines()]
        assert len(lines) == 27 and all("choices" in line["reply"] for line in lines)
        with client(stub, tmp_path) as one:
            assert one.ask_all(requests, "") == [f"reply {i % 27}" for i in range(30)]
        assert len(stub.asked) == 3 * 27


def test_retry_after(tmp_path):
    with Stub(lambda body, attempt: FAULTS[0] if attempt == 1 else "x") as stub, client(stub, tmp_path) as one:
        one.ask_all([(asked("q"), 0.0)], "")
        assert stub.asked[1][0] - stub.asked[0][0] >= 0.2
    assert judge.retry_after("3") == 3 and judge.retry_after(None) == judge.retry_after("soon") == 0
    assert 8 < judge.retry_after(formatdate(time.time() + 10, usegmt=True)) <= 10
    assert judge.retry_after("-1") == 0 and judge.retry_after("1e9") == judge.LONGEST_WAIT


def test_what_cannot_be_mended_stops_with_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    echo = lambda h: respond(h, 401, f"wrong key {h.headers['Authorization']}")
    with Stub(lambda *_: echo) as stub, client(stub, tmp_path) as one:
        said = stopped(capsys, lambda: one.ask_all([(asked(str(i)), 0.0) for i in range(9)], ""), "401", "***")
        assert KEY not in said and stub.asked[0][2] == f"Bearer {KEY}"
    with Stub(lambda *_: FAULTS[1]) as stub, client(stub, tmp_path, retries=2, concurrency=1) as one:
        stopped(capsys, lambda: one.ask_all([(asked("q"), 0.0)], ""), "failed 3 times", "HTTP 500", "run it again")
        assert len(stub.asked) == 3
    elsewhere = Stub(lambda *_: "stolen")
    with elsewhere, Stub(lambda *_: lambda h: respond(h, 307, "", Location=elsewhere.url)) as stub:
        with client(stub, tmp_path) as one:
            stopped(capsys, lambda: one.ask_all([(asked("q"), 0.0)], ""), "307")
        assert not elsewhere.asked
    with Stub(lambda *_: "fine") as stub, client(stub, tmp_path) as one:
        one.ask_all([(asked("q"), 0.0)], "")
        stopped(capsys, lambda: client(stub, tmp_path), "in use by another run")
    assert KEY not in (tmp_path / "cache.jsonl").read_text()
    stopped(capsys, lambda: judge.Client(judge.Endpoint(model="m")), "--base_url")
    for url in ("x/v1", "ftp://x", "http://", "http://[x", "http://localhost:80a0/v1", "http://x:99999"):
        stopped(
            capsys, lambda url=url: judge.Client(judge.Endpoint(model="m", base_url=url)), "--base_url is no address"
        )
    stopped(capsys, lambda: judge.Client(judge.Endpoint(model="m", base_url="http://x", request="[1]")), "--request")


def test_requests_can_be_changed(tmp_path):
    with Stub(lambda *_: "x") as stub:
        with client(stub, tmp_path, request='{"temperature": null, "max_tokens": null, "top_p": 0.5}') as one:
            one.ask_all([(asked("q"), 0.7)], "")
        body = json.loads(stub.asked[0][1])
    assert body == {"model": "m", "messages": asked("q"), "top_p": 0.5} and stub.asked[0][2] is None


def test_a_cut_last_line_of_the_cache(tmp_path, capsys):
    cache = tmp_path / "cache.jsonl"
    with Stub(lambda body, _: body["messages"][0]["content"] * 2) as stub:
        requests = [(asked(text), 0.0) for text in ("a", "é\u2028", "c")]
        with client(stub, tmp_path, concurrency=1) as one:
            one.ask_all(requests, "")
        whole = cache.read_bytes()
        cache.write_bytes(whole[:-20])
        with client(stub, tmp_path) as one:
            assert one.ask_all(requests, "") == ["aa", "é\u2028é\u2028", "cc"]
        assert len(stub.asked) == 4 and cache.read_bytes() == whole
        cache.write_bytes(b"{broken\n" + whole)
        stopped(capsys, lambda: client(stub, tmp_path), "none of ours")


def test_killed_and_resumed(tmp_path, capsys):
    rows = [{"prompt": f"question {i}", "responses": [{"text": f"answer {i}"}]} for i in range(60)]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def answer(body, _):
        time.sleep(0.05)
        return f"Score: {int(body['messages'][-1]['content'].split()[-1]) % 6}"

    with Stub(answer) as stub:
        cache = tmp_path / "cache.jsonl"
        flags = ["score", "--samples", str(tmp_path / "s.jsonl"), "--base_url", stub.url, "--model", "m", "--cache",
                 str(cache), "--concurrency", "2", "--output", str(tmp_path / "out.json"), "--scored",
                 str(tmp_path / "graded.jsonl")]  # fmt: skip
        run = subprocess.Popen([sys.executable, str(ROOT / "eval" / "judge.py"), *flags], stdout=subprocess.DEVNULL)
        deadline = time.time() + 60
        while not (cache.is_file() and cache.read_bytes().count(b"\n") >= 10) and time.time() < deadline:
            time.sleep(0.01)
        run.kill()
        run.wait()
        kept = [json.loads(line)["request"] for line in cache.read_bytes().split(b"\n")[:-1]]
        time.sleep(0.2)
        before = len(stub.asked)
        assert 10 <= len(kept) < 60 and not (tmp_path / "out.json").exists()
        judge.main(flags)
        later = [json.loads(raw) for _, raw, _ in stub.asked[before:]]
        assert len(later) == 60 - len(kept) and not [body for body in later if body in kept]
        found = json.loads((tmp_path / "out.json").read_text())
        graded = samples.read(str(tmp_path / "graded.jsonl"))
        assert [row["responses"][0]["score"] for row in graded] == [i % 6 for i in range(60)]
        assert found["score"]["all"]["mean"] == pytest.approx(2.5) and found["counts"] == dict.fromkeys("012345", 10)
        judge.main(flags)
        assert len(stub.asked) == before + 60 - len(kept)
    assert "2.50" in capsys.readouterr().out


def test_a_reply_without_a_verdict_is_asked_once_more(tmp_path):
    def answer(body, _):
        number = int(body["messages"][0]["content"])
        again = len(body["messages"]) == 3
        return "Score: 3" if number == 0 or (again and number == 1) else "hm" if number < 3 else None

    with Stub(answer) as stub, client(stub, tmp_path) as one:
        found = one.verdicts([asked(str(i)) for i in range(4)], judge.read_score, judge.SCORE_FORM)
        assert found == [3, 3, None, None] and len(stub.asked) == 4 + 3
        again = [json.loads(raw)["messages"] for _, raw, _ in stub.asked[4:]]
        assert all([m["role"] for m in messages] == ["user", "assistant", "user"] for messages in again)
    assert judge.mean_with_interval([[3.0], [3.0], [None], [None]])["n"] == 2
    assert judge.mean_with_interval([[None]]) == {"mean": None, "ci95": None, "n": 0}


# ----------------------------------------------------------------------------------------------------- reading verdicts


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("Reason: short.\nResult: A", "A"),
        ("**Result:** B", "B"),
        ("Result: [[C]].", "C"),
        ("result - b", "B"),
        ("Result: A\nNo, wait.\nResult: B", "B"),
        ("Result: <A, B or C>", None),
        ("Result: A or B or C", None),
        (" **c**.", "C"),
        ("A: yes", None),
        ("Results vary", None),
        ("Result: Both", None),
        ("", None),
    ],
)
def test_read_pairwise(reply, found):
    assert judge.read_pairwise(reply) == found


@pytest.mark.parametrize(
    ("reply", "found"),
    [("Score: 4\nEvaluation evidence: 2 of 5", 4), ("**Score:** 3/5", 3), ("Total score: 0", 0), ("Score: 4.5", 4.5),
     ("Score: 9", None), ("I score this", None), (" **5**.", 5), ("5 points of note", None)],
)  # fmt: skip
def test_read_score(reply, found):
    assert judge.read_score(reply) == found


@pytest.mark.parametrize(
    ("reply", "found"),
    [("Rating: [[7]]", 7), ("[[2]] no: [[8.5]]", 8.5), ("[[10/10]]", 10), ("[[11]]", None), ("[[0]]", None),
     ("Rating: [5]", 5), ("**Rating**: 8/10.", 8), ("a rating: 1 to 10", None), ("Rating: 5, no: [[6]]", 6),
     ("see [3]", None), ("[[n]]", None), ("Rating: 8.", 8), ("Rating: 8.5 to 9", None), ("rating: 10-12", None)],
)  # fmt: skip
def test_read_rating(reply, found):
    assert judge.read_rating(reply) == found


@pytest.mark.parametrize(
    ("reply", "found"),
    [("so [[A>>B]]", "A>>B"), ("[[ b > a ]]", "B>A"), ("[[A=B]] again: [[A=B]]", "A=B"), ("[[A>B]] or [[B>A]]", None),
     ("[[A>A]]", None), ("A>B", None), ("[[A>>>B]]", None)],
)  # fmt: skip
def test_read_verdict(reply, found):
    assert judge.read_verdict(reply) == found


def test_the_prompts_forms_can_be_read():
    """What a judge is told to write is what is read, and an echo of the instruction is nothing."""
    for text, read, form in ((judge.PAIRWISE["dialogue"], judge.read_pairwise, "Result: C"),
                             (judge.PAIRWISE["summary"], judge.read_pairwise, "Result: A"),
                             (judge.SCORE, judge.read_score, "Score: 5"), (judge.MT_BENCH, judge.read_rating, "[[9]]"),
                             (judge.ARENA, judge.read_verdict, "[[B>>A]]")):  # fmt: skip
        assert read(form) is not None
        assert read(text) is None or text is judge.MT_BENCH  # which shows an example


def test_fill():
    system, user = judge.fill("be fair\n---\nQ {prompt}\nA {a} {unknown}", prompt="{a}\n---\nx", a="\\1 {prompt}")
    assert system == {"role": "system", "content": "be fair"}
    assert user == {"role": "user", "content": "Q {a}\n---\nx\nA \\1 {prompt} {unknown}"}
    assert judge.fill("{x}", x=1) == asked("1")


def test_prompt_file(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("rate {prompt}")
    stopped(capsys, lambda: judge.template(str(tmp_path / "p.txt"), "", ("prompt", "a")), "{a}")
    stopped(capsys, lambda: judge.template(str(tmp_path / "q.txt"), "", ("prompt",)), "does not exist")
    assert judge.template(str(tmp_path / "p.txt"), "", ("prompt",)) == "rate {prompt}"
    assert judge.template("", "default", ("prompt",)) == "default"
    (tmp_path / "p.txt").write_text("évaluez {prompt}", encoding="latin-1")
    stopped(capsys, lambda: judge.template(str(tmp_path / "p.txt"), "", ("prompt",)), "not UTF-8")


# ----------------------------------------------------------------------------------------------------- the benchmarks


def test_arena_points():
    assert judge.arena_points("A>>B", "B>>A").tolist() == [6, 0]  # the model strongly better, from both places
    assert judge.arena_points("A>>B", "A>>B").tolist() == [3, 3]  # the first place strongly better
    assert judge.arena_points("A=B", "A>B").tolist() == [0.5, 1.5]
    assert judge.arena_points(None, "B>A").tolist() == [1, 0] and judge.arena_points(None, None).tolist() == [0, 0]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["write a poem", "make it shorter"]},
    {"question_id": 111, "category": "math", "turns": ["what is 1 + 1", "and 2 + 2"]},
    {"question_id": 141, "category": "stem", "turns": ["why is the sky blue", "and at night"]},
]
REFERENCES = [{"question_id": 111, "model_id": "gpt-4", "choices": [{"index": 0, "turns": ["REF two", "REF four"]}]}]


def test_mt_bench(tmp_path, capsys):
    questions, references = write(tmp_path / "q.jsonl", QUESTIONS), write(tmp_path / "r.jsonl", REFERENCES)
    with Stub(lambda body, _: f"answer to {body['messages'][-1]['content']}") as stub:
        judge.main(["answers", "--questions", questions, "--base_url", stub.url, "--model", "policy", "--output",
                    str(tmp_path / "a.jsonl"), "--cache", str(tmp_path / "c.jsonl")])  # fmt: skip
        heat = {tuple(m["content"] for m in body["messages"]): body["temperature"]
                for body in (json.loads(raw) for _, raw, _ in stub.asked)}  # fmt: skip
    assert heat[("write a poem",)] == 0.7 and heat[("what is 1 + 1",)] == 0.0 and heat[("why is the sky blue",)] == 0.1
    assert heat[("write a poem", "answer to write a poem", "make it shorter")] == 0.7 and len(heat) == 6
    said = judge.read_answers(str(tmp_path / "a.jsonl"), judge.read_questions(questions, 0))
    assert said[0] == ["answer to write a poem", "answer to make it shorter"]
    assert samples.read(str(tmp_path / "a.jsonl"))[1]["category"] == "writing"  # a sample file like any other

    def rate(body, _):  # turn 1: 8, turn 2: 4; math gets one less, and its last answer no rating at all
        text = body["messages"][1]["content"]
        second, math = "turn of 2" in text or "answer of turn 2" in text, "1 + 1" in text
        assert ("REF" in text) == math and ("REF four" in text) == (math and second)
        assert ("[Assistant, turn 2]" in text) == second
        return "none" if second and math else f"[[{(4 if second else 8) - math}]]"

    with Stub(rate) as stub:
        found = judge.main(["mt_bench", "--questions", questions, "--answers", str(tmp_path / "a.jsonl"), "--base_url",
                            stub.url, "--references", references, "--model", "j", "--cache",
                            str(tmp_path / "c.jsonl")])  # fmt: skip
    rating = found["rating"]
    assert found["unread"] == 1 and rating["all"]["n"] == 5 and rating["all"]["mean"] == pytest.approx(31 / 5)
    assert rating["math"]["mean"] == 7 and rating["writing"]["mean"] == 6
    assert rating["turn 1"]["mean"] == pytest.approx(23 / 3) and rating["turn 2"]["mean"] == 4
    assert "6.20" in capsys.readouterr().out
    chat = [{"prompt": [{"role": "user", "content": "write a poem"}], "responses": [{"text": "x"}, {"text": "y"}]}]
    one = [{"id": 1, "turns": ["write a poem"]}]
    again = {"prompt": "write a poem", "completion": "z"}  # of several answers to one prompt the first counts
    assert judge.read_answers(write(tmp_path / "chat.jsonl", [*chat, again]), one) == [["x"]]
    dialogue = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    ask = write(tmp_path / "dialogue.jsonl", [{"prompt": [*dialogue, {"role": "user", "content": "bye"}]}])
    stopped(capsys, lambda: judge.read_questions(ask, 0), "row 1", "of the user only")
    rows = [{"question_id": q["question_id"], "choices": [{"turns": ["x", "y"]}]} for q in QUESTIONS[:2]]
    fastchat = write(tmp_path / "f.jsonl", rows)
    assert judge.read_answers(fastchat, judge.read_questions(questions, 2)) == [["x", "y"]] * 2
    stopped(capsys, lambda: judge.read_answers(fastchat, judge.read_questions(questions, 0)), "question 141, turn 1")


def test_arena(tmp_path, capsys):
    """Answers are numbers; the judge calls a gap of 3 or more strong, and has a weakness for the first place."""
    rows = [{"uid": f"u{i}", "category": "arena", "prompt": f"question {i}"} for i in range(12)]
    worth = np.random.default_rng(0).integers(0, 8, (3, 12)).tolist()
    questions = write(tmp_path / "q.jsonl", rows)
    files = [write(tmp_path / f"{name}.jsonl", [row | {"responses": [{"text": f"[{w}]"}]} for row, w in zip(rows, ws)])
             for name, ws in zip(("base", "one", "two"), worth)]  # fmt: skip

    def verdict(a, b):
        gap = a - b + 1
        return (
            "A=B"
            if gap == 0
            else ("A" if gap > 0 else "B") + (">>" if abs(gap) >= 3 else ">") + ("B" if gap > 0 else "A")
        )

    def answer(body, _):
        a, b = (int(x.split("]")[0]) for x in body["messages"][1]["content"].split("[")[1:3])
        return f"I compare. [[{verdict(a, b)}]]"

    with Stub(answer) as stub:
        found = judge.main(["arena", "--questions", questions, "--answers", *files[1:], "--baseline", files[0],
                            "--base_url", stub.url, "--model", "j", "--cache", str(tmp_path / "c.jsonl")])  # fmt: skip
        assert len(stub.served) <= 2 * 2 * 12
    for name, mine in zip(files[1:], worth[1:]):
        won = lost = 0.0
        for m, b in zip(mine, worth[0]):
            for gap in (m - b + 1, m - b - 1):  # the model first, the model second
                weight = 3 if abs(gap) >= 3 else 1
                won += 0.5 if gap == 0 else weight * (gap > 0)
                lost += 0.5 if gap == 0 else weight * (gap < 0)
        result = found["models"][name]
        assert result["win_rate"] == pytest.approx(won / (won + lost)) and result["unread"] == 0
        assert result["ci95"][0] < result["win_rate"] < result["ci95"][1]
    assert "95 % interval" in capsys.readouterr().out
    with Stub(lambda *_: "hm") as stub:
        found = judge.main(["arena", "--questions", questions, "--answers", files[1], "--baseline", files[0],
                            "--base_url", stub.url, "--model", "j", "--cache", str(tmp_path / "c.jsonl")])  # fmt: skip
    (result,) = found["models"].values()
    assert result["win_rate"] is result["ci95"] is None and result["unread"] == 24


def test_a_position_bias_cancels(tmp_path):
    """In a third of the pairs the judge takes the first response whatever it says. Both orders, averaged, are fair to
    both sides: swapping a and b mirrors the result."""
    rng = np.random.default_rng(0)
    worth = rng.permutation(200).reshape(100, 2)
    write(tmp_path / "a.jsonl", [{"prompt": f"q{i}", "completion": f"<{a}>"} for i, (a, _) in enumerate(worth)])
    write(tmp_path / "b.jsonl", [{"prompt": f"q{i}", "completion": f"<{b}>"} for i, (_, b) in enumerate(worth)])

    def answer(body, _):
        a, b = (int(x.split(">")[0]) for x in body["messages"][1]["content"].split("<")[1:3])
        return f"Result: {'A' if (a + b) % 3 == 0 or a > b else 'B'}"

    with Stub(answer) as stub:
        common = ["--base_url", stub.url, "--model", "j", "--cache", str(tmp_path / "c.jsonl")]
        one, other = (
            winrate.main(["--a", str(tmp_path / f"{x}.jsonl"), "--b", str(tmp_path / f"{y}.jsonl"), *common])
            for x, y in ("ab", "ba")
        )
        assert len(stub.asked) == 200  # the second run asks what the first one did
    biased, better = worth.sum(1) % 3 == 0, worth[:, 0] > worth[:, 1]
    rate = one["groups"]["all"]["win_rate"]["mean"]
    assert rate == pytest.approx(np.where(biased, 0.5, better).mean())
    assert other["groups"]["all"]["win_rate"]["mean"] == pytest.approx(1 - rate)
    assert one["agree"] == pytest.approx(1 - biased.mean())
    assert one["first_place"] == pytest.approx(np.where(biased, 1, 0.5).mean())


# ------------------------------------------------------------------------------------------------------- the real files


@pytest.mark.skipif(not (DATA / "mt_bench_question.jsonl").is_file(), reason="no real data here")
def test_real_questions():
    questions = judge.read_questions(str(DATA / "mt_bench_question.jsonl"), 0)
    assert len(questions) == 80 and {len(q["turns"]) for q in questions} == {2}
    hard = [q for q in questions if q["category"] in judge.WITH_REFERENCE]
    references = judge.read_answers(str(DATA / "mt_bench_reference_gpt4.jsonl"), hard)
    assert len(references) == 30 and all(len(turns) == 2 for turns in references)
    heat = [judge.TEMPERATURES.get(q["category"], 0.0) for q in questions]
    assert [heat.count(t) for t in (0.7, 0.1, 0.0)] == [20, 20, 40]
    arena = judge.read_questions(str(DATA / "arena_hard_v0.1_question.jsonl"), 0)
    assert len(arena) == len({q["id"] for q in arena}) == 500 and all(len(q["turns"]) == 1 for q in arena)


# ---------------------------------------------------------------------------------------------- hostile, odd, and secret


def test_a_secret_is_nowhere_to_be_read(tmp_path, monkeypatch, capfd):
    """An endpoint that sends the key back: in its reply, its reason, its headers; and a password in the address."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    echo = lambda h: respond(h, 200, json.dumps({"choices": [{"message": {"content": f"A, {KEY}"}}], "you": KEY}))
    with Stub(lambda *_: echo) as stub, client(stub, tmp_path) as one:
        assert one.ask_all([(asked("x"), 0.0)], "") == ["A, ***"]

    def reason(handler):
        handler.send_response(400, f"no {KEY}")
        handler.end_headers()

    for fault in (reason, lambda h: respond(h, 400, f"what is {KEY}?"), lambda h: respond(h, 200, f'{{"{KEY}": ')):
        with (
            Stub(lambda *_, fault=fault: fault) as stub,
            client(stub, tmp_path, retries=0) as one,
            pytest.raises(SystemExit),
        ):
            one.ask_all([(asked("y"), 0.0)], "")
    address = "http://user:hunter-two@127.0.0.1:9/v1"
    settings = judge.Endpoint(base_url=address, model="m", cache=str(tmp_path / "other"), retries=0, timeout=0.4)
    with judge.Client(settings) as one, pytest.raises(SystemExit):
        one.ask_all([(asked("z"), 0.0)], "")
    said = "".join(capfd.readouterr()) + "".join(path.read_text() for path in tmp_path.iterdir())
    assert "***" in said and KEY not in said and "hunter" not in said


@pytest.mark.parametrize("key", ["sk-1\nX-Evil: 1", "sk-\x7f", "sk-\u00e9\u2028"])
def test_a_key_that_is_none_is_refused_unseen(tmp_path, monkeypatch, capsys, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    said = stopped(
        capsys, lambda: judge.Client(judge.Endpoint(base_url="http://h/v1", model="m", cache=str(tmp_path / "c")))
    )
    assert "$OPENAI_API_KEY" in said and "sk-" not in said


@pytest.mark.parametrize("content", [7, ["A"], {"text": "A"}, True])
def test_what_is_no_text_is_not_kept(tmp_path, content):
    odd = lambda h: respond(h, 200, json.dumps({"choices": [{"message": {"content": content}}]}))
    with Stub(lambda body, attempt: odd if attempt == 1 else "A") as stub, client(stub, tmp_path) as one:
        assert one.ask_all([(asked("x"), 0.0)], "") == ["A"]
    assert len((tmp_path / "cache.jsonl").read_text().splitlines()) == 1


def test_a_reply_that_drips_or_never_ends_is_given_up(tmp_path, monkeypatch, capsys):
    def drip(handler):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b" ")
            time.sleep(0.1)

    def flood(handler):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b" " * 2**16)

    monkeypatch.setattr(judge, "MOST_BYTES", 2**18)
    for fault in (drip, flood):
        with Stub(lambda *_, fault=fault: fault) as stub, client(stub, tmp_path, retries=1) as one:
            began = time.time()
            stopped(capsys, lambda one=one: one.ask_all([(asked("x"), 0.0)], ""), "does not come to its end")
            assert time.time() - began < 5


def test_settings_and_caches_that_cannot_be_used(tmp_path, capsys):
    begin = lambda **changes: judge.Client(judge.Endpoint(**{"base_url": "http://h/v1", "model": "m"} | changes))
    (tmp_path / "folder").mkdir()
    for changes in ({"concurrency": 0}, {"retries": -1}, {"timeout": 0.0}, {"timeout": float("nan")}):
        stopped(capsys, lambda changes=changes: begin(cache=str(tmp_path / "c"), **changes), "--concurrency")
    stopped(capsys, lambda: begin(cache=str(tmp_path / "folder")), "cannot be written")
    for i, line in enumerate(
        (
            "[1]",
            '{"key": 1}',
            '{"key": "a", "reply": {"choices": [{"message": {"content": 5}}]}}',
            "no json",
            "[" * 10**5,
        )
    ):
        foreign = tmp_path / f"foreign{i}"
        foreign.write_text(line + "\n")
        stopped(capsys, lambda foreign=foreign: begin(cache=str(foreign)), "line 1 of the cache")
        assert foreign.read_text() == line + "\n"
