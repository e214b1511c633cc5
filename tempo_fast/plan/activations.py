"""Activations that a backward needs, per token: what autograd keeps of transformers' layers with peft's adapters.

D hidden size, F width of the MLP, H query heads, K key heads, d head size, R rank of the adapters, s bytes of an
element (2 for bfloat16, 4 for float32), m bytes a dropout keeps of an element (1 on CUDA, 4 on a CPU, 0 without one).

A decoder layer keeps, in bytes per token:

    norms      2 · 4·D          RMSNorm works in float32: a copy of its input, or the residual itself (s = 4)
    attention  s·(2·H·d + 2·X·d) + 4·H    query and output, key and value (X = K, or H where heads are repeated), and
                                the log-sum-exp; 2·s·H·d more where one layer makes query, key and value (vision)
    MLP        3 · s·F          gate, its activation, the way up
    adapters   Σ (4 + m)·in + 4·R over the adapted layers: peft casts each layer's input to float32, drops some of it
               out, and keeps it for the gradient of A, and A's output for that of B. Without dropout in a float32 model
               nothing is copied, so layers share one input, and attention's output is kept already.
    weights    Σ s·in over distinct inputs where the model itself trains, and s·D for each norm's weight
    inputs     the same Σ under ZeRO-3, whose linear function keeps its input whether its weight trains or not (with
               ``selective`` torch's own runs, ``runtime/zero_config.py``)

With full checkpointing a layer keeps its input, s·D, and one layer at a time has all of the above. ``selective`` also
keeps outputs of matmuls that do not widen (q, k, v, o, down: s·(2·D + H·d + 2·K·d); of A: 4·R) and attention's
output. Beyond what is kept, the backward of the last layer's MLP holds (``in_backward``) its gradients.

Sources: transformers 5.23 (models/qwen2_vl/modeling_qwen2_vl.py), peft 0.21 (tuners/lora/layer.py), ``training/
activations.py``, ``trees/attention_merged.py``; held against torch.autograd.graph.saved_tensors_hooks in the tests.
"""

from __future__ import annotations

from tempo_fast.plan.setting import Setting
from tempo_fast.plan.shapes import Linear, Tower

# peft's layers that share an input with the one before, and those whose input attention keeps already
_SHARED = ("k_proj", "v_proj", "up_proj")
_OF_ATTENTION = ("o_proj", "proj")


def kept_by_layer(tower: Tower, s: Setting) -> dict[str, float]:
    """Bytes per token that one layer keeps for its backward when nothing is computed again, by term."""
    d, f, heads = tower.width, tower.mlp, tower.heads * tower.head_dim
    keys = tower.key_heads * tower.head_dim
    norm = 4 * d if tower.rms and not s.liger else s.size * d
    seen = keys_kept(tower, s)
    # values are a view of what one layer made of all three
    joined = 2 * heads if any(_leaf(x) == "qkv" for x in tower.linears) else 0
    kept = {
        "norms": 2.0 * norm + (4 * (heads + keys) if tower.head_norms else 0),
        "attention": s.size * (2 * heads + 2 * seen + joined) + 4 * tower.heads,
        "mlp": (2 if s.liger else 3) * s.size * f if tower.gated else 2 * s.size * f,
    }
    inputs = sum(x.inputs for x in tower.linears if _leaf(x) not in (*_SHARED, *_OF_ATTENTION))
    if s.lora:
        kept["adapters"] = sum(kept_by_adapter(x, s) for x in tower.linears if x.adapted)
        if s.deepspeed and s.stage == 3 and s.policy != "selective" and (s.dropout or s.size == 2):
            kept["inputs"] = s.size * inputs
    else:
        kept["weights"] = s.size * (inputs + 2 * d)
    return kept


def keys_kept(tower: Tower, s: Setting) -> int:
    """Elements per token that attention keeps of the keys (and as many of the values)."""
    heads, keys = tower.heads * tower.head_dim, tower.key_heads * tower.head_dim
    if not s.cuda:
        return heads  # torch's kernel for CPUs takes no grouped heads: they are repeated
    # split: the answers' call takes a mask, and therefore repeated heads
    return keys + heads if s.attention == "split" and s.trees else keys


def kept_by_adapter(linear: Linear, s: Setting) -> float:
    """Bytes per token that the adapter of one layer keeps."""
    if s.dropout or s.size == 2:
        return (4 + s.mask) * linear.inputs + 4 * s.rank
    alone = _leaf(linear) not in (*_SHARED, *_OF_ATTENTION)
    return (4 * linear.inputs if alone else 0) + 4 * s.rank


def _leaf(linear: Linear) -> str:
    return linear.name.rsplit(".", 1)[-1]


def kept(tower: Tower, s: Setting, *, crossing: float = 0.0) -> float:
    """Bytes per token that all layers keep between forward and backward under the policy.

    ``crossing``: share of the tokens that are answers; attention keeps their output twice (over their own branch, and
    over the prompt).
    """
    if s.policy == "none":
        return tower.depth * sum(kept_by_layer(tower, s).values())
    layer: float = s.size * tower.width
    if s.policy == "selective":
        heads = 0 if s.hides_attention else tower.heads * tower.head_dim
        layer += sum(s.size * x.outputs for x in tower.linears if x.outputs <= x.inputs)
        layer += sum(4 * s.rank for x in tower.linears if x.adapted)
        layer += (s.size * heads + 4 * tower.heads * bool(heads)) * (1 + crossing)
    return tower.depth * layer


def again(tower: Tower, s: Setting) -> float:
    """Bytes per token that one layer adds while the backward computes it again; 0 where nothing is.

    What the policy has kept is not made twice.
    """
    if s.policy == "none":
        return 0.0
    whole = sum(kept_by_layer(tower, s).values())
    # the first norm's float32 input is the kept one
    shared = s.size * tower.width if s.size == 4 else 0
    if s.policy == "selective":
        shared += 0 if s.hides_attention else s.size * tower.heads * tower.head_dim
        shared += sum(4 * s.rank for x in tower.linears if x.adapted)
        # what was kept of q, k, v and o goes as it is used
        narrow = [x for x in tower.linears if x.outputs <= x.inputs]
        shared += s.size * sum(x.outputs for x in narrow[:-1])
    return whole - shared


def in_backward(tower: Tower, s: Setting) -> float:
    """Bytes per token of gradients at the highest point of an MLP's backward, over what was kept at its start.

    The way down first: A's gradient in float32, 4·F, while its input is still there; then gate and way up, when what
    the way down kept has gone. Beside it, gradients of the layer's output: one for the residual, one for the MLP, and
    the adapter's in float32.
    """
    f = tower.mlp
    if not s.lora:
        wide = 2 * s.size * f
    elif s.size == 4 and not s.dropout:
        wide = 8 * f
    else:
        wide = 4 * f
    return wide + (2 * s.size + 4) * tower.width
