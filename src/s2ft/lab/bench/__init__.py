"""`s2ft bench`: measurements beside other methods and a lower bound (the floor).

report         what benchmarks share: turns, and what comes back
training       what a training step costs
presets        its models and sizes, and the options that change them
bases          its frozen models
contestants    sets up each method for it
training_plot  a picture of time and memory
selection      how long choosing channels takes
switch         how long a switch takes, beside LoRA and one copy
fusion         how long fusing two adapters takes, on files
parallel       what many adapters in one batch cost, beside LoRA
quantised      whether gradients are right on each quantisation
dense          whether a slice held dense beside a quantised rest is faster or leaner
packed         tiny GPTQ, AWQ and float8 checkpoints for it
families       which of transformers' models are trained, and how exactly
serve          many clients ask `s2ft serve`, and what is compared with it
clients        those who ask
servers        servers in processes of their own
sync           how many bytes put an adapter into a running engine, beside LoRAs and the whole model
everyday       commands on files, and preparing data, beside reading and writing the bytes
distributed    two processes under each engine, beside one process and LoRA
divided        one of those processes
evaluation     how fast answers are generated, beside plain `generate`
"""
