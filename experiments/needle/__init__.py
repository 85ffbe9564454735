"""Needle in a haystack: one sentence, hidden at every depth of texts of every length."""
