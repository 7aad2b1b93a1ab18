"""`s2ft train`: one fine-tuning, from options to a result with its card.

Read `options`, then `train`.

    method      what is asked of each method
    methods     S²FT and what it is compared with: where a method is added
    objectives  what is learned from which data: where an objective is added
    options     every option, once
    schema      the options as a JSON schema, for editors
    values      how an option's value is read, and what is refused
    inputs      checks that the files and folders of the options exist
    preview     what a run would make of its data
    launch      can a run start? inputs, output, and what several processes support
    engines     FSDP2 and DeepSpeed: how a model is loaded for them, and what is saved
    recipe      batch and learning rate where they are not given, with the reason
    channels    which channels a run of S²FT trains
    lora        LoRA and DoRA: config, targets, rank
    peft_methods  PEFT's own methods, with the keys of their own configs
    paca        PaCA: columns drawn in each layer by itself
    contest     one run for each of several methods
    lisa        LISA, as a callback
    galore      GaLore: import, targets, checkpoints
    trial       one batch before the run: its time and memory
    layout      in place or indexed, with the reason
    search      the learning rate, by short runs
    estimate    time and memory of a run, before it starts
    machines    options of `s2ft plan`: devices
    fit         memory per device, from a model's configuration: what fits, with which engine
    arguments   options → TRL's `SFTConfig`
    head        the head of TRL's loss, in tiles that suit a CPU
    holdout     the held-out loss, in batches
    trackers    TensorBoard, W&B and others: which there are, and whether they are installed
    live        a run while it trains, in the terminal
    trainer     TRL's trainers with an orderly stop; supervised fine-tuning
    trainers    the trainers of the other objectives
    orpo        ORPO's, which is an experiment of TRL
    reward_functions  your functions that reward answers: found, run, checked
    checkpoints  which of a run's checkpoints are complete, and which are kept
    prepare     from options to a run that is ready to start
    train       fine-tuning in one call
    resume      finds the newest checkpoint, and checks that it belongs to this run
    samples     what base and result answer to the same prompts
    weights     what each layer's change weighs
    results     the files that a run writes into its folder
    hub         the upload of a result: is it allowed, and how
    card        the run card
    model_card  the result's README for the Hub
"""
