"""`s2ft reproduce`: rows of the paper's tables, from data to a score beside the paper's.

options   every option, once
recipes   rows of the paper's tables, as recipes
run       runs a recipe: train, evaluate, compare
memory    how much GPU memory a recipe needs
duration  how long it trains
table     memory and time of all recipes
"""
