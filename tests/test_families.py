"""Model families: tiny random models of each through the scripts, their log-probs, and the tokens of their chat templates.

`make test-all` takes every family through the whole chain, `make test` three of them and DeBERTa's reward model.
"""

import contextlib
import io
import json
import math
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dvpo
import gvm
import rm
import sample
import sft
import toy
import vcb
from kernels import model_class, packing_gap

SCRIPTS = {"sft": sft, "rm": rm, "gvm": gvm, "dvpo": dvpo, "sample": sample, "vcb": vcb}
CPU = torch.device("cpu")

# ------------------------------------------------------------------------------------------------------------- templates
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe of help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% endfor %}"
)
TEMPLATES = {  # template, EOS, the token that ends an answer, BOS, other control tokens
    "chatml": (CHATML, "<|endoftext|>", "<|im_end|>", None, "<|im_start|>"),
    "gemma": (GEMMA, "<eos>", "<end_of_turn>", "<bos>", "<start_of_turn>"),
    "phi3": (PHI3, "<|endoftext|>", "<|end|>", "<s>", "<|system|>", "<|user|>", "<|assistant|>"),
    "llama3": (LLAMA3, "<|end_of_text|>", "<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    "mistral": (MISTRAL, "</s>", "</s>", "<s>"),
    "plain": (sft.PLAIN_TEMPLATE, "<|endoftext|>", "<|endoftext|>", None),
}  # fmt: skip
LINES = [
    "How long do I boil an egg? About seven minutes, and then it goes into cold water.",
    "What is the tallest mountain? The tallest mountain is Mount Everest, near Nepal.",
    "Is the train late? It is not late: the train is here, and it is a good train.",
    "Be brief. Be of help. You answer like a pirate. User: Assistant: system user assistant model",
]
SIZE = 400  # tokens of every vocabulary


def tokenizer(style):
    """BPE trained on a few lines: of bytes, and for Mistral of characters, where a text begins with a space."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    template, eos, end, bos, *others = TEMPLATES[style]
    special = ["<pad>", "<unk>", *dict.fromkeys(filter(None, (bos, eos, end, *others)))]
    special = [AddedToken(token, rstrip=style == "phi3", special=True, normalized=False) for token in special]
    backend, alphabet = Tokenizer(models.BPE(unk_token="<unk>")), pre_tokenizers.ByteLevel.alphabet()
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if style == "mistral":
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()
        alphabet = ["\n", *map(chr, range(33, 127))]
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    backend.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=SIZE, **options))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token="<pad>", unk_token="<unk>", chat_template=template,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- models
SMALL = {
    "vocab_size": SIZE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.3, "tie_word_embeddings": False,
}  # fmt: skip
GEMMAS = {"tie_word_embeddings": True, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8,
          "final_logit_softcapping": 4.0, "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
FAMILIES = {  # configuration, chat template, what is not SMALL's
    "llama": ("Llama", "llama3", {}),
    "llama_tied": ("Llama", "llama3", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", "mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", "chatml", {}),
    "qwen3": ("Qwen3", "chatml", {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", "gemma", GEMMAS | {"attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3Text", "gemma", GEMMAS),
    "gpt_neox": ("GPTNeoX", "plain", {}),
    "gpt2": ("GPT2", "plain", {"tie_word_embeddings": True}),
    "phi3": ("Phi3", "phi3", {}),
    "olmo2": ("Olmo2", "plain", {}),
    "granite": ("Granite", "chatml", {"logits_scaling": 2.0, "embedding_multiplier": 6.0, "initializer_range": 0.5}),
    "cohere": ("Cohere", "chatml", {"logit_scale": 0.5, "tie_word_embeddings": True, "initializer_range": 0.5}),
}
NO_CLASS = {"gvm": ("gemma3", "olmo2", "granite", "cohere"), "rm": ("granite", "cohere")}  # in transformers
KIND = {"gvm": "value", "rm": "reward"}
ASKED = [
    "What is the tallest mountain?",
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is the train late?"}],
    [{"role": "user", "content": "Is it good?"}, {"role": "assistant", "content": "It is."}, {"role": "user", "content": "Why?"}],
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model of every family, far from uniform, and graded rows; `deberta` is an encoder with its own tokens."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    home = tmp_path_factory.mktemp("home")
    for family, (name, style, options) in FAMILIES.items():
        tok = tokenizer(style)
        ids = {f"{x}_token_id": getattr(tok, f"{x}_token_id") for x in ("pad", "bos", "eos")}
        config = getattr(transformers, f"{name}Config")(**SMALL | ids | options)
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(home / family)
        tok.save_pretrained(home / family)
    config = transformers.DebertaV2Config(
        **SMALL | {"max_position_embeddings": 64, "initializer_range": 0.1}, relative_attention=True, position_buckets=16,
        pos_att_type=["p2c", "c2p"], share_att_key=True, norm_rel_ebd="layer_norm", type_vocab_size=0, pooler_hidden_size=32,
    )  # fmt: skip
    transformers.DebertaV2Model(config).save_pretrained(home / "deberta")
    backend, special = Tokenizer(models.Unigram()), ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="[UNK]", show_progress=False)
    backend.train_from_iterator(LINES, trainer)
    names = {f"{x[1:-1].lower()}_token": x for x in special}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(home / "deberta")
    answers = [{"text": "It is late.", "score": 2.0, "policy": "a"}, {"text": "No.", "score": 0.5, "policy": "b"}]
    rows = [{"prompt": ASKED[i % 3] if i < 3 else f"Is it {i}?", "responses": answers} for i in range(20)]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


def random_rows(lengths=((3, 4), (9, 1), (1, 7), (15, 6))):
    """(prompt ids, response ids) of several lengths."""
    generator = torch.Generator().manual_seed(0)
    ids = lambda size: torch.randint(20, SIZE - 100, (size,), generator=generator).tolist()
    return [(ids(prompt), ids(response)) for prompt, response in lengths]


@torch.no_grad()
def stock_logps(model, rows, temperature=1.0):
    """Log-probs of the responses, each row alone, by log_softmax of the model's logits."""
    found = []
    for prompt, response in rows:
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double() / temperature
        found.append(logits.log_softmax(-1)[range(len(response)), response])
    return torch.cat(found)


# ------------------------------------------------------------------------------------------------------------- log-probs
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_the_models_own_logits(home, family):
    import transformers

    args, rows = sft.Args(), random_rows()
    model = sft.load_model("causal", str(home / family), sft.load_tokenizer(str(home / family), args), args).eval()
    assert all(getattr(model.config, key) == value for key, value in FAMILIES[family][2].items())
    batch, policy = sft.collate(rows, 0), sft.Policy(model)
    stock = transformers.AutoModelForCausalLM.from_pretrained(home / family, attn_implementation="eager").eval()
    with torch.no_grad():
        assert float(stock(batch.input_ids).logits.std()) > 1
        for temperature in (1.0, 0.7):
            own, found = stock_logps(stock, rows, temperature), policy(batch, temperature)
            assert float((found[batch.response_mask] - own).abs().max()) < 1e-5
            assert (found[~batch.response_mask] == 0).all()
            loss = policy(batch, temperature, token_weight=0.1)
            assert float(loss) == pytest.approx(-0.1 * float(own.sum()), abs=1e-5)
    policy.check(SimpleNamespace(autocast=contextlib.nullcontext, args=args))


PACKED = SimpleNamespace(micro_tokens=4096, padding=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_are_those_of_padded_ones(home, family):
    """Log-probs, values and rewards of sequences that share rows, and the gradient of the log-probs."""
    args = sft.Args()
    rows = random_rows(((3, 4), (9, 1), (1, 7), (20, 10), (2, 3), (15, 6), (4, 4)))  # short ones fit beside long ones
    tokenizer = sft.load_tokenizer(str(home / family), args)
    load = lambda kind: sft.load_model(kind, str(home / family), tokenizer, args).eval()
    policy = sft.Policy(load("causal"))
    batches = [sft.collate(rows, 0), sft.collate(rows, 0, None, PACKED)]
    assert batches[0].position_ids is None and batches[1].position_ids is not None
    assert batches[1].input_ids.numel() < 0.6 * batches[0].input_ids.numel()
    padded, packed = (policy(batch) for batch in batches)
    assert float((padded - packed).abs().max()) < 1e-5
    grads = [torch.autograd.grad(x.sum(), list(policy.parameters()), allow_unused=True) for x in (padded, packed)]
    for one, two in zip(*grads, strict=True):
        assert one is None or float((one - two).abs().max()) < 1e-4 * (1 + float(one.abs().max()))
    sequences, turns = [p + r for p, r in rows], [[row] for row in rows]
    with torch.no_grad():
        value, reward = gvm.ValueModel(load("value")), rm.RewardModel(load("reward"), True)
        found = [value(gvm.collate_values(turns, 0, False, None, args)) for args in (None, PACKED)]
        assert float((found[0] - found[1]).abs().max()) < 1e-5 and float(found[0].std()) > 1e-3
        found = [reward(*rm.collate_scored(sequences, 0, CPU, args)) for args in (None, PACKED)]
        assert float((found[0] - found[1]).abs().max()) < 1e-5 and float(found[0].std()) > 1e-3


def reference_flash(
    module, query, key, value, mask, scaling, dropout=0.0, cu_seq_lens_q=None, max_length_q=None, **rest
):
    """What flash-attn's variable-length function computes, sequence by sequence, from what it is told; (B, H, L, D)."""
    assert mask is None and len(query) == 1 and cu_seq_lens_q.dtype == torch.int32
    assert torch.equal(rest["cu_seq_lens_k"], cu_seq_lens_q) and rest["max_length_k"] == max_length_q
    assert max_length_q == int(cu_seq_lens_q.diff().max()) and int(cu_seq_lens_q[-1]) == query.shape[2]
    groups, found = query.shape[1] // key.shape[1], []
    for a, b in zip(cu_seq_lens_q[:-1].tolist(), cu_seq_lens_q[1:].tolist(), strict=True):
        k, v = (x[:, :, a:b].repeat_interleave(groups, 1) for x in (key, value))
        scores = query[:, :, a:b] @ k.transpose(2, 3) * scaling
        later = torch.ones(b - a, b - a, dtype=torch.bool).triu(1)
        found.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ v)
    return torch.cat(found, 2).transpose(1, 2), None


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt_neox", "olmo2", "granite", "cohere"])
def test_flash_attention_is_told_where_packed_sequences_begin(home, family):
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("flash_reference", reference_flash)
    AttentionMaskInterface.register("flash_reference", lambda *_, **__: None)
    args = sft.Args()
    rows = random_rows(((3, 4), (9, 1), (1, 7), (20, 10), (2, 3), (15, 6), (4, 4)))
    model = sft.load_model("causal", str(home / family), sft.load_tokenizer(str(home / family), args), args).eval()
    policy = sft.Policy(model)
    with torch.no_grad():
        padded = policy(sft.collate(rows, 0))
        model.config._attn_implementation = "flash_reference"
        packed = policy(sft.collate(rows, 0, None, PACKED))
    assert float((padded - packed).abs().max()) < 1e-5


def forgets_positions(monkeypatch):
    """Llama's mask without the positions by which packed sequences are told apart."""
    from transformers.models.llama import modeling_llama

    mask = modeling_llama.create_causal_mask
    forgetful = lambda *args, **options: mask(*args, **options | {"position_ids": None})
    monkeypatch.setattr(modeling_llama, "create_causal_mask", forgetful)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_packed_sequence_that_is_seen_shows_far_above_rounding(monkeypatch, bf16):
    """Also in a model that is not trained yet, whose attention does little."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(toy.config()).to(torch.bfloat16 if bf16 else torch.float32)
    limit = 0.05 if bf16 else 1e-3
    assert packing_gap(model) < limit / 4
    forgets_positions(monkeypatch)
    assert packing_gap(model) > 3 * limit


def test_a_frozen_reward_model_that_mixes_packed_sequences_is_refused(home, tmp_path, capsys, monkeypatch):
    args = sft.Args()
    tokenizer = sft.load_tokenizer(str(home / "llama"), args)
    sft.load_model("reward", str(home / "llama"), tokenizer, args).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    sample.TextReward(str(tmp_path / "rm"), sample.Args(), CPU)
    forgets_positions(monkeypatch)
    with pytest.raises(SystemExit):
        sample.TextReward(str(tmp_path / "rm"), sample.Args(), CPU)
    assert "give --padding" in capsys.readouterr().err
    sample.TextReward(str(tmp_path / "rm"), sample.Args(padding=True), CPU)


def test_a_family_that_mixes_packed_sequences_is_refused(home, tmp_path, capsys, monkeypatch):
    forgets_positions(monkeypatch)
    flags = ["--model", str(home / "llama"), "--data", str(home / "rows.jsonl"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        sft.main([*flags, "--steps", "1"])
    assert ended.value.code == 2 and "give --padding" in capsys.readouterr().err
    sft.main([*flags, "--steps", "1", "--padding"])


@pytest.mark.parametrize("script", ["sft", "dvpo", "vcb", "sample"])
def test_a_head_that_does_more_than_is_known_is_refused(home, tmp_path, capfd, monkeypatch, script):
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification, LlamaForTokenClassification

    forward = LlamaForCausalLM.forward

    def doubled(self, *inputs, **options):
        found = forward(self, *inputs, **options)
        found.logits = 2 * found.logits
        return found

    monkeypatch.setattr(LlamaForCausalLM, "forward", doubled)
    values = LlamaForTokenClassification.from_pretrained(home / "llama", num_labels=1)
    values.save_pretrained(tmp_path / "gvm"), tokenizer("llama3").save_pretrained(tmp_path / "gvm")
    start = f"--{'model' if script == 'sft' else 'policy'} {home}/llama --data {home}/rows.jsonl --steps 1"
    rewards = LlamaForSequenceClassification.from_pretrained(home / "llama", num_labels=1)
    rewards.save_pretrained(tmp_path / "rm"), tokenizer("llama3").save_pretrained(tmp_path / "rm")
    more = {"dvpo": f" --gvm {tmp_path}/gvm --rollout_batch_size 4 --batch_size 2"}.get(script, "")
    if script == "sample":
        start, more = start.removesuffix(" --steps 1"), f" --reward_model {tmp_path}/rm"
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        SCRIPTS[script].main(f"{start}{more} --output_dir {tmp_path}/out".split())
    error, said = capfd.readouterr().err, r"error: LlamaForCausalLM: log-probs .* not supported\n"
    assert ended.value.code == 2 and re.fullmatch(said, error), error
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------- the chain
STEPS = "--steps 2 --warmup_steps 0 --max_response_tokens 12"
FLAGS = {
    "sft": f"{STEPS} --learning_rate 1e-3 --batch_size 4",
    "rm": f"{STEPS} --learning_rate 1e-2 --batch_size 4 --micro_tokens 128",
    "gvm": f"{STEPS} --learning_rate 1e-2 --batch_size 4 --micro_tokens 128",
    "dvpo": f"{STEPS} --learning_rate 1e-4 --rollout_batch_size 4 --batch_size 2",
    "sample": "--n 2 --max_response_tokens 12",
    "vcb": f"{STEPS} --learning_rate 1e-3 --batch_size 4",
}


def outputs(module, rows):
    """What a model computes in training, before it is saved: log-probs, values or rewards of random rows."""
    kind = type(module).__name__
    with torch.no_grad():
        if kind == "RewardModel":
            return module(*rm.collate_scored([p + r for p, r in rows], 0, CPU))
        batch = sft.collate(rows, 0) if kind == "Policy" else gvm.collate_values([[row] for row in rows], 0, False)
        return module(batch)[batch[-1]]


def stock_outputs(model, script, rows):
    """The same by the stock class's own forward pass."""
    if script not in KIND:
        return stock_logps(model, rows).float()
    with torch.no_grad():
        if script == "gvm":
            return torch.cat([model(torch.tensor([p + r])).logits[0, len(p) - 1 :, 0] for p, r in rows])
        ids, _, _ = rm.collate_scored([p + r for p, r in rows], model.config.pad_token_id, CPU)
        lengths = torch.tensor([len(p) + len(r) for p, r in rows])
        return model(ids, attention_mask=(torch.arange(ids.shape[1]) < lengths[:, None]).long()).logits[:, 0]


def run(script, folder, *flags, family=""):
    """A run of a script under default flags, and what must hold of it; returns final/, or sample.py's rows."""
    import transformers

    module, before, folder = SCRIPTS[script], [], folder / script
    rows, finish = random_rows(), None if script == "sample" else module.Run.finish

    def finishing(self, *rest, **summary):
        before.append(outputs(self.engine.module.eval(), rows))
        return finish(self, *rest, **summary)

    with (
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(action="ignore"),
        mock.patch("torch.cuda.is_available", return_value=False),
        mock.patch.object(module.Run, "finish", finishing) if finish else contextlib.nullcontext(),
    ):
        module.main([*map(str, flags), *FLAGS[script].split(), "--output_dir", str(folder)])
    path = folder / ("metrics.jsonl" if finish else "graded.jsonl")
    lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]  # a text may hold other ends of line
    if script == "sample":
        scores = [[response["score"] for response in line["responses"]] for line in lines]
        assert len(lines) == 20 and all(len(s) == 2 and all(map(math.isfinite, s)) for s in scores)
        return path
    assert len(lines) == 2 and all(math.isfinite(value) for line in lines for value in line.values())
    assert all(line.get("logp_gap_max", 0) < 1e-4 for line in lines)  # in dvpo, generation's log-probs are training's
    config = transformers.AutoConfig.from_pretrained(folder / "final")
    auto = model_class(KIND.get(script, "causal"), config)
    assert auto.__name__.startswith("AutoModelFor") == (family not in NO_CLASS.get(script, ()))
    model, loading = auto.from_pretrained(folder / "final", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    start = transformers.AutoModel.from_pretrained(flags[1])  # whose weights were not left behind
    assert torch.allclose(*(x.get_input_embeddings().weight for x in (start, model)), atol=0.05)
    after = stock_outputs(model.eval(), script, rows)
    assert float(after.std()) > 0.02 and torch.allclose(after, before[0], atol=1e-4, rtol=1e-4)
    assert (folder / "final" / "adapter").is_dir() == (script in KIND and "--lora_r" not in flags)
    return folder / "final"


FAST = ("llama_tied", "gemma3", "gpt2")


@pytest.mark.parametrize("family", [x if x in FAST else pytest.param(x, marks=pytest.mark.slow) for x in FAMILIES])
def test_a_family_through_all_scripts(home, tmp_path, family):
    import transformers

    data = ["--data", home / "rows.jsonl"]
    policy = run("sft", tmp_path, "--model", home / family, *data)
    values = run("gvm", tmp_path, "--model", policy, *data, family=family)
    reward = run("rm", tmp_path, "--model", policy, *data, family=family)
    run("dvpo", tmp_path, "--policy", policy, "--gvm", values, *data)
    drawn = run("sample", tmp_path, "--policy", policy, "--reward_model", reward, *data)
    final = run("vcb", tmp_path, "--policy", policy, "--data", drawn)
    tok, first = transformers.AutoTokenizer.from_pretrained(final), tokenizer(FAMILIES[family][1])
    assert tok.get_vocab() == first.get_vocab() and tok.chat_template == first.chat_template


@pytest.mark.parametrize("flags", ["", "--lora_r 0"])
def test_a_deberta_reward_model_grades_a_gpt_neox_policy(home, tmp_path, flags):
    args = sft.Args()
    own, other = (sft.load_tokenizer(str(home / name), args, chat=False) for name in ("deberta", "gpt_neox"))
    pair = rm.encode_pair(own, ASKED[0], "It is late.", args)
    assert own.decode(pair).count("[SEP]") == 2 and own.get_vocab() != other.get_vocab()
    policy = run("sft", tmp_path, "--model", home / "gpt_neox", "--data", home / "rows.jsonl")
    reward = run("rm", tmp_path, "--model", home / "deberta", "--data", home / "rows.jsonl", *flags.split())
    drawn = run("sample", tmp_path, "--policy", policy, "--reward_model", reward, "--data", home / "rows.jsonl")
    run("vcb", tmp_path, "--policy", policy, "--data", drawn)


# --------------------------------------------------------------------------------------------------------- end of a turn
LIMITS = SimpleNamespace(max_prompt_tokens=500, max_response_tokens=500)
KNOWS_SYSTEM = [style for style in TEMPLATES if style not in ("gemma", "mistral")]


def messages(prompt, text):
    return [*sft.as_messages(prompt), {"role": "assistant", "content": text}]


def rendered(tok, chat, end):
    """Ids of a conversation by the template alone, up to and with the last answer's end; what is behind it is no text."""
    whole = tok.apply_chat_template(chat, return_dict=False)
    size = len(whole) - whole[::-1].index(tok.convert_tokens_to_ids(end))
    assert not tok.decode(whole[size:]).replace(tok.eos_token, "").strip()
    return whole[:size]


def encoded(tok, prompt, text):
    before, response = sft.encode(tok, {"prompt": prompt, "text": text}, "text", LIMITS)
    return before + response


def conversation(tok, prompts, texts):
    """Ids of [tau ; x ; y], the last prompt and text being x and y."""
    group = [gvm.Answer(sft.as_messages(p), sft.response_ids(tok, t, LIMITS)) for p, t in zip(prompts, texts)]
    turns = gvm.render(tok, group, 10**4)
    assert [response for _, response in turns] == [answer.response for answer in group]
    return [token for turn in turns for part in turn for token in part]


@pytest.mark.parametrize("style", TEMPLATES)
def test_a_response_ends_where_the_template_ends_it(home, style):
    tok, end = tokenizer(style), TEMPLATES[style][2]
    for prompt in ASKED if style in KNOWS_SYSTEM else ASKED[::2]:
        ids = encoded(tok, prompt, "It is late: no train.")
        assert ids[-1] == tok.convert_tokens_to_ids(end) == sft.control_tokens(tok)[0]
        assert ids == rendered(tok, messages(prompt, "It is late: no train."), end)
    family = next(name for name, (_, of, _) in FAMILIES.items() if of == style)
    model = sft.load_model("causal", str(home / family), tok, sft.Args())
    assert sft.Policy(model).ends == {ids[-1], tok.eos_token_id} == set(sample.end_tokens(str(home / family), tok))


@pytest.mark.parametrize("style", TEMPLATES)
def test_tau_x_and_y_are_the_conversation_that_the_template_makes(style):
    tok, end = tokenizer(style), TEMPLATES[style][2]
    texts = "It is late.", "No.", "Seven minutes, about."
    for prompts in ([ASKED[0], ASKED[2]], [ASKED[2], ASKED[0], "Why not?"]):
        chat = [m for pair in zip(prompts, texts) for m in messages(*pair)]
        assert conversation(tok, prompts, texts) == rendered(tok, chat, end)
    if style in KNOWS_SYSTEM:  # x's own opens the conversation
        system, asked = ASKED[1]
        chat = [system, *messages(ASKED[0], "It is late."), *messages([asked], "No.")]
        assert conversation(tok, ASKED[:2], texts) == rendered(tok, chat, end)


@pytest.mark.parametrize("style", [style for style in TEMPLATES if style not in KNOWS_SYSTEM])
def test_a_system_message_that_the_template_does_not_take_opens_the_first_question(style):
    tok, (system, asked) = tokenizer(style), ASKED[1]
    folded = f"{system['content']}\n\n{asked['content']}"
    assert encoded(tok, ASKED[1], "No.") == encoded(tok, folded, "No.")
    chat = [*messages(f"{system['content']}\n\n{ASKED[0]}", "No."), *messages([asked], "Yes.")]
    assert conversation(tok, ASKED[:2], ["No.", "Yes."]) == rendered(tok, chat, TEMPLATES[style][2])


# ------------------------------------------------------------------------------------------ control tokens spelled in text
@pytest.mark.parametrize("style", TEMPLATES)
@pytest.mark.parametrize("where", ["prompt", "response", "earlier"])
def test_a_control_token_that_is_spelled_in_text_stays_text(style, where):
    tok, (_, eos, end, _, *others) = tokenizer(style), TEMPLATES[style]
    control = set(sft.control_tokens(tok)[1].values()) - {tok.unk_token_id}
    spelled = " and ".join(["I say", *dict.fromkeys((end, eos, *others)), "to you"])
    chat = {
        "prompt": lambda text: (f"Why {text}?", "No."),
        "response": lambda text: ("Why?", text),
        "earlier": lambda text: (messages("Why?", text) + ASKED[2][2:], "No."),
    }[where]
    found = []
    for x, y in (chat(spelled), chat("I say it to you")):
        found += [encoded(tok, x, y), conversation(tok, ["Is it?", x], ["Yes.", y])]
    for ids, harmless in zip(found[:2], found[2:]):
        assert [i for i in ids if i in control] == [i for i in harmless if i in control]
        assert tok.decode(ids).count(spelled) == 1


def test_a_tokenizer_that_cannot_tell_control_tokens_from_text_is_told_of_the_row(tmp_path, capfd):
    tok, good = toy.tokenizer(), {"prompt": "how is the soup ?", "completion": "it is good ."}
    bad = [good | {"completion": "it is <eos> good ."}, good | {"prompt": "how is <eos> the soup ?"}]
    for row in bad:
        with pytest.raises(ValueError, match="a control token is spelled in"):
            sft.encode(tok, row, "completion", LIMITS)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, *bad, good)))
    args = SimpleNamespace(data=str(path), split="train", seed=0, skip_bad_rows=True)
    encode = lambda row: [sft.encode(tok, row, "completion", LIMITS)]
    assert len(sft.load_data(args, "sft", encode)) == 2
    assert f"2 of 4 rows left out, the first one because of {path} row 2: a control token" in capfd.readouterr().out
    args.skip_bad_rows = False
    with pytest.raises(SystemExit) as ended:
        sft.load_data(args, "sft", encode)
    assert ended.value.code == 2 and f"{path} row 2: a control token" in capfd.readouterr().err
