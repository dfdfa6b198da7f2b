"""Controlled experiments: many fits that differ in a few keys, and one table of what came out."""
