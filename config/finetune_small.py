"""What the fine-tunings of small models with few labels share.

Built on by finetune_demo.py, finetune_fsdd.py, finetune_wakewords.py and finetune_esc10.py, which say what each costs,
how much time it takes and what to expect.
"""
warmup_steps = 20
lr = 1e-3
layer_decay = 1.0               # few layers
head = 'probe'                  # begin where a linear probe of the features ends
pooling = 'bands'               # few labels: 83 % on spoken digits where mean has 68 (docs/recipe.md)
label_smoothing = 0.1
eval_interval = 100
log_interval = 50
workers = 0
