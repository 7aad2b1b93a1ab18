"""`s2ft reproduce`: rows of the paper's tables, from data to a score beside the paper's.

recipes   rows of the paper's tables, as recipes
run       a recipe, run: train, evaluate, compare
memory    how much GPU memory a recipe needs
duration  how long it trains
table     both, for all recipes
"""
