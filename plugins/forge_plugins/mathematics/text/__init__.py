"""Tokenizers and the generation of text."""
