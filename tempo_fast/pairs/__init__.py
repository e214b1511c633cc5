"""Preference pairs: captions of clips, perturbed answers, filters, spans, and the formats of others."""
