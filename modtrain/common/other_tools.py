"""What Lightning, Hugging Face's Trainer, litgpt and torchtitan call what has another name here.

Only to answer a key or a value that is not known with the one to write; none of these is accepted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

_SECTIONS = (
    *("trainer", "train", "training", "training_args", "args", "model_args", "data_args"),
    *("optimizer", "optim", "lr_scheduler", "model", "data", "eval", "metrics", "job", "logger"),
)

KEYS: dict[str, tuple[str, ...]] = {
    "optimizer.lr": ("lr", "learning_rate", "max_lr", "peak_lr"),
    "optimizer.weight_decay": ("wd", "weight_decay"),
    "optimizer.beta1": ("adam_beta1",),
    "optimizer.beta2": ("adam_beta2",),
    "optimizer.eps": ("adam_epsilon", "adam_eps"),
    "optimizer.grad_clip": (
        "gradient_clip_val",
        "max_grad_norm",
        "max_norm",
        "clip_grad",
        "grad_clip",
    ),
    "schedule.warmup_steps": ("lr_warmup_steps", "num_warmup_steps", "warmup_iters"),
    "schedule.warmup": ("warmup_ratio", "lr_warmup_fraction", "warmup_fraction"),
    "seed": ("seed_everything", "random_seed"),
    "budget.steps": ("max_steps", "train_steps", "num_train_steps", "total_steps", "max_iters"),
    "budget.tokens": ("train_tokens", "num_tokens", "total_tokens"),
    "budget.flops": ("max_flops", "compute_budget"),
    "budget.epochs": ("epochs", "max_epochs", "num_train_epochs", "num_epochs", "n_epochs"),
    "max_time": ("max_time", "max_train_time", "time_limit", "train_time_limit", "walltime"),
    "batch.micro_batch_size": (
        *("batch_size", "train_batch_size", "per_device_train_batch_size", "local_batch_size"),
        *("micro_batch", "per_device_batch_size", "bs"),
    ),
    "eval.batch_size": ("per_device_eval_batch_size", "eval_batch_size", "val_batch_size"),
    "eval.every": ("val_check_interval", "eval_steps", "eval_interval", "eval_freq"),
    "eval.sequences": ("limit_val_batches", "max_eval_samples"),
    "checkpoint.every": (
        *("save_steps", "save_interval", "every_n_train_steps", "checkpoint_interval"),
        *("save_every", "ckpt_freq"),
    ),
    "checkpoint.keep_last": ("save_total_limit", "save_top_k", "keep_latest_k"),
    "log.every": ("log_every_n_steps", "logging_steps", "log_interval", "log_freq"),
    "log.wandb_project": ("wandb_project", "project"),
    "log.progress": ("enable_progress_bar", "progress_bar"),
    "data.seq_len": (
        *("block_size", "max_seq_length", "max_seq_len", "max_length", "context_length"),
        *("sequence_length", "seq_length", "seq_len"),
    ),
    "data.path": ("dataset", "data_dir", "dataset_path", "dataset_name", "train_data", "data_path"),
    "data.num_workers": ("dataloader_num_workers", "num_workers"),
    "data.shuffle": ("shuffle",),
    "model.num_layers": ("n_layer", "n_layers", "num_hidden_layers", "layers", "depth"),
    "model.num_heads": ("n_head", "n_heads", "num_attention_heads", "heads"),
    "model.num_kv_heads": ("n_kv_heads", "num_key_value_heads", "n_query_groups"),
    "model.d_model": ("n_embd", "hidden_size", "dim", "emb_dim", "embed_dim"),
    "model.d_ff": ("intermediate_size", "ffn_dim", "hidden_dim_mlp"),
    "model.vocab_size": ("padded_vocab_size", "vocab"),
    "model.rope_theta": ("rope_base",),
    "strategy.accelerator": ("accelerator", "device"),
    "strategy.tensor_parallel": ("tensor_parallel_degree", "tp", "tp_size", "tensor_parallel_size"),
    "strategy.context_parallel": ("context_parallel_degree", "cp", "context_parallel_size"),
    "strategy.expert_parallel": ("expert_parallel_degree", "ep", "expert_parallel_size"),
    "deterministic": ("full_determinism",),
    "compile": ("torch_compile", "compile_model"),
    "name": ("run_name", "exp_name", "experiment_name", "wandb_run_name"),
    "runs_dir": ("out_dir", "output_dir", "default_root_dir", "save_dir", "log_dir", "logdir"),
    # of other verbs
    "run": (
        "runs",
        "checkpoint_dir",
        "ckpt",
        "checkpoint_path",
        "model_path",
        "model_name_or_path",
    ),
    "prompt": ("text", "input_text"),
    "text": ("prompt", "input_text"),
    "max_tokens": ("max_new_tokens", "num_tokens_to_generate"),
    "samples": ("num_samples", "num_return_sequences"),
    "sampling.temperature": ("temperature",),
    "sampling.top_k": ("top_k",),
    "sampling.top_p": ("top_p",),
    "sources": ("input", "inputs", "files", "corpus_path", "train_file"),
    "valid_fraction": ("val_split_fraction", "validation_split", "val_fraction", "test_size"),
    "text_column": ("text_field", "text_key", "dataset_text_field", "column"),
}
"""A key here, and the names that others give to it, without their sections."""

CHOICES: dict[str, tuple[str, ...]] = {
    "log": ("logger", "loggers", "report_to", "logger_name"),
    "schedule": ("lr_scheduler_type", "scheduler", "lr_schedule", "decay_type"),
    "optimizer": ("optim", "optimizer_name"),
    "model": ("model_name", "flavor", "config_name"),
    "strategy": ("distributed_strategy",),
}
"""A group here, and the names that others give to the choice."""

_LAUNCH = (
    "add launch=local num_processes={value}, or start the processes with torchrun"
    " --nproc-per-node {value} -m modtrain train …"
)
SENTENCES: dict[str, str] = {
    **dict.fromkeys(("devices", "gpus", "num_gpus", "nproc_per_node", "num_processes"), _LAUNCH),
    **dict.fromkeys(
        ("num_nodes", "nnodes"),
        "start the processes with torchrun --nnodes {value} …, or modtrain submit … nodes={value}",
    ),
    **dict.fromkeys(
        ("accumulate_grad_batches", "gradient_accumulation_steps", "gradient_accumulation_iters"),
        "accumulation follows from the batch: write batch.tokens=N, the tokens of a step over all"
        " devices",
    ),
    **dict.fromkeys(
        ("global_batch_size", "total_batch_size"),
        "batches are counted in tokens: write batch.tokens=N, {value} times the sequence length",
    ),
    **dict.fromkeys(
        ("resume_from_checkpoint", "ckpt_path", "resume_from", "init_from"),
        "the same name resumes the run; the weights of another run: init.run=NAME init.step=N",
    ),
    **dict.fromkeys(
        ("gradient_checkpointing", "use_gradient_checkpointing"),
        "write strategy.activation_checkpointing=full",
    ),
    "bf16": "write precision=bf16",
    "fp16": "fp16 is not offered: write precision=bf16",
    "do_eval": "held-out losses come with every run: set eval.every, or run modtrain eval",
}
"""What is no key here, and what to do instead."""

VALUES: dict[str, dict[str, str]] = {
    "precision": {
        **dict.fromkeys(("bf16-mixed", "bf16-true", "bfloat16", "bf16_mixed", "amp"), "bf16"),
        **dict.fromkeys(("16", "16-mixed", "16-true", "fp16", "float16", "half"), "bf16"),
        **dict.fromkeys(("32", "32-true", "float32", "float", "full"), "fp32"),
    },
    "log": {"json": "jsonl", "none": "jsonl", "tb": "tensorboard"},
    "resume": dict.fromkeys(("true", "always", "latest", "last", "must", "allow"), "auto"),
    "optimizer": {"adam": "adamw", "adamw_torch": "adamw", "adamw_torch_fused": "adamw"},
    "strategy": {
        **dict.fromkeys(("ddp_find_unused_parameters_true", "dp", "ddp_spawn"), "ddp"),
        **dict.fromkeys(("fsdp2", "full_shard", "fsdp_native"), "fsdp"),
        **dict.fromkeys(("deepspeed", "deepspeed_stage_2"), "deepspeed_2"),
        **dict.fromkeys(("deepspeed_stage_3", "zero3"), "deepspeed_3"),
        **dict.fromkeys(("auto", "none"), "single"),
    },
    "strategy.accelerator": dict.fromkeys(("gpu", "nvidia"), "cuda"),
    "schedule": {"cosine_with_min_lr": "cosine", "constant_with_warmup": "constant"},
}
"""Values of a key or group here, as others write them."""


def key_here(key: str, known: Collection[str], groups: Collection[str]) -> str | None:
    """Return the key or group that other tools call ``key``; None where it is not known.

    known: the keys of this configuration. groups: those that have choices.
    """
    section, _, name = key.replace("-", "_").rpartition(".")
    if section and section not in _SECTIONS:
        return None
    return _target(name, known, KEYS) or _target(name, groups, CHOICES)


def sentence_for(key: str, value: str, known: Collection[str]) -> str | None:
    """Return what to do in place of another tool's ``key=value`` that has no key here."""
    section, _, name = key.replace("-", "_").rpartition(".")
    if name not in SENTENCES or not _trains(known) or (section and section not in _SECTIONS):
        return None
    return SENTENCES[name].format(value=value or "N")


def value_here(key: str, value: str) -> str:
    """Return what another tool's value of a key or group is here, or ``value`` itself."""
    names = VALUES.get(key, {})
    return names.get(value.strip("'\"").lower(), value)


def _trains(known: Collection[str]) -> bool:
    return "budget.tokens" in known


def _target(name: str, known: Collection[str], table: Mapping[str, tuple[str, ...]]) -> str | None:
    return next((key for key, others in table.items() if name in others and key in known), None)
