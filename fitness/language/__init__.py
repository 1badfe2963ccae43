"""Objectives of causal language models on the user's own texts, questions and prompts."""
