"""Corpora that others have tokenised: Megatron, nanoGPT, OLMo, MosaicML and LitData."""
