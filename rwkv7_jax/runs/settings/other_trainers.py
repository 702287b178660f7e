"""The flags of other programs, and the settings or flags that replace them.

Source: BlinkDL/RWKV-LM@524481d RWKV-v7/train_temp/train.py; Joluck/RWKV-PEFT@5704c39 train.py;
lm-evaluation-harness (`num_fewshot`).
"""

EQUIVALENTS = {
    "load_model": "config.init",
    "proj_dir": "workdir",
    "random_seed": "config.seed",
    "wandb": "config.trackers",
    "peft": "config.mode",
    "train_type": "config.mode",
    "quant": "config.model.weights",
    "data_file": "config.data.path",
    "data_shuffle": "config.data.order",
    "magic_prime": "config.data.order",
    "dataload": "config.data.packing",
    "ctx_len": "config.data.length",
    "micro_bsz": "config.data.batch_size",
    "accumulate_grad_batches": "config.optimizer.accumulate",
    "epoch_count": "config.steps",
    "epoch_steps": "config.steps",
    "my_exit_tokens": "config.steps",
    "epoch_save": "config.save_every",
    "vocab_size": "config.model.vocab_size",
    "n_layer": "config.model.num_layers",
    "n_embd": "config.model.width",
    "dim_ffn": "config.model.ffn_width",
    "head_size_a": "config.model.head_size",
    "grad_cp": "config.model.remat",
    "precision": "config.model.dtype",
    "lr_init": "config.optimizer.learning_rate",
    "lr_final": "config.optimizer.final_learning_rate",
    "lr_schedule": "config.optimizer.schedule",
    "beta1": "config.optimizer.b1",
    "beta2": "config.optimizer.b2",
    "adam_eps": "config.optimizer.eps",
    "grad_clip": "config.optimizer.clip",
    "strategy": "config.mesh",
    "devices": "config.mesh",
    "num_nodes": "processes",
    "num_fewshot": "config.shots",
}
