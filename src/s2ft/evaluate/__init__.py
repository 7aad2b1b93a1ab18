"""`s2ft eval`: questions, answers, scores.

Read `tasks`, then `run`.

    tasks       the tasks, and their questions from files and the Hub
    extraction  how an answer is read
    engines     what writes answers: the interface, and vLLM
    generation  answers by transformers, in batches of like length
    answers     answers kept in JSONL, resumable
    writing     unanswered prompts → engine → rows
    tally       counts, intervals, means
    subjects    base and adapters: loaded, told apart
    run         evaluation in one call
    scores      base against tuned, for the run card
    mt_bench    MT-Bench's questions and both turns
    judge       a judge behind OpenAI's protocol
    judging     answers rated, ratings counted
    harness     tasks of the lm-evaluation-harness
"""
