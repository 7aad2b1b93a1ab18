"""Every model class of transformers, as a tiny random model, and whether s2ft trains it exactly.

tiny   builds the models, and what they are called with
own    what some families want otherwise
check  trains, saves, reloads, merges and lays out one of them, beside full autograd
steps  trains one of them for a few steps, beside full autograd
page   the support table of the documentation
"""
