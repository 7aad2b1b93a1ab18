"""`s2ft study`: the paper's claims at small scale.

selection       does it matter which channels are trained?
generalization  what is learned, carried over, forgotten
fusion          two skills, learned apart and added up
commonsense     real text: commonsense questions
contenders      who is compared, at which learning rate
tuning          the best learning rate, inside its grid
training        one fine-tuning in memory
runs            runs that are kept, so that a study goes on
summary         means with Student's interval
report          table and picture
"""
