"""Which heads and channels are trained.

Read `units`, `structure`, then `select`, which asks the others in turn.

    units      heads and channels, and where they lie in layers
    structure  coupled projections of a live model: attention and MLP blocks
    families   model families: the names of their layers, and how heads lie in them
    towers     vision and audio towers beside the language model
    coverage   what of a model can be trained, and what is left out
    targets    which projections are trained
    budget     how many units each layer trains
    scores     how important a head or channel is: the registry `SCORES`
    select     `select`: chooses them

    weight_scores  scores that need no data
    data_scores    scores that read data
"""
