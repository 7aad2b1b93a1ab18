"""`s2ft serve`: many adapters of one base behind OpenAI's API.

Read `batch` and `scheduler` for the engine, then `service` and `app`.

options    every option, once
model      the base model: loaded, checked, ready for adapters
cache      keys and values of rows that come and go
batch      rows that go through the model together
sampling   the next token of each row
spelling   the text and the bytes of a token
text       tokens → text, up to a stop string
job        what is asked of the engine, and what comes back
row        one answer in the making
scheduler  which rows run; the thread that owns the model
adapters   names → adapters and fusions
requests   what clients may ask
responses  answers in OpenAI's shapes
errors     refusals in OpenAI's shape
keys       the keys of those who may ask
access     lets those through that have one
limits     how large and how slow a request may be
logs       a line for each request
metrics    counts for Prometheus
service    from a request to its events
answering  answers as responses, whole or streamed
app        routes, and what stands before them
channels   which channels an adapter trains, for the page
server     starts, runs and stops
vllm       the same through vLLM
"""
