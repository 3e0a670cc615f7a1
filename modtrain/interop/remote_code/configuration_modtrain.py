"""Configuration of Mixture-of-Depths language models (arXiv 2404.02258)."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


class ModtrainConfig(PreTrainedConfig):
    """A pre-norm decoder in which routers decide, token by token, who enters a layer.

    Unlisted fields are those of Llama.

    layer_capacities: by layer, the share of the tokens that its routers were trained to take; None
        for a layer that every token enters.
    routed_part: what a routed layer routes: the ``block``, its ``attention`` (or convolution), its
        ``mlp``, or ``both``, each with a router of its own.
    keep_kv: routed attention has keys and values of all tokens, and queries of those that enter.
    router_score: a router's score of a token: ``linear``, ``mlp``; ``none`` if only a predictor
        decides; the controls ``random`` and ``fixed`` decide by the token's position.
    router_hidden_size, predictor_hidden_size: hidden width of an ``mlp`` score, of a predictor.
    router_input_norm: a linear score's input is first scaled to root mean square 1.
    decisions: the causal decisions that were trained. ``predictor``: a small MLP's logit is
        positive. ``auxiliary``: the score is. ``threshold``: the score is above a running quantile.
        ``position``: of ``random`` and ``fixed`` scores.
    decision: the one to use; None: the first.
    gate: what a token's update is multiplied by: the ``raw`` score, its ``sigmoid`` or ``tanh``, or
        ``none`` for 1; then ``gate_multiplier`` times it plus ``gate_offset``; with ``gate_scale``
        times a learned scalar.
    attention_bias: queries, keys and values have biases; the output has none.
    layer_mixers: by layer, ``attention`` or ``convolution``.
    conv_width: tokens under a convolution, the token itself included.
    gated_mlp: SwiGLU; else two matrices and a GELU.
    layer_experts: by layer, whether its MLP is a mixture of experts.
    num_experts, num_noop_experts, num_shared_experts: that compute, that do nothing, that see every
        token.
    expert_choice: ``token``: a token chooses its experts; ``expert``: an expert takes the tokens
        above a running quantile.
    expert_bias: a bias is added for the choice, not for the weights.
    """

    model_type = "modtrain"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 1408
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    head_dim: int = 64
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    sliding_window: int | None = None
    qk_norm: bool = False
    attention_bias: bool = False
    gated_mlp: bool = True
    layer_mixers: list[str] | None = None
    conv_width: int = 4
    layer_capacities: list[float | None] | None = None
    routed_part: str = "block"
    keep_kv: bool = False
    router_score: str = "linear"
    router_hidden_size: int = 64
    router_input_norm: bool = False
    decisions: list[str] | None = None
    decision: str | None = None
    predictor_hidden_size: int = 64
    gate: str = "raw"
    gate_multiplier: float = 1.0
    gate_offset: float = 0.0
    gate_scale: bool = False
    layer_experts: list[bool] | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 2
    num_noop_experts: int = 0
    num_shared_experts: int = 0
    moe_intermediate_size: int = 0
    expert_choice: str = "token"
    expert_bias: bool = False

    def __init__(self, **kwargs: Any) -> None:
        """Take the fields above, and those of every configuration.

        Raises:
            ValueError: the model was not trained with the ``decision``.
        """
        own = {
            name: kwargs.pop(name, getattr(ModtrainConfig, name))
            for name in ModtrainConfig.__annotations__
        }
        super().__init__(**kwargs)
        for name, value in own.items():
            setattr(self, name, value)
        layers = self.num_hidden_layers
        self.layer_mixers = self.layer_mixers or ["attention"] * layers
        self.layer_capacities = self.layer_capacities or [None] * layers
        self.layer_experts = self.layer_experts or [False] * layers
        self.rope_parameters = self.rope_parameters or {
            "rope_type": "default",
            "rope_theta": 10000.0,
        }
        self.decisions = self.decisions or ["predictor"]
        self.decision = self.decision or self.decisions[0]
        if self.decision not in self.decisions:
            raise ValueError(f"decision={self.decision}: the model has {self.decisions}")
