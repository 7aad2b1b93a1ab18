"""Training data and questions: records from files and the Hub, chat templates, tokens.

records   records of files and the Hub, each with its place for error messages
examples  the three layouts of training data, brought to one
chat      conversations: what a record may hold, which turns are learned
template  the model's chat template: what it leaves out, where it ends a turn
prompts   the words that a model is asked in
tokens    token ids, with labels on the response only
packing   do packed examples see each other?
folder    where files lie in a folder like LLM-Adapters'
"""
