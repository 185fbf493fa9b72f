"""Runs of a recipe: plan, warm start, dry run, check, run, compare."""
