"""Sweeps: models of many ratios, budgets and recipes, judged side by side."""
