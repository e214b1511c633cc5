"""The loss head and the objectives inside other trainers: thin mixins, nothing patched, nothing of them imported.

``answers``: per-token log-probs of any transformers causal model from its hidden states; ``trl``, ``ms_swift`` and
``llama_factory``: what each trainer's own method expects back, as a mixin and, through ``drop_in``, as the trainer with
the mixin in it. Needs torch (and the host trainer) alone.
"""
