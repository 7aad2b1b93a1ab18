"""`s2ft study`: the paper's claims at small scale.

selection       how the choice of channels matters
generalization  what is learned, carried over, forgotten
fusion          adapters of two skills, fused
commonsense     real text: commonsense questions
contenders      the methods that are compared, and their learning rates
tuning          finds the best learning rate on a grid
training        one fine-tuning in memory
runs            keeps finished runs, so that a study can continue
summary         means with Student's interval
report          table and picture
"""
