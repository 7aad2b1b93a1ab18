"""`s2ft reproduce`: rows of the paper's tables, from data to a score beside the paper's.

options   every option, once
recipes   rows of the paper's tables, as recipes
run       runs a recipe: train, evaluate, compare
memory    how much GPU memory a recipe needs
table     the recipes as a table, with memory and an estimate of hours
"""
