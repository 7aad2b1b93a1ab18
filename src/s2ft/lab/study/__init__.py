"""`s2ft study`: the paper's claims at small scale, on the embedded base and on a real model.

selection       how the choice of channels matters
generalization  what is learned, carried over, forgotten
fusion          adapters of two skills, fused
commonsense     real text: commonsense questions
defaults        a real model: the defaults beside a grid of rates and LoRA
real            a real model: the paper's claims
contenders      the methods that are compared, and their learning rates
tuning          finds the best learning rate on a grid
training        one fine-tuning in memory
material        what a real model is trained on and asked
experiment      one run on a real model
chains          runs side by side, each contender's after its rate is tuned
workers         processes that perform runs
runs            keeps finished runs, so that a study can continue
summary         means with Student's interval
report          scores and table
bars            the picture of scores
curves          the picture of loss against learning rate
"""
