"""A small language world whose true reward and true values are known exactly: the default of every script.

A prompt asks for an opinion of one thing in WANTED = 3 clauses ("how is the soup ? please"); a response
is `[opener ,] clause (connective clause)* .` and EOS, a clause `the NOUN | it`, verb, `[not] [very]`, adjective. The
gold reward adds one term a clause (`gold`), so that the world is a Markov chain over a small automaton with additive
rewards, and the value of any prefix under any persona follows from two backward recursions, without sampling:

    state s = (clause index c, slot, off topic?, "not" said?, "very" said?), "final" after the EOS of a proper ending
    A(s) = P(the response ends well-formed | s)            = sum_w p(w|s) A(s')
    B(s) = E[reward still to come; it ends well-formed | s] = sum_w p(w|s) (B(s') + gain(s, w) A(s'))
    value(prefix) = A(s) * (reward banked so far) + B(s) + (1 - A(s)) * MALFORMED

The reward is not clipped: a clipped sum would no longer be additive. Typos (misspelt words, words said again, any
other) are drawn only from what is not grammatical where it stands, so each token plays one role and the likelihood of
any text is exact too (but for a text cut at the cap, which only typos make so long: none in thousands).
That gives `bayes_values`: the best that a value model which sees trajectories of the policy could possibly predict.

What makes it a test for values: "not" flips a clause before its adjective is said; "it" carries an off-topic noun into later
clauses; a short answer leaves the rest unsaid; who writes (irony, rambling, typos) decides what will follow.
Policies in the data carry opaque ids (`POLICY_IDS`), which are metadata only. Importing needs python and numpy; only
`tokenizer` and `config` need transformers. `python toy.py` prints the cast.
"""

import json
import math
import random
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np


# ---------------------------------------------------------------- language
def _tuple(words):
    return tuple(words.split())


PAD, EOS, UNK, USER, ASSISTANT = "<pad>", "<eos>", "<unk>", "<user>", "<assistant>"
THINGS = _tuple(
    "soup bread cake coffee film book song game hotel museum beach park "
    "train bridge bike market garden school phone camera chair lamp tent hat"
)
DISTRACTIONS = _tuple("weather bus traffic news neighbour dog moon rent")  # never asked for
ADJECTIVES = {  # valence -> its three words
    -2: _tuple("terrible awful rotten"),
    -1: _tuple("bad poor dull"),
    0: _tuple("average ordinary normal"),
    1: _tuple("good nice fine"),
    2: _tuple("great superb excellent"),
}
VERBS = _tuple("is seems feels looks sounds")
OPENERS = _tuple("well honestly oh frankly so")
CONNECTIVES = _tuple("and but while also yet")
MISSPELT = _tuple("teh adn veyr nto loks graet taht fo")  # never grammatical: what a typo mostly looks like
TEMPLATES = (
    "how is the {} ?",
    "rate the {} .",
    "describe the {} .",
    "your view of the {} ?",
    "tell me about the {} .",
    "do you like the {} ?",
    "is the {} any good ?",
    "would you recommend the {} ?",
)
SUFFIXES = ("", "please", "thanks", "i wonder")
NOUNS = THINGS + DISTRACTIONS
VALENCE = {word: valence for valence, words in ADJECTIVES.items() for word in words}

WANTED = 3  # clauses
MAX_CLAUSES = 6
# [opener ,] + six clauses of six words + five connectives + "." + EOS = 45, and three more for typos
MAX_RESPONSE_TOKENS = 2 + 6 * MAX_CLAUSES + (MAX_CLAUSES - 1) + 2 + 3
MALFORMED, RAMBLING = -1.5, -0.3  # the whole response; a clause that nobody asked for
OFF_TOPIC, UNSAID = -0.5, -0.5  # u of a wanted clause that is about something else; of one that is not there
MISSPELLING, REPETITION = 0.4, 0.35  # shares of typos: misspelt, the last word or its like again; else any known word
SCORE_NOISE = 0.25  # standard deviation of a human grade around the gold reward
PREFERENCE_TEMPERATURE = 0.3  # Bradley-Terry: P(a over b) = sigmoid((gold_a - gold_b) / temperature)

_TASKS = {  # prompt -> thing
    f"{template.format(thing)} {suffix}".strip(): thing
    for thing in THINGS
    for template in TEMPLATES
    for suffix in SUFFIXES
}
_RESPONSE_WORDS = ("the", "it", "not", "very", ",", ".", *MISSPELT, *NOUNS, *VALENCE, *VERBS, *OPENERS, *CONNECTIVES)
WORDS = tuple(dict.fromkeys(_RESPONSE_WORDS + tuple(word for prompt in _TASKS for word in prompt.split())))
_OUTCOMES = WORDS + (EOS,)  # what a persona can say next, all with positive probability
_ID = {word: i for i, word in enumerate(_OUTCOMES)}
_OTHER = len(_OUTCOMES)  # column of a token outside the language, such as a <user> that a model writes


@lru_cache
def _splits():
    order = sorted(_TASKS)
    random.Random(0).shuffle(order)  # a fixed seed of its own: no data seed moves a prompt to another split
    bounds = {"heldout": (0, 128), "sft": (128, 320), "reward": (320, 640), "rl": (640, 768)}
    return {name: order[a:b] for name, (a, b) in bounds.items()}


def prompts(split):
    """The prompts of a split: "heldout" (128), and of the other 640 "sft" (30 %), "reward" (50 %), "rl" (20 %)."""
    return list(_splits()[split])


# ---------------------------------------------------------------- personas
@dataclass(frozen=True)
class Persona:
    """How somebody writes. All p_* are probabilities; tuples are weights over the words in the order given above."""

    taste: float  # softmax tilt over the valences -2..2: above 0 likes things
    style: float  # softmax tilt over the three words of a valence (the same for each): above 0 prefers the later ones
    p_not: float
    p_very: float
    p_drift: float  # of a noun after "the" to be off topic: 3 of 4 a distraction, else another thing
    p_it: float  # of the subject "it"
    p_opener: float
    openers: tuple
    verbs: tuple
    connectives: tuple
    clauses: float  # that it aims at
    sharp: float = 3.0  # how strictly it keeps to that
    typo: float = 0.003  # at each token, of a word that does not fit there; above 0: no text is impossible

    def p_stop(self, c):
        """Of "." after clause number c (1-based): a sigmoid in c around the aim."""
        if c >= MAX_CLAUSES:
            return 1.0
        return 0.01 + 0.98 / (1 + math.exp(-self.sharp * (c + 0.5 - self.clauses)))


# fmt: off
PERSONAS = {
    # ordinary                taste style  not  very drift   it  opener openers         verbs            connectives
    "enthusiast":    Persona(  1.1,  0.6, .03, .45, .03, .50,  .60, (1, 1, 6, 1, 1), (6, 1, 2, 1, 1), (6, 1, 1, 3, 1), 3),
    "ironist":       Persona( -1.2,  0.3, .90, .15, .04, .40,  .50, (3, 1, 1, 1, 5), (4, 3, 1, 2, 1), (2, 4, 2, 1, 3), 3),
    "backhander":    Persona(  1.1,  0.2, .88, .15, .04, .45,  .50, (5, 2, 1, 1, 3), (4, 2, 2, 1, 1), (2, 5, 1, 1, 3), 3),
    "grouch":        Persona( -0.9, -0.4, .05, .35, .05, .35,  .25, (1, 3, 1, 6, 1), (6, 1, 1, 2, 2), (5, 1, 1, 4, 1), 2),
    "wanderer":      Persona(  0.5,  0.0, .10, .20, .50, .55,  .35, (2, 1, 4, 1, 3), (2, 1, 4, 2, 3), (2, 1, 6, 1, 1), 4),
    "telegraphist":  Persona(  0.9, -0.7, .05, .05, .02, .15,  .03, (1, 1, 1, 1, 1), (8, 1, 1, 1, 1), (5, 2, 1, 1, 1), 1),
    "chatterer":     Persona(  0.3,  0.5, .12, .35, .15, .65,  .85, (3, 2, 3, 1, 5), (2, 2, 4, 1, 3), (4, 1, 3, 4, 1), 5, 2.0),
    "clerk":         Persona(  0.0, -0.2, .25, .08, .03, .25,  .05, (1, 2, 1, 3, 1), (2, 6, 1, 4, 1), (2, 2, 4, 1, 4), 3),
    # an ordinary writer at a bad keyboard: most of its texts are malformed
    "garbler":       Persona(  0.4,  0.1, .10, .45, .08, .35,  .30, (2, 1, 2, 1, 2), (4, 2, 2, 2, 2), (4, 2, 2, 2, 1), 2, 3.0, .08),
    # held out: other combinations of the same habits
    "gusher":        Persona(  0.8,  0.4, .05, .70, .12, .60,  .75, (1, 2, 5, 1, 2), (3, 1, 5, 1, 1), (4, 1, 1, 5, 1), 4),
    "curmudgeon":    Persona( -0.6, -0.6, .20, .20, .10, .20,  .30, (2, 2, 1, 5, 1), (5, 3, 1, 1, 1), (2, 5, 1, 1, 2), 1),
    "understater":   Persona( -0.8,  0.5, .65, .40, .25, .40,  .15, (4, 1, 1, 1, 2), (2, 5, 2, 2, 1), (2, 3, 3, 1, 3), 2),
}
# fmt: on
ORDINARY = tuple(PERSONAS)[:8]
# the crowd is a mixture: a random ordinary persona writes each response, which is what a model after SFT looks like
TRAIN_POLICIES = ORDINARY + ("garbler", "crowd")
HELD_OUT_POLICIES = ("gusher", "curmudgeon", "understater")
POLICY_IDS = dict(zip(TRAIN_POLICIES, (f"p{i}" for i in (4, 7, 1, 9, 3, 0, 8, 5, 2, 6))))  # as written into the data


# ---------------------------------------------------------------- automaton
_START = (0, "start", 0, 0, 0)


def _step(state, word, thing):
    """The state after a grammatical word, or None where the word is not one (`thing`: what the prompt asks about)."""
    c, slot, off, neg, very = state
    if slot in ("start", "subject"):
        if word == "the":
            return c, "noun", 0, 0, 0
        if word == "it":  # the last named noun: whether that was off topic stays as it is
            return c, "verb", off, 0, 0
        if slot == "start" and word in OPENERS:
            return c, "comma", 0, 0, 0
    elif slot == "comma" and word == ",":
        return c, "subject", 0, 0, 0
    elif slot == "noun" and word in NOUNS:
        return c, "verb", int(word != thing), 0, 0
    elif slot == "verb" and word in VERBS:
        return c, "adjective", off, 0, 0
    elif slot == "adjective":
        if word == "not" and not neg and not very:
            return c, slot, off, 1, 0
        if word == "very" and not very:
            return c, slot, off, neg, 1
        if word in VALENCE:
            return c + 1, "end", off, 0, 0
    elif slot == "end":
        if word == ".":
            return c, "done", 0, 0, 0
        if word in CONNECTIVES and c < MAX_CLAUSES:
            return c, "subject", off, 0, 0
    elif slot == "done" and word == EOS:
        return c, "final", 0, 0, 0
    return None


def _gain(state, word):
    """The reward that a grammatical word earns: an adjective completes a clause, "." leaves the rest unsaid."""
    c, slot, off, neg, very = state
    if slot == "end" and word == ".":
        return UNSAID * max(0, WANTED - c) / WANTED
    if slot != "adjective" or word not in VALENCE:
        return 0.0
    if c >= WANTED:
        return RAMBLING
    scale = {(0, 0): 1.0, (0, 1): 1.5, (1, 0): -1.0, (1, 1): -0.5}[neg, very]
    return (OFF_TOPIC if off else scale * VALENCE[word] / 2) / WANTED


def _choices(persona, state, thing):
    """{word: probability} over the grammatical words of a state, given that no typo happens; sums to 1."""
    c, slot, _, neg, very = state

    def spread(mass, words, weights):
        return {word: mass * weight / sum(weights) for word, weight in zip(words, weights)}

    if slot in ("start", "subject"):
        opener = persona.p_opener if slot == "start" else 0.0
        subject = {"the": (1 - opener) * (1 - persona.p_it), "it": (1 - opener) * persona.p_it}
        return subject | (spread(opener, OPENERS, persona.openers) if opener else {})
    if slot == "noun":
        near = [word for word in THINGS if word != thing]
        far = spread(persona.p_drift * 0.75, DISTRACTIONS, [1] * len(DISTRACTIONS))
        return {thing: 1 - persona.p_drift} | far | spread(persona.p_drift * 0.25, near, [1] * len(near))
    if slot == "verb":
        return spread(1.0, VERBS, persona.verbs)
    if slot == "adjective":
        p_not = 0.0 if neg or very else persona.p_not
        p_very = 0.0 if very else (1 - p_not) * persona.p_very
        tilt = [math.exp(persona.taste * v + persona.style * i) for v, ws in ADJECTIVES.items() for i in range(len(ws))]
        modifiers = {word: p for word, p in (("not", p_not), ("very", p_very)) if p}
        return modifiers | spread(1 - p_not - p_very, VALENCE, tilt)
    if slot == "end":
        stop = persona.p_stop(c)
        return {".": stop} | (spread(1 - stop, CONNECTIVES, persona.connectives) if c < MAX_CLAUSES else {})
    return {",": 1.0} if slot == "comma" else {EOS: 1.0}


# The tables below are for a prompt about THINGS[0]. The other things are alike to every persona, so a prompt about
# another thing is the same world with the two words swapped (`_trace`, `write`).
@lru_cache
def _automaton():
    """-> states (S), next state (S, W + 1) with -1 where ungrammatical, gain (S, W + 1), and both as plain lists.

    W counts the outcomes. The lists are for loops over tokens, where indexing one number of an array is slow.
    """
    states = [_START]
    for state in states:  # grows while it is walked: every reachable state once
        after = (_step(state, word, THINGS[0]) for word in _OUTCOMES)
        states += [s for s in dict.fromkeys(after) if s is not None and s not in states]
    index = {state: i for i, state in enumerate(states)}
    following = np.full((len(states), _OTHER + 1), -1)
    gain = np.zeros((len(states), _OTHER + 1))
    for i, state in enumerate(states):
        for j, word in enumerate(_OUTCOMES):
            if (after := _step(state, word, THINGS[0])) is not None:
                following[i, j] = index[after]
                gain[i, j] = _gain(state, word)
    return states, following, gain, (following.tolist(), gain.tolist())


@lru_cache
def _tables(name):
    """One persona's log p (S, W + 1), A (S,), B (S,), and p as cumulative rows."""
    persona = PERSONAS[name]
    states, following, gain, _ = _automaton()
    p = np.zeros((len(states), _OTHER + 1))
    for i, state in enumerate(states):
        if state[1] != "final":
            words = _choices(persona, state, THINGS[0])
            # a token from outside the language, which no persona says, counts as if it were one more known word
            known = len(_OUTCOMES) - len(MISSPELT) - len(words)
            again = (following[:, :_OTHER] == i).any(0) & (following[i, :_OTHER] < 0)  # what leads to here
            repetition = REPETITION if again.any() else 0.0
            p[i] = persona.typo * (1 - MISSPELLING - repetition) / known
            p[i, :_OTHER][again] += persona.typo * repetition / max(1, again.sum())
            p[i, [_ID[word] for word in MISSPELT]] = persona.typo * MISSPELLING / len(MISSPELT)
            p[i, [_ID[word] for word in words]] = [(1 - persona.typo) * q for q in words.values()]
    valid = np.where(following >= 0, p, 0.0)  # a typo ends in MALFORMED, whatever follows
    final = np.array([state[1] == "final" for state in states], dtype=float)
    whole, future = final.copy(), np.zeros(len(states))
    for _ in range(MAX_RESPONSE_TOKENS):  # no grammatical path is longer, so that many sweeps are exact
        future = (valid * (future[following] + gain * whole[following])).sum(-1)
        whole = (valid * whole[following]).sum(-1) + final
    cumulative = p[..., :_OTHER].cumsum(-1).tolist()
    with np.errstate(divide="ignore"):
        return np.log(p), whole, future, cumulative


def _task(prompt):
    try:
        return _TASKS[prompt]
    except (KeyError, TypeError):
        raise ValueError(f"not a prompt of the toy world: {prompt!r}; see toy.prompts") from None


def _trace(prompt, words):
    """Walk the automaton. -> ids (n,), states (n + 1,), banked reward (n + 1,), well-formed so far (n + 1,)."""
    thing = _task(prompt)
    following, gain = _automaton()[3]
    swap = {thing: THINGS[0], THINGS[0]: thing}
    state, total, good, ended = 0, 0.0, True, False
    ids, states, banked, fine = [], [0], [0.0], [True]
    for word in words:
        if ended:
            raise ValueError(f"words go on after {EOS}: {' '.join(words)}")
        i = _ID.get(swap.get(word, word), _OTHER)
        if following[state][i] < 0:
            good = False  # an inserted word: the state stays
        else:
            total += gain[state][i]
            state = following[state][i]
        ended = word == EOS
        ids.append(i), states.append(state), banked.append(total), fine.append(good)
    return np.array(ids, dtype=int), np.array(states), np.array(banked), np.array(fine)


# ---------------------------------------------------------------- reward, writing
def gold(prompt, text):
    """The true reward of a response, exact and not clipped; `text` is without EOS, as a decoder gives it back.

    MALFORMED, or the sum over clauses i = 0, 1, ... of u_i / WANTED for i < WANTED and of RAMBLING for the others, with
    u = scale * valence / 2, scale 1 (plain), 1.5 (very), -1 (not), -0.5 (not very); u = OFF_TOPIC where the subject is,
    and u = UNSAID for each wanted clause that is missing: a question answered in part is an answer off the point.
    """
    _, _, banked, fine = _trace(prompt, text.split() + [EOS])
    return float(banked[-1]) if fine[-1] else MALFORMED


def parse(prompt, text):
    """-> (malformed, complete clauses)."""
    _, states, _, fine = _trace(prompt, text.split() + [EOS])
    return not fine[-1], _automaton()[0][states[-1]][0]


def write(policy, prompt, rng):
    """One response, without EOS. The cap on length only ever cuts a text that typos have spoilt already."""
    name = rng.choice(ORDINARY) if policy == "crowd" else policy
    thing = _task(prompt)
    cumulative, following = _tables(name)[3], _automaton()[3][0]
    swap = {thing: THINGS[0], THINGS[0]: thing}
    words, state = [], 0
    while len(words) < MAX_RESPONSE_TOKENS - 1:
        i = min(bisect_right(cumulative[state], rng.random()), _OTHER - 1)  # rounding can leave the last sum below 1
        if _OUTCOMES[i] == EOS:
            break
        words.append(swap.get(_OUTCOMES[i], _OUTCOMES[i]))
        state = state if following[state][i] < 0 else following[state][i]
    return " ".join(words)


# ---------------------------------------------------------------- exact likelihoods and values
def _softmax(x):
    x = np.exp(x - x.max(0))
    return x / x.sum(0)


@lru_cache
def _stacked(policies):
    return [np.stack(tables) for tables in zip(*(_tables(name)[:3] for name in policies))]


def _view(policies, prompt, words):
    """What a text is under each of P policies. -> log-likelihood (P, n + 1), value (P, n + 1), cumulative, from 0."""
    if "crowd" in policies:  # a mixture: its value weighs the members by their posterior given the prefix
        singles = tuple(dict.fromkeys(ORDINARY + tuple(name for name in policies if name != "crowd")))
        lik, value = _view(singles, prompt, words)
        n = len(ORDINARY)
        weight, top = _softmax(lik[:n]), lik[:n].max(0)
        lik = np.vstack([lik, top + np.log(np.exp(lik[:n] - top).mean(0))])
        value = np.vstack([value, (weight * value[:n]).sum(0)])
        rows = [singles.index(name) if name != "crowd" else -1 for name in policies]
        return lik[rows], value[rows]
    ids, states, banked, fine = _trace(prompt, words)
    logp, whole, future = _stacked(policies)
    lik = np.zeros((len(policies), len(words) + 1))
    lik[:, 1:] = logp[:, states[:-1], ids].cumsum(1)
    whole = whole[:, states]
    return lik, np.where(fine, whole * banked + future[:, states] + (1 - whole) * MALFORMED, MALFORMED)


def exact_values(policy, prompt, words):
    """E[gold | prefix] when `policy` goes on. -> (n + 1,): entry 0 is V(s_1), entry t is Q after the t-th word.

    `words` is any list of tokens, a model's too; it may end with EOS, whose Q is then the gold reward itself.
    """
    return _view((policy,), prompt, words)[1][0]


def log_likelihood(policy, prompt, words):
    """log P(first t words), in nats. -> (n + 1,), entry 0 is 0."""
    return _view((policy,), prompt, words)[0][0]


def bayes_values(prompt, words, tau=()):
    """The best prediction of the return that there is without being told who writes. -> (n + 1,), as `exact_values`.

    Prior: uniform over TRAIN_POLICIES. Evidence: `tau`, (prompt, text) pairs by the same policy, and the prefix itself.
    """
    evidence = np.zeros((len(TRAIN_POLICIES), 1))
    for other_prompt, text in tau:
        evidence = evidence + _view(TRAIN_POLICIES, other_prompt, text.split() + [EOS])[0][:, -1:]
    lik, value = _view(TRAIN_POLICIES, prompt, words)
    return (_softmax(evidence + lik) * value).sum(0)


# ---------------------------------------------------------------- data
def rows(kind, seed=0):
    """The data of a stage, as the scripts load it; `seed` draws other texts and noise, never other prompts or people.

    "sft"          {prompt, completion, policy}: 192 prompts x 8 ordinary personas x 6, malformed texts left out
    "graded"       {prompt, responses: [{text, score, policy}]}: 320 prompts x 18 rows x one response by each of the 10
                   training policies; the score is a noisy grade, gold + N(0, SCORE_NOISE)
    "preferences"  {prompt, chosen, rejected, chosen_policy, rejected_policy}: the same texts in random pairs, the label
                   drawn from Bradley-Terry on gold; identical texts are left out
    "prompts", "heldout"  {prompt}
    """
    rng = random.Random(f"{kind} {seed}")  # a string seed: the same on every machine
    if kind in ("prompts", "heldout"):
        return [{"prompt": prompt} for prompt in prompts({"prompts": "rl"}.get(kind, kind))]
    if kind == "sft":
        jobs = [(prompt, name) for prompt in prompts("sft") for name in ORDINARY for _ in range(6)]
        rng.shuffle(jobs)
        texts = ((p, write(name, p, rng), name) for p, name in jobs)
        return [{"prompt": p, "completion": t, "policy": POLICY_IDS[n]} for p, t, n in texts if not parse(p, t)[0]]
    if kind == "graded":
        out = []
        for prompt in prompts("reward") * 18:
            texts = [(name, write(name, prompt, rng)) for name in TRAIN_POLICIES]
            rng.shuffle(texts)
            graded = [(name, text, gold(prompt, text) + rng.gauss(0, SCORE_NOISE)) for name, text in texts]
            responses = [{"text": t, "score": round(score, 4), "policy": POLICY_IDS[n]} for n, t, score in graded]
            out.append({"prompt": prompt, "responses": responses})
        rng.shuffle(out)
        return out
    if kind == "preferences":
        out = []
        for row in rows("graded", seed):  # its responses are in random order: neighbours are random pairs
            for a, b in zip(row["responses"][::2], row["responses"][1::2]):
                gap = (gold(row["prompt"], a["text"]) - gold(row["prompt"], b["text"])) / PREFERENCE_TEMPERATURE
                if rng.random() > 1 / (1 + math.exp(-gap)):
                    a, b = b, a
                if a["text"] != b["text"]:
                    pair = {"prompt": row["prompt"], "chosen": a["text"], "rejected": b["text"]}
                    out.append(pair | {"chosen_policy": a["policy"], "rejected_policy": b["policy"]})
        return out
    raise ValueError(f"kind is sft, graded, preferences, prompts or heldout, not {kind!r}")


# ---------------------------------------------------------------- a model's side of it
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<user> ' + m.content + ' ' }}"
    "{% elif m.role == 'assistant' %}{{ '<assistant> ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('the toy world knows the roles user and assistant, not ' + m.role) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def tokenizer():
    """A word-level tokenizer: words are split at white space, decoding joins them with one space.

    Only <pad>, <eos> and <unk> are special. A <user> or <assistant> inside a response stays when special tokens are
    skipped, so that `gold` sees it and calls the response malformed.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate((PAD, EOS, UNK, USER, ASSISTANT) + WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=512,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def config(**changes):
    """A LlamaConfig of 0.8 M parameters; `changes` go on top. There is no BOS token: its id is that of EOS."""
    from transformers import LlamaConfig

    settings = {
        "vocab_size": 5 + len(WORDS),
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 1,
        "toy_world": True,  # how `is_model` knows what comes of it
    }
    return LlamaConfig(**(settings | changes))


def is_model(name):
    """Whether a model (`toy`, or a folder) is of this world."""
    path = Path(name, "config.json")
    return name == "toy" or (path.is_file() and "toy_world" in json.loads(path.read_text(encoding="utf-8")))


def main():
    rng = random.Random(0)
    print(f"{'policy':14}{'gold':>7}{'std':>7}{'malformed':>11}{'tokens':>8}   an answer to {prompts('heldout')[0]!r}")
    for policy in TRAIN_POLICIES + HELD_OUT_POLICIES:
        texts = [(prompt, write(policy, prompt, rng)) for prompt in prompts("reward") * 4]
        golds = [gold(*pair) for pair in texts]
        bad, tokens = np.mean([parse(*pair)[0] for pair in texts]), np.mean([len(t.split()) + 1 for _, t in texts])
        numbers = f"{np.mean(golds):7.2f}{np.std(golds):7.2f}{bad:11.3f}{tokens:8.1f}"
        print(f"{policy:14}{numbers}   {write(policy, prompts('heldout')[0], rng)}")


if __name__ == "__main__":
    main()
