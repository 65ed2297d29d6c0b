"""Training from scratch: texts into packed sequences, a Trainer that says what it does, evaluation by distance.

sources      texts from files, folders, a Hub data set or the running Python; the split by document
tokens       byte-level tokens, or byte pairs learned in the run; both reload with AutoTokenizer
packing      documents into sequences of one length, whose segments attention tells apart
masking      masked language modelling: which tokens are hidden is a function of seed, epoch and row
occurrences  how far back a token last occurred: what a window can no longer see
evaluation   loss of every class of tokens, perplexity, bits per byte
guards       what accelerate would silently do differently on a CPU is refused
trainer      Transformers' Trainer with all of this
run          one training from arguments to a saved model; compare: the same for several mechanisms
"""
