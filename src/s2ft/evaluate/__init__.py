"""`s2ft eval`: questions, answers, scores.

Read `options` and `tasks`, then `run`.

    options     every option, once; are the files there that they name?
    tasks       the table of tasks
    questions   a task's questions, from files and the Hub
    extraction  how an answer is read
    engines     what writes answers: transformers, in batches of similar length, or vLLM
    writing     the tokens of a batch of answers; rows that have ended leave it
    answers     answers written, scored, and kept in JSONL; resumable
    tally       counts, intervals, means
    subjects    what is evaluated: the base and its adapters
    run         evaluation in one call
    comparison  scores of the base and the result, for the run card
    mt_bench    MT-Bench: questions, answers to both turns, ratings
    judge       a judge that speaks OpenAI's chat completions
    judge_http  one question to the judge's server, by OpenAI's client
    harness     tasks of the lm-evaluation-harness
likelihood  answers chosen by likelihood, and the perplexity of text
"""
