"""Runs that are killed, starved and poisoned, and what becomes of them."""
