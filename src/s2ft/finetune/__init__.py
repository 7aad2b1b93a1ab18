"""`s2ft train`: one fine-tuning, from options to a result with its card.

Read `options`, then `train`.

    options     every option, once
    inputs      are the files and folders there that the options name?
    launch      what several processes can train together
    recipe      batch and learning rate that were left open, and why
    channels    which channels a run of S²FT trains
    baselines   the methods that S²FT is compared with
    lisa        LISA, as a callback
    galore      GaLore: import, targets, checkpoints
    layout      in place or indexed, and why
    arguments   options → TRL's `SFTConfig`
    trainer     TRL's `SFTTrainer` with whole checkpoints and a polite end
    train       fine-tuning in one call
    resume      which checkpoint, and is it of this run?
    results     what a run leaves in its folder
    card        the run card
    model_card  the result's README for the Hub
"""
