"""What does routing save when text is made? Decoding and prompts, MoD against dense.

    python -m benchmarks.decode

Both models have the same shape; every other block of the second takes 12.5 % of the tokens. It is
trained for some steps on text of a Markov chain, so that its thresholds are those of its capacity,
and then continues such text by its own draws at temperature 1. Cached, in float32.

``speedup_b1``, ``speedup_b8``: tokens a second of MoD over dense behind a long prompt, with one and
with eight sequences in the batch; ``speedup_b8_short``: behind a short one, where a step mostly
reads weights, once for all eight, and one sequence that takes part is enough to read them.
``cache_ratio``: memory of MoD's cache over dense's, eight sequences, long. ``eta_prefill``:
(T_dense / T_MoD) / (F_dense / F_MoD) for a prompt, F the executed FLOPs. ``over_hf``: tokens a
second of the dense model's `Decoder` over those of Hugging Face's ``generate``, the same weights
in a Llama, greedy, prompt included; both come to the same tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks._harness import (
    HEAD_WIDTH,
    check_width,
    finish,
    fix_threads,
    interleave,
    print_times,
    ratio,
)
from benchmarks._llama import as_llama
from modtrain.inference.config import SamplingConfig
from modtrain.inference.generate.decoder import Decoder, DecoderConfig, Token
from modtrain.inference.generate.sampling import PerSequenceRNG, distribution, draw
from modtrain.models.cache.cache import Cache
from modtrain.models.config import ModelConfig
from modtrain.models.depth.config import RouterConfig
from modtrain.models.flops import Load, realised_flops
from modtrain.models.transformer import Transformer
from modtrain.optimizers.config import OptimizerConfig
from modtrain.optimizers.registry import build_optimizer

CAPACITY = 0.125


def main() -> None:
    """Measure, print the times, and the result as JSON on the last line."""
    options = _options()
    fix_threads(options.threads)
    text = _MarkovText(options.vocab)
    models = {
        "dense": Transformer(_config(options, "dense")).eval(),
        "mod": _trained(Transformer(_config(options, "every_other")), text, options),
    }
    result: dict[str, float] = {}
    for name, batch, length in (
        ("speedup_b1", 1, options.prompt),
        ("speedup_b8", 8, options.prompt),
        ("speedup_b8_short", 8, options.short_prompt),
    ):
        prompts_BS = text.draw(batch, length, seed=batch)
        sides = {side: _Decoding(model, prompts_BS) for side, model in models.items()}
        calls = {side: partial(decoding.run, options.tokens) for side, decoding in sides.items()}
        seconds = interleave(calls, options.rounds, warmup=1)
        print_times(f"{options.tokens} tokens behind {length:,}, {batch} at once", seconds)
        print(f"  took part: {sides['mod'].shares()}")
        result[name] = ratio(seconds["dense"], seconds["mod"])
        if name == "speedup_b8":
            cache_bytes = {
                side: decoding.cache.allocated_bytes() for side, decoding in sides.items()
            }
            result["cache_ratio"] = cache_bytes["mod"] / cache_bytes["dense"]
    result |= _prefill(models, text.draw(1, options.middle_prompt, seed=3), options)
    short_BS = text.draw(1, options.short_prompt, seed=4)
    result["over_hf"] = _over_hf(models["dense"], short_BS, options)
    finish("decode", result)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--d-model", type=int, default=512, help=f"a multiple of {HEAD_WIDTH}")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--prompt", type=int, default=4096, help="tokens of a long prompt")
    parser.add_argument("--middle-prompt", type=int, default=1024, help="of the one for prefill")
    parser.add_argument("--short-prompt", type=int, default=256, help="of a short one")
    parser.add_argument("--tokens", type=int, default=32, help="tokens made of each")
    parser.add_argument("--train-steps", type=int, default=40, help="of 4 x 256 tokens")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    check_width(parser, options.d_model)
    numbers = vars(options).values()
    if min(numbers) < 1 or options.tokens < 2:
        parser.error("every number must be at least 1, --tokens 2")
    return options


def _config(options: argparse.Namespace, pattern: str) -> ModelConfig:
    return ModelConfig(
        d_model=options.d_model,
        num_layers=options.layers,
        num_heads=options.d_model // HEAD_WIDTH,
        vocab_size=options.vocab,
        pattern=pattern,
        capacity=CAPACITY,
        router=RouterConfig(causal=["threshold"], threshold_decay=0.9),
    )


class _MarkovText:
    """Text in which each token is followed by one of eight, some of them rare."""

    def __init__(self, vocab: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._next_VC = torch.randint(vocab, (vocab, 8), generator=generator)
        self._chance_C = torch.arange(1, 9, dtype=torch.float64).reciprocal()

    def draw(self, sequences: int, length: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        token_B = torch.randint(len(self._next_VC), (sequences,), generator=generator)
        tokens = []
        for _ in range(length):
            tokens.append(token_B)
            choice_B = torch.multinomial(
                self._chance_C, sequences, replacement=True, generator=generator
            )
            token_B = self._next_VC[token_B, choice_B]
        return torch.stack(tokens, dim=1)


def _trained(model: Transformer, text: _MarkovText, options: argparse.Namespace) -> Transformer:
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-3))
    loss = 0.0
    for step in range(options.train_steps):
        tokens_BT = text.draw(4, 257, seed=1000 + step)
        output = model(tokens_BT[:, :-1], tokens_BT[:, 1:])
        if output.loss is None:
            raise ValueError("there are no targets")
        optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        optimizer.step()
        model.update_running_stats(model.batch_stats(output))
        loss = output.loss.item()
    print(f"trained for {options.train_steps} steps, to a loss of {loss:.2f}")
    return model.eval()


class _Decoding:
    """Sequences that continue their prompts, and can return to them."""

    def __init__(self, model: Transformer, prompts_BS: Tensor) -> None:
        batch, self.length = prompts_BS.shape
        self.model, self.cache = model, Cache(model.config, batch)
        self.chosen_R, self.tokens = [0] * len(model.routers), 0
        for part_BS in torch.split(prompts_BS[:, :-1], 512, dim=1):
            model.extend(part_BS, self.cache, last_only=True)
        self.last_B1 = prompts_BS[:, -1:]

    @torch.inference_mode()
    def run(self, tokens: int) -> float:
        """Make so many tokens of each sequence. Returns the seconds."""
        batch = len(self.last_B1)
        rng, token_B1 = PerSequenceRNG(1, batch), self.last_B1
        start = time.perf_counter()
        for _ in range(tokens):
            output = self.model.extend(token_B1, self.cache, last_only=True)
            chance_BV = distribution(output.require_logits()[:, -1], SamplingConfig())
            token_B1 = draw(chance_BV, rng.uniform(range(batch))).unsqueeze(1)
            for place, record in enumerate(output.routing):
                self.chosen_R[place] += int(record.chosen_BS.sum())
            self.tokens += batch
        seconds = time.perf_counter() - start
        self.cache.truncate([self.length - 1] * batch)
        return seconds

    def shares(self) -> str:
        """What took part, by router."""
        return ", ".join(f"{count / self.tokens:.1%}" for count in self.chosen_R)


def _prefill(
    models: dict[str, Transformer], tokens_BS: Tensor, options: argparse.Namespace
) -> dict[str, float]:
    flops = {}
    calls: dict[str, Callable[[], None]] = {}
    for name, model in models.items():

        def run(model: Transformer = model) -> None:
            model.extend(tokens_BS, Cache(model.config, 1), last_only=True)

        calls[name] = run
        routing = iter(model.extend(tokens_BS, Cache(model.config, 1)).routing)
        length = tokens_BS.shape[1]
        loads = []
        for capacity in model.config.capacities:
            count = length if capacity is None else int(next(routing).chosen_BS.sum())
            loads.append(Load(count, count * count, count))
        selection = model.config.causal_selections[0]
        cost = realised_flops(model.config, length, loads, selection)
        # The head is computed for the last token alone.
        flops[name] = cost.total - cost.head * (1 - 1 / length)
    seconds = interleave(calls, options.rounds)
    print_times(f"a prompt of {options.middle_prompt} tokens", seconds)
    saved = flops["dense"] / flops["mod"]
    return {
        "flops_ratio_prefill": saved,
        "eta_prefill": ratio(seconds["dense"], seconds["mod"]) / saved,
    }


def _over_hf(model: Transformer, tokens_BS: Tensor, options: argparse.Namespace) -> float:
    llama = as_llama(model, options.short_prompt + options.tokens)
    config = DecoderConfig("causal", options.tokens, SamplingConfig(greedy=True))
    made: dict[str, list[int]] = {}

    def ours() -> None:
        decoder = Decoder(model, config, tokens_BS.tolist())
        made["ours"] = [event.id for event in decoder.run() if isinstance(event, Token)]

    def theirs() -> None:
        generated = llama.generate(
            tokens_BS,
            attention_mask=torch.ones_like(tokens_BS),
            max_new_tokens=options.tokens,
            do_sample=False,
            pad_token_id=0,
        )
        made["theirs"] = generated[0, tokens_BS.shape[1] :].tolist()

    seconds = interleave({"Hugging Face": theirs, "ours": ours}, options.rounds, warmup=1)
    print_times(f"{options.tokens} tokens and a prompt of {options.short_prompt}, dense", seconds)
    if made["ours"] != made["theirs"]:
        raise RuntimeError(f"the tokens differ: {made}")
    return ratio(seconds["Hugging Face"], seconds["ours"])


if __name__ == "__main__":
    main()
