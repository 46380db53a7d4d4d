"""Heads of Hugging Face models: the LM head, read through `linear_logprob`, and the head of one label (values, rewards).

What a family does to its logits is done here too: soft cap (Gemma) and logit scale (Cohere multiplies, Granite divides) are
read from the text part of the model's config, the bias from the head. Whatever else a head does shows in `logit_gap`,
which compares with the model's own logits.
"""

import torch

from kernels.logprob import linear_logprob, linear_nll


def patch_head(model):
    """Lets the model's LM head answer with log-probs; without a target it is what it was.

    head(hidden (N, D), target (N,), temperature) → (N,) fp32 log-probs of logits / temperature, from fp32 logits: bf16
    ones cost 0.02 nat a token, and sums and ratios feel it. head(hidden, target, token_weight=w) → -w Σ logp, a scalar.
    All inside the head's own forward: there ZeRO-3 has gathered its weight."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    stock, softcap = head.forward, getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logits_scaling", 1.0) / getattr(config, "logit_scale", 1.0)

    def forward(hidden, target=None, temperature: float = 1.0, token_weight: float | None = None):
        if target is None:
            return stock(hidden)
        options = {"bias": head.bias, "temperature": temperature * scale, "softcap": softcap}
        if token_weight is None:
            return linear_logprob(hidden, head.weight, target, logits_dtype=torch.float32, **options)
        weight = torch.full(target.shape, token_weight, dtype=torch.float32, device=target.device)
        return linear_nll(hidden, head.weight, target, weight, **options)

    head.forward = forward


def hidden_states(backbone, input_ids, position_ids=None):
    """Last hidden states (B·L, D). With positions (B, L) that begin anew at each sequence packed into a row, attention stays
    inside a sequence: by a block mask that transformers builds of them, or by flash-attn's variable-length path."""
    packed = {}
    if position_ids is not None and "flash" in (backbone.config._attn_implementation or ""):
        # It takes packed sequences in one row. It is told where they begin: else every layer would look, and wait for the device.
        input_ids, position_ids = input_ids.view(1, -1), position_ids.view(1, -1)
        starts = (position_ids[0] == 0).nonzero()[:, 0].to(torch.int32)
        ends = torch.nn.functional.pad(starts, (0, 1), value=position_ids.shape[1])
        longest = int(ends.diff().max())
        packed = {f"cu_seq_lens_{x}": ends for x in "qk"} | {f"max_length_{x}": longest for x in "qk"}
    if position_ids is not None:
        packed["position_ids"] = position_ids
    return backbone(input_ids=input_ids, use_cache=False, **packed).last_hidden_state.flatten(0, 1)


@torch.no_grad()
def packing_gap(model) -> float:
    """How much a sequence's hidden states change when another stands before it in its row: mean |difference| over mean |value|.
    Rounding (1e-3 in bf16), or near 1 where it sees the other."""
    training, device = model.training, next(model.parameters()).device
    ids, positions = torch.arange(1, 25, device=device)[None], torch.arange(16, device=device)
    backbone = getattr(model, model.base_model_prefix)
    model.eval()
    packed = hidden_states(backbone, ids, torch.cat([positions, positions[:8]])[None])[16:]
    alone = hidden_states(backbone, ids[:, 16:])
    model.train(training)
    return float((packed - alone).abs().mean() / alone.abs().mean())


@torch.no_grad()
def logit_gap(model) -> float:
    """Mean distance, in nats, of the patched head's log-probs from log_softmax of the model's own logits, on one row.

    Below 1e-3 in fp32 where the head is understood; in bf16 the model's own logits are rounded (up to 0.1)."""
    training, device = model.training, next(model.parameters()).device
    ids = torch.arange(1, 17, device=device)[None]
    model.eval()
    hidden = hidden_states(model.get_decoder(), ids)[:-1]
    ours = model.get_output_embeddings()(hidden, ids[0, 1:])
    own = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    model.train(training)
    return float((ours - own).abs().mean())


def model_class(kind: str, config):
    """The class of a `causal`, `value` (token classification) or `reward` (sequence classification) model: transformers'
    Auto class, or where it has none for the family, its generic head on the family's backbone. What that saves loads by
    `model_class(kind, AutoConfig.from_pretrained(folder)).from_pretrained(folder)`."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    task = {"causal": "CausalLM", "value": "TokenClassification", "reward": "SequenceClassification"}[kind]
    auto = getattr(transformers, f"AutoModelFor{task}")
    if kind == "causal" or type(config) in auto._model_mapping or getattr(config, "auto_map", None):
        return auto
    base = next(c for c in MODEL_MAPPING[type(config)].__mro__[1:] if issubclass(c, transformers.PreTrainedModel))
    head, name = (
        getattr(transformers.modeling_layers, f"GenericFor{task}"),
        type(config).__name__.removesuffix("Config"),
    )
    return type(f"{name}For{task}", (head, base), {"config_class": type(config), "base_model_prefix": "model"})


def head_name(model) -> str:
    """The model's name for its head of one label: `score` (most) or `classifier` (DeBERTa; GPT-NeoX and GPT-2 by token)."""
    return "score" if hasattr(model, "score") else "classifier"


def read_head(model, input_ids, position_ids, position):
    """The one-label head's output at flat `position`s (N,) of input_ids (B, L): (N,) fp32, computed in its weights' precision."""
    hidden = hidden_states(getattr(model, model.base_model_prefix), input_ids, position_ids)
    hidden, head = hidden.index_select(0, position), getattr(model, head_name(model))
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.to(head.weight.dtype)).float().squeeze(-1)
