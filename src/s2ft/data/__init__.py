"""Training data and questions: records from files and the Hub, chat templates, tokens.

sources   what a name stands for, a file, a folder or a data set on the Hub; is it there?
files     records of one file: JSON, JSON lines, CSV, Parquet, plain or compressed, each with its line for error messages
records   records from files, folders and the Hub
layouts   what a record is by its fields: chat, ShareGPT, Alpaca, questions, text; columns by other names
examples  one form for all layouts of training data
chat      conversations: what a record may hold, which turns the loss falls on
template  renders the model's chat template; what it leaves out, where it ends a turn
prompts   prompts: Alpaca's, and through the chat template
mapped    tables that need not fit in memory
cache     what was tokenised once, by content
tokens    token ids, with labels on the response only
preferences  pairs of answers, judged answers, and prompts alone
preference_tokens  their token ids
masks     which part of an example is learned, for people to see
packing   tests whether packed examples see each other
folder    where files are in a folder like LLM-Adapters'
"""
