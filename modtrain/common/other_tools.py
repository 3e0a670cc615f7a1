"""What Lightning, Hugging Face's Trainer, litgpt and torchtitan call what has another name here.

Only to answer a key or a value that is not known with the one to write; none of these is accepted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

_SECTIONS = (
    *("trainer", "train", "training", "training_args", "args", "model_args", "data_args"),
    *("optimizer", "optim", "lr_scheduler", "scheduler", "model", "data", "datamodule", "dataset"),
    *("eval", "evaluation", "validation", "metrics", "job", "logger", "logging", "wandb"),
    *("checkpoint", "parallelism", "parallel", "activation_checkpoint", "compile", "comm"),
    *("generation", "generation_config", "sampling", "tokenizer", "dataloader", "experiment"),
)

KEYS: dict[str, tuple[str, ...]] = {
    "optimizer.lr": ("lr", "learning_rate", "max_lr", "peak_lr", "base_lr", "init_lr"),
    "optimizer.weight_decay": ("wd", "weight_decay"),
    "optimizer.beta1": ("adam_beta1",),
    "optimizer.beta2": ("adam_beta2",),
    "optimizer.eps": ("adam_epsilon", "adam_eps"),
    "optimizer.grad_clip": (
        *("gradient_clip_val", "max_grad_norm", "max_norm", "clip_grad", "grad_clip"),
        *("clip_grad_norm", "grad_norm_clip", "gradient_clipping"),
    ),
    "schedule.warmup_steps": (
        *("warmup_steps", "lr_warmup_steps", "num_warmup_steps", "warmup_iters"),
        *("lr_warmup_iters", "warmup_iterations"),
    ),
    "schedule.warmup": ("warmup_ratio", "lr_warmup_fraction", "warmup_fraction"),
    "schedule.decay": ("decay_ratio",),
    "schedule.final": ("min_lr_factor", "min_lr_ratio", "min_lr_rate", "alpha_f"),
    "seed": ("seed_everything", "random_seed", "global_seed"),
    "data.seed": ("data_seed",),
    "budget.steps": (
        *("max_steps", "train_steps", "num_train_steps", "total_steps", "max_iters", "train_iters"),
        *("num_iterations", "num_steps", "n_steps", "iterations", "training.steps"),
    ),
    "budget.tokens": (
        *("max_tokens", "train_tokens", "num_tokens", "total_tokens", "max_train_tokens"),
    ),
    "budget.flops": ("max_flops", "compute_budget"),
    "budget.epochs": ("epochs", "max_epochs", "num_train_epochs", "num_epochs", "n_epochs"),
    "max_time": ("max_time", "max_train_time", "time_limit", "train_time_limit", "walltime"),
    "batch.micro_batch_size": (
        *("batch_size", "train_batch_size", "per_device_train_batch_size", "local_batch_size"),
        *("micro_batch", "micro_batch_size", "per_device_batch_size", "device_batch_size", "bs"),
    ),
    "eval.batch_size": (
        *("per_device_eval_batch_size", "eval_batch_size", "val_batch_size"),
        *("validation.local_batch_size",),
    ),
    "eval.every": (
        *("val_check_interval", "eval_steps", "eval_interval", "eval_freq", "eval_every"),
        *("val_loss_every", "val_every", "eval.interval", "validation.freq"),
    ),
    "eval.sequences": ("max_eval_samples", "num_eval_samples"),
    "checkpoint.every": (
        *("save_steps", "save_interval", "every_n_train_steps", "checkpoint_interval"),
        *("save_every", "ckpt_freq", "checkpoint.interval", "checkpoint_every"),
    ),
    "checkpoint.keep_last": ("save_total_limit", "save_top_k", "keep_latest_k"),
    "checkpoint.background": ("async_mode", "async_save", "dist_ckpt_async"),
    "log.every": (
        *("log_every_n_steps", "logging_steps", "log_interval", "log_freq", "log_every"),
    ),
    "log.wandb_project": ("wandb_project", "project", "wandb.project"),
    "log.tensorboard": ("enable_tensorboard",),
    "log.progress": ("enable_progress_bar", "progress_bar"),
    "data.seq_len": (
        *("block_size", "max_seq_length", "max_seq_len", "max_length", "context_length"),
        *("sequence_length", "seq_length", "seq_len", "cutoff_len", "n_ctx", "context_size"),
    ),
    "data.path": (
        *("dataset", "data_dir", "dataset_path", "dataset_name", "train_data", "data_path"),
        *("train_data_path", "data_root", "train_data_dir"),
    ),
    "data.num_workers": ("dataloader_num_workers", "num_workers", "num_dataloader_workers"),
    "data.prefetch_factor": ("dataloader_prefetch_factor", "prefetch_factor"),
    "data.shuffle": ("shuffle",),
    "model.num_layers": (
        *("n_layer", "n_layers", "num_hidden_layers", "layers", "depth", "num_blocks"),
    ),
    "model.num_heads": ("n_head", "n_heads", "num_attention_heads", "heads"),
    "model.num_kv_heads": ("n_kv_heads", "n_kv_head", "num_key_value_heads", "n_query_groups"),
    "model.d_model": (
        *("n_embd", "hidden_size", "dim", "emb_dim", "embed_dim", "model_dim", "width"),
    ),
    "model.d_ff": ("intermediate_size", "ffn_dim", "hidden_dim_mlp", "ffn_hidden_size", "d_mlp"),
    "model.head_dim": ("head_size",),
    "model.vocab_size": ("padded_vocab_size", "vocab", "n_vocab"),
    "model.rope_theta": ("rope_base",),
    "model.norm_eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon"),
    "model.init_std": ("initializer_range",),
    "model.activation": ("hidden_act", "activation_function"),
    "model.tie_embeddings": ("tie_word_embeddings", "weight_tying"),
    "model.sliding_window": ("sliding_window_size", "attention_window"),
    "model.experts.count": ("num_experts", "num_local_experts", "n_expert", "n_routed_experts"),
    "strategy.accelerator": ("accelerator", "device"),
    "strategy.tensor_parallel": (
        *("tensor_parallel_degree", "tp", "tp_size", "tp_degree", "tensor_parallel_size"),
        *("tensor_model_parallel_size",),
    ),
    "strategy.context_parallel": (
        *("context_parallel_degree", "cp", "cp_size", "cp_degree", "context_parallel_size"),
    ),
    "strategy.expert_parallel": (
        *("expert_parallel_degree", "ep", "ep_size", "ep_degree", "expert_parallel_size"),
        *("expert_model_parallel_size",),
    ),
    "strategy.timeout": ("ddp_timeout", "train_timeout_seconds", "dist_timeout"),
    "strategy.activation_checkpointing": ("activation_checkpoint.mode",),
    "deterministic": ("full_determinism",),
    "compile": ("torch_compile", "compile_model", "use_compile", "compile.enable"),
    "name": ("run_name", "exp_name", "experiment_name", "wandb_run_name", "wandb.name", "run_id"),
    # Of verbs that write a folder of their own; else the next one.
    "output": ("output_dir", "out_dir", "output_path", "output_prefix", "out", "destination"),
    "runs_dir": (
        *("out_dir", "output_dir", "default_root_dir", "save_dir", "log_dir", "logdir"),
        *("dump_folder", "logging_dir", "save_folder"),
    ),
    "init.run": ("initial_checkpoint_dir", "pretrained", "initial_load_path", "init_from_ckpt"),
    # of other verbs
    "run": (
        *("runs", "checkpoint_dir", "ckpt", "ckpt_path", "checkpoint_path", "checkpoint"),
        *("model_path", "model_name_or_path", "model", "name"),
    ),
    "prompt": ("text", "input_text", "start", "prompts"),
    "text": ("prompt", "input_text"),
    "max_tokens": ("max_new_tokens", "num_tokens_to_generate", "max_length", "n_predict"),
    "samples": ("num_samples", "num_return_sequences"),
    "stop": ("stop_strings", "stop_sequences", "stop_words"),
    "sampling.temperature": ("temperature", "temp"),
    "sampling.top_k": ("top_k",),
    "sampling.top_p": ("top_p",),
    "sampling.min_p": ("min_p",),
    "sampling.repetition_penalty": ("repetition_penalty", "repeat_penalty"),
    "sampling.seed": ("seed",),
    "task.num_fewshot": ("num_fewshot", "n_shot", "fewshot"),
    "task.limit": ("limit",),
    "sequences": ("max_eval_samples", "num_eval_samples"),
    "sources": ("input", "inputs", "files", "corpus_path", "train_file", "data_files"),
    "valid_fraction": ("val_split_fraction", "validation_split", "val_fraction", "test_size"),
    "text_column": ("text_field", "text_key", "dataset_text_field", "column", "json_keys"),
    "tokenizer.path": (
        *("tokenizer_path", "tokenizer_dir", "tokenizer_name", "tokenizer_name_or_path"),
    ),
}
"""A key here, and the names that others give to it, without their sections.

A name with a section is another tool's key as a whole, where the last part says too little.
"""

CHOICES: dict[str, tuple[str, ...]] = {
    "log": ("logger", "loggers", "report_to", "logger_name"),
    "schedule": ("lr_scheduler_type", "scheduler", "lr_schedule", "decay_type", "lr_decay_style"),
    "optimizer": ("optim", "optimizer_name", "optimizer_type"),
    "model": ("model_name", "flavor", "config_name", "model_config", "model_size", "model.name"),
    "strategy": ("distributed_strategy", "parallel_strategy"),
}
"""A group here, and the names that others give to the choice."""

_LAUNCH = (
    "add launch=local num_processes={value}, or start the processes with torchrun"
    " --nproc-per-node {value} -m modtrain train …"
)
_NONE = "leave it out: the models have none"
SENTENCES: dict[str, str] = {
    **dict.fromkeys(("devices", "gpus", "num_gpus", "nproc_per_node", "num_processes"), _LAUNCH),
    **dict.fromkeys(
        ("num_nodes", "nnodes"),
        "start the processes with torchrun --nnodes {value} …, or modtrain submit … nodes={value}",
    ),
    **dict.fromkeys(
        (
            *("accumulate_grad_batches", "gradient_accumulation_steps"),
            *("gradient_accumulation_iters", "grad_accum_steps", "grad_accum"),
        ),
        "accumulation follows from the batch: write batch.tokens=N, the tokens of a step over all"
        " devices",
    ),
    **dict.fromkeys(
        ("global_batch_size", "total_batch_size", "effective_batch_size"),
        "batches are counted in tokens: write batch.tokens=N, {value} times the sequence length",
    ),
    **dict.fromkeys(
        ("resume_from_checkpoint", "ckpt_path", "resume_from", "init_from", "load_step"),
        "the same name resumes the run; the weights of another run: init.run=NAME init.step=N",
    ),
    **dict.fromkeys(
        ("gradient_checkpointing", "use_gradient_checkpointing", "recompute"),
        "write strategy.activation_checkpointing=full",
    ),
    **dict.fromkeys(
        (
            *("limit_val_batches", "eval_iters", "eval_batches", "eval_max_batches", "val_batches"),
            *("eval.max_iters", "validation.steps", "max_val_batches"),
        ),
        "held-out text is counted in sequences: write eval.sequences=N; a batch has eval.batch_size"
        " of them",
    ),
    **dict.fromkeys(
        ("limit_train_batches", "fast_dev_run", "overfit_batches"),
        "for a short run write budget.steps=N",
    ),
    **dict.fromkeys(
        ("min_lr", "final_lr", "end_lr", "eta_min"),
        "the last rate is a share of the highest: write schedule.final=0.1",
    ),
    **dict.fromkeys(
        ("lr_decay_iters", "lr_decay_steps", "decay_steps", "t_max"),
        "leave it out: the schedule has exactly the run's steps; schedule=wsd decays over the last"
        " schedule.decay=0.2",
    ),
    **dict.fromkeys(("dropout", "attention_dropout", "resid_dropout", "hidden_dropout"), _NONE),
    **dict.fromkeys(("label_smoothing", "label_smoothing_factor"), _NONE),
    **dict.fromkeys(
        ("tokenizer_dir", "tokenizer_path", "tokenizer_name", "tokenizer", "tokenizer.path"),
        "prepared data have their tokenizer: it is chosen by modtrain prepare tokenizer.path=…",
    ),
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id", "save_safetensors"),
        "a run becomes a Hugging Face folder by modtrain export",
    ),
    **dict.fromkeys(
        ("eval_only", "validate_only", "do_predict"),
        "held-out losses of a run: modtrain eval run=…",
    ),
    **dict.fromkeys(
        ("pipeline_parallel_degree", "pp", "pp_size", "pipeline_model_parallel_size"),
        "pipeline parallelism is not offered: strategy=fsdp shards the parameters, strategy=fsdp_tp"
        " each matrix as well",
    ),
    **dict.fromkeys(
        ("data_parallel_shard_degree", "dp_shard", "fsdp_size", "data_parallel_replicate_degree"),
        "write strategy=fsdp, which shards over all processes, or strategy=hsdp, which shards over"
        " strategy.shard_size of them",
    ),
    **dict.fromkeys(("enable_wandb", "use_wandb", "wandb_log", "wandb"), "write log=wandb"),
    **dict.fromkeys(("use_tensorboard",), "write log=tensorboard"),
    "do_train": "leave it out: modtrain train trains",
    "disable_tqdm": "write log.progress=false",
    **dict.fromkeys(
        ("eval_strategy", "evaluation_strategy", "do_eval", "check_val_every_n_epoch"),
        "held-out losses come with every run: set eval.every, or run modtrain eval",
    ),
    **dict.fromkeys(
        ("save_strategy", "enable_checkpointing", "always_save_checkpoint", "enable_checkpoint"),
        "a run always saves: set checkpoint.every, in steps",
    ),
    "logging_strategy": "a run always records: set log.every, in steps",
    **dict.fromkeys(
        ("overwrite_output_dir", "overwrite"), "give another name, or remove the run's directory"
    ),
    **dict.fromkeys(
        ("fsdp_config", "deepspeed_config", "deepspeed"),
        "write strategy=fsdp or strategy=deepspeed_2: what can be set is in its section",
    ),
    "fsdp": "write strategy=fsdp",
    **dict.fromkeys(
        ("callbacks", "plugins", "profiler"),
        "leave it out: a run has its own; docs/how-to/add-a-callback.md adds one",
    ),
    "num_sanity_val_steps": "leave it out: a run checks its data before the first step",
    "bf16": "write precision=bf16",
    "fp16": "fp16 is not offered: write precision=bf16",
    **dict.fromkeys(("dtype", "torch_dtype", "mixed_precision"), "write precision=bf16 or fp32"),
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
    "model.activation": dict.fromkeys(("silu", "swish"), "swiglu"),
    "strategy.accelerator": dict.fromkeys(("gpu", "nvidia"), "cuda"),
    "schedule": {"cosine_with_min_lr": "cosine", "constant_with_warmup": "constant"},
}
"""Values of a key or group here, as others write them."""
_ACTIONS = ("list", "verify", "prune", "consolidate")


def key_here(key: str, known: Collection[str], groups: Collection[str]) -> str | None:
    """Return the key or group that other tools call ``key``; None where it is not known.

    known: the keys of this configuration. groups: those that have choices.
    """
    key = key.replace("-", "_")
    section, _, name = key.rpartition(".")
    if whole := _target(key, known, KEYS):
        return whole
    if section and section not in _SECTIONS:
        return None
    return (
        _target(key, groups, CHOICES)
        or _target(name, known, KEYS)
        or _target(name, groups, CHOICES)
    )


def sentence_for(key: str, value: str, known: Collection[str]) -> str | None:
    """Return what to do in place of another tool's ``key=value`` that has no key here."""
    key = key.replace("-", "_")
    section, _, name = key.rpartition(".")
    name = key if key in SENTENCES else name
    if key in _ACTIONS and "action" in known:
        return f"write action={key}"
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
