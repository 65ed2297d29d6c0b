"""Tasks: from rows in a file to a model that was trained, kept at its best, and scored.

tables          rows from files or the Hub, columns by role, splits that keep groups together
text            translation, summarisation, dialogue;  labels: classes of texts and of tokens;  answers: questions
examples        what the model is given; padding; dropped and masked tokens
objective       the loss: per label of the whole step; smoothing, R-Drop
batches         batches that grow;  optimisers: those that Trainer has no name for;  search: hyper-parameters
trainer         Seq2SeqTrainer with all of this
models          pretrained models made longer and fast; TFast models from scratch
run             from arguments to saved models, figures and a table;  evaluate: a saved model on rows
"""
