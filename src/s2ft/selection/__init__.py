"""Which heads and channels are trained.

Read `structure`, then `select`, which asks the others in turn.

    structure  what is coupled with what in a live model
    families   by which names families write their blocks, and how heads lie in them
    towers     what stands beside the language model
    coverage   what of a model is reached, and what is left out
    targets    which projections are trained
    budget     how many units each layer trains
    scores     how important a head or channel is: the registry `SCORES`
    select     which ones: `select`

    weight_scores  scores that need no data
    data_scores    scores that read data
"""
