"""Readers of data files: each gives named columns of one length. Numbers only, no kernel."""
