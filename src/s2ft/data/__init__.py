"""Training data and questions: records from files and the Hub, chat templates, tokens.

sources   what a name stands for, a file, a folder or a data set on the Hub; is it there?
records   records from files and the Hub, each with its file and line for error messages
examples  one form for the three layouts of training data
chat      conversations: what a record may hold, which turns the loss falls on
template  renders the model's chat template; what it leaves out, where it ends a turn
prompts   prompts: Alpaca's, and through the chat template
tokens    token ids, with labels on the response only
preferences  pairs of answers, judged answers, and prompts alone
preference_tokens  their token ids
packing   tests whether packed examples see each other
folder    where files are in a folder like LLM-Adapters'
"""
