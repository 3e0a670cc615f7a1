"""`modtrain config VERB …`: the configuration that a command line composes."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import OmegaConf

from modtrain.cli.compose import SCHEMAS, compose
from modtrain.cli.compose_verbs import as_composed
from modtrain.common.errors import ConfigError, Problem


def composed_yaml(words: Sequence[str], config_dir: str | None) -> str:
    """Return the configuration of a verb, the first of ``words``, under the others, as YAML.

    Raises:
        ConfigError: there is no such verb, or an override does not fit.
    """
    verb, *overrides = words or [""]
    if verb not in SCHEMAS:
        remedy = f"write modtrain config VERB …, VERB one of {', '.join(SCHEMAS)}"
        raise ConfigError([Problem("config", verb, "has no verb with a configuration", remedy)])
    typed = compose(verb, as_composed(verb, overrides), config_dir)
    return OmegaConf.to_yaml(OmegaConf.structured(typed)).rstrip()
